"""Encryption at rest: artifacts that only the holder of a secret key can read, wherever they lie.

Each file NAME becomes NAME.sealed:

    magic "cgseal01" | salt [32] | size of the plain file, u64 little-endian | blocks
    block i = AES-256-GCM of 64 KiB (the last one fewer), 16 bytes longer; nonce = i as 12 bytes, little-endian
    its key = HKDF-SHA256(secret key, salt, "hf_cachegen seal 1" NUL name NUL size)

The salt is random, so no key and nonce are used twice. Name, size and position are bound to the bytes: a block that
was moved, renamed, cut off or put together from two files does not open. Blocks open one by one: ranges stay ranges.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_cachegen.container import MANIFEST_FILE, Reader, Segment, Store
from hf_cachegen.container.reader import PrefetchingStore
from hf_cachegen.errors import (
    ArtifactExistsError,
    ArtifactNotFoundError,
    ConfigError,
    CorruptError,
    MissingExtraError,
    TruncatedError,
)
from hf_cachegen.stores.local import LocalStore
from hf_cachegen.stores.signed import SIGNATURE_FILE

SUFFIX = ".sealed"
KEY_BYTES = 32
BLOCK_BYTES = 1 << 16
TAG_BYTES = 16
_MAGIC = b"cgseal01"
_SALT_BYTES = 32
_HEADER_BYTES = len(_MAGIC) + _SALT_BYTES + 8
_INFO = b"hf_cachegen seal 1"
Secret = bytes | str | os.PathLike[str]


@dataclass(frozen=True)
class _Opened:
    size: int
    cipher: Any


class SealedStore:
    """The plain files of what is sealed in `store`. key: 32 bytes, or the path of a file that holds them.

    Raises CorruptError for what this key does not open, ConfigError for a key that is none, MissingExtraError without
    `cryptography`. Threads may share it as far as they may share the store.
    """

    def __init__(self, store: Store, key: Secret) -> None:
        self.store = store
        self._key = _secret(key)
        _cryptography()
        self._opened: dict[str, _Opened] = {}

    def __str__(self) -> str:
        return str(self.store)

    def size(self, name: str) -> int:
        """Length of the plain file in bytes."""
        return self._open(name).size

    def read(self, name: str, offset: int, length: int, xxh3: str | None = None) -> bytes:
        """Exactly that range of the plain file."""
        opened = self._open(name)
        if offset < 0 or length < 0 or offset + length > opened.size:
            raise TruncatedError(f"{name} has {opened.size} bytes; {length} at {offset} were asked for")
        if not length:
            return b""
        first = offset // BLOCK_BYTES
        plain = self._unseal(opened, name, first, *_sealed_range(opened.size, offset, length))
        start = offset - first * BLOCK_BYTES
        return plain[start : start + length]

    def prefetch(self, segments: Iterable[Segment]) -> None:
        """Has the blocks of these segments fetched ahead."""
        if isinstance(self.store, PrefetchingStore):
            sealed = []
            for s in segments:
                if s.length and s.offset + s.length <= self.size(s.file):
                    place = _sealed_range(self.size(s.file), s.offset, s.length)
                    sealed.append(Segment(s.file + SUFFIX, s.name, *place, ""))
            self.store.prefetch(sealed)

    def _unseal(self, opened: _Opened, name: str, first: int, position: int, count: int) -> bytes:
        from cryptography.exceptions import InvalidTag

        for _ in range(2):  # what was damaged on its way is fetched once more
            data = memoryview(self.store.read(name + SUFFIX, position, count))
            blocks = (data[at : at + BLOCK_BYTES + TAG_BYTES] for at in range(0, count, BLOCK_BYTES + TAG_BYTES))
            try:
                return b"".join(
                    opened.cipher.decrypt(_nonce(first + index), block, None) for index, block in enumerate(blocks)
                )
            except InvalidTag:
                continue
        raise CorruptError(f"{self}: {name}{SUFFIX} was sealed with another key, or is damaged")

    def _open(self, name: str) -> _Opened:
        if name not in self._opened:
            total = self.store.size(name + SUFFIX)
            if total < _HEADER_BYTES:
                raise TruncatedError(f"{self}: {name}{SUFFIX} has {total} bytes, less than its header")
            header = self.store.read(name + SUFFIX, 0, _HEADER_BYTES)
            size = int.from_bytes(header[-8:], "little")
            if not header.startswith(_MAGIC):
                raise CorruptError(f"{self}: {name}{SUFFIX} is no sealed file")
            if total != _HEADER_BYTES + size + TAG_BYTES * -(-size // BLOCK_BYTES):
                raise CorruptError(f"{self}: {name}{SUFFIX} of {total} bytes cannot hold {size}; fetch it again")
            self._opened[name] = _Opened(size, _cipher(self._key, header[len(_MAGIC) : -8], name, size))
        return self._opened[name]


def seal(directory: str | os.PathLike[str], out: str | os.PathLike[str], key: Secret) -> int:
    """Writes the artifact in `directory`, every byte of which is checked, sealed into the folder `out`; returns the
    bytes written. The manifest comes last: without it the folder holds nothing that opens.

    Raises ArtifactExistsError where sealed files stand already; ArtifactError, ConfigError.
    """
    secret = _secret(key)
    _cryptography()
    store, target = LocalStore(directory), Path(out)
    reader = Reader(store)
    reader.verify()
    names = [*sorted(set(reader.sizes) - {MANIFEST_FILE}), MANIFEST_FILE]
    try:
        store.size(SIGNATURE_FILE)
        names.insert(0, SIGNATURE_FILE)
    except ArtifactNotFoundError:
        pass
    target.mkdir(parents=True, exist_ok=True)
    there = sorted(path.name for path in target.iterdir() if path.name.endswith(SUFFIX))
    if there:
        raise ArtifactExistsError(f"{target} holds {there[0]} already; choose another folder")
    made: list[Path] = []
    try:
        for name in names:
            made.append(target / f".{name}.partial")
            with open(made[-1], "xb") as file:
                for piece in _sealed(store, name, secret):
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
        total = sum(path.stat().st_size for path in made)
        for name, path in zip(names, made, strict=True):
            os.rename(path, target / f"{name}{SUFFIX}")
    finally:
        for path in made:
            path.unlink(missing_ok=True)
    return total


def _sealed(store: LocalStore, name: str, key: bytes) -> Iterator[bytes]:
    size, salt = store.size(name), secrets.token_bytes(_SALT_BYTES)
    cipher = _cipher(key, salt, name, size)
    yield _MAGIC + salt + size.to_bytes(8, "little")
    for index, at in enumerate(range(0, size, BLOCK_BYTES)):
        yield cipher.encrypt(_nonce(index), store.read(name, at, min(BLOCK_BYTES, size - at)), None)


def _sealed_range(size: int, offset: int, length: int) -> tuple[int, int]:
    """(offset, length) within the sealed file of the blocks that hold a range, not empty, of the plain one."""
    first, last = offset // BLOCK_BYTES, (offset + length - 1) // BLOCK_BYTES
    plain = min(size, (last + 1) * BLOCK_BYTES) - first * BLOCK_BYTES
    return _HEADER_BYTES + first * (BLOCK_BYTES + TAG_BYTES), plain + (last - first + 1) * TAG_BYTES


def _nonce(block: int) -> bytes:
    return block.to_bytes(12, "little")


def _cipher(key: bytes, salt: bytes, name: str, size: int) -> Any:
    hashes, hkdf, aead = _cryptography()
    info = b"\0".join([_INFO, name.encode(), size.to_bytes(8, "little")])
    return aead.AESGCM(hkdf.HKDF(hashes.SHA256(), KEY_BYTES, salt, info).derive(key))


def _secret(key: Secret) -> bytes:
    if not isinstance(key, bytes):
        try:
            key = Path(key).read_bytes()
        except OSError as error:
            raise ConfigError(f"there is no key to be read at {os.fspath(key)!r}: {error.strerror}") from error
    if len(key) != KEY_BYTES:
        raise ConfigError(f"a key has {KEY_BYTES} bytes, got {len(key)}; head -c {KEY_BYTES} /dev/urandom makes one")
    return key


def _cryptography() -> tuple[Any, Any, Any]:
    try:
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.ciphers import aead
        from cryptography.hazmat.primitives.kdf import hkdf
    except ImportError as error:
        raise MissingExtraError("sealed artifacts need cryptography: pip install 'hf_cachegen[crypto]'") from error
    return hashes, hkdf, aead
