"""Transformers caches <-> plain keys and values.

`capture` returns the tensors of a filled cache. `build_dynamic` and `build_static` make a fresh stock cache for ONE
generation, because generating changes its cache. Built layers are views of the captured tensors: stock layers grow by
concatenation and never write into them. The captured tensors hold every token, also of sliding layers, so that a cache
can be cut to any prefix. A built sliding layer keeps the last window - 1 tokens and its cumulative length, like the
stock one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from hf_cachegen.codec.geometry import Geometry, LayerGeometry, LayerKind
from hf_cachegen.errors import TensorError
from hf_cachegen.models.kinds import require_captured
from hf_cachegen.models.prefix import Reuse
from hf_cachegen.models.requirements import layer_kinds

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class KVTensors:
    """All keys and values of a context.

    Attributes:
        keys: for each layer [1, heads, tokens, k_dim], in the dtype of the geometry.
        values: for each layer [1, v_heads, tokens, v_dim], in the dtype of the geometry.
        geometry: the shapes and the dtype.

    Raises:
        TensorError: the tensors contradict the geometry.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    geometry: Geometry

    def __post_init__(self) -> None:
        geometry = self.geometry
        if not len(self.keys) == len(self.values) == len(geometry.layers):
            raise TensorError(
                f"expected the tensors of {len(geometry.layers)} layers, got {len(self.keys)} keys and "
                f"{len(self.values)} values"
            )
        for index, (layer, keys, values) in enumerate(zip(geometry.layers, self.keys, self.values, strict=True)):
            rows = (geometry.batch, geometry.tokens)
            _require(index, "keys", keys, (rows[0], layer.heads, rows[1], layer.k_dim), geometry.dtype)
            _require(index, "values", values, (rows[0], layer.v_heads, rows[1], layer.v_dim), geometry.dtype)

    def to(self, devices: Sequence[torch.device]) -> KVTensors:
        """Return the tensors with layer i on devices[i]; a layer that is there already is not copied."""
        keys = tuple(tensor.to(device) for tensor, device in zip(self.keys, devices, strict=True))
        values = tuple(tensor.to(device) for tensor, device in zip(self.values, devices, strict=True))
        return KVTensors(keys, values, self.geometry)

    def clone(self) -> KVTensors:
        """Return a copy in memory of its own."""
        keys = tuple(tensor.detach().clone() for tensor in self.keys)
        return KVTensors(keys, tuple(tensor.detach().clone() for tensor in self.values), self.geometry)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without its module: torch.bfloat16 -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def capture(cache: Cache, config: PreTrainedConfig) -> KVTensors:
    """Return the keys and values of all tokens in a filled cache of one row.

    Args:
        cache: the cache that the model filled.
        config: the configuration of the model.

    Returns:
        Views of the cache's tensors, not copies.

    Raises:
        UnsupportedLayerError: a layer is of another kind.
        TensorError: the cache is empty, has several rows or layers of different length, or its sliding layers have
            dropped tokens already.
    """
    kinds = layer_kinds(config)
    layers = getattr(cache, "layers", [])
    if len(layers) != len(kinds):
        raise TensorError(f"expected a cache of {len(kinds)} layers, this {type(cache).__name__} has {len(layers)}")
    pairs = [_all_tokens(index, layer) for index, layer in enumerate(layers)]
    first = pairs[0][0]
    if first.shape[0] != 1:
        raise TensorError(
            f"expected a cache of one row, got {first.shape[0]} rows: keep one row of each layer's tensors"
        )
    geometry = Geometry(
        layers=tuple(_geometry(kind, window, *pair) for (kind, window), pair in zip(kinds, pairs, strict=True)),
        tokens=int(first.shape[2]),
        batch=1,
        dtype=dtype_name(first.dtype),
    )
    return KVTensors(tuple(keys for keys, _ in pairs), tuple(values for _, values in pairs), geometry)


