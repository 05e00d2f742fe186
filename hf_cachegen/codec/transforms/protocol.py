"""Transform: the protocol between a context's rows and the parts of an artifact.

One instance encodes and decodes the chunks of one context. A transform is one class in one file. It is registered by
its name (`hf_cachegen.codec.transforms.register`). No file outside this package depends on which transform it has.

A chunk's rows are [tokens, channels]: all channels of layer 0's K, of its V, of layer 1's K, ... (`codec.rows.gather`).
They become one part per level: part 0 is the base, every further part a refinement. Level n is decoded from parts
0..n-1. All chunks share the side information.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from hf_cachegen.codec import quantize
from hf_cachegen.codec.chunk import Placed, Span
from hf_cachegen.codec.geometry import Geometry
from hf_cachegen.codec.into import Target
from hf_cachegen.codec.predictor import Known
from hf_cachegen.codec.profile import Profile
from hf_cachegen.codec.rows import ContextRows
from hf_cachegen.codec.transfer import Check, all_of
from hf_cachegen.config import CacheGenConfig


class Fitted(NamedTuple):
    """A transform fitted to a context.

    Attributes:
        transform: The transform.
        bits: The cost of each channel under the chosen tables, float64 [levels, channels]; None where the bits belong
            to no single channel.
    """

    transform: Transform
    bits: Tensor | None


class Transform(ABC):
    """Encode and decode the chunks of one context. The class methods describe the contexts of a configuration.

    Attributes:
        name: The value of `CacheGenConfig.transform` that selects it, and its name in manifests.
        needs_profile: Whether it needs the model's profile to encode and to decode.
        channels: The number of channels of its rows.
    """

    name: ClassVar[str]
    needs_profile: ClassVar[bool] = False
    channels: int

    @classmethod
    @abstractmethod
    def fit(cls, context: ContextRows, config: CacheGenConfig, profile: Profile | None) -> Fitted:
        """Fit to a context. The chunks may be iterated over more than once.

        Args:
            context: Rows of bfloat16, float16 or float32, on the device of layer 0's keys.
            config: Its `transform` is `name`.
            profile: Of the model; None where none was given.

        Returns:
            The fitted transform and its bits.

        Raises:
            TensorError: The transform cannot express a value: it is not finite, or too large.
            ConfigError: The transform does not support the configuration, or a profile is missing.
            ProfileError: The profile is of another model.
        """

    @classmethod
    @abstractmethod
    def from_side(
        cls, side: bytes, geometry: Geometry, config: CacheGenConfig, profile: Profile | None
    ) -> Transform:
        """Restore the transform that wrote this side information.

        Args:
            side: Untrusted; its length is one of `side_lengths`.
            geometry: Of the cache.
            config: Of the artifact.
            profile: Of the model; None where none was given.

        Returns:
            The fitted transform.

        Raises:
            CorruptError, TruncatedError: No encoder writes these bytes.
            ConfigError: A profile is missing.
            ProfileError: The profile is another one.
        """

    @classmethod
    @abstractmethod
    def side_lengths(cls, geometry: Geometry, config: CacheGenConfig) -> range:
        """Return the possible lengths of the side information of such a cache, in bytes. Nothing is allocated."""

    @classmethod
    def levels(cls, config: CacheGenConfig) -> int:
        """Return the number of levels, which is also the number of a chunk's parts."""
        return config.levels

    @classmethod
    def features(
        cls, side: bytes, geometry: Geometry, config: CacheGenConfig, profile: Profile | None
    ) -> tuple[str, ...]:
        """Return the features that a reader must support to read these artifacts (`artifact.manifest.FEATURES`).

        Args:
            side: The side information that an encoder of this release wrote.
            geometry: Of the cache.
            config: Of the artifact.
            profile: Of the model; None where none is needed.
        """
        return ()

    @classmethod
    def stepped(cls, config: CacheGenConfig, offset: int, profile: Profile | None) -> CacheGenConfig:
        """Return the configuration with other steps: `offset` quarter octaves larger. Here, `steps` is multiplied.

        Args:
            config: Its `transform` is `name`.
            offset: In quarter octaves; 4 doubles the steps.
            profile: Of the model; None where none is needed.

        Raises:
            ConfigError: The step is outside the range that can be expressed.
        """
        first, middle, last = (step * 2 ** (offset / quantize.STEPS_PER_OCTAVE) for step in config.steps)
        return replace(config, steps=(first, middle, last))

    def knowing(self, known: Known | None) -> Transform:
        """Return this transform with what its loader has computed from the tokens; itself where it takes nothing."""
        return self

    @abstractmethod
    def side_bytes(self) -> bytes:
        """Return the side information."""

    @abstractmethod
    def encode(self, rows: Tensor, span: Span) -> list[bytes]:
        """Encode a chunk.

        Args:
            rows: [tokens, channels], in the dtype that it was fitted to.
            span: The position of the chunk in the context.

        Returns:
            The bytes of every part, `levels` of them.

        Raises:
            TensorError: The transform cannot express a value.
        """

    def encode_chunk(self, context: ContextRows, span: Span) -> list[bytes]:
        """Encode a chunk of the context that it was fitted to. A transform should override it if it needs no rows.

        Args:
            context: The context.
            span: The position of the chunk.

        Returns:
            The result of `encode`.

        Raises:
            TensorError: The transform cannot express a value.
        """
        return self.encode(context.chunk(span), span)

    @abstractmethod
    def decode_into(self, parts: Sequence[bytes | memoryview], span: Span, target: Target, row: int = 0) -> None:
        """Decode a chunk at level len(parts) into rows [row, row + tokens) of a target, in its dtype, on its device.

        After an error these rows are undefined.

        Args:
            parts: The bytes of parts 0..level-1.
            span: The position of the chunk in the context.
            target: Receives the rows.
            row: The target's row of the chunk's first token.

        Raises:
            CorruptError, TruncatedError: The bytes are damaged.
        """

    def launch(self, chunks: Iterable[Placed], target: Target) -> Check:
        """Start decoding each (parts, span, row) as `decode_into` does, on the target's device.

        A transform should override it if it can decode several chunks together, or without waiting for the device.

        Args:
            chunks: All of one level.
            target: Receives the rows. Work that is launched on the same stream later finds them.

        Returns:
            What waits until all chunks are known to be sound.

        Raises:
            CorruptError, TruncatedError: The bytes are damaged; the result raises these too.
        """
        for parts, span, row in chunks:
            self.decode_into(parts, span, target, row)
        return all_of([])

    def release(self) -> None:  # noqa: B027
        """Free the memory that is kept from launch to launch. A transform that keeps none has nothing to do."""

    def decode_many(self, chunks: Iterable[Placed], target: Target) -> None:
        """Decode each (parts, span, row) as `decode_into` does, in the way of `launch`.

        Raises:
            CorruptError, TruncatedError: The bytes are damaged.
        """
        self.launch(chunks, target)()

    def decode(self, parts: Sequence[bytes | memoryview], span: Span, dtype: torch.dtype = torch.float32) -> Tensor:
        """Decode a chunk at level len(parts) into new rows [tokens, channels] of this dtype, on the CPU.

        Raises:
            CorruptError, TruncatedError: The bytes are damaged.
        """
        rows = torch.empty(span.tokens, self.channels, dtype=dtype)
        self.decode_into(parts, span, Target.matrix(rows))
        return rows

    def approximations(self, rows: Tensor, span: Span) -> list[Tensor]:
        """Return the result of `decode` at level 1, 2, ...: each float32 [tokens, channels] on the CPU, or of the rows'
        dtype.

        Used to measure errors and divergences. A transform that can compute this without coding should override it.
        """
        parts = self.encode(rows, span)
        return [self.decode(parts[:level], span) for level in range(1, len(parts) + 1)]

    def squares(self, context: ContextRows, span: Span) -> tuple[Tensor, Tensor]:
        """Return the squared errors of a chunk at level 1, 2, ..., and the squares of its values.

        A transform should override it if it knows the errors without decoding.

        Args:
            context: The context that it was fitted to.
            span: The position of the chunk.

        Returns:
            (float64 [levels, vectors], float64 [vectors]): sums over the values of K and V of each layer in turn.
        """
        rows, owner = context.chunk(span).cpu(), context.channels.vectors
        exact, nothing = rows.double(), torch.zeros(2 * len(context.geometry.layers), dtype=torch.float64)
        errors = []
        for decoded in self.approximations(rows, span):
            difference = decoded.to(rows.dtype).double().sub_(exact).nan_to_num_()
            errors.append(nothing.index_add(0, owner, difference.square_().sum(0)))
        return torch.stack(errors), nothing.index_add(0, owner, exact.square().nan_to_num().sum(0))
