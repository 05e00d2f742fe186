"""Shared by the tests of streams of predicted artifacts: what each chunk must be, and hooks into the first layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache as remember
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from hf_cachegen.cache import CacheGenCache
from hf_cachegen.models.compat import CACHE_ARGUMENT
from hf_cachegen.models.probe import PROBE_TOKENS
from hf_cachegen.streaming import Plan
from tests.streaming_support import report
from tests.tiny_models import shared


@remember
def loaded(folder: Path, level: int | None = None) -> CacheGenCache:
    return CacheGenCache.from_pretrained(folder, shared("llama"), level=level)


def sides(cache: Any) -> list[Tensor]:
    return [*cache.kv.keys, *cache.kv.values]


def close(a: Any, b: Any, where: slice = slice(None)) -> bool:
    """Report whether keys and values are equal but for roundings."""
    pairs = zip(sides(a), sides(b), strict=True)
    return all(torch.allclose(x[:, :, where], y[:, :, where], rtol=1e-4, atol=1e-4) for x, y in pairs)


def computed(cache: CacheGenCache, where: slice) -> bool:
    """Report whether these tokens are what the model computes behind the tokens before them."""
    past = DynamicCache()
    for index, (keys, values) in enumerate(zip(cache.kv.keys, cache.kv.values, strict=True)):
        if where.start:
            past.update(keys[:, :, : where.start].clone(), values[:, :, : where.start].clone(), index)
    with torch.no_grad():
        shared("llama")(input_ids=cache.input_ids[:, where], **{CACHE_ARGUMENT: past}, use_cache=True)
    pairs = zip(sides(cache), [*(x.keys for x in past.layers), *(x.values for x in past.layers)], strict=True)
    return all(torch.allclose(x[:, :, where], y[:, :, where], rtol=1e-4, atol=1e-4) for x, y in pairs)


def as_reported(cache: CacheGenCache, folder: Path, *, recomputed: bool = True) -> list[int | None]:
    """Check each chunk against a plain load of its level, or its own computation; return the levels.

    recomputed: compare recomputed chunks, where those before them have not been refined since.
    """
    for chunk in report(cache).chunks:
        where = slice(chunk.first, chunk.first + chunk.tokens)
        if chunk.level is None:
            assert not recomputed or computed(cache, where), chunk
        else:
            assert close(cache, loaded(folder, chunk.level), where), chunk
    return [chunk.level for chunk in report(cache).chunks]


@contextmanager
def entering(model: Any, action: Callable[[], Any]) -> Iterator[None]:
    """Call `action` when a pass of more tokens than a probe enters the model."""

    def hook(module: Any, given: tuple[Tensor, ...]) -> None:
        if given[0].shape[1] > PROBE_TOKENS:
            action()

    handle = model.get_input_embeddings().register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def hooks(model: Any) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


class Mixed:
    """Recompute the first two chunks, and take level 2 for the others."""

    smoothing, refines, text = 0.0, False, 2

    def plan(self, outlook: Any) -> Plan:
        return Plan(level=2, sure=2, text=min(self.text, len(outlook.missing)), why="a test", seconds=0.0)
