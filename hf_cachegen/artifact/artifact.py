"""Artifacts in files: write the codec's streams chunk by chunk, and read them in the same way.

In this package only this module and `encoded` use the codec.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from hf_cachegen.artifact import (
    BASE_FILE,
    INPUT_IDS,
    TEXT_FILE,
    TOKENS_FILE,
    ArtifactWriter,
    ContextText,
    Limits,
    Manifest,
    Reader,
    Segment,
    Store,
    chunk_name,
    pack_input_ids,
    refine_file,
)
from hf_cachegen.artifact.encoded import SIDE, EncodedContext, manifest_of, segments_of
from hf_cachegen.artifact.manifest import INDEXED
from hf_cachegen.artifact.pin import Pin
from hf_cachegen.artifact.tensors import NamedTensor, decode_tensors, encode_tensors, read_encoded
from hf_cachegen.codec import tables
from hf_cachegen.codec.context import Encoder, Placement, checked_level, codec_of, decode_chunks
from hf_cachegen.codec.geometry import Geometry
from hf_cachegen.codec.predictor import Known
from hf_cachegen.codec.profile import Profile
from hf_cachegen.codec.rows import spans_of
from hf_cachegen.codec.transforms import Transform, transform_of
from hf_cachegen.config import CacheGenConfig
from hf_cachegen.errors import ConfigError, LimitError, ManifestError, ProfileError, TensorError


def write(
    source: Encoder | EncodedContext,
    directory: str | os.PathLike[str],
    *,
    input_ids: Sequence[int] | None = None,
    fingerprint: dict[str, Any] | None = None,
    text: ContextText | None = None,
    tensors: Sequence[NamedTensor] = (),
    overwrite: bool = False,
) -> Manifest:
    """Write an artifact into `directory`, completely or not at all.

    Args:
        source: A context to encode, or an encoded one.
        directory: Created if it does not exist.
        input_ids: The context's token ids, to store with it.
        fingerprint: The model that the cache belongs to.
        text: The text of the context, to store with it.
        tensors: Named tensors to store with it, exactly; those of an encoded context come first.
        overwrite: Replace an existing artifact.

    Returns:
        The manifest.

    Raises:
        ArtifactExistsError: The directory already holds an artifact.
        TensorError: input_ids are no token ids, or not one per token of the cache; or a named tensor cannot be coded.
    """
    if input_ids is not None and len(input_ids) != source.geometry.tokens:
        raise TensorError(f"expected an input_id for each of {source.geometry.tokens} tokens, got {len(input_ids)}")
    chunks: Iterable[Sequence[bytes]]
    encoded = encode_tensors(tensors)
    if isinstance(source, Encoder):
        side, chunks = source.codec.side_bytes(), source.chunks()
    else:
        side, chunks, encoded = source.side, zip(*source.parts, strict=True), (*source.tensors, *encoded)
    with ArtifactWriter(directory, overwrite=overwrite) as writer:
        for file, name, data in segments_of(side, chunks, encoded):
            writer.add(file, name, data)
        if input_ids is not None:
            writer.add(TOKENS_FILE, INPUT_IDS, pack_input_ids(input_ids))
        if text is not None:
            writer.add(TEXT_FILE, *text.segment())
        report = source.report() if isinstance(source, Encoder) else source.report
        manifest = manifest_of(source.geometry, source.config, report, fingerprint, source.profile, side, encoded)
        return writer.commit(manifest)


class Artifact:
    """An opened artifact. Its manifest is read and checked; its segments are verified when they are read.

    Args:
        source: The store that holds it (`hf_cachegen.stores.open_store`, `LocalStore`), or a reader of it.
        profile: The profile that decoding needs (`pin` describes it). None: it needs none, or nothing is decoded.
            `hf_cachegen.profiles.finding.profile_of` finds it.
        limits: The largest artifact to accept. A reader has its own limits.

    Raises:
        ArtifactNotFoundError: The store holds no artifact.
        ManifestError: The manifest is damaged, or contradicts itself.
        LimitError: The artifact is larger than the limits.
        UnsupportedFormatError: It has a later format version, or needs an unknown feature.
        TruncatedError, CorruptError: Raised by the methods that read segments, for damaged bytes.
    """

    def __init__(self, source: Store | Reader, profile: Profile | None = None, *, limits: Limits | None = None):
        self.reader = source if isinstance(source, Reader) else Reader(source, limits or Limits())
        self.profile = profile
        self.store = self.reader.store
        manifest = self.manifest = self.reader.manifest
        self.geometry = Geometry.from_dict(manifest.geometry)
        self.config = _config(manifest.codec)
        self.fingerprint = manifest.fingerprint
        self.report = manifest.report
        tokens, chunk_tokens = self.geometry.tokens, self.config.chunk_tokens
        # The counts first: a small manifest can state tokens of which a list of chunks would take all memory.
        sound = tokens == manifest.tokens and -(-tokens // chunk_tokens) == len(manifest.chunks)
        if not sound or [(span.first, span.tokens) for span in spans_of(tokens, chunk_tokens)] != list(manifest.chunks):
            raise ManifestError("the chunk table does not match the geometry's tokens and the codec's chunk_tokens")
        transform = transform_of(self.config)
        if manifest.levels != transform.levels(self.config):
            raise ManifestError(f"expected files for {transform.levels(self.config)} levels, got {manifest.levels}")
        if self.geometry.nbytes > self.reader.limits.max_decoded_bytes:
            most = self.reader.limits.max_decoded_bytes
            raise LimitError(f"expected a cache of at most {most} decoded bytes, got {self.geometry.nbytes}")
        if self.geometry.indexed != (INDEXED in manifest.required):
            raise ManifestError(f"expected indexed layers and the required feature {INDEXED!r} together, got one alone")
        if not self.geometry.layers and not manifest.states:
            raise ManifestError("expected a layer with keys and values, or named tensors, the artifact has neither")
        side = manifest.segment(BASE_FILE, SIDE).length
        if side not in transform.side_lengths(self.geometry, self.config):
            raise ManifestError(f"the side information has {side} bytes, which does not fit the geometry's channels")
        ids = manifest.files.get(TOKENS_FILE)
        if ids and ids.segments[0].length != 8 * self.geometry.tokens:
            raise ManifestError("the number of input_ids must be the geometry's number of tokens")

    def with_profile(self, profile: Profile | None) -> Artifact:
        """Return the same opened artifact, to be decoded with this profile."""
        return Artifact(self.reader, profile)

    @property
    def levels(self) -> int:
        """Number of levels that it serves."""
        return self.manifest.levels

    @property
    def input_ids(self) -> list[int] | None:
        """The context's token ids; None if they were not stored."""
        return self.reader.input_ids()

    def nbytes_at(self, level: int | None = None) -> int:
        """Return the bytes that a loader of `level` fetches, manifest included. None: all stored bytes."""
        return self.reader.nbytes_at(level)

    def segments(self, chunk: int, level: int) -> list[Segment]:
        """Return the segments needed to decode a chunk at `level`: the base's, then the refinements'."""
        files = [BASE_FILE, *(refine_file(number) for number in range(1, level))]
        return [self.manifest.segment(file, chunk_name(chunk)) for file in files]

    def _parts(self, chunk: int, level: int) -> list[bytes]:
        return [self.reader.read(segment) for segment in self.segments(chunk, level)]

    def _prefetch(self, level: int) -> None:
        chunks = (segment for index in range(len(self.manifest.chunks)) for segment in self.segments(index, level))
        self.reader.prefetch([self.manifest.segment(BASE_FILE, SIDE), *chunks])

    def _side(self) -> bytes:
        return self.reader.read(self.manifest.segment(BASE_FILE, SIDE))

    def read(self) -> EncodedContext:
        """Read and verify all parts into memory."""
        self._prefetch(self.levels)
        chunks = [self._parts(chunk, self.levels) for chunk in range(len(self.manifest.chunks))]
        parts = tuple(zip(*chunks, strict=True))
        profile = None if self.pin is None else self.profile
        tensors = read_encoded(self.reader)
        return EncodedContext(self.geometry, self.config, self._side(), parts, self.report, profile, tensors)

    def tensors(self) -> tuple[NamedTensor, ...]:
        """Read, verify and decode the named tensors that are stored with the context, on the CPU.

        Raises:
            TruncatedError, CorruptError: The files are damaged.
        """
        return decode_tensors(read_encoded(self.reader))

    @property
    def pin(self) -> Pin | None:
        """The manifest's description of the profile that decoding needs; None if it needs none."""
        return Pin.from_codec(self.manifest.codec) if transform_of(self.config).needs_profile else None

    def codec(self) -> Transform:
        """Return the transform that decodes the chunks. Fetches the side information.

        Raises:
            ProfileError: The profile is missing, or another one.
            TruncatedError, CorruptError: The side information is damaged.
        """
        pin = self.pin
        if pin is not None and self.profile is None:
            raise ProfileError(f"this artifact needs {pin}: pass it as profile=")
        return codec_of(self.geometry, self.config, self._side(), self.profile)

    def decode(
        self, level: int | None = None, device: Placement = None, *, known: Known | None = None,
        progress: bool = False,
    ) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
        """Read, verify and decode the context, chunk by chunk.

        Args:
            level: Default: the finest.
            device: Of the tensors, or of each layer. Default: the CPU.
            known: What a loader computes from the tokens, where `config.predict_layers` is set.
            progress: Show a progress bar.

        Returns:
            (keys, values): for each layer [batch, heads, tokens, dim], in the cache's dtype.

        Raises:
            LevelError: The artifact does not have this level.
            ProfileError: The profile is missing, or another one.
            ConfigError: The artifact needs `known`.
            TruncatedError, CorruptError: The files are damaged.
        """
        level = checked_level(level, self.levels)
        if not self.geometry.layers:  # named tensors are its whole content
            return [], []
        self._prefetch(level)
        spans = spans_of(self.geometry.tokens, self.config.chunk_tokens)
        codec = self.codec().knowing(known)
        return decode_chunks(codec, self.geometry, spans, lambda c: self._parts(c, level), device, progress)


def _config(codec: dict[str, Any]) -> CacheGenConfig:
    if codec.get("codebook") != tables.SHIPPED_CODEBOOK:
        raise ManifestError(f"codec.codebook is {codec.get('codebook')!r:.80}, expected {tables.SHIPPED_CODEBOOK!r}")
    if not isinstance(codec.get("config"), dict):
        raise ManifestError("codec.config must be an object")
    try:
        config = CacheGenConfig.from_dict(codec["config"])
        transform_of(config)
    except (ConfigError, TypeError) as error:
        raise ManifestError(f"codec.config: {error}") from error
    return config
