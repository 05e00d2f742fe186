"""What the tests of the prefix cache share: a cache with small blocks, and calls compared with the stock one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from hf_cachegen import PrefixCache
from hf_cachegen.generation import generate
from tests.generation_support import seeded

WIDTH = 8
"""Tokens of a block."""


def small(folder: Path | str, **options: Any) -> PrefixCache:
    """A prefix cache of short blocks that loads whatever it finds."""
    chosen: dict[str, Any] = {"block_tokens": WIDTH, "min_tokens": WIDTH, "reuse": "always", **options}
    return PrefixCache(folder, chosen.pop("max_bytes", "100MB"), **chosen)


def same_as_stock(model: Any, prefix_cache: PrefixCache, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """Generate with the prefix cache, and require what the stock call gives."""
    expected = seeded(model.generate, ids, **copy.deepcopy(options))
    found = seeded(generate, model, ids, prefix_cache=prefix_cache, **options)
    assert torch.equal(found, expected)
    return found
