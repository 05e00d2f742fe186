"""The manifest: the content of an artifact, the position of each byte, and the checksums that verify it
(docs/format.md).

`cachegen.json` is JSON in one fixed spelling, so equal content gives equal bytes:

    {
    "chunks":[[0,512],[512,100]],
    "codec":{...},
    ...
    "xxh3":"0123456789abcdef0123456789abcdef"
    }

The last member is the XXH3-128 of all bytes before its line. It is compared before anything is parsed: a flipped bit or
a missing byte anywhere is a ManifestError. The checksum detects accidents, not attacks: an attacker can compute it too.
So all values are checked as untrusted: types, names, limits, and that the segments of each file tile it from the end of
its header to its last byte.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import xxhash

from hf_cachegen import strict_json
from hf_cachegen.artifact import checks, header
from hf_cachegen.artifact.checks import MANIFEST_FILE
from hf_cachegen.artifact.entries import NAME, STATES, STATES_FILE, TensorEntry, read_entries
from hf_cachegen.errors import LevelError, LimitError, ManifestError, UnsupportedFormatError

BASE_FILE = "base.safetensors"
TOKENS_FILE = header.TOKENS_FILE
TEXT_FILE = "text.safetensors"
"""The text of the context (hf_cachegen.artifact.text). No level needs it."""
INPUT_IDS = "input_ids"
SIGNATURE_FILE = "cachegen.sig"
"""Optional file beside the manifest, with its signature (hf_cachegen.stores.signed)."""
PROFILE_FILE = "cachegen_profile.safetensors"
"""A profile's name beside an artifact, in a model's folder, and in a repository (hf_cachegen.stores.profiles)."""
FORMAT_VERSION = 1
MEDIA_FEATURE = "media"
INDEXED = "indexed"
"""The feature that a geometry with indexed layers requires."""
FEATURES: frozenset[str] = frozenset(
    {"klt", "klt-chain", "klt-step", "klt-tables", MEDIA_FEATURE, "predict", "sinks", STATES, INDEXED}
)
"""Features that a manifest may require. klt: coefficients in the basis of a profile, which `codec` names; klt-chain:
each layer is predicted from the base of the layers before it; klt-step: the step is not the profile's; klt-tables: the
side information lists tables that differ from the profile's; predict: the loader computes the first layers and predicts
the others from them; sinks: some tokens have finer steps than the rest; states: a file of named tensors beside the keys
and values; media: the context holds pictures, videos or audio, which a prompt must share; indexed: values of some
layers end with an index key.
"""

_FILE_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,47}\.safetensors")
_REFINE_NAME = re.compile(r"refine-([1-9])\.safetensors")
_DIGEST = re.compile(r"[0-9a-f]{32}")
_TAIL_BYTES = len('"xxh3":""\n}\n') + 32


@dataclass(frozen=True)
class Limits:
    """The largest values that a reader accepts. They are checked before memory is allocated, and raise LimitError."""

    max_header_bytes: int = 1 << 20
    max_tokens: int = 1 << 24
    max_segments: int = 1 << 16
    max_segment_bytes: int = 1 << 32
    max_decoded_bytes: int = 1 << 40
    max_profile_bytes: int = 1 << 34
    max_text_bytes: int = 1 << 28


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Segment:
    """A byte range of a file: `offset` counts from the file's first byte; `xxh3` is the XXH3-128 in hex."""

    file: str
    name: str
    offset: int
    length: int
    xxh3: str


@dataclass(frozen=True)
class FileEntry:
    """A file: `size` in bytes, the digest of the header, and the segments that tile the rest of it in order."""

    size: int
    header_xxh3: str
    segments: tuple[Segment, ...]

    @property
    def header_bytes(self) -> int:
        """Length of the header. The data area begins there."""
        return self.segments[0].offset if self.segments else self.size


