"""identity: values minus their channel's mean. The context's first token is stored exactly if it is an attention sink.

The values of a sink differ from those of all other tokens, and the first token is by far the most important
(`codec.sinks`). It is coded as a copy of its neighbour, and its own row is stored in the side information.

Side information, per channel: u8 step; i16 mean in 1/16 of the coarsest step; u8 table of the base, u8 of each
refinement. Then the first token's row in the cache's dtype, if it is stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hf_cachegen.codec import fit
from hf_cachegen.codec.chunk import Channels, LossyCodec, Placed, Span
from hf_cachegen.codec.geometry import DTYPE_BYTES, Geometry
from hf_cachegen.codec.into import Target
from hf_cachegen.codec.launching import launch
from hf_cachegen.codec.profile import Profile
from hf_cachegen.codec.rows import ContextRows
from hf_cachegen.codec.section import Cursor
from hf_cachegen.codec.side import Side
from hf_cachegen.codec.transfer import Check
from hf_cachegen.codec.transforms.protocol import Fitted, Transform
from hf_cachegen.config import CacheGenConfig


class Identity(Transform):
    """Code the values without a prediction.

    Args:
        inner: The codec of the values.
        first: The row of the first token, [channels]; None: it is coded with the others.
    """

    name = "identity"

    def __init__(self, inner: LossyCodec, first: Tensor | None = None):
        self.inner, self.first = inner, first
        self.channels = len(inner.channels)

    @classmethod
    def fit(cls, context: ContextRows, config: CacheGenConfig, profile: Profile | None) -> Fitted:
        inner, bits = cls.fitted(context, config)
        return Fitted(cls(inner, context.first_token if 0 in context.sinks else None), bits)

    @classmethod
    def fitted(cls, context: ContextRows, config: CacheGenConfig) -> tuple[LossyCodec, Tensor]:
        """Fit the codec of the values. Return it with the bits of each part's channels, float64 [levels, channels]."""
        if 0 not in context.sinks:
            return fit.fit(context.chunks, context.channels, config, 0, context.source, context.spans)
        fit.require_finite(context.first_token[None], context.channels.vectors)

        def without_first() -> Iterator[tuple[Tensor, Span]]:
            return ((blanked(rows, span), span) for rows, span in context.chunks())

        whole = context.source if context.spans[0].tokens > 1 else None  # `blanked` has no neighbour in such a chunk
        source = None if whole is None else replace(whole, blank=True)
        return fit.fit(without_first, context.channels, config, 0, source, context.spans)

    @classmethod
    def from_side(cls, side: bytes, geometry: Geometry, config: CacheGenConfig, profile: Profile | None) -> Identity:
        channels, own = Channels.of(geometry), _own_length(geometry, config)
        inner = LossyCodec(channels, config, Side.read(Cursor(side[:own]), len(channels), config, anchors=False))
        if len(side) == own:
            return cls(inner)
        return cls(inner, torch.frombuffer(bytearray(side[own:]), dtype=getattr(torch, geometry.dtype)))

    @classmethod
    def side_lengths(cls, geometry: Geometry, config: CacheGenConfig) -> range:
        own, first = _own_length(geometry, config), geometry.channels * DTYPE_BYTES[geometry.dtype]
        return range(own, own + first + 1, first)

    @classmethod
    def features(
        cls, side: bytes, geometry: Geometry, config: CacheGenConfig, profile: Profile | None
    ) -> tuple[str, ...]:
        return ("sinks",) if len(side) > _own_length(geometry, config) else ()

    def side_bytes(self) -> bytes:
        first = b"" if self.first is None else self.first.contiguous().view(torch.uint8).numpy().tobytes()
        return self.inner.side.to_bytes(anchors=False) + first

    def encode(self, rows: Tensor, span: Span) -> list[bytes]:
        return self.inner.encode(self._coded(rows, span), span)

    def encode_chunk(self, context: ContextRows, span: Span) -> list[bytes]:
        return super().encode_chunk(context, span) if self.inner.source is None else self.inner.encode_own(span)

    def decode_into(self, parts: Sequence[bytes | memoryview], span: Span, target: Target, row: int = 0) -> None:
        self.launch([(parts, span, row)], target)()

    def launch(self, chunks: Iterable[Placed], target: Target) -> Check:
        starts: list[int] = []

        def watched() -> Iterator[Placed]:
            for parts, span, row in chunks:
                if span.first == 0:
                    starts.append(row)
                yield parts, span, row

        check = launch(self.inner, watched(), target)
        for row in starts:
            if self.first is not None:
                target.put(self.first[None], row)
        return check

    def approximations(self, rows: Tensor, span: Span) -> list[Tensor]:
        found = self.inner.approximations(self._coded(rows, span), span)
        if self.first is not None and span.first == 0:
            for level in found:
                level[0] = self.first
        return found

    def _coded(self, rows: Tensor, span: Span) -> Tensor:
        return rows if self.first is None else blanked(rows, span)


def blanked(rows: Tensor, span: Span) -> Tensor:
    """Replace the context's first token in rows [tokens, channels] by its neighbour, or by zero if it has none."""
    if span.first:
        return rows
    rows = rows.clone()
    rows[0] = rows[1] if len(rows) > 1 else 0
    return rows


def _own_length(geometry: Geometry, config: CacheGenConfig) -> int:
    """Return the bytes of the side information without the first token."""
    return geometry.channels * (3 + config.levels)
