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
from hf_cachegen.models.indexed import index_of, joined, put_index, require_no_positions, sides_of
from hf_cachegen.models.kinds import LayerContent, layer_contents, require_captured
from hf_cachegen.models.prefix import Reuse
from hf_cachegen.models.quantised import dequantised, is_quantised
from hf_cachegen.models.recurrent import Checkpoint, put_states, states_of

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


def capture(cache: Cache, config: PreTrainedConfig, empty: Geometry | None = None) -> KVTensors:
    """Return the keys and values of all tokens in a filled cache of one row.

    Args:
        cache: the cache that the model filled.
        config: the configuration of the model.
        empty: the geometry of the context if no layer of the model holds keys and values.

    Returns:
        Views of the cache's tensors, not copies.

    Raises:
        UnsupportedLayerError: a layer is of another kind.
        TensorError: the cache is empty, has several rows or layers of different length, or its sliding layers have
            dropped tokens already.
    """
    contents = layer_contents(config)
    layers = getattr(cache, "layers", [])
    # A cache without a configuration ends with the last layer that has keys.
    if len(layers) != len(contents) and any(content.kind is not None for content in contents[len(layers) :]):
        raise TensorError(
            f"expected a cache of {len(contents)} layers, this {type(cache).__name__} has {len(layers)}"
        )
    found: list[tuple[LayerGeometry, Tensor, Tensor]] = []
    for index, (layer, content) in enumerate(zip(layers, contents, strict=False)):
        require_captured(index, layer, content)
        if content.kind is not None:
            found.append(_captured(index, layer, content))
    if not found and empty is not None:
        return KVTensors((), (), empty)
    if not found:
        raise TensorError("expected a layer with keys and values, the cache has none")
    first = found[0][1]
    if first.shape[0] != 1:
        raise TensorError(
            f"expected a cache of one row, got {first.shape[0]} rows: keep one row of each layer's tensors"
        )
    geometry = Geometry(
        layers=tuple(layer for layer, _, _ in found),
        tokens=int(first.shape[2]),
        batch=1,
        dtype=dtype_name(first.dtype),
    )
    return KVTensors(tuple(keys for _, keys, _ in found), tuple(values for _, _, values in found), geometry)


