"""Tensors <-> artifact: where codec and container meet.

Keys and values are per-layer lists of [batch, heads, tokens, head_dim]. `encode_kv` and `decode_kv` work in memory; `write` streams
chunk by chunk into a directory, `Artifact` reads one the same way, so memory holds the tensors and one chunk.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from hf_cachegen.codec import fit, tables
from hf_cachegen.codec.chunk import Codec, Columns, LossyCodec, Side, Span
from hf_cachegen.codec.lossless import LosslessCodec
from hf_cachegen.config import CacheGenConfig
from hf_cachegen.container import (
    BASE_FILE,
    INPUT_IDS,
    TOKENS_FILE,
    ArtifactWriter,
    Limits,
    Manifest,
    Reader,
    artifact_sizes,
    chunk_name,
    nbytes_at,
    pack_input_ids,
    refine_file,
)
from hf_cachegen.errors import ConfigError, LevelError, LimitError, ManifestError, TensorError
from hf_cachegen.geometry import Geometry, LayerGeometry
from hf_cachegen.stores import LocalStore

SIDE = "side"
"""Name of the segment with the side information, the first of the base file."""
WRITER = "hf_cachegen 0.1.0"


@dataclass(frozen=True)
class EncodedContext:
    """A context's KV cache, encoded, in memory.

    parts[p][c] are the bytes of chunk c in part p (0: the base, then the refinements); `report` says what it cost.
    """

    geometry: Geometry
    config: CacheGenConfig
    side: bytes
    parts: tuple[tuple[bytes, ...], ...]
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def levels(self) -> int:
        return len(self.parts)

    @property
    def nbytes(self) -> int:
        """Bytes of everything that a user would store: all files, their headers and the manifest."""
        return nbytes_at(self._sizes())

    def nbytes_at(self, level: int) -> int:
        """Bytes of everything that a loader of `level` must fetch. Raises LevelError."""
        return nbytes_at(self._sizes(), level)

    def _sizes(self) -> dict[str, int]:
        manifest = _manifest(self.geometry, self.config, self.report, None)
        lengths = [(file, name, len(data)) for file, name, data in _segments(self.side, zip(*self.parts, strict=True))]
        return artifact_sizes(manifest, lengths)


class Encoder:
    """Encodes one context: checks and measures it when made, then gives its chunks one by one.

    keys[i] [batch, heads, tokens, k_dim] and values[i] [batch, v_heads, tokens, v_dim] of layer i: one dtype (bfloat16, float16 or
    float32), any devices. layers: their geometry where they are not all of kind "full". Raises TensorError for tensors that
    do not fit together or are not finite (lossless keeps those).
    """

    def __init__(
        self,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        config: CacheGenConfig | None = None,
        *,
        layers: Sequence[LayerGeometry] | None = None,
        progress: bool = False,
    ):
        self.config = config or CacheGenConfig()
        self.geometry = _geometry(keys, values, layers)
        self.keys, self.values, self.progress = keys, values, progress
        self.columns = _columns(self.geometry)
        self.spans = _spans(self.geometry.tokens, self.config.chunk_tokens)
        self.codec: Codec
        if self.config.lossless:
            self.codec, self._bits = LosslessCodec.fit(self._rows, self.columns, self.config, keys[0].dtype)
        else:
            self.codec, self._bits = fit.fit(self._rows, self.columns, self.config)
        self._bytes = [len(self.codec.side_bytes())] + [0] * (self.codec.parts - 1)
        vectors = 2 * len(self.geometry.layers)
        self._errors = torch.zeros(self.codec.parts, vectors, dtype=torch.float64)
        self._energy = torch.zeros(vectors, dtype=torch.float64)

    def _rows(self) -> Iterator[tuple[Tensor, Span]]:
        for span in self.spans:
            yield _gather(self.keys, self.values, span), span

    def chunks(self) -> Iterator[list[bytes]]:
        """The bytes of every part, chunk by chunk."""
        for rows, span in tqdm(self._rows(), "encode", len(self.spans), unit="chunk", disable=not self.progress):
            parts = self.codec.encode(rows, span)
            for part, data in enumerate(parts):
                self._bytes[part] += len(data)
            if self.config.measure:
                self._measure(rows.cpu(), span)
            yield parts

    def _measure(self, rows: Tensor, span: Span) -> None:
        exact, owner = rows.double(), self.columns.vectors
        self._energy.index_add_(0, owner, exact.square().nan_to_num().sum(0))
        for level, decoded in enumerate(self.codec.approximations(rows, span)):
            difference = decoded.to(rows.dtype).double().sub_(exact).nan_to_num_()
            self._errors[level].index_add_(0, owner, difference.square_().sum(0))

    def report(self) -> dict[str, Any]:
        """What encoding cost, complete once `chunks` is exhausted; every list has one number per level."""
        elements = self.geometry.elements
        sizes = torch.tensor(self._bytes).cumsum(0).tolist()
        vectors = torch.zeros(self._bits.shape[0], len(self._energy), dtype=torch.float64)
        bits = vectors.index_add_(1, self.columns.vectors, self._bits).cumsum(0)
        errors = (self._errors / self._energy.clamp_min(1e-300)).sqrt()
        layers = []
        for index, layer in enumerate(self.geometry.layers):
            row: dict[str, Any] = {}
            for offset, kind, channels in ((0, "k", layer.k_channels), (1, "v", layer.v_channels)):
                count = channels * self.geometry.batch * self.geometry.tokens
                row[f"{kind}_bits"] = [round(b / count, 4) for b in bits[:, 2 * index + offset].tolist()]
                if self.config.measure:
                    row[f"{kind}_error"] = [round(e, 6) for e in errors[:, 2 * index + offset].tolist()]
            layers.append(row)
        return {
            "elements": elements,
            "bytes_per_level": sizes,
            "bits_per_element": [round(8 * size / elements, 4) for size in sizes],
            "layers": layers,
        }


def encode_kv(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    config: CacheGenConfig | None = None,
    *,
    layers: Sequence[LayerGeometry] | None = None,
    progress: bool = False,
) -> EncodedContext:
    """Encodes keys and values (see `Encoder` for shapes and errors) in memory."""
    encoder = Encoder(keys, values, config, layers=layers, progress=progress)
    parts = tuple(zip(*encoder.chunks(), strict=True))
    return EncodedContext(encoder.geometry, encoder.config, encoder.codec.side_bytes(), parts, encoder.report())


def decode_kv(
    encoded: EncodedContext, level: int | None = None, device: torch.device | str | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """(keys, values) at `level` (default: the finest), in the dtype they had, on `device` (default: the CPU).

    Raises LevelError, TruncatedError or CorruptError.
    """
    level = _level(level, encoded.levels)
    codec = _codec(encoded.geometry, encoded.config, encoded.side)
    spans = _spans(encoded.geometry.tokens, encoded.config.chunk_tokens)
    return _decode(codec, encoded.geometry, spans, lambda c: [part[c] for part in encoded.parts[:level]], device, False)


def write(
    source: Encoder | EncodedContext,
    directory: str | os.PathLike[str],
    *,
    input_ids: Sequence[int] | None = None,
    fingerprint: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Writes an artifact into `directory`: whole, or not at all. Raises ArtifactExistsError where there is one already."""
    if input_ids is not None and len(input_ids) != source.geometry.tokens:
        raise TensorError(f"{len(input_ids)} input_ids for a cache of {source.geometry.tokens} tokens")
    if isinstance(source, Encoder):
        side, chunks = source.codec.side_bytes(), source.chunks()
    else:
        side, chunks = source.side, zip(*source.parts, strict=True)
    with ArtifactWriter(directory, overwrite=overwrite) as writer:
        for file, name, data in _segments(side, chunks):
            writer.add(file, name, data)
        if input_ids is not None:
            writer.add(TOKENS_FILE, INPUT_IDS, pack_input_ids(input_ids))
        report = source.report() if isinstance(source, Encoder) else source.report
        return writer.commit(_manifest(source.geometry, source.config, report, fingerprint))


