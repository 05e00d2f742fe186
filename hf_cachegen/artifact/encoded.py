"""An artifact in memory: an encoded context, with the content of its files and of its manifest.

`encode_kv` and `decode_kv` are the codec's `Encoder` and `decode_chunks` for all chunks at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hf_cachegen._version import __version__
from hf_cachegen.artifact.entries import STATES, STATES_FILE
from hf_cachegen.artifact.manifest import BASE_FILE, INDEXED, Manifest, chunk_name, nbytes_at, refine_file
from hf_cachegen.artifact.pin import Pin
from hf_cachegen.artifact.tensors import EncodedTensor
from hf_cachegen.artifact.writer import artifact_sizes
from hf_cachegen.codec import learnt, tables
from hf_cachegen.codec.context import Encoder, checked_level, codec_of, decode_chunks
from hf_cachegen.codec.geometry import Geometry, LayerGeometry
from hf_cachegen.codec.profile import Profile
from hf_cachegen.codec.rows import spans_of
from hf_cachegen.codec.transforms import transform_of
from hf_cachegen.config import CacheGenConfig

SIDE = "side"
"""Name of the segment with the side information, the first of the base file."""
WRITER = f"hf_cachegen {__version__}"


@dataclass(frozen=True)
class EncodedContext:
    """A context's KV cache, encoded, in memory.

    Attributes:
        geometry: Of the cache.
        config: The encoder's options, with the transform that was used.
        side: The side information.
        parts: `parts[p][c]` are the bytes of chunk c in part p (0: the base, then the refinements).
        report: The measured sizes and errors (`Encoder.report`).
        profile: Of the klt transform. It is stored once per model and not counted in the size of a context.
        tensors: The named tensors that are stored with the context.
    """

    geometry: Geometry
    config: CacheGenConfig
    side: bytes
    parts: tuple[tuple[bytes, ...], ...]
    report: dict[str, Any] = field(default_factory=dict)
    profile: Profile | None = None
    tensors: tuple[EncodedTensor, ...] = ()

    @property
    def levels(self) -> int:
        """Number of levels."""
        return len(self.parts)

    @property
    def nbytes(self) -> int:
        """Bytes to store: all files, their headers and the manifest."""
        return nbytes_at(self._sizes())

    def nbytes_at(self, level: int) -> int:
        """Return the bytes that a loader of `level` fetches, headers and manifest included. Raises LevelError."""
        return nbytes_at(self._sizes(), level)

    def _sizes(self) -> dict[str, int]:
        manifest = manifest_of(
            self.geometry, self.config, self.report, None, self.profile, self.side, self.tensors
        )
        lengths = [
            (file, name, len(data))
            for file, name, data in segments_of(self.side, zip(*self.parts, strict=True), self.tensors)
        ]
        return artifact_sizes(manifest, lengths)


def encode_kv(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    config: CacheGenConfig | None = None,
    profile: Profile | None = None,
    *,
    layers: Sequence[LayerGeometry] | None = None,
    progress: bool = False,
) -> EncodedContext:
    """Encode keys and values in memory.

    Args:
        keys: Of layer i [batch, heads, tokens, k_dim]; all bfloat16, all float16 or all float32, on any devices.
        values: Of layer i [batch, v_heads, tokens, v_dim], in the dtype of the keys.
        config: Default: CacheGenConfig().
        profile: Of the model, for the klt transform.
        layers: The layers' geometry, where they are not all of kind "full".
        progress: Show a progress bar.

    Returns:
        The encoded context.

    Raises:
        TensorError: The tensors do not fit together, or a value is not finite (lossless accepts such values).
        ConfigError: The klt transform has no profile.
        ProfileError: The profile is of another model.
    """
    encoder = Encoder(keys, values, config, profile, layers=layers, progress=progress)
    parts, side = tuple(zip(*encoder.chunks(), strict=True)), encoder.codec.side_bytes()
    return EncodedContext(encoder.geometry, encoder.config, side, parts, encoder.report(), encoder.profile)


def encode_no_kv(geometry: Geometry, config: CacheGenConfig | None = None) -> EncodedContext:
    """Return the encoded form of a context without keys and values, whose content is its named tensors.

    Args:
        geometry: without layers.
        config: its chunks are kept; the transform is lossless, in one level.
    """
    chosen = replace(config or CacheGenConfig(), transform="identity", lossless=True)
    side = learnt.to_bytes(learnt.learn_book((), 1, chosen.prob_bits), torch.empty(0, dtype=torch.uint8))
    codec = codec_of(geometry, chosen, side, None)
    dtype = getattr(torch, geometry.dtype)
    spans = spans_of(geometry.tokens, chosen.chunk_tokens)
    chunks = tuple(codec.encode(torch.empty(span.tokens, 0, dtype=dtype), span)[0] for span in spans)
    size = len(side) + sum(map(len, chunks))
    report = {"elements": 0, "bytes_per_level": [size], "bits_per_element": [0.0], "layers": []}
    return EncodedContext(geometry, chosen, side, (chunks,), report)


def decode_kv(
    encoded: EncodedContext, level: int | None = None, device: torch.device | str | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Decode a context from memory.

    Args:
        encoded: The context.
        level: Default: the finest.
        device: Of the tensors. Default: the CPU.

    Returns:
        (keys, values): for each layer [batch, heads, tokens, dim], in the dtype of the encoded tensors.

    Raises:
        LevelError: The context does not have this level.
        TruncatedError, CorruptError: The bytes are damaged.
    """
    level = checked_level(level, encoded.levels)
    codec = codec_of(encoded.geometry, encoded.config, encoded.side, encoded.profile)
    spans = spans_of(encoded.geometry.tokens, encoded.config.chunk_tokens)
    return decode_chunks(
        codec, encoded.geometry, spans, lambda c: [part[c] for part in encoded.parts[:level]], device, False
    )


def segments_of(
    side: bytes, chunks: Iterable[Sequence[bytes]], tensors: Iterable[EncodedTensor] = ()
) -> Iterator[tuple[str, str, bytes]]:
    """Yield (file, name, bytes) of every segment, in the order of writing."""
    yield BASE_FILE, SIDE, side
    for index, parts in enumerate(chunks):
        for part, data in enumerate(parts):
            yield (refine_file(part) if part else BASE_FILE), chunk_name(index), data
    for tensor in tensors:
        yield STATES_FILE, tensor.entry.name, tensor.data


def manifest_of(
    geometry: Geometry,
    config: CacheGenConfig,
    report: dict[str, Any],
    fingerprint: dict[str, Any] | None,
    profile: Profile | None,
    side: bytes,
    tensors: Sequence[EncodedTensor] = (),
) -> Manifest:
    """Return the manifest, without its files."""
    codec: dict[str, Any] = {"config": config.to_dict(), "codebook": tables.SHIPPED_CODEBOOK}
    if profile is not None:
        codec["profile"] = Pin.of(profile).to_dict()
    return Manifest(
        geometry=geometry.to_dict(),
        codec=codec,
        chunks=tuple((span.first, span.tokens) for span in spans_of(geometry.tokens, config.chunk_tokens)),
        report=report,
        fingerprint=fingerprint,
        required=(
            *transform_of(config).features(side, geometry, config, profile),
            *([STATES] if tensors else []),
            *([INDEXED] if geometry.indexed else []),
        ),
        states=tuple(tensor.entry for tensor in tensors),
        writer=WRITER,
    )
