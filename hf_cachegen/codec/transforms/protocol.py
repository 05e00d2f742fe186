"""Transform: the protocol between a context's rows and the parts of an artifact.

One instance encodes and decodes the chunks of one context. A transform is one class in one file. It is registered by
its name (`hf_cachegen.codec.transforms.register`), and no file outside this package asks which transform it has.

A chunk's rows are [tokens, channels]: all channels of layer 0's K, of its V, of layer 1's K, ... (`codec.rows.gather`).
It becomes one part for each level: part 0 is the base, every further part a refinement. Level n is decoded from parts
0..n-1. What all chunks share is the side information.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from hf_cachegen.codec.chunk import Span
from hf_cachegen.codec.geometry import Geometry
from hf_cachegen.codec.into import Target
from hf_cachegen.codec.profile import Profile
from hf_cachegen.codec.rows import ContextRows
from hf_cachegen.config import CacheGenConfig


class Fitted(NamedTuple):
    """A transform fitted to a context.

    bits: what each channel costs under the tables that were chosen, float64 [levels, channels]; None where a channel
    has no bits of its own.
    """

    transform: Transform
    bits: Tensor | None


class Transform(ABC):
    """Encodes and decodes the chunks of one context. The class methods say what such a context may look like.

    Attributes:
        name: the value of `CacheGenConfig.transform` that selects it, and that manifests name it by.
        needs_profile: whether it takes the model's profile, to encode and to decode.
        channels: the number of channels of its rows.
    """

    name: ClassVar[str]
    needs_profile: ClassVar[bool] = False
    channels: int

    @classmethod
    @abstractmethod
    def fit(cls, context: ContextRows, config: CacheGenConfig, profile: Profile | None) -> Fitted:
        """Fit to a context, chunk by chunk, as often as needed.

        Args:
            context: rows of bfloat16, float16 or float32, on the device of layer 0's keys.
            config: its `transform` is `name`.
            profile: of the model; None where none was given.

        Raises:
            TensorError: the transform cannot express a value: not finite, or too large.
            ConfigError: the configuration asks for what the transform cannot do, or a profile is missing.
            ProfileError: the profile is another model's.
        """

    @classmethod
    @abstractmethod
    def from_side(
        cls, side: bytes, geometry: Geometry, config: CacheGenConfig, profile: Profile | None
    ) -> Transform:
        """The transform that wrote this side information, which is untrusted; its length is one of `side_lengths`.

        Raises:
            CorruptError, TruncatedError: no encoder writes these bytes.
            ConfigError: a profile is missing.
            ProfileError: the profile is another one.
        """

    @classmethod
    @abstractmethod
    def side_lengths(cls, geometry: Geometry, config: CacheGenConfig) -> range:
        """The lengths in bytes that the side information of such a cache can have; computed without allocating."""

    @classmethod
    def levels(cls, config: CacheGenConfig) -> int:
        """The number of levels, and of a chunk's parts."""
        return config.levels

    @classmethod
    def features(
        cls, side: bytes, geometry: Geometry, config: CacheGenConfig, profile: Profile | None
    ) -> tuple[str, ...]:
        """What a reader must support to read these artifacts (`artifact.manifest.FEATURES`).

        Args:
            side: what an encoder of this release wrote.
        """
        return ()

    @abstractmethod
    def side_bytes(self) -> bytes:
        """The side information."""

    @abstractmethod
    def encode(self, rows: Tensor, span: Span) -> list[bytes]:
        """Encode a chunk.

        Args:
            rows: [tokens, channels], as those that it was fitted to.
            span: which tokens of the context these are.

        Returns:
            The bytes of every part, `levels` of them.

        Raises:
            TensorError: as `fit`.
        """

    @abstractmethod
    def decode_into(self, parts: Sequence[bytes | memoryview], span: Span, target: Target, row: int = 0) -> None:
        """Decode a chunk at level len(parts) into rows [row, row + tokens) of a target, in its dtype, on its device.

        After an error these rows are undefined.

        Raises:
            CorruptError, TruncatedError: the bytes are damaged.
        """

    def decode(self, parts: Sequence[bytes | memoryview], span: Span, dtype: torch.dtype = torch.float32) -> Tensor:
        """Decode a chunk into rows [tokens, channels] of this dtype, on the CPU. Raises what `decode_into` raises."""
        rows = torch.empty(span.tokens, self.channels, dtype=dtype)
        self.decode_into(parts, span, Target.matrix(rows))
        return rows

    def approximations(self, rows: Tensor, span: Span) -> list[Tensor]:
        """What `decode` gives at level 1, 2, ...: each float32 [tokens, channels] on the CPU, or of the rows' dtype.

        Used to measure errors and divergences. A transform that gets there without coding overrides this.
        """
        parts = self.encode(rows, span)
        return [self.decode(parts[:level], span) for level in range(1, len(parts) + 1)]