class Artifact:
    """An artifact in a local directory; opening reads its manifest alone.

    Raises ArtifactNotFoundError, ManifestError, LimitError, UnsupportedFormatError; its methods TruncatedError and CorruptError too.
    """

    def __init__(self, path: str | os.PathLike[str], limits: Limits | None = None):
        self.path = path
        self.reader = Reader(LocalStore(path), limits or Limits())
        manifest = self.manifest = self.reader.manifest
        self.geometry = Geometry.from_dict(manifest.geometry)
        self.config = _config(manifest.codec)
        self.fingerprint = manifest.fingerprint
        self.report = manifest.report
        expected = [(span.first, span.tokens) for span in _spans(self.geometry.tokens, self.config.chunk_tokens)]
        if expected != list(manifest.chunks):
            raise ManifestError("the chunk table does not match the geometry's tokens and the codec's chunk_tokens")
        if manifest.levels != (1 if self.config.lossless else self.config.levels):
            raise ManifestError(f"the codec has {self.config.levels} levels, the files {manifest.levels}")
        if self.geometry.nbytes > self.reader.limits.max_decoded_bytes:
            raise LimitError(f"decoded, this cache has {self.geometry.nbytes} bytes: above the limit")
        ids = manifest.files.get(TOKENS_FILE)
        if ids and ids.segments[0].length != 8 * self.geometry.tokens:
            raise ManifestError("the number of input_ids is not the geometry's number of tokens")

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

    def _parts(self, chunk: int, level: int) -> list[bytes]:
        files = [BASE_FILE, *(refine_file(number) for number in range(1, level))]
        return [self.reader.read(self.manifest.segment(file, chunk_name(chunk))) for file in files]

    def _side(self) -> bytes:
        return self.reader.read(self.manifest.segment(BASE_FILE, SIDE))

    def read(self) -> EncodedContext:
        """Everything, verified, in memory."""
        chunks = [self._parts(chunk, self.levels) for chunk in range(len(self.manifest.chunks))]
        return EncodedContext(self.geometry, self.config, self._side(), tuple(zip(*chunks, strict=True)), self.report)

    def decode(
        self, level: int | None = None, device: torch.device | str | None = None, *, progress: bool = False
    ) -> tuple[list[Tensor], list[Tensor]]:
        """(keys, values) at `level` (default: the finest), read, verified and decoded chunk by chunk."""
        level = _level(level, self.levels)
        codec = _codec(self.geometry, self.config, self._side())
        spans = _spans(self.geometry.tokens, self.config.chunk_tokens)
        return _decode(codec, self.geometry, spans, lambda c: self._parts(c, level), device, progress)


