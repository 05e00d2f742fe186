"""Tensors <-> the parts of an artifact, in memory and chunk by chunk.

Keys and values are per-layer lists of [batch, heads, tokens, head_dim]. An `Encoder` gives the bytes of one chunk
after the other, `decode_chunks` takes them in the same way, so memory holds the tensors and one chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from hf_cachegen import __version__
from hf_cachegen.codec import fit, tables
from hf_cachegen.codec.chunk import Codec, Columns, LossyCodec, Side, Span
from hf_cachegen.codec.into import Target
from hf_cachegen.codec.klt import DIGEST_BYTES, KltCodec, has_sinks
from hf_cachegen.codec.lossless import LosslessCodec
from hf_cachegen.codec.sinks import FirstToken, find_sinks, without_first
from hf_cachegen.config import CacheGenConfig, TransformName
from hf_cachegen.container import BASE_FILE, Manifest, artifact_sizes, chunk_name, nbytes_at, refine_file
from hf_cachegen.errors import ConfigError, CorruptError, LevelError, TensorError, TruncatedError
from hf_cachegen.geometry import DTYPE_BYTES, Geometry, LayerGeometry
from hf_cachegen.profile import Profile

SIDE = "side"
"""Name of the segment with the side information, the first of the base file."""
MAX_LOSSLESS_TABLES = 256
WRITER = f"hf_cachegen {__version__}"


@dataclass(frozen=True)
class EncodedContext:
    """A context's KV cache, encoded, in memory.

    parts[p][c] are the bytes of chunk c in part p (0: the base, then the refinements); `report` says what it cost;
    `profile` is that of the klt transform, which is kept once for a model and not counted in any context's size.
    """

    geometry: Geometry
    config: CacheGenConfig
    side: bytes
    parts: tuple[tuple[bytes, ...], ...]
    report: dict[str, Any] = field(default_factory=dict)
    profile: Profile | None = None

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
        manifest = manifest_of(self.geometry, self.config, self.report, None, self.profile, self.side)
        lengths = [
            (file, name, len(data)) for file, name, data in segments_of(self.side, zip(*self.parts, strict=True))
        ]
        return artifact_sizes(manifest, lengths)


class Encoder:
    """Encodes one context: checks and measures it when made, then gives its chunks one by one.

    keys[i] [batch, heads, tokens, k_dim] and values[i] [batch, v_heads, tokens, v_dim] of layer i: one dtype
    (bfloat16, float16 or float32), any devices. config: default CacheGenConfig(). layers: their geometry where they
    are not all of kind "full". Raises TensorError for tensors that do not fit together or are not finite (lossless
    keeps those), ConfigError for klt without a profile, ProfileError for another model's.
    """

    def __init__(
        self,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        config: CacheGenConfig | None = None,
        profile: Profile | None = None,
        *,
        layers: Sequence[LayerGeometry] | None = None,
        progress: bool = False,
    ):
        self.config = config or CacheGenConfig()
        self.geometry = _geometry(keys, values, layers)
        self.keys, self.values, self.progress = keys, values, progress
        self.columns = _columns(self.geometry)
        self.spans = spans_of(self.geometry.tokens, self.config.chunk_tokens)
        if self.config.transform == "auto":
            self.config = replace(self.config, transform=self._best_transform(profile))
        self.profile = profile if self.config.transform == "klt" else None
        self.codec: Codec
        self._bits: Tensor | None = None
        if self.config.transform == "klt":
            self.codec = KltCodec.fit(self._rows, self.geometry, self.config, _required(profile), self._sinks)
        elif self.config.lossless:
            self.codec, self._bits = LosslessCodec.fit(self._rows, self.columns, self.config, keys[0].dtype)
        else:
            self.codec, self._bits = self._fitted(self._rows, self.config)
        self._bytes = [len(self.codec.side_bytes())] + [0] * (self.codec.parts - 1)
        vectors = 2 * len(self.geometry.layers)
        self._errors = torch.zeros(self.codec.parts, vectors, dtype=torch.float64)
        self._energy = torch.zeros(vectors, dtype=torch.float64)

    @cached_property
    def _sinks(self) -> Tensor:
        return find_sinks(self.keys)

    def _best_transform(self, profile: Profile | None) -> TransformName:
        """klt where there is a profile; else what codes two chunks of the context smaller at equal steps: a step twice
        as fine costs a bit a value, so bits + log2(step) compares what two transforms cost at their own steps.
        """
        if self.config.lossless:
            return "identity"
        if profile is not None:
            return "klt"
        tried = sorted({0, len(self.spans) // 2})
        tokens = sum(self.spans[index].tokens for index in tried)

        def rows() -> Iterator[tuple[Tensor, Span]]:
            return ((gather(self.keys, self.values, self.spans[index]), self.spans[index]) for index in tried)

        cost: dict[TransformName, float] = {}
        names: tuple[TransformName, ...] = ("delta", "identity")
        for name in names:
            codec, bits = self._fitted(rows, replace(self.config, transform=name))
            cost[name] = float(bits.sum() + tokens * codec.steps.log2().sum())
        return min(names, key=cost.__getitem__)

    def _fitted(self, chunks: fit.Chunks, config: CacheGenConfig) -> tuple[LossyCodec | FirstToken, Tensor]:
        """As `fit.fit`; identity keeps the first token apart, if that is a sink."""
        if config.transform == "delta" or 0 not in self._sinks:
            return fit.fit(chunks, self.columns, config)
        first = gather(self.keys, self.values, Span(0, 1, 1)).cpu()
        fit.require_finite(first, self.columns.vectors)
        codec, bits = fit.fit(without_first(chunks), self.columns, config)
        return FirstToken(codec, first[0]), bits

    def _rows(self) -> Iterator[tuple[Tensor, Span]]:
        for span in self.spans:
            yield gather(self.keys, self.values, span), span

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
        errors = (self._errors / self._energy.clamp_min(1e-300)).sqrt()
        bits = self._bits_by_vector()
        layers = []
        for index, layer in enumerate(self.geometry.layers):
            row: dict[str, Any] = {}
            for offset, kind, channels in ((0, "k", layer.k_channels), (1, "v", layer.v_channels)):
                count = channels * self.geometry.batch * self.geometry.tokens
                if bits is not None:
                    row[f"{kind}_bits"] = [round(b / count, 4) for b in bits[:, 2 * index + offset].tolist()]
                if self.config.measure:
                    row[f"{kind}_error"] = [round(e, 6) for e in errors[:, 2 * index + offset].tolist()]
            layers.append(row)
        found: dict[str, Any] = {
            "elements": elements,
            "bytes_per_level": sizes,
            "bits_per_element": [round(8 * size / elements, 4) for size in sizes],
            "layers": layers,
        }
        if self.profile is not None and (kl := self.profile.divergences) is not None:
            found["profile_kl"] = kl
        return found

    def _bits_by_vector(self) -> Tensor | None:
        """Bits up to each level, [levels, vectors]; a joint basis has none of its own for a layer."""
        if self._bits is None:
            return None
        totals = torch.zeros(self._bits.shape[0], len(self._energy), dtype=torch.float64)
        return totals.index_add_(1, self.columns.vectors, self._bits).cumsum(0)


def encode_kv(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    config: CacheGenConfig | None = None,
    profile: Profile | None = None,
    *,
    layers: Sequence[LayerGeometry] | None = None,
    progress: bool = False,
) -> EncodedContext:
    """Encodes keys and values (see `Encoder` for shapes and errors) in memory."""
    encoder = Encoder(keys, values, config, profile, layers=layers, progress=progress)
    parts, side = tuple(zip(*encoder.chunks(), strict=True)), encoder.codec.side_bytes()
    return EncodedContext(encoder.geometry, encoder.config, side, parts, encoder.report(), encoder.profile)


def decode_kv(
    encoded: EncodedContext, level: int | None = None, device: torch.device | str | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """(keys, values) at `level` (default: the finest), in the dtype they had, on `device` (default: the CPU).

    Raises LevelError, TruncatedError or CorruptError.
    """
    level = checked_level(level, encoded.levels)
    codec = codec_of(encoded.geometry, encoded.config, encoded.side, encoded.profile)
    spans = spans_of(encoded.geometry.tokens, encoded.config.chunk_tokens)
    return decode_chunks(
        codec, encoded.geometry, spans, lambda c: [part[c] for part in encoded.parts[:level]], device, False
    )


def segments_of(side: bytes, chunks: Iterable[Sequence[bytes]]) -> Iterator[tuple[str, str, bytes]]:
    """(file, name, bytes) of every segment, in the order of writing."""
    yield BASE_FILE, SIDE, side
    for index, parts in enumerate(chunks):
        for part, data in enumerate(parts):
            yield (refine_file(part) if part else BASE_FILE), chunk_name(index), data


def manifest_of(
    geometry: Geometry,
    config: CacheGenConfig,
    report: dict[str, Any],
    fingerprint: dict[str, Any] | None,
    profile: Profile | None,
    side: bytes,
) -> Manifest:
    """The manifest, its files not yet known."""
    codec: dict[str, Any] = {"config": config.to_dict(), "codebook": tables.SHIPPED_CODEBOOK}
    if profile is not None:
        codec["profile"] = profile.named.to_dict()
    return Manifest(
        geometry=geometry.to_dict(),
        codec=codec,
        chunks=tuple((span.first, span.tokens) for span in spans_of(geometry.tokens, config.chunk_tokens)),
        report=report,
        fingerprint=fingerprint,
        required=_features(geometry, config, profile, side),
        writer=WRITER,
    )


def _features(geometry: Geometry, config: CacheGenConfig, profile: Profile | None, side: bytes) -> tuple[str, ...]:
    """What a reader must know of beyond the first readers' formats (`container.manifest.FEATURES`)."""
    if profile is None:
        return ("sinks",) if not config.lossless and len(side) > _own_length(geometry, config) else ()
    if len(side) == DIGEST_BYTES:
        return ("klt",)
    return ("klt", "klt-tables", "sinks") if has_sinks(side, profile) else ("klt", "klt-tables")


