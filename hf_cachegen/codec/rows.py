"""Tensors <-> rows: keys and values per layer, [batch, heads, tokens, dim], and chunks as matrices [tokens, channels].

The channels of a row: layer 0's K, its V, layer 1's K, ..., each by batch, head, dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from hf_cachegen.codec.chunk import Channels, Span
from hf_cachegen.codec.geometry import Geometry, LayerGeometry
from hf_cachegen.codec.sinks import find_sinks
from hf_cachegen.errors import TensorError


class ContextRows:
    """A context's keys and values as rows, one chunk in memory at a time.

    keys[i] [batch, heads, tokens, k_dim] and values[i] [batch, v_heads, tokens, v_dim] of layer i: of one dtype, on any
    devices. geometry: theirs. spans: the chunks to give. whole: the context that these are some chunks of.
    """

    def __init__(
        self, keys: Sequence[Tensor], values: Sequence[Tensor], geometry: Geometry, spans: Sequence[Span],
        whole: ContextRows | None = None,
    ):  # fmt: skip
        self.keys, self.values, self.geometry, self.spans = keys, values, geometry, spans
        self.channels = Channels.of(geometry)
        self._whole = whole

    def chunks(self) -> Iterator[tuple[Tensor, Span]]:
        """(rows [tokens, channels] on layer 0's device, span) of every chunk, from the first at each call."""
        for span in self.spans:
            yield gather(self.keys, self.values, span), span

    def only(self, chunks: Sequence[int]) -> ContextRows:
        """The same context with these chunks alone; the rest still shows in `sinks` and `first_token`."""
        return ContextRows(self.keys, self.values, self.geometry, [self.spans[index] for index in chunks], self)

    @cached_property
    def sinks(self) -> Tensor:
        """Positions of the attention sinks, int64, rising, on the CPU; found when first asked for."""
        return find_sinks(self.keys) if self._whole is None else self._whole.sinks

    @property
    def first_token(self) -> Tensor:
        """The row of the context's first token, [channels], on the CPU."""
        return gather(self.keys, self.values, Span(0, 1, 1)).cpu()[0]


def spans_of(tokens: int, chunk_tokens: int) -> list[Span]:
    """The chunks of a context."""
    return [Span(first, min(chunk_tokens, tokens - first), tokens) for first in range(0, tokens, chunk_tokens)]


def geometry_of(keys: Sequence[Tensor], values: Sequence[Tensor], layers: Sequence[LayerGeometry] | None) -> Geometry:
    """The geometry of these tensors; layers: that of their layers, where they are not all of kind "full".

    Raises TensorError for tensors that do not fit together, or do not fit the layers.
    """
    if not keys or len(keys) != len(values) or (layers is not None and len(layers) != len(keys)):
        raise TensorError(
            f"{len(keys)} keys and {len(values)} values; there must be one of each per layer, and a layer"
        )
    found, first = [], keys[0]
    for index, (k, v) in enumerate(zip(keys, values, strict=True)):
        for name, x in (("keys", k), ("values", v)):
            if x.dim() != 4 or x.shape[0] != first.shape[0] or x.shape[2] != first.shape[2] or x.dtype != first.dtype:
                raise TensorError(
                    f"{name} of layer {index}: expected [{first.shape[0]}, heads, {first.shape[2]}, dim] in "
                    f"{first.dtype} as in layer 0's keys, got {list(x.shape)} in {x.dtype}"
                )
        shape = {"heads": k.shape[1], "k_dim": k.shape[3], "v_heads": v.shape[1], "v_dim": v.shape[3]}
        layer = LayerGeometry("full", **shape) if layers is None else layers[index]
        if any(getattr(layer, name) != value for name, value in shape.items()):
            raise TensorError(f"layer {index}: the tensors have {shape}, the geometry given says {layer}")
        found.append(layer)
    dtype = str(first.dtype).removeprefix("torch.")
    return Geometry(tuple(found), tokens=first.shape[2], batch=first.shape[0], dtype=dtype)


def gather(keys: Sequence[Tensor], values: Sequence[Tensor], span: Span) -> Tensor:
    """rows [tokens, channels] of a chunk, on layer 0's device."""
    device, tokens = keys[0].device, slice(span.first, span.first + span.tokens)
    pairs = (x for pair in zip(keys, values, strict=True) for x in pair)
    return torch.cat([x[:, :, tokens].permute(2, 0, 1, 3).reshape(span.tokens, -1).to(device) for x in pairs], 1)


def empty_kv(geometry: Geometry, devices: Sequence[torch.device | str | None]) -> list[Tensor]:
    """Room for a cache: layer 0's keys, its values, layer 1's keys, ..., [batch, heads, tokens, dim] each. devices: of
    each layer.
    """
    dtype, found = getattr(torch, geometry.dtype), []
    for layer, device in zip(geometry.layers, devices, strict=True):
        for heads, dim in ((layer.heads, layer.k_dim), (layer.v_heads, layer.v_dim)):
            found.append(torch.empty(geometry.batch, heads, geometry.tokens, dim, dtype=dtype, device=device))
    return found


def scatter(rows: Tensor, found: Sequence[Tensor], span: Span) -> None:
    """The inverse of `gather`: puts a chunk's rows [tokens, channels] where they belong in `empty_kv`'s tensors."""
    widths = [x.shape[0] * x.shape[1] * x.shape[3] for x in found]
    for x, channels in zip(found, rows.split(widths, 1), strict=True):
        shaped = channels.reshape(span.tokens, x.shape[0], x.shape[1], x.shape[3]).permute(1, 2, 0, 3)
        x[:, :, span.first : span.first + span.tokens] = shaped