@dataclass(frozen=True)
class Manifest:
    """The description of an artifact, which is read before its streams.

    Attributes:
        geometry, codec, report, fingerprint: JSON objects that the layers above write and validate.
        chunks: (first token, tokens) of each chunk, in order and without gaps.
        files: The files by name.
        extra: JSON object that the user stores with the artifact.
        required: Features that a reader must support.
        states: The named tensors of `states.safetensors`, in the order of its segments.
        writer: Name and version of the program that wrote it.
        format_version: Version of the format.
    """

    geometry: dict[str, Any]
    codec: dict[str, Any]
    chunks: tuple[tuple[int, int], ...]
    files: dict[str, FileEntry] = field(default_factory=dict)
    fingerprint: dict[str, Any] | None = None
    report: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    states: tuple[TensorEntry, ...] = ()
    writer: str = ""
    format_version: int = FORMAT_VERSION

    @property
    def segments(self) -> tuple[Segment, ...]:
        """All segments: by file in alphabetical order, then in the order of their bytes."""
        return tuple(segment for _, entry in sorted(self.files.items()) for segment in entry.segments)

    @property
    def tokens(self) -> int:
        """Number of tokens of the whole context."""
        return sum(count for _, count in self.chunks)

    @property
    def levels(self) -> int:
        """Number of levels that the artifact serves."""
        return levels_of(self.files)

    def segment(self, file: str, name: str) -> Segment:
        """Return the segment of this name. Raises ManifestError if there is none."""
        try:
            return self._index[file, name]
        except KeyError:
            raise ManifestError(f"{MANIFEST_FILE} lists no segment {name!r} in {file!r}") from None

    @cached_property
    def _index(self) -> dict[tuple[str, str], Segment]:
        return {(segment.file, segment.name): segment for segment in self.segments}


def chunk_name(index: int) -> str:
    """Return the name of chunk `index`'s segment in the base and in every refinement."""
    return f"chunk-{index:05d}"


def refine_file(number: int) -> str:
    """Return the file of refinement `number`, from 1. With it a loader reaches level `number + 1`."""
    return f"refine-{number}.safetensors"


def levels_of(files: Collection[str]) -> int:
    """Return the number of levels that these files serve: the base, and one for each refinement."""
    return 1 + sum(1 for name in files if _REFINE_NAME.fullmatch(name))


def files_at(files: Collection[str], level: int) -> list[str]:
    """Return those of `files` that a loader of `level` (1: the base alone) fetches, sorted. Raises LevelError."""
    levels = levels_of(files)
    if not 1 <= level <= levels:
        raise LevelError(f"level must be from 1 to {levels} for this artifact, got {level}")
    beyond = {TEXT_FILE, *(refine_file(number) for number in range(level, levels))}
    return sorted(set(files) - beyond)


def nbytes_at(sizes: Mapping[str, int], level: int | None = None) -> int:
    """Return the bytes that a loader of `level` fetches, manifest included. None: all files, which a user stores."""
    return sum(sizes.values()) if level is None else sum(sizes[name] for name in files_at(sizes, level))


def check_file_name(name: Any) -> None:
    """Raise ManifestError for names that no file of an artifact has: paths, other suffixes, capitals."""
    checks.text(name, _FILE_NAME, "files")


def is_own_file(name: str) -> bool:
    """Return whether a file of this name in an artifact's directory can only be the artifact's, and may be replaced."""
    named = (MANIFEST_FILE, BASE_FILE, TOKENS_FILE, TEXT_FILE, STATES_FILE)
    return name in named or _REFINE_NAME.fullmatch(name) is not None


def digest(data: bytes | memoryview) -> str:
    """Return the XXH3-128 in hex, the only checksum of the format."""
    return xxhash.xxh3_128_hexdigest(data)


def tile(file: str, segments: Iterable[tuple[str, int, str]]) -> FileEntry:
    """Return the entry of a file whose segments (name, length, digest) follow each other after the header."""
    segments = list(segments)
    head = header.build(file, [(name, length) for name, length, _ in segments])
    placed, position = [], len(head)
    for name, length, xxh3 in segments:
        placed.append(Segment(file, name, position, length, xxh3))
        position += length
    return FileEntry(position, digest(head), tuple(placed))