def _required(profile: Profile | None) -> Profile:
    if profile is None:
        raise ConfigError(
            "transform='klt' needs a profile of the model: pass profile=, or learn one with learn_profile"
        )
    return profile


def side_lengths(geometry: Geometry, config: CacheGenConfig) -> range:
    """The lengths that the side information of such a cache can have: for identity with the first token or without."""
    columns = geometry.elements // geometry.tokens
    if config.transform == "klt":
        most = config.levels * (-(-columns // 8) + columns) + 4 * geometry.tokens
        return range(DIGEST_BYTES, DIGEST_BYTES + most + 1)
    if config.lossless:
        rest, table = 1 + columns * DTYPE_BYTES[geometry.dtype], 2 * tables.VALUE_SYMBOLS
        return range(rest + table, rest + MAX_LOSSLESS_TABLES * table + 1, table)
    length, first = _own_length(geometry, config), columns * DTYPE_BYTES[geometry.dtype]
    return range(length, length + 1) if config.transform == "delta" else range(length, length + first + 1, first)


def _own_length(geometry: Geometry, config: CacheGenConfig) -> int:
    """Of delta's and identity's side information, without the first token."""
    return geometry.elements // geometry.tokens * ((2 if config.transform == "delta" else 3) + config.levels)


def codec_of(geometry: Geometry, config: CacheGenConfig, side: bytes, profile: Profile | None) -> Codec:
    """The codec that wrote this side information. Raises CorruptError, TruncatedError, ProfileError.

    Nothing is built for any column before there are as many bytes as such columns take.
    """
    lengths = side_lengths(geometry, config)
    if len(side) not in lengths:
        message = f"the side information has {len(side)} bytes; that of this geometry has {lengths[0]} or more"
        raise (TruncatedError if len(side) < lengths[0] else CorruptError)(message)
    if config.transform == "klt":
        return KltCodec.from_side(side, geometry, config, _required(profile))
    columns = _columns(geometry)
    if config.lossless:
        return LosslessCodec.from_bytes(side, columns, config, getattr(torch, geometry.dtype))
    codec = LossyCodec(columns, config, Side.from_bytes(side[: lengths[0]], len(columns), config))
    if len(side) == lengths[0]:
        return codec
    return FirstToken(codec, torch.frombuffer(bytearray(side[lengths[0] :]), dtype=getattr(torch, geometry.dtype)))


def checked_level(level: int | None, levels: int) -> int:
    """`level`, or the finest for None. Raises LevelError."""
    if level is None:
        return levels
    if not isinstance(level, int) or isinstance(level, bool) or not 1 <= level <= levels:
        raise LevelError(f"level must be a whole number from 1 to {levels} for this artifact, got {level!r}")
    return level


def spans_of(tokens: int, chunk_tokens: int) -> list[Span]:
    """The chunks of a context."""
    return [Span(first, min(chunk_tokens, tokens - first), tokens) for first in range(0, tokens, chunk_tokens)]


def _geometry(keys: Sequence[Tensor], values: Sequence[Tensor], layers: Sequence[LayerGeometry] | None) -> Geometry:
    if not keys or len(keys) != len(values) or (layers is not None and len(layers) != len(keys)):
        raise TensorError(
            f"{len(keys)} keys and {len(values)} values; there must be one of each per layer, and a layer"
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
            raise TensorError(f"layer {index}: the tensors have {shape}, the geometry given says {layer}")
        found.append(layer)
    dtype = str(first.dtype).removeprefix("torch.")
    return Geometry(tuple(found), tokens=first.shape[2], batch=first.shape[0], dtype=dtype)


def _columns(geometry: Geometry) -> Columns:
    """Order of a chunk's columns: layer, K before V, batch, head, dim."""
    widths = [geometry.batch * n for layer in geometry.layers for n in (layer.k_channels, layer.v_channels)]
    vectors = torch.repeat_interleave(torch.arange(len(widths)), torch.tensor(widths))
    return Columns(vectors, (vectors // 2 * 3 // len(geometry.layers)))


def gather(keys: Sequence[Tensor], values: Sequence[Tensor], span: Span) -> Tensor:
    """rows [tokens, columns] of a chunk, on layer 0's device."""
    device, tokens = keys[0].device, slice(span.first, span.first + span.tokens)
    pairs = (x for pair in zip(keys, values, strict=True) for x in pair)
    return torch.cat([x[:, :, tokens].permute(2, 0, 1, 3).reshape(span.tokens, -1).to(device) for x in pairs], 1)


def decode_chunks(
    codec: Codec,
    geometry: Geometry,
    spans: Sequence[Span],
    parts_of: Callable[[int], list[bytes]],
    device: torch.device | str | None,
    progress: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """(keys, values) from the parts of each chunk, decoded one by one straight into their tensors."""
    found = empty_kv(geometry, [device] * len(geometry.layers))
    target = Target.layers(found)
    counted = enumerate(tqdm(spans, "decode", unit="chunk", disable=not progress))
    if isinstance(codec, LossyCodec):
        codec.decode_many(((parts_of(index), span, span.first) for index, span in counted), target)
    else:
        for index, span in counted:
            codec.decode_into(parts_of(index), span, target, span.first)
    return found[::2], found[1::2]


def empty_kv(geometry: Geometry, devices: Sequence[torch.device | str | None]) -> list[Tensor]:
    """Room for a cache: layer 0's keys, its values, layer 1's keys, ..., [batch, heads, tokens, dim] each. devices: of
    each layer.
    """
    dtype, found = getattr(torch, geometry.dtype), []
    for layer, device in zip(geometry.layers, devices, strict=True):
        for heads, dim in ((layer.heads, layer.k_dim), (layer.v_heads, layer.v_dim)):
            found.append(torch.empty(geometry.batch, heads, geometry.tokens, dim, dtype=dtype, device=device))
    return found


def scatter(rows: Tensor, found: Sequence[Tensor], span: Span) -> None:
    """The inverse of `gather`: puts a chunk's rows [tokens, columns] where they belong in `empty_kv`'s tensors."""
    widths = [x.shape[0] * x.shape[1] * x.shape[3] for x in found]
    for x, columns in zip(found, rows.split(widths, 1), strict=True):
        shaped = columns.reshape(span.tokens, x.shape[0], x.shape[1], x.shape[3]).permute(1, 2, 0, 3)
        x[:, :, span.first : span.first + span.tokens] = shaped