def _segments(side: bytes, chunks: Iterator[Sequence[bytes]] | zip[tuple[bytes, ...]]) -> Iterator[tuple[str, str, bytes]]:
    yield BASE_FILE, SIDE, side
    for index, parts in enumerate(chunks):
        for part, data in enumerate(parts):
            yield (refine_file(part) if part else BASE_FILE), chunk_name(index), data


def _manifest(
    geometry: Geometry, config: CacheGenConfig, report: dict[str, Any], fingerprint: dict[str, Any] | None
) -> Manifest:
    chunks = tuple((span.first, span.tokens) for span in _spans(geometry.tokens, config.chunk_tokens))
    codec = {"config": config.to_dict(), "codebook": tables.SHIPPED_CODEBOOK}
    return Manifest(
        geometry=geometry.to_dict(), codec=codec, chunks=chunks, report=report, fingerprint=fingerprint, writer=WRITER
    )


def _config(codec: dict[str, Any]) -> CacheGenConfig:
    if codec.get("codebook") != tables.SHIPPED_CODEBOOK:
        raise ManifestError(f"codec.codebook is {codec.get('codebook')!r:.80}, expected {tables.SHIPPED_CODEBOOK!r}")
    if not isinstance(codec.get("config"), dict):
        raise ManifestError("codec.config must be an object")
    try:
        return CacheGenConfig.from_dict(codec["config"])
    except (ConfigError, TypeError) as error:
        raise ManifestError(f"codec.config: {error}") from error