def dumps(manifest: Manifest) -> bytes:
    """Return the bytes of `cachegen.json`, equal for equal manifests. Raises ManifestError for values that JSON cannot
    hold.
    """
    members = {
        "chunks": manifest.chunks,
        "codec": manifest.codec,
        "extra": manifest.extra,
        "files": {
            name: {
                "header_xxh3": entry.header_xxh3,
                "segments": [[s.name, s.offset, s.length, s.xxh3] for s in entry.segments],
                "size": entry.size,
            }
            for name, entry in manifest.files.items()
        },
        "fingerprint": manifest.fingerprint,
        "format_version": manifest.format_version,
        "geometry": manifest.geometry,
        "report": manifest.report,
        "required": manifest.required,
        **({STATES: [entry.to_dict() for entry in manifest.states]} if manifest.states else {}),
        "writer": manifest.writer,
    }
    try:
        lines = [f'"{name}":{strict_json.dumps(value)},\n' for name, value in members.items()]
        body = ("{\n" + "".join(lines)).encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise ManifestError(f"this manifest cannot be written as JSON: {error}") from error
    return body + _tail(body)


def _tail(body: bytes) -> bytes:
    return f'"xxh3":"{digest(body)}"\n}}\n'.encode("ascii")


def loads(data: bytes, limits: Limits = DEFAULT_LIMITS, features: Collection[str] = FEATURES) -> Manifest:
    """Parse and check the bytes of a `cachegen.json`, untrusted. Unknown members are ignored.

    Raises:
        ManifestError: The manifest is damaged, or contradicts itself.
        LimitError: A count or a size is above the limits.
        UnsupportedFormatError: A later format version, or a required feature that is not among `features`.
    """
    if len(data) > limits.max_header_bytes:
        raise LimitError(f"{MANIFEST_FILE} has {len(data)} bytes, the limit is {limits.max_header_bytes}")
    body, tail = data[:-_TAIL_BYTES], data[-_TAIL_BYTES:]
    if tail != _tail(body):
        raise ManifestError(f"{MANIFEST_FILE} is damaged or cut short: its checksum is wrong; fetch the artifact again")
    try:
        members = strict_json.loads(data)
    except ValueError as error:
        raise ManifestError(f"{MANIFEST_FILE} is not strict JSON: {error}") from error
    return _Members("", members).manifest(limits, features)


class _Members:
    """A JSON object, and its path in the manifest."""

    def __init__(self, where: str, value: Any) -> None:
        if not isinstance(value, dict):
            found = checks.short(value)
            raise ManifestError(f"{MANIFEST_FILE}: expected an object at {where or 'the top'}, got {found}")
        self.where, self.value = where, value

    def take(self, name: str, kind: type, default: Any = None) -> Any:
        """Return the member `name`, exactly of this `kind` (a bool is no int). Without a default it is required."""
        value = self.value.get(name, default)
        if type(value) is not kind:
            where = f"{self.where}.{name}" if self.where else name
            raise ManifestError(f"{MANIFEST_FILE}: expected {kind.__name__} at {where}, got {checks.short(value)}")
        return value

    def count(self, name: str) -> int:
        return checks.count(self.value.get(name), f"{self.where}.{name}")

    def digest(self, name: str) -> str:
        return checks.text(self.value.get(name), _DIGEST, f"{self.where}.{name}")

    def manifest(self, limits: Limits, features: Collection[str]) -> Manifest:
        version = self.take("format_version", int)
        if version > FORMAT_VERSION:
            raise UnsupportedFormatError(
                f"this release reads format version {FORMAT_VERSION}, got format version {version}; upgrade hf_cachegen"
            )
        if version < 1:
            raise ManifestError(f"{MANIFEST_FILE}: format_version must be at least 1, got {version}")
        required = self.take("required", list, [])
        unknown = [feature for feature in required if type(feature) is not str or feature not in features]
        if unknown:
            found = checks.short(unknown)
            raise UnsupportedFormatError(f"this release cannot read {found}; upgrade hf_cachegen to read it")
        chunks = _chunks(self.take("chunks", list), limits)
        files = _files(self.take("files", dict), limits)
        _check_parts(files, len(chunks))
        table = self.take(STATES, list, [])
        if bool(table) != (STATES_FILE in files) or (table and STATES not in required):
            raise ManifestError(
                f"{MANIFEST_FILE}: expected the table {STATES}, the file {STATES_FILE} and the required feature "
                f"{STATES!r} together, got some of them alone"
            )
        named = [(s.name, s.length) for s in files[STATES_FILE].segments] if table else []
        return Manifest(
            geometry=self.take("geometry", dict),
            codec=self.take("codec", dict),
            chunks=chunks,
            files=files,
            fingerprint=None if self.value.get("fingerprint") is None else self.take("fingerprint", dict),
            report=self.take("report", dict, {}),
            extra=self.take("extra", dict, {}),
            required=tuple(required),
            states=read_entries(table, named, limits.max_tokens, limits.max_decoded_bytes),
            writer=self.take("writer", str, ""),
            format_version=version,
        )


