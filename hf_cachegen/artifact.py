"""Artifacts on disk: what `encoding` makes of tensors, written chunk by chunk, and read the same way."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_cachegen.codec import tables
from hf_cachegen.codec.chunk import Codec
from hf_cachegen.config import CacheGenConfig
from hf_cachegen.container import (
    BASE_FILE,
    INPUT_IDS,
    TOKENS_FILE,
    ArtifactWriter,
    Limits,
    Manifest,
    Reader,
    Segment,
    Store,
    chunk_name,
    pack_input_ids,
    refine_file,
)
from hf_cachegen.encoding import (
    SIDE,
    EncodedContext,
    Encoder,
    checked_level,
    codec_of,
    decode_chunks,
    manifest_of,
    segments_of,
    side_lengths,
    spans_of,
)
from hf_cachegen.errors import ConfigError, LimitError, ManifestError, TensorError
from hf_cachegen.finding import ProfileLike, for_decoding
from hf_cachegen.geometry import Geometry
from hf_cachegen.profile import Profile
from hf_cachegen.stores import LocalStore
from hf_cachegen.stores.profiles import Pin


def write(
    source: Encoder | EncodedContext,
    directory: str | os.PathLike[str],
    *,
    input_ids: Sequence[int] | None = None,
    fingerprint: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Writes an artifact into `directory`: whole, or not at all. Raises ArtifactExistsError where there is one
    already.
    """
    if input_ids is not None and len(input_ids) != source.geometry.tokens:
        raise TensorError(f"{len(input_ids)} input_ids for a cache of {source.geometry.tokens} tokens")
    chunks: Iterable[Sequence[bytes]]
    if isinstance(source, Encoder):
        side, chunks = source.codec.side_bytes(), source.chunks()
    else:
        side, chunks = source.side, zip(*source.parts, strict=True)
    with ArtifactWriter(directory, overwrite=overwrite) as writer:
        for file, name, data in segments_of(side, chunks):
            writer.add(file, name, data)
        if input_ids is not None:
            writer.add(TOKENS_FILE, INPUT_IDS, pack_input_ids(input_ids))
        report = source.report() if isinstance(source, Encoder) else source.report
        return writer.commit(manifest_of(source.geometry, source.config, report, fingerprint, source.profile, side))


class Artifact:
    """An artifact in a folder, or behind any other store (hf_cachegen.stores); opening reads its manifest alone.

    profile: that of the klt transform, or its place; "auto": the right one, from wherever `finding.for_decoding` finds
    it; None: the one beside the artifact alone.

    Raises ArtifactNotFoundError, ManifestError, LimitError, UnsupportedFormatError; its methods TruncatedError and
    CorruptError too.
    """

    def __init__(
        self,
        place: str | os.PathLike[str] | Store,
        limits: Limits | None = None,
        profile: ProfileLike = "auto",
        model_folder: str = "",
    ):
        self.store = LocalStore(place) if isinstance(place, str | os.PathLike) else place
        self._profile, self._model_folder = profile, model_folder
        self.reader = Reader(self.store, limits or Limits())
        manifest = self.manifest = self.reader.manifest
        self.geometry = Geometry.from_dict(manifest.geometry)
        self.config = _config(manifest.codec)
        self.fingerprint = manifest.fingerprint
        self.report = manifest.report
        expected = [(span.first, span.tokens) for span in spans_of(self.geometry.tokens, self.config.chunk_tokens)]
        if expected != list(manifest.chunks):
            raise ManifestError("the chunk table does not match the geometry's tokens and the codec's chunk_tokens")
        if manifest.levels != (1 if self.config.lossless else self.config.levels):
            raise ManifestError(f"the codec has {self.config.levels} levels, the files {manifest.levels}")
        if self.geometry.nbytes > self.reader.limits.max_decoded_bytes:
            raise LimitError(f"decoded, this cache has {self.geometry.nbytes} bytes: above the limit")
        side = manifest.segment(BASE_FILE, SIDE).length
        if side not in side_lengths(self.geometry, self.config):
            raise ManifestError(f"side information of {side} bytes: the geometry's columns take another number")
        ids = manifest.files.get(TOKENS_FILE)
        if ids and ids.segments[0].length != 8 * self.geometry.tokens:
            raise ManifestError("the number of input_ids is not the geometry's number of tokens")

    def elsewhere(self, place: Store) -> Artifact:
        """Another artifact, opened as this one was. Raises what opening does."""
        return Artifact(place, self.reader.limits, self._profile, self._model_folder)

    @property
    def levels(self) -> int:
        return self.manifest.levels

    @property
    def input_ids(self) -> list[int] | None:
        """The context's token ids, None where they were not stored."""
        return self.reader.input_ids()

    def nbytes_at(self, level: int | None = None) -> int:
        """Bytes that a loader of `level` fetches, everything counted; None: all that is stored."""
        return self.reader.nbytes_at(level)

    def segments(self, chunk: int, level: int) -> list[Segment]:
        """The segments of a chunk that decoding it at `level` takes: the base's, then the refinements'."""
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
        """Everything, verified, in memory."""
        self._prefetch(self.levels)
        chunks = [self._parts(chunk, self.levels) for chunk in range(len(self.manifest.chunks))]
        parts = tuple(zip(*chunks, strict=True))
        return EncodedContext(self.geometry, self.config, self._side(), parts, self.report, self.profile())

    @property
    def pin(self) -> Pin | None:
        """What the manifest says of the profile that decoding needs, None where it needs none."""
        return Pin.from_codec(self.manifest.codec) if self.config.transform == "klt" else None

    def profile(self) -> Profile | None:
        """The profile that decoding needs. Raises ProfileError where it is missing or another one, and what fetching it
        raises (`finding.for_decoding`).
        """
        pin = self.pin
        if pin is None:
            return None
        self._profile = for_decoding(self._profile, pin, self.store, self._model_folder, self.reader.limits)
        return self._profile

    def codec(self) -> Codec:
        """What decodes the chunks; fetches the side information, and the profile if it takes one."""
        return codec_of(self.geometry, self.config, self._side(), self.profile())

    def decode(
        self, level: int | None = None, device: torch.device | str | None = None, *, progress: bool = False
    ) -> tuple[list[Tensor], list[Tensor]]:
        """(keys, values) at `level` (default: the finest), read, verified and decoded chunk by chunk."""
        level = checked_level(level, self.levels)
        self.profile()
        self._prefetch(level)
        spans = spans_of(self.geometry.tokens, self.config.chunk_tokens)
        return decode_chunks(self.codec(), self.geometry, spans, lambda c: self._parts(c, level), device, progress)


def _config(codec: dict[str, Any]) -> CacheGenConfig:
    if codec.get("codebook") != tables.SHIPPED_CODEBOOK:
        raise ManifestError(f"codec.codebook is {codec.get('codebook')!r:.80}, expected {tables.SHIPPED_CODEBOOK!r}")
    if not isinstance(codec.get("config"), dict):
        raise ManifestError("codec.config must be an object")
    try:
        config = CacheGenConfig.from_dict(codec["config"])
    except (ConfigError, TypeError) as error:
        raise ManifestError(f"codec.config: {error}") from error
    if config.transform == "auto":
        raise ManifestError("codec.config: an artifact names the transform that made it, not 'auto'")
    return config