def _codec(geometry: Geometry, config: CacheGenConfig, side: bytes) -> Codec:
    columns = _columns(geometry)
    if config.lossless:
        return LosslessCodec.from_bytes(side, columns, config, getattr(torch, geometry.dtype))
    return LossyCodec(columns, config, Side.from_bytes(side, len(columns), config))


def _level(level: int | None, levels: int) -> int:
    if level is None:
        return levels
    if not isinstance(level, int) or isinstance(level, bool) or not 1 <= level <= levels:
        raise LevelError(f"level must be a whole number from 1 to {levels} for this artifact, got {level!r}")
    return level


def _spans(tokens: int, chunk_tokens: int) -> list[Span]:
    return [Span(first, min(chunk_tokens, tokens - first), tokens) for first in range(0, tokens, chunk_tokens)]


def _geometry(keys: Sequence[Tensor], values: Sequence[Tensor], layers: Sequence[LayerGeometry] | None) -> Geometry:
    if not keys or len(keys) != len(values) or (layers is not None and len(layers) != len(keys)):
        raise TensorError(f"{len(keys)} keys and {len(values)} values; there must be one of each per layer, and a layer")
    found, first = [], keys[0]
    for index, (k, v) in enumerate(zip(keys, values, strict=True)):
        for name, x in (("keys", k), ("values", v)):
            if x.dim() != 4 or x.shape[0] != first.shape[0] or x.shape[2] != first.shape[2] or x.dtype != first.dtype:
                raise TensorError(
                    f"{name} of layer {index}: expected [{first.shape[0]}, heads, {first.shape[2]}, dim] in {first.dtype} "
                    f"as in layer 0's keys, got {list(x.shape)} in {x.dtype}"
                )
        shape = {"heads": k.shape[1], "k_dim": k.shape[3], "v_heads": v.shape[1], "v_dim": v.shape[3]}
        layer = LayerGeometry("full", **shape) if layers is None else layers[index]
        if any(getattr(layer, name) != value for name, value in shape.items()):
            raise TensorError(f"layer {index}: the tensors have {shape}, the geometry given says {layer}")
        found.append(layer)
    dtype = str(first.dtype).removeprefix("torch.")
    return Geometry(tuple(found), tokens=first.shape[2], batch=first.shape[0], dtype=dtype)


def _columns(geometry: Geometry) -> Columns:
    """Order of a chunk's columns: layer, K before V, batch, head, dim."""
    widths = [geometry.batch * n for layer in geometry.layers for n in (layer.k_channels, layer.v_channels)]
    vectors = torch.repeat_interleave(torch.arange(len(widths)), torch.tensor(widths))
    return Columns(vectors, (vectors // 2 * 3 // len(geometry.layers)))


def _gather(keys: Sequence[Tensor], values: Sequence[Tensor], span: Span) -> Tensor:
    """rows [tokens, columns] of a chunk, on layer 0's device."""
    device, tokens = keys[0].device, slice(span.first, span.first + span.tokens)
    pairs = (x for pair in zip(keys, values, strict=True) for x in pair)
    return torch.cat([x[:, :, tokens].permute(2, 0, 1, 3).reshape(span.tokens, -1).to(device) for x in pairs], 1)


def _decode(
    codec: Codec,
    geometry: Geometry,
    spans: Sequence[Span],
    parts_of: Callable[[int], list[bytes]],
    device: torch.device | str | None,
    progress: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    dtype, found = getattr(torch, geometry.dtype), []
    for layer in geometry.layers:
        for heads, dim in ((layer.heads, layer.k_dim), (layer.v_heads, layer.v_dim)):
            found.append(torch.empty(geometry.batch, heads, geometry.tokens, dim, dtype=dtype, device=device))
    widths = [x.shape[0] * x.shape[1] * x.shape[3] for x in found]
    for index, span in enumerate(tqdm(spans, "decode", unit="chunk", disable=not progress)):
        rows = codec.decode(parts_of(index), span).to(dtype)
        for x, columns in zip(found, rows.split(widths, 1), strict=True):
            shaped = columns.reshape(span.tokens, x.shape[0], x.shape[1], x.shape[3]).permute(1, 2, 0, 3)
            x[:, :, span.first : span.first + span.tokens] = shaped
    return found[::2], found[1::2]
