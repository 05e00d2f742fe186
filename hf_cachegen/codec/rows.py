"""Convert keys and values per layer, [batch, heads, tokens, dim], to chunks as matrices [tokens, channels], and back.

The channels of a row: layer 0's K, its V, layer 1's K, ..., each by batch, head, dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from hf_cachegen.codec.chunk import Channels, Span
from hf_cachegen.codec.geometry import Geometry, LayerGeometry
from hf_cachegen.codec.into import Target
from hf_cachegen.codec.predictor import Known
from hf_cachegen.codec.sinks import find_sinks
from hf_cachegen.codec.source import Source
from hf_cachegen.errors import TensorError


class ContextRows:
    """A context's keys and values as rows, one chunk in memory at a time.

    Args:
        keys: Of layer i [batch, heads, tokens, k_dim]; all of one dtype, on any devices.
        values: Of layer i [batch, v_heads, tokens, v_dim], in the dtype of the keys.
        geometry: Of these tensors.
        spans: The chunks to iterate over.
        whole: The whole context, if these are only some of its chunks.
        known: What a loader of the context computes from its tokens, if anything.
    """

    def __init__(
        self, keys: Sequence[Tensor], values: Sequence[Tensor], geometry: Geometry, spans: Sequence[Span],
        whole: ContextRows | None = None, known: Known | None = None,
    ):  # fmt: skip
        self.keys, self.values, self.geometry, self.spans = keys, values, geometry, spans
        self.channels = Channels.of(geometry)
        self.known = known
        self._whole = whole

    def chunks(self) -> Iterator[tuple[Tensor, Span]]:
        """Yield (rows [tokens, channels] on layer 0's device, span) of every chunk, from the first at each call."""
        for span in self.spans:
            yield self.chunk(span), span

    @cached_property
    def source(self) -> Source | None:
        """The tensors as the source of the compiled passes; None where these cannot read them."""
        pairs = [x for pair in zip(self.keys, self.values, strict=True) for x in pair]
        if any(x.device.type != "cpu" for x in pairs):
            return None
        return Source.of(Target.layers(pairs), self.channels.vectors)

    def chunk(self, span: Span) -> Tensor:
        """Return the rows [tokens, channels] of a chunk, on layer 0's device."""
        return gather(self.keys, self.values, span)

    def vectors(self, span: Span) -> list[Tensor]:
        """Return K and V of each layer in turn in a chunk of a batch of 1: views [tokens, heads, dim]."""
        pairs = (x for pair in zip(self.keys, self.values, strict=True) for x in pair)
        return [x[0, :, span.first : span.first + span.tokens].transpose(0, 1) for x in pairs]

    def energy(self, span: Span) -> Tensor:
        """Return the sum of the squared values of each vector in a chunk that `source` reads: float64 [vectors]."""
        if self.source is None:
            raise ValueError("no compiled code can read these tensors")
        squares = self.source.squares([span])
        return torch.zeros(2 * len(self.keys), dtype=torch.float64).index_add_(0, self.channels.vectors, squares)

    def only(self, chunks: Sequence[int]) -> ContextRows:
        """Return the same context with these chunks only. `sinks` and `first_token` still depend on the whole context.
        """
        spans = [self.spans[index] for index in chunks]
        return ContextRows(self.keys, self.values, self.geometry, spans, self, self.known)

    def of_layers(self, layers: Sequence[int]) -> ContextRows:
        """Return the same context with these layers only. `sinks` and `first_token` are those of these layers."""
        keys, values = ([tensors[index] for index in layers] for tensors in (self.keys, self.values))
        geometry = replace(self.geometry, layers=tuple(self.geometry.layers[index] for index in layers))
        return ContextRows(keys, values, geometry, self.spans)

    @cached_property
    def sinks(self) -> Tensor:
        """Positions of the attention sinks, int64, ascending, on the CPU. Computed at the first access."""
        return find_sinks(self.keys) if self._whole is None else self._whole.sinks

    @property
    def first_token(self) -> Tensor:
        """The row of the context's first token, [channels], on the CPU."""
        return gather(self.keys, self.values, Span(0, 1, 1)).cpu()[0]


def spans_of(tokens: int, chunk_tokens: int) -> list[Span]:
    """Return the chunks of a context."""
    return [Span(first, min(chunk_tokens, tokens - first), tokens) for first in range(0, tokens, chunk_tokens)]


def geometry_of(keys: Sequence[Tensor], values: Sequence[Tensor], layers: Sequence[LayerGeometry] | None) -> Geometry:
    """Return the geometry of these tensors.

    Args:
        keys: Of layer i [batch, heads, tokens, k_dim].
        values: Of layer i [batch, v_heads, tokens, v_dim].
        layers: The layers' geometry, where they are not all of kind "full".

    Raises:
        TensorError: The tensors do not fit together, or do not fit the layers.
    """
    if not keys or len(keys) != len(values) or (layers is not None and len(layers) != len(keys)):
        raise TensorError(
            f"expected one key tensor and one value tensor per layer, got {len(keys)} keys and {len(values)} values"
            + ("" if layers is None else f" for {len(layers)} layers")
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
            raise TensorError(f"layer {index}: expected tensors of {layer}, got {shape}")
        found.append(layer)
    dtype = str(first.dtype).removeprefix("torch.")
    return Geometry(tuple(found), tokens=first.shape[2], batch=first.shape[0], dtype=dtype)


def gather(keys: Sequence[Tensor], values: Sequence[Tensor], span: Span) -> Tensor:
    """Return the rows [tokens, channels] of a chunk, on layer 0's device."""
    device, tokens = keys[0].device, slice(span.first, span.first + span.tokens)
    pairs = (x for pair in zip(keys, values, strict=True) for x in pair)
    return torch.cat([x[:, :, tokens].permute(2, 0, 1, 3).reshape(span.tokens, -1).to(device) for x in pairs], 1)


def empty_kv(geometry: Geometry, devices: Sequence[torch.device | str | None]) -> list[Tensor]:
    """Allocate a cache: layer 0's keys, its values, layer 1's keys, ..., each [batch, heads, tokens, dim].

    Args:
        geometry: Of the cache.
        devices: The device of each layer.
    """
    dtype, found = getattr(torch, geometry.dtype), []
    with torch.inference_mode(False):  # else a thread that refines them could not write into them
        for layer, device in zip(geometry.layers, devices, strict=True):
            for heads, dim in ((layer.heads, layer.k_dim), (layer.v_heads, layer.v_dim)):
                found.append(torch.empty(geometry.batch, heads, geometry.tokens, dim, dtype=dtype, device=device))
    return found


def scatter(rows: Tensor, found: Sequence[Tensor], span: Span) -> None:
    """Write a chunk's rows [tokens, channels] into the tensors of `empty_kv`. Inverse of `gather`."""
    widths = [x.shape[0] * x.shape[1] * x.shape[3] for x in found]
    for x, channels in zip(found, rows.split(widths, 1), strict=True):
        shaped = channels.reshape(span.tokens, x.shape[0], x.shape[1], x.shape[3]).permute(1, 2, 0, 3)
        x[:, :, span.first : span.first + span.tokens] = shaped