def _chunks(table: list[Any], limits: Limits) -> tuple[tuple[int, int], ...]:
    if len(table) > limits.max_segments:
        raise LimitError(f"{MANIFEST_FILE}: {len(table)} chunks, the limit is {limits.max_segments}")
    chunks, position = [], 0
    for index, row in enumerate(table):
        first, count = checks.row(row, 2, f"chunks[{index}]")
        if checks.count(first, f"chunks[{index}][0]") != position:
            raise ManifestError(f"{MANIFEST_FILE}: chunk {index} begins at token {first}, expected {position}")
        if checks.count(count, f"chunks[{index}][1]") == 0:
            raise ManifestError(f"{MANIFEST_FILE}: chunk {index} has no tokens")
        position += count
        if position > limits.max_tokens:
            raise LimitError(f"{MANIFEST_FILE}: more than {limits.max_tokens} tokens, the limit")
        chunks.append((first, count))
    if not chunks:
        raise ManifestError(f"{MANIFEST_FILE}: there are no chunks")
    return tuple(chunks)


def _files(table: dict[str, Any], limits: Limits) -> dict[str, FileEntry]:
    files, total = {}, 0
    for name, value in table.items():
        check_file_name(name)
        members = _Members(f"files[{name}]", value)
        rows = members.take("segments", list)
        total += len(rows)
        if total > limits.max_segments:
            raise LimitError(f"{MANIFEST_FILE}: more than {limits.max_segments} segments, the limit")
        segments = tuple(_segment(name, row, f"{members.where}.segments[{i}]", limits) for i, row in enumerate(rows))
        entry = FileEntry(members.count("size"), members.digest("header_xxh3"), segments)
        if len({segment.name for segment in segments}) != len(segments):
            raise ManifestError(f"{MANIFEST_FILE}: two segments of {name} have one name")
        if entry != tile(name, [(s.name, s.length, s.xxh3) for s in segments]):
            raise ManifestError(
                f"{MANIFEST_FILE}: the header and the segments of {name} do not tile its {entry.size} bytes"
            )
        if entry.header_bytes > limits.max_header_bytes:
            raise LimitError(f"{name}: a header of {entry.header_bytes} bytes, the limit is {limits.max_header_bytes}")
        files[name] = entry
    return files


def _segment(file: str, row: Any, where: str, limits: Limits) -> Segment:
    name, offset, length, xxh3 = checks.row(row, 4, where)
    if checks.count(length, f"{where}[2]") > limits.max_segment_bytes:
        raise LimitError(f"{MANIFEST_FILE}: {where} has {length} bytes, the limit is {limits.max_segment_bytes}")
    return Segment(
        file, checks.text(name, NAME, f"{where}[0]"), checks.count(offset, f"{where}[1]"), length,
        checks.text(xxh3, _DIGEST, f"{where}[3]"),
    )  # fmt: skip


def _check_parts(files: Mapping[str, FileEntry], chunks: int) -> None:
    """Check that the base and each refinement hold every chunk once, in order, and that refinements have no gaps."""
    parts = [BASE_FILE, *(refine_file(number) for number in range(1, levels_of(files)))]
    expected = [chunk_name(index) for index in range(chunks)]
    for part in parts:
        if part not in files:
            raise ManifestError(f"{MANIFEST_FILE}: {part} is not among the files {sorted(files)}")
        if [s.name for s in files[part].segments if s.name.startswith("chunk-")] != expected:
            raise ManifestError(f"{MANIFEST_FILE}: {part} must hold chunk-00000 to {expected[-1]}, in order")
    if TOKENS_FILE in files:
        segments = files[TOKENS_FILE].segments
        if [s.name for s in segments] != [INPUT_IDS] or segments[0].length % header.INPUT_ID_BYTES:
            raise ManifestError(f"{MANIFEST_FILE}: {TOKENS_FILE} must hold {INPUT_IDS!r}, 8 bytes per token, alone")
