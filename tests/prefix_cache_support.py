"""What the tests of the prefix cache share: a cache with small blocks, and calls compared with the stock one."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from hf_cachegen import PrefixCache
from hf_cachegen.generation import generate
from hf_cachegen.models.compat import cache_argument
from tests.generation_support import seeded

WIDTH = 8
"""Tokens of a block."""


def disk_bytes(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # evicted meanwhile
            total += path.stat().st_size if path.is_file() else 0
    return total


def small(folder: Path | str, **options: Any) -> PrefixCache:
    """A prefix cache of short blocks that loads whatever it finds."""
    chosen: dict[str, Any] = {"block_tokens": WIDTH, "min_tokens": WIDTH, "reuse": "always", **options}
    return PrefixCache(folder, chosen.pop("max_bytes", "100MB"), **chosen)


def same_as_stock(model: Any, prefix_cache: PrefixCache, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """Generate with the prefix cache, and require what the stock call gives.

    Where two choices are equally good but for rounding, a prompt that is read in two parts may give the other one. Then
    a stock call that reads it so must agree.
    """
    expected = seeded(model.generate, ids, **copy.deepcopy(options))
    found = seeded(generate, model, ids, prefix_cache=prefix_cache, **options)
    if not torch.equal(found, expected):
        assert any(torch.equal(found, other) for other in in_two_parts(model, ids, **options))
    return found


def in_two_parts(model: Any, ids: torch.Tensor, **options: Any) -> Iterator[torch.Tensor]:
    """Yield what the stock call gives for one prompt after a pass over its first token, its first two, and so on."""
    rows = max(options.get("num_beams", 1), options.get("num_return_sequences", 1))
    others = {name: option for name, option in options.items() if name != "cache_implementation"}
    for first in range(1, ids.shape[1] if len(ids) == 1 else 0):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids[:, :first], **{cache_argument(model): cache})
        cache.batch_repeat_interleave(rows)
        yield seeded(model.generate, ids, **{cache_argument(model): cache}, **copy.deepcopy(others))