def build_dynamic(kv: KVTensors, reuse: Reuse, repeats: int, devices: Sequence[torch.device]) -> DynamicCache:
    """Build a stock DynamicCache that holds the first `reuse.length` positions of a batch of prompts.

    Row r holds zeros up to position reuse.pads[r], which the attention mask hides, and the context from there on.

    Args:
        kv: the keys and values of the context.
        reuse: the part of the context to use, and the padding of each row.
        repeats: how often each row is repeated (beams, or returned sequences).
        devices: the device of each layer.

    Returns:
        A cache of len(reuse.pads) * repeats rows.
    """
    cache = DynamicCache()
    # Without a config the stock cache would append full layers on demand; the layers below are all.
    cache.layer_class_to_replicate = None
    for layer, keys, values, device in zip(kv.geometry.layers, kv.keys, kv.values, devices, strict=True):
        stock = DynamicLayer() if layer.window is None else DynamicSlidingWindowLayer(sliding_window=layer.window)
        first = 0 if layer.window is None else max(0, reuse.length - (layer.window - 1))
        rows = _padded_rows(keys, first, reuse, repeats, device), _padded_rows(values, first, reuse, repeats, device)
        stock.lazy_initialization(*rows)
        stock.keys, stock.values = rows
        if layer.window is not None:
            stock.cumulative_length = reuse.length
        cache.layers.append(stock)
    return cache


def build_static(
    kv: KVTensors, reuse: Reuse, repeats: int, devices: Sequence[torch.device], config: PreTrainedConfig, length: int
) -> StaticCache:
    """Build a StaticCache with room for `length` tokens. The other arguments are those of `build_dynamic`."""
    cache = StaticCache(config=config, max_cache_len=length)
    for stock, keys, values, device in zip(cache.layers, kv.keys, kv.values, devices, strict=True):
        stock.update(_padded_rows(keys, 0, reuse, repeats, device), _padded_rows(values, 0, reuse, repeats, device))
    return cache


def _all_tokens(index: int, layer: Any) -> tuple[Tensor, Tensor]:
    require_captured(index, layer)
    tokens = int(layer.get_seq_length())
    if tokens == 0:
        raise TensorError(f"layer {index} of the cache is empty")
    held = int(layer.keys.shape[2])
    if held < tokens:
        raise TensorError(
            f"layer {index}: expected {tokens} tokens, it keeps {held}, because its sliding window dropped the others; "
            "prefill with transformers.DynamicCache() without a config, or use CacheGenCache.from_context"
        )
    return layer.keys[:, :, :tokens], layer.values[:, :, :tokens]


def _geometry(kind: LayerKind, window: int | None, keys: Tensor, values: Tensor) -> LayerGeometry:
    return LayerGeometry(kind, keys.shape[1], keys.shape[3], values.shape[1], values.shape[3], window)


def _require(index: int, name: str, tensor: Tensor, shape: tuple[int, ...], dtype: str) -> None:
    if tuple(tensor.shape) != shape or dtype_name(tensor.dtype) != dtype:
        raise TensorError(
            f"layer {index}: expected {name} {list(shape)} {dtype}, got {list(tensor.shape)} {dtype_name(tensor.dtype)}"
        )


def _padded_rows(tensor: Tensor, first: int, reuse: Reuse, repeats: int, device: torch.device) -> Tensor:
    """Lay a layer [1, heads, tokens, dim] out in the positions of the prompts, from position `first` on.

    Returns:
        [rows * repeats, heads, reuse.length - first, dim]; a view where no row is padded.
    """
    tensor = tensor.to(device)
    if not any(reuse.pads):
        return tensor[:, :, first : reuse.length].expand(len(reuse.pads) * repeats, -1, -1, -1)
    _, heads, _, dim = tensor.shape
    rows = tensor.new_zeros(len(reuse.pads), heads, reuse.length - first, dim)
    for row, pads in enumerate(reuse.pads):
        start = max(first, pads)
        rows[row, :, start - first :] = tensor[0, :, start - pads : max(0, reuse.length - pads)]
    return rows if repeats == 1 else rows.repeat_interleave(repeats, dim=0)
