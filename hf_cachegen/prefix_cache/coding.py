"""Keys and values of one block <-> the block's file.

The codec is the package's own: `encode_kv` of the block's tokens as a context of one chunk. Lossless by default, so
that a block gives back the very bits that were computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_cachegen.artifact.encoded import encode_kv
from hf_cachegen.codec.chunk import Span
from hf_cachegen.codec.context import codec_of
from hf_cachegen.codec.geometry import Geometry, LayerGeometry
from hf_cachegen.codec.spread import Destination
from hf_cachegen.codec.transfer import Check, all_of
from hf_cachegen.config import CacheGenConfig
from hf_cachegen.errors import CacheGenError, ConfigError, CorruptError, LevelError, ManifestError
from hf_cachegen.prefix_cache.block import Block
from hf_cachegen.prefix_cache.keys import Family, block_key, pack_tokens
from hf_cachegen.profiles.files import Profile


@dataclass(frozen=True)
class Coding:
    """How blocks of one family are encoded.

    Attributes:
        config: the codec's options.
        level: how many levels are stored; None for all.
        profile: the profile of the klt transform, if it is used.
    """

    config: CacheGenConfig
    level: int | None
    profile: Profile | None

    def __post_init__(self) -> None:
        levels = 1 if self.config.lossless else self.config.levels
        if self.level is not None and not (type(self.level) is int and 1 <= self.level <= levels):
            raise LevelError(f"level must be a whole number from 1 to {levels} for this config, got {self.level!r}")

    def of_block(self, depth: int, tokens: int) -> CacheGenConfig:
        """Return the options for one block: a block's ends are not a context's, but the first block has its start."""
        first = self.config.protect_first if depth == 0 else 0
        return replace(self.config, chunk_tokens=tokens, protect_first=first, protect_last=0, measure=False)

    def encode(
        self, family: Family, parent: bytes, depth: int, tokens: Sequence[int], keys: Sequence[Tensor],
        values: Sequence[Tensor], layers: Sequence[LayerGeometry],
    ) -> Block:  # fmt: skip
        """Encode the block of these tokens.

        Args:
            family: what the block belongs to.
            parent: the key of the block before it, or the salt.
            depth: number of blocks before it.
            tokens: its token ids.
            keys, values: of each layer, [1, heads, tokens, dim].
            layers: the layers' geometry.

        Raises:
            TensorError: the tensors cannot be encoded.
        """
        key = block_key(parent, pack_tokens(tokens))
        if not layers:  # of a model with recurrent states alone: its block is a name for them
            empty = Geometry((), len(tokens), 1, family.fields["fingerprint"]["dtype"]).to_dict()
            return Block(key, parent, depth, family, tuple(tokens), empty, {}, b"", (b"",))
        encoded = encode_kv(keys, values, self.of_block(depth, len(tokens)), self.profile, layers=list(layers))
        parts = tuple(part[0] for part in encoded.parts[: self.level])
        return Block(
            key, parent, depth, family, tuple(tokens), encoded.geometry.to_dict(), encoded.config.to_dict(),
            encoded.side, parts,
        )  # fmt: skip

    def geometry(self, block: Block) -> Geometry:
        """Return the geometry of a stored block.

        Raises:
            ManifestError: it contradicts the block's tokens, or is no geometry.
            LimitError: a count is above the limits.
        """
        geometry = Geometry.from_dict(block.geometry)
        if geometry.batch != 1 or geometry.tokens != len(block.tokens):
            raise ManifestError(
                f"a block of {len(block.tokens)} tokens claims {geometry.batch} rows of {geometry.tokens} tokens"
            )
        return geometry

    def launch(self, block: Block, geometry: Geometry, destination: Destination | None, first: int) -> Check:
        """Start decoding a block into the tensors of a longer context.

        Args:
            block: the block.
            geometry: its geometry, checked against the model's.
            destination: the tensors; None for a model without keys and values.
            first: the token of these tensors that the block begins at.

        Returns:
            what waits until the block is in the tensors, and known to be sound.

        Raises:
            ArtifactError: the bytes are not what an encoder writes; the check raises it too.
        """
        if destination is None:
            return all_of([])
        try:
            config = CacheGenConfig.from_dict(block.config)
        except (ConfigError, TypeError) as error:
            raise ManifestError(f"the codec's options in a block: {error}") from error
        expected: dict[str, Any] = self.of_block(block.depth, geometry.tokens).to_dict()
        wrong = sorted(n for n, value in config.to_dict().items() if n != "transform" and value != expected.get(n))
        if wrong or config.transform == "auto" or expected["transform"] not in ("auto", config.transform):
            raise ManifestError(f"a block was encoded with other options than its family says: {wrong or 'transform'}")
        if (count := len(block.parts) + block.missing) != self.levels:
            raise ManifestError(f"a block of this family has {self.levels} levels, this one has {count}")
        codec = codec_of(geometry, config, block.side, self.profile)
        placed = (list(block.parts), Span(0, geometry.tokens, geometry.tokens), first)
        with _damage(block):
            found = destination.launch(codec, [placed])

        def check() -> None:
            with _damage(block):
                found()

        return check

    @property
    def levels(self) -> int:
        """Levels of a stored block."""
        return self.level or (1 if self.config.lossless else self.config.levels)


@contextmanager
def _damage(block: Block) -> Iterator[None]:
    """Raise CorruptError for what damaged bytes do to a decoder, and leave the errors of a device as they are."""
    try:
        yield
    except (CacheGenError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except (ValueError, RuntimeError, IndexError) as error:
        raise CorruptError(f"block {block.key.hex()[:16]} cannot be decoded: {error}") from error
