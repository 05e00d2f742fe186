"""Encryption at rest: artifacts that only the holder of a secret key can read.

Each file NAME becomes NAME.sealed:

    magic "cgseal01" | salt [32] | size of the plain file, u64 little-endian | blocks
    block i = AES-256-GCM of 64 KiB (the last one fewer), 16 bytes longer; nonce = i as 12 bytes, little-endian
    its key = HKDF-SHA256(secret key, salt, "hf_cachegen seal 1" NUL name NUL size)

The salt is random, so no key and nonce are used twice. The key of a file depends on its name and size, and the nonce on
the position, so a block that was moved, renamed, cut or combined from two files does not open. Each block opens by
itself, so ranges can be read. The local cache keeps the blocks that have opened, sealed, under the salt of their file.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_cachegen.artifact import MANIFEST_FILE, PROFILE_FILE, SIGNATURE_FILE, Reader, Segment, Store
from hf_cachegen.artifact.store import output_path
from hf_cachegen.artifact.writer import finish_interrupted, locked, make_folders, remove_empty
from hf_cachegen.errors import (
    ArtifactExistsError,
    ConfigError,
    CorruptError,
    MissingExtraError,
    OfflineError,
    TruncatedError,
)
from hf_cachegen.stores.local import LocalStore, open_folder, read_key_file
from hf_cachegen.stores.segment_cache import SegmentCache

SUFFIX = ".sealed"
_PARTIAL = f"{SUFFIX}.partial"
"""Ends the name of a file that is being written. No name of a plain file ends so."""
KEY_BYTES = 32
BLOCK_BYTES = 1 << 16
TAG_BYTES = 16
_MAGIC = b"cgseal01"
_SALT_BYTES = 32
_HEADER_BYTES = len(_MAGIC) + _SALT_BYTES + 8
_INFO = b"hf_cachegen seal 1"
_FETCH_AGAIN = "-"
"""A checksum that no range has, so that a store fetches the range again instead of returning the bytes it holds."""
Secret = bytes | str | os.PathLike[str]


@dataclass(frozen=True)
class _Opened:
    size: int
    header: bytes
    cipher: Any


@dataclass(frozen=True)
class Kept:
    """The sealed bytes of one artifact in the local cache.

    Attributes:
        cache: the local cache.
        origin: the location of the artifact.
        version: name of content that never changes (a commit). Without one, headers are fetched each time, except
            offline.
        refresh: do not read cached bytes.
    """

    cache: SegmentCache
    origin: str
    version: str | None = None
    refresh: bool = False

    def _header(self, name: str) -> str:
        return f"sealed header of {name}, {self.version or 'last seen'}"

    def header(self, name: str) -> bytes | None:
        """Return the header of a sealed file, not verified; None where the cache lacks it."""
        return None if self.refresh else self.cache.noted(self.origin, self._header(name))

    def range(self, opened: _Opened, name: str, position: int, count: int) -> bytes | None:
        """Return a range of a sealed file, not verified; None where the cache lacks it."""
        found = None if self.refresh else self.cache.noted(self.origin, _range_key(opened, name, position, count))
        return found if found is not None and len(found) == count else None

    def has(self, opened: _Opened, name: str, position: int, count: int) -> bool:
        """Report whether `range` is likely to find it."""
        return not self.refresh and self.cache.has_note(self.origin, _range_key(opened, name, position, count))

    def keep(self, opened: _Opened, name: str, position: int, data: bytes) -> None:
        """Keep a range that has opened, and the header of its file."""
        self.cache.note(self.origin, _range_key(opened, name, position, len(data)), data)
        self.cache.note(self.origin, self._header(name), opened.header)


def _range_key(opened: _Opened, name: str, position: int, count: int) -> str:
    return f"{count} sealed bytes at {position} of {name}, {opened.header.hex()}"


class SealedStore(Store):
    """The plain files of a sealed artifact. Threads may share it if they may share `store`.

    Args:
        store: the store of the sealed files; None to read the local cache alone.
        key: 32 bytes, or the path of a file that holds them.
        kept: the local cache of sealed ranges; None for no cache.

    Raises:
        ConfigError: the key cannot be read, or has another length.
        MissingExtraError: `cryptography` is not installed.
        CorruptError: when read: a block does not open with this key.
        OfflineError: when read: `store` is None, and the cache lacks the range.
    """

    def __init__(self, store: Store | None, key: Secret, kept: Kept | None = None) -> None:
        self.store, self.kept = store, kept
        self._key = _secret(key)
        _cryptography()
        self._opened: dict[str, _Opened] = {}

    def __str__(self) -> str:
        return str(self.store) if self.kept is None else self.kept.origin

    def size(self, name: str) -> int:
        """Return the length of the plain file in bytes."""
        return self._open(name).size

    def read(self, name: str, offset: int, length: int, xxh3: str | None = None) -> bytes:
        """Read exactly that range of the plain file."""
        opened = self._open(name)
        if offset < 0 or length < 0 or offset + length > opened.size:
            raise TruncatedError(f"{self}: expected {length} bytes at {offset}; {name} has {opened.size} bytes")
        if not length:
            return b""
        first = offset // BLOCK_BYTES
        plain = self._unseal(opened, name, first, *_sealed_range(opened.size, offset, length))
        start = offset - first * BLOCK_BYTES
        return plain[start : start + length]

    def prefetch(self, segments: Iterable[Segment]) -> None:
        """Begin to fetch the blocks of these segments."""
        if self.store is not None:
            inside = [s for s in segments if s.length and s.offset + s.length <= self.size(s.file)]
            self.store.prefetch([self.locate(s) for s in inside if not self._has(s)])

    def unwrap(self) -> Store | None:
        """Return the store of the sealed files; None where only the local cache is read."""
        return self.store

    def expect(self, name: str, nbytes: int) -> None:
        """Do nothing: ranges of the plain files are not ranges of the sealed ones."""

    def unfetched(self, segments: Sequence[Segment]) -> list[Segment]:
        """Return an empty list: ranges of the plain files are not ranges of the sealed ones."""
        return []

    def folder(self) -> None:
        """Return None: the plain files are in no folder."""
        return None

    def _has(self, segment: Segment) -> bool:
        sealed = _sealed_range(self.size(segment.file), segment.offset, segment.length)
        return self.kept is not None and self.kept.has(self._open(segment.file), segment.file, *sealed)

    def locate(self, segment: Segment) -> Segment:
        """Return the range of the sealed file that holds the blocks of a segment, which must not be empty."""
        sealed = _sealed_range(self.size(segment.file), segment.offset, segment.length)
        return Segment(segment.file + SUFFIX, segment.name, *sealed, "")

    def _unseal(self, opened: _Opened, name: str, first: int, position: int, count: int) -> bytes:
        from cryptography.exceptions import InvalidTag

        data = None
        for attempt in range(3):  # a cached range may be torn, and a fetched one damaged: fetch, then fetch again
            if attempt == 0:
                data = self.kept.range(opened, name, position, count) if self.kept else None
            elif self.store is not None or data is None:
                data = self._source(name).read(name + SUFFIX, position, count, None if attempt == 1 else _FETCH_AGAIN)
            if data is None:
                continue
            view = memoryview(data)
            blocks = (view[at : at + BLOCK_BYTES + TAG_BYTES] for at in range(0, count, BLOCK_BYTES + TAG_BYTES))
            try:
                plain = b"".join(
                    opened.cipher.decrypt(_nonce(first + index), block, None) for index, block in enumerate(blocks)
                )
            except InvalidTag:
                continue
            if attempt and self.kept:
                self.kept.keep(opened, name, position, data)
            return plain
        raise CorruptError(f"{self}: {name}{SUFFIX} is damaged, or was sealed with another key: pass the right key=")

    def _open(self, name: str) -> _Opened:
        if name not in self._opened:
            header = None
            if self.kept and (self.store is None or self.kept.version is not None):
                header = self.kept.header(name)
            if header is None:
                source = self._source(name)
                header = read_header(source, name)
            self._opened[name] = _Opened(_plain_size(header), header, _cipher(self._key, header, name))
        return self._opened[name]

    def _source(self, name: str) -> Store:
        if self.store is None:
            raise OfflineError(
                f"{self}: {name}{SUFFIX}, or the range of it that is needed, is not in the cache; load it once without "
                "local_files_only (and not in offline mode)"
            )
        return self.store


def read_header(store: Store, name: str) -> bytes:
    """Read the header of a sealed file, and compare the file's length with it.

    Args:
        store: the store of the sealed files.
        name: name of the plain file.

    Raises:
        TruncatedError: the file is shorter than a header.
        CorruptError: the file is not a sealed file, or has another length.
    """
    total = store.size(name + SUFFIX)
    if total < _HEADER_BYTES:
        raise TruncatedError(f"{store}: expected a header of {_HEADER_BYTES} bytes, {name}{SUFFIX} has {total} in all")
    header = store.read(name + SUFFIX, 0, _HEADER_BYTES)
    if not header.startswith(_MAGIC):
        raise CorruptError(f"{store}: {name}{SUFFIX} is not a sealed file; fetch it again")
    size = _plain_size(header)
    if total != _HEADER_BYTES + size + TAG_BYTES * -(-size // BLOCK_BYTES):
        raise CorruptError(
            f"{store}: {name}{SUFFIX} has {total} bytes, which is not the length for {size} plain ones; fetch it again"
        )
    return header


def sealed_names(directory: str | os.PathLike[str]) -> list[str]:
    """Return the plain names of the sealed files in a folder; an empty list where it holds no sealed artifact."""
    names = sorted(entry.name for entry in os.scandir(directory) if entry.name.endswith(SUFFIX))
    return [name.removesuffix(SUFFIX) for name in names] if MANIFEST_FILE + SUFFIX in names else []


def seal(directory: str | os.PathLike[str], out: str | os.PathLike[str], key: Secret) -> int:
    """Verify an artifact, and write it sealed. The manifest is written last: without it nothing in the folder opens.

    Args:
        directory: the folder of the artifact.
        out: the folder for the sealed files; created if needed.
        key: 32 bytes, or the path of a file that holds them.

    Returns:
        The number of bytes written.

    Raises:
        ConfigError: the key cannot be read, or has another length.
        ArtifactExistsError: `out` holds sealed files, or a plain artifact, or another writer is using it.
        ArtifactError: the artifact is damaged.
        OSError: the disk is full, or access is denied.
    """
    secret = _secret(key)
    _cryptography()
    store, target = open_folder(directory), output_path(out)
    reader = Reader(store)
    reader.verify()
    names = [*sorted(set(reader.sizes) - {MANIFEST_FILE}), MANIFEST_FILE]
    names = [name for name in (PROFILE_FILE, SIGNATURE_FILE) if (store.directory / name).is_file()] + names
    made = make_folders(target)
    try:
        finish_interrupted(target)
        with locked(target):
            _require_unused(target)
            return _write_sealed(store, names, target, secret)
    except BaseException:
        remove_empty(made)
        raise


def _require_unused(target: Path) -> None:
    """Raise ArtifactExistsError where a folder holds an artifact; remove what a killed process left in it."""
    found = sorted(path.name for path in target.iterdir())
    there = [name for name in found if name.endswith(SUFFIX)]
    if there:
        raise ArtifactExistsError(f"{target} holds {there[0]} already; choose another folder")
    if MANIFEST_FILE in found:
        raise ArtifactExistsError(f"{target} holds a plain artifact, which would stay readable; choose another folder")
    for name in found:
        if name.startswith(".") and name.endswith(_PARTIAL):
            (target / name).unlink()


def _write_sealed(store: LocalStore, names: Sequence[str], target: Path, key: bytes) -> int:
    made: list[Path] = []
    try:
        for name in names:
            partial = target / f".{name}{_PARTIAL}"
            with open(partial, "xb") as file:
                made.append(partial)
                for piece in _sealed(store, name, key):
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
        total = sum(path.stat().st_size for path in made)
        for name, path in zip(names, made, strict=True):
            os.rename(path, target / f"{name}{SUFFIX}")
    except OSError as error:
        if error.filename is None:
            error.filename = str(target)  # writing to an open file names no file
        raise
    finally:
        for path in made:
            path.unlink(missing_ok=True)
    return total


def _sealed(store: LocalStore, name: str, key: bytes) -> Iterator[bytes]:
    size, salt = store.size(name), secrets.token_bytes(_SALT_BYTES)
    header = _MAGIC + salt + size.to_bytes(8, "little")
    cipher = _cipher(key, header, name)
    yield header
    for index, at in enumerate(range(0, size, BLOCK_BYTES)):
        yield cipher.encrypt(_nonce(index), store.read(name, at, min(BLOCK_BYTES, size - at)), None)


def seal_bytes(data: bytes, name: str, key: Secret) -> bytes:
    """Return `data` sealed as a file of this name would be, for files that are written and read whole."""
    header = _MAGIC + secrets.token_bytes(_SALT_BYTES) + len(data).to_bytes(8, "little")
    cipher, view = _cipher(_secret(key), header, name), memoryview(data)
    starts = range(0, len(data), BLOCK_BYTES)
    blocks = (cipher.encrypt(_nonce(i), view[at : at + BLOCK_BYTES], None) for i, at in enumerate(starts))
    return header + b"".join(blocks)


def unseal_bytes(sealed: bytes, name: str, key: Secret) -> bytes:
    """Return the inverse of `seal_bytes`. Raises TruncatedError, CorruptError."""
    from cryptography.exceptions import InvalidTag

    header, body = sealed[:_HEADER_BYTES], memoryview(sealed)[_HEADER_BYTES:]
    if len(header) < _HEADER_BYTES:
        raise TruncatedError(f"{name}: a sealed file has at least {_HEADER_BYTES} bytes, this one has {len(header)}")
    size = _plain_size(header)
    if not header.startswith(_MAGIC) or len(body) != size + TAG_BYTES * -(-size // BLOCK_BYTES):
        raise CorruptError(f"{name} is no sealed file, or was cut")
    cipher, step = _cipher(_secret(key), header, name), BLOCK_BYTES + TAG_BYTES
    try:
        starts = range(0, len(body), step)
        return b"".join(cipher.decrypt(_nonce(i), body[at : at + step], None) for i, at in enumerate(starts))
    except InvalidTag as error:
        raise CorruptError(f"{name} was sealed with another key, or is damaged") from error


def _sealed_range(size: int, offset: int, length: int) -> tuple[int, int]:
    """Return (offset, length) in the sealed file of the blocks that hold a range, not empty, of the plain file."""
    first, last = offset // BLOCK_BYTES, (offset + length - 1) // BLOCK_BYTES
    plain = min(size, (last + 1) * BLOCK_BYTES) - first * BLOCK_BYTES
    return _HEADER_BYTES + first * (BLOCK_BYTES + TAG_BYTES), plain + (last - first + 1) * TAG_BYTES


def _nonce(block: int) -> bytes:
    return block.to_bytes(12, "little")


def _plain_size(header: bytes) -> int:
    return int.from_bytes(header[-8:], "little")


def _cipher(key: bytes, header: bytes, name: str) -> Any:
    hashes, hkdf, aead = _cryptography()
    info = b"\0".join([_INFO, name.encode(), header[-8:]])
    return aead.AESGCM(hkdf.HKDF(hashes.SHA256(), KEY_BYTES, header[len(_MAGIC) : -8], info).derive(key))


def _secret(key: Secret) -> bytes:
    if not isinstance(key, bytes):
        key = read_key_file(key)
    if len(key) != KEY_BYTES:
        raise ConfigError(
            f"expected a key of {KEY_BYTES} bytes, got {len(key)}; head -c {KEY_BYTES} /dev/urandom makes one"
        )
    return key


def _cryptography() -> tuple[Any, Any, Any]:
    try:
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.ciphers import aead
        from cryptography.hazmat.primitives.kdf import hkdf
    except ImportError as error:
        raise MissingExtraError("sealed artifacts need cryptography: pip install 'hf_cachegen[crypto]'") from error
    return hashes, hkdf, aead