class UnmaskedSlidingLayer(DynamicSlidingWindowLayer):
    """A sliding layer that shows all its tokens to the first forward pass, and drops those outside the window then.

    The stock layer does so in a prefill. Most models mask those tokens in any case; some read them.
    """

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of tokens that the next forward pass reads, and the position of the first."""
        if self.is_initialized and self.keys.shape[2] == self.cumulative_length:
            return self.cumulative_length + query_length, 0
        found: tuple[int, int] = super().get_mask_sizes(query_length)
        return found


def build_dynamic(
    kv: KVTensors, reuse: Reuse, repeats: int, devices: Sequence[torch.device], *, masked: bool = True
) -> DynamicCache:
    """Build a stock DynamicCache that holds the first `reuse.length` positions of a batch of prompts.

    Row r holds zeros up to position reuse.pads[r], which the attention mask hides, and the context from there on.

    Args:
        kv: the keys and values of the context, of a model without states.
        reuse: the part of the context to use, and the padding of each row.
        repeats: how often each row is repeated (beams, or returned sequences).
        devices: the device of each layer.
        masked: the model masks all tokens outside its windows.

    Returns:
        A cache of len(reuse.pads) * repeats rows.
    """
    cache = DynamicCache()
    sliding = DynamicSlidingWindowLayer if masked else UnmaskedSlidingLayer
    # Without a config the stock cache would append full layers on demand; the layers below are all.
    cache.layer_class_to_replicate = None
    for layer, keys, values, device in zip(kv.geometry.layers, kv.keys, kv.values, devices, strict=True):
        stock = DynamicLayer() if layer.window is None else sliding(sliding_window=layer.window)
        _fill(stock, keys, values, reuse, repeats, device)
        cache.layers.append(stock)
    return cache


def build_by_config(
    kv: KVTensors, checkpoint: Checkpoint | None, reuse: Reuse, repeats: int, devices: Sequence[torch.device],
    config: PreTrainedConfig, room: int | None = None,
) -> Cache:  # fmt: skip
    """Build a stock cache of a model whose layers are not all plain ones (`kinds.is_plain`).

    Args:
        kv: the keys and values of the context.
        checkpoint: the states after reuse.length tokens; None for a model without states.
        reuse: the part of the context to use; with states no row is padded.
        repeats: how often each row is repeated.
        devices: the device of each layer of the model.
        config: the configuration of the model.
        room: tokens that a StaticCache has room for; None for a DynamicCache.

    Returns:
        A cache of len(reuse.pads) * repeats rows.
    """
    cache = DynamicCache(config=config) if room is None else StaticCache(config=config, max_cache_len=room)
    sides = iter(zip(kv.geometry.layers, kv.keys, kv.values, strict=True))
    contents = layer_contents(config)
    for index, (stock, content, device) in enumerate(zip(cache.layers, contents, devices, strict=True)):
        if content.kind is not None:
            layer, keys, values = next(sides)
            values, indices = sides_of(layer, values)
            if room is None:
                _fill(stock, keys, values, reuse, repeats, device)
            else:
                stock.update(*(_padded_rows(side, 0, reuse, repeats, device) for side in (keys, values)))
            if indices is not None:
                put_index(stock, _padded_rows(indices, 0, reuse, repeats, device))
        if checkpoint is not None:
            put_states(stock, states_of(checkpoint, index), len(reuse.pads) * repeats, device)
    return cache


def build_static(
    kv: KVTensors, reuse: Reuse, repeats: int, devices: Sequence[torch.device], config: PreTrainedConfig, length: int
) -> StaticCache:
    """Build a StaticCache with room for `length` tokens. The other arguments are those of `build_dynamic`."""
    cache = StaticCache(config=config, max_cache_len=length)
    for stock, keys, values, device in zip(cache.layers, kv.keys, kv.values, devices, strict=True):
        stock.update(_padded_rows(keys, 0, reuse, repeats, device), _padded_rows(values, 0, reuse, repeats, device))
    return cache


def _fill(stock: Any, keys: Tensor, values: Tensor, reuse: Reuse, repeats: int, device: torch.device) -> None:
    """Fill a fresh dynamic layer with the reused part of a context."""
    window = stock.sliding_window if isinstance(stock, DynamicSlidingWindowLayer) else None
    cut = window is not None and not isinstance(stock, UnmaskedSlidingLayer)
    first = max(0, reuse.length - (window - 1)) if window is not None and cut else 0
    rows = _padded_rows(keys, first, reuse, repeats, device), _padded_rows(values, first, reuse, repeats, device)
    stock.lazy_initialization(*rows)
    stock.keys, stock.values = rows
    if window is not None:
        stock.cumulative_length = reuse.length


def _all_tokens(index: int, layer: Any) -> tuple[Tensor, Tensor]:
    tokens = int(layer.get_seq_length())
    if tokens == 0:
        raise TensorError(f"layer {index} of the cache is empty")
    keys, values = dequantised(layer) if is_quantised(layer) else (layer.keys, layer.values)
    held = int(keys.shape[2])
    if held < tokens:
        raise TensorError(
            f"layer {index}: expected {tokens} tokens, it keeps {held}, because its sliding window dropped the others; "
            "prefill with transformers.DynamicCache() without a config, or use CacheGenCache.from_context"
        )
    return keys[:, :, :tokens], values[:, :, :tokens]


def _captured(index: int, layer: Any, content: LayerContent) -> tuple[LayerGeometry, Tensor, Tensor]:
    """Return the geometry, keys and values of a filled layer, index keys joined to the values."""
    keys, values = _all_tokens(index, layer)
    kind: LayerKind = content.kind or "full"
    indices = index_of(layer, keys.shape[2]) if content.indexed else None
    if indices is not None:
        require_no_positions(index, layer)
        kind, values = "indexed", joined(values, indices)
    dim = None if indices is None else int(indices.shape[-1])
    heads, k_dim, v_heads, v_dim = keys.shape[1], keys.shape[3], values.shape[1], values.shape[3]
    return LayerGeometry(kind, heads, k_dim, v_heads, v_dim, content.window, dim), keys, values


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
