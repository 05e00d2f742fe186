"""Transformers' own quantised caches as baselines: the decoded context and the bytes that it takes.

The context is written to a QuantizedCache as a prefill would write it, and read back. Bytes are those of all tensors of
the layers: packed values, scales, shifts. While generating, QuantizedCache keeps the newest tokens exact and quantises
again from time to time; a stored context is quantised once, as here. hqq packs several rows into a byte and fails on a
remainder, so its context is padded with the last token, and the padding counts.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
import transformers.cache_utils
from torch import Tensor
from transformers import QuantizedCache

GROUP_SIZES = (64, 32, 16)
BACKENDS = {
    "quanto-4": ("quanto", 4, 0),
    "quanto-2": ("quanto", 2, 0),
    "hqq-8": ("hqq", 8, 1),
    "hqq-4": ("hqq", 4, 1),
    "hqq-2": ("hqq", 2, 1),
    "fp8": ("fp8", 8, 0),
}
"""Codec to (backend, bits, axis): the axes of Transformers' documentation."""
HQQ_TOKENS = 4
"""Common multiple of the numbers of rows that hqq packs into one byte (1, 2, 4)."""
_NEEDS = {"quanto": "optimum.quanto", "hqq": "hqq.core.quantize"}


def missing(codec: str) -> str | None:
    """Return the reason why a codec cannot be used here, None where it can."""
    backend = BACKENDS[codec][0]
    if backend == "fp8":
        return None if hasattr(transformers.cache_utils, "Fp8QuantizedLayer") else "this transformers has no fp8 cache"
    module = _NEEDS[backend]
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        found = False
    return None if found else f"{module.split('.')[0]} is not installed"


def quantise(codec: str, config: Any, keys: Sequence[Tensor], values: Sequence[Tensor]) -> QuantizedCache:
    """Return a QuantizedCache of keys and values, per layer [1, heads, tokens, head_dim]."""
    backend, bits, axis = BACKENDS[codec]
    # Groups run over the flattened tensor; a size must divide every layer's.
    numbers = {x.numel() // x.shape[-2] for x in (*keys, *values)}
    group = next((size for size in GROUP_SIZES if all(n % size == 0 for n in numbers)), None)
    options = {} if backend == "fp8" else {"nbits": bits, "axis_key": axis, "axis_value": axis, "q_group_size": group}
    cache = QuantizedCache(backend, config, **options)
    surplus = -keys[0].shape[2] % HQQ_TOKENS if backend == "hqq" else 0
    for index, (k, v) in enumerate(zip(keys, values, strict=True)):
        cache.update(*(torch.cat([x, x[:, :, -1:].expand(-1, -1, surplus, -1)], 2) for x in (k, v)), index)
    return cache


def dequantise(cache: QuantizedCache, tokens: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return (keys, values) of the first `tokens` tokens as attention reads them."""
    keys = [layer._dequantize(layer._quantized_keys)[:, :, :tokens] for layer in cache.layers]
    values = [layer._dequantize(layer._quantized_values)[:, :, :tokens] for layer in cache.layers]
    return keys, values


def nbytes(cache: QuantizedCache) -> int:
    """Return the bytes of everything that is stored."""
    return sum(_held([layer._quantized_keys, layer._quantized_values]) for layer in cache.layers)


def _held(found: Any) -> int:
    if isinstance(found, dict):
        return sum(map(_held, found.values()))
    if isinstance(found, list | tuple) and not isinstance(found, torch.Size):
        return sum(map(_held, found))
    if not isinstance(found, Tensor):
        return 0
    if type(found) is Tensor or not hasattr(found, "__tensor_flatten__"):
        return found.untyped_storage().nbytes()
    return sum(_held(getattr(found, name)) for name in found.__tensor_flatten__()[0])
