"""delta, the transform of CacheGen (section 5.2): anchors, and every other token's difference to its group's anchor.

Side information, per channel: u8 step; u8 table of the anchors; u8 table of the base, u8 of each refinement.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from hf_cachegen.codec import fit
from hf_cachegen.codec.chunk import Channels, LossyCodec, Placed, Span
from hf_cachegen.codec.geometry import Geometry
from hf_cachegen.codec.into import Target
from hf_cachegen.codec.launching import launch
from hf_cachegen.codec.profile import Profile
from hf_cachegen.codec.rows import ContextRows
from hf_cachegen.codec.section import Cursor
from hf_cachegen.codec.side import Side
from hf_cachegen.codec.transfer import Check
from hf_cachegen.codec.transforms.protocol import Fitted, Transform
from hf_cachegen.config import CacheGenConfig


class Delta(Transform):
    """Code the differences to anchors, one anchor per `config.group_tokens` tokens.

    Args:
        inner: The codec of the differences.
    """

    name = "delta"

    def __init__(self, inner: LossyCodec):
        self.inner = inner
        self.channels = len(inner.channels)

    @classmethod
    def fit(cls, context: ContextRows, config: CacheGenConfig, profile: Profile | None) -> Fitted:
        inner, bits = cls.fitted(context, config)
        return Fitted(cls(inner), bits)

    @classmethod
    def fitted(cls, context: ContextRows, config: CacheGenConfig) -> tuple[LossyCodec, Tensor]:
        """Fit the codec of the differences. Return it with the bits of each part's channels, float64 [levels,
        channels].
        """
        source = context.source
        return fit.fit(context.chunks, context.channels, config, config.group_tokens, source, context.spans)

    @classmethod
    def from_side(cls, side: bytes, geometry: Geometry, config: CacheGenConfig, profile: Profile | None) -> Delta:
        channels = Channels.of(geometry)
        found = Side.read(Cursor(side), len(channels), config, anchors=True)
        return cls(LossyCodec(channels, config, found, config.group_tokens))

    @classmethod
    def side_lengths(cls, geometry: Geometry, config: CacheGenConfig) -> range:
        length = geometry.channels * (2 + config.levels)
        return range(length, length + 1)

    def side_bytes(self) -> bytes:
        return self.inner.side.to_bytes(anchors=True)

    def encode(self, rows: Tensor, span: Span) -> list[bytes]:
        return self.inner.encode(rows, span)

    def encode_chunk(self, context: ContextRows, span: Span) -> list[bytes]:
        return super().encode_chunk(context, span) if self.inner.source is None else self.inner.encode_own(span)

    def decode_into(self, parts: Sequence[bytes | memoryview], span: Span, target: Target, row: int = 0) -> None:
        self.launch([(parts, span, row)], target)()

    def launch(self, chunks: Iterable[Placed], target: Target) -> Check:
        return launch(self.inner, chunks, target)

    def approximations(self, rows: Tensor, span: Span) -> list[Tensor]:
        return self.inner.approximations(rows, span)
