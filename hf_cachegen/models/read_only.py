"""A filled cache layer that refuses every change, for a cache that many generations share."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor
from transformers.cache_utils import DynamicLayer

from hf_cachegen.errors import ReadOnlyCacheError


def refuse(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
    """Raise ReadOnlyCacheError."""
    raise ReadOnlyCacheError(
        "a CacheGenCache is read-only, since many generations share it, and this model was not prepared for one: call "
        "hf_cachegen.attach(model) before model.generate(..., cache=cache), or make a copy with cache.to_dynamic()"
    )


class ReadOnlyLayer(DynamicLayer):
    """A filled layer that refuses every change; the methods of the stock cache call those of its layers."""

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        super().lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    lazy_initialization = update = crop = reset = reorder_cache = offload = prefetch = refuse
    batch_repeat_interleave = batch_select_indices = refuse
