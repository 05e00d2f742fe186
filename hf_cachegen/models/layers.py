"""Transformers caches <-> plain keys and values.

`capture` takes a filled cache apart. `build_dynamic` and `build_static` make a fresh stock cache for ONE generation,
because generating changes the cache it is given. Built layers are views of the captured tensors: stock layers grow by
concatenation and never write into them. The captured tensors hold every token, also of sliding layers, so that a cache
can be cut to any prefix. A built sliding layer keeps the last window - 1 tokens and its cumulative length, as the stock
one does.
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
    StaticLayer,
    StaticSlidingWindowLayer,
)

from hf_cachegen.codec.geometry import Geometry, LayerGeometry, LayerKind
from hf_cachegen.errors import TensorError, UnsupportedLayerError
from hf_cachegen.models.prefix import Reuse
from hf_cachegen.models.requirements import layer_kinds

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class KVTensors:
    """All keys and values of a context. For layer i: keys [1, heads, tokens, k_dim], values [1, v_heads, tokens,
    v_dim].

    Raises TensorError where the tensors contradict the geometry.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    geometry: Geometry

    def __post_init__(self) -> None:
        geometry = self.geometry
        if not len(self.keys) == len(self.values) == len(geometry.layers):
            raise TensorError(
                f"{len(self.keys)} keys and {len(self.values)} values for {len(geometry.layers)} layers of geometry"
            )
        for index, (layer, keys, values) in enumerate(zip(geometry.layers, self.keys, self.values, strict=True)):
            rows = (geometry.batch, geometry.tokens)
            _require(index, "keys", keys, (rows[0], layer.heads, rows[1], layer.k_dim), geometry.dtype)
            _require(index, "values", values, (rows[0], layer.v_heads, rows[1], layer.v_dim), geometry.dtype)

    def to(self, devices: Sequence[torch.device]) -> KVTensors:
        """Layer i on devices[i]; no copy of a layer that is there already."""
        keys = tuple(tensor.to(device) for tensor, device in zip(self.keys, devices, strict=True))
        values = tuple(tensor.to(device) for tensor, device in zip(self.values, devices, strict=True))
        return KVTensors(keys, values, self.geometry)

    def clone(self) -> KVTensors:
        """The same numbers in memory of their own."""
        keys = tuple(tensor.detach().clone() for tensor in self.keys)
        return KVTensors(keys, tuple(tensor.detach().clone() for tensor in self.values), self.geometry)


def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def capture(cache: Cache, config: PreTrainedConfig) -> KVTensors:
    """The keys and values of a filled cache of one row, all tokens of every layer; views, not copies.

    Raises UnsupportedLayerError for a layer of another kind, TensorError for a cache that is empty, has several rows or
    layers of different length, or whose sliding layers have dropped tokens already.
    """
    kinds = layer_kinds(config)
    layers = getattr(cache, "layers", [])
    if len(layers) != len(kinds):
        raise TensorError(f"the model has {len(kinds)} cache layers, this {type(cache).__name__} has {len(layers)}")
    pairs = [_all_tokens(index, layer) for index, layer in enumerate(layers)]
    first = pairs[0][0]
    if first.shape[0] != 1:
        raise TensorError(
            f"a context is one row; this cache has {first.shape[0]} (keep one row of each layer's tensors)"
        )
    geometry = Geometry(
        layers=tuple(_geometry(kind, window, *pair) for (kind, window), pair in zip(kinds, pairs, strict=True)),
        tokens=int(first.shape[2]),
        batch=1,
        dtype=dtype_name(first.dtype),
    )
    return KVTensors(tuple(keys for keys, _ in pairs), tuple(values for _, values in pairs), geometry)


def build_dynamic(kv: KVTensors, reuse: Reuse, repeats: int, devices: Sequence[torch.device]) -> DynamicCache:
    """A stock DynamicCache which holds the first `reuse.columns` columns of a batch, every row `repeats` times.

    Row r holds the context from column reuse.pads[r] on; what stands before it is zeros that the attention mask hides.
    """
    cache = DynamicCache()
    # Without a config the stock cache would append full layers as they come; these are all there is.
    cache.layer_class_to_replicate = None
    for layer, keys, values, device in zip(kv.geometry.layers, kv.keys, kv.values, devices, strict=True):
        stock = DynamicLayer() if layer.window is None else DynamicSlidingWindowLayer(sliding_window=layer.window)
        first = 0 if layer.window is None else max(0, reuse.columns - (layer.window - 1))
        rows = _columns(keys, first, reuse, repeats, device), _columns(values, first, reuse, repeats, device)
        stock.lazy_initialization(*rows)
        stock.keys, stock.values = rows
        if layer.window is not None:
            stock.cumulative_length = reuse.columns
        cache.layers.append(stock)
    return cache


def build_static(
    kv: KVTensors, reuse: Reuse, repeats: int, devices: Sequence[torch.device], config: PreTrainedConfig, length: int
) -> StaticCache:
    """Like `build_dynamic`, as a StaticCache with room for `length` tokens."""
    cache = StaticCache(config=config, max_cache_len=length)
    for stock, keys, values, device in zip(cache.layers, kv.keys, kv.values, devices, strict=True):
        stock.update(_columns(keys, 0, reuse, repeats, device), _columns(values, 0, reuse, repeats, device))
    return cache


def _all_tokens(index: int, layer: Any) -> tuple[Tensor, Tensor]:
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer):
        raise UnsupportedLayerError(f"layer {index} of the cache is a {type(layer).__name__}, which cannot be captured")
    tokens = int(layer.get_seq_length())
    if tokens == 0:
        raise TensorError(f"layer {index} of the cache is empty")
    held = int(layer.keys.shape[2])
    if held < tokens:
        raise TensorError(
            f"layer {index} has kept {held} of {tokens} tokens: its sliding window was cut, and no prefix can be "
            "rebuilt from it; prefill with a config-less transformers.DynamicCache(), or use CacheGenCache.from_context"
        )
    return layer.keys[:, :, :tokens], layer.values[:, :, :tokens]


def _geometry(kind: LayerKind, window: int | None, keys: Tensor, values: Tensor) -> LayerGeometry:
    return LayerGeometry(kind, keys.shape[1], keys.shape[3], values.shape[1], values.shape[3], window)


def _require(index: int, name: str, tensor: Tensor, shape: tuple[int, ...], dtype: str) -> None:
    if tuple(tensor.shape) != shape or dtype_name(tensor.dtype) != dtype:
        raise TensorError(
            f"layer {index}: expected {name} {list(shape)} {dtype}, got {list(tensor.shape)} {dtype_name(tensor.dtype)}"
        )


def _columns(tensor: Tensor, first: int, reuse: Reuse, repeats: int, device: torch.device) -> Tensor:
    """[1, heads, tokens, dim] -> [rows * repeats, heads, reuse.columns - first, dim]; a view where no row is padded."""
    tensor = tensor.to(device)
    if not any(reuse.pads):
        return tensor[:, :, first : reuse.columns].expand(len(reuse.pads) * repeats, -1, -1, -1)
    _, heads, _, dim = tensor.shape
    rows = tensor.new_zeros(len(reuse.pads), heads, reuse.columns - first, dim)
    for row, pads in enumerate(reuse.pads):
        start = max(first, pads)
        rows[row, :, start - first :] = tensor[0, :, start - pads : max(0, reuse.columns - pads)]
    return rows if repeats == 1 else rows.repeat_interleave(repeats, dim=0)
