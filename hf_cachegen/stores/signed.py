"""Signatures: artifacts that only the holder of a private key can have made.

The checksums of the format find accidents and do not authenticate. A signature is a file beside the manifest:

    cachegen.sig = Ed25519 signature, 128 hex digits, newline, statement
    statement    = JSON {"ranges": [[file, offset, length, SHA-256], ...], "signed": "hf_cachegen artifact 1"}

The ranges are the manifest, and the header and the segments of each file. So each range that a reader asks for is
verified by itself, and a partial load verifies all that it reads. SignedStore refuses any other range.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hf_cachegen import strict_json
from hf_cachegen.artifact import MANIFEST_FILE, SIGNATURE_FILE, Reader, Store
from hf_cachegen.errors import ArtifactNotFoundError, ConfigError, LimitError, MissingExtraError, SignatureError
from hf_cachegen.stores.local import LocalStore, open_folder, read_key_file

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

MAX_SIGNATURE_BYTES = 16 << 20
_SIGNED = "hf_cachegen artifact 1"
_SIGNATURE = re.compile(rb"[0-9a-f]{128}\n")
KeyLike = bytes | str | os.PathLike[str]


class SignedStore(Store):
    """The signed files of a store.

    Args:
        store: the store of the artifact.
        public_key: 32 raw bytes, or the path of a PEM file.

    Raises:
        ConfigError: the key cannot be read.
        MissingExtraError: `cryptography` is not installed.
        SignatureError: the artifact is not signed with the private half of the key; when read: a range is not signed,
            or has other bytes.
    """

    signed: ClassVar[bool] = True

    def __init__(self, store: Store, public_key: KeyLike) -> None:
        self.store = store
        self._ranges = _statement(store, _public(public_key))
        self._sizes: dict[str, int] = {}
        for name, offset, length in self._ranges:
            self._sizes[name] = max(self._sizes.get(name, 0), offset + length)

    def __str__(self) -> str:
        return str(self.store)

    def size(self, name: str) -> int:
        """Return the length of the file in bytes, which must be the signed one (except of the signature itself)."""
        size = self.store.size(name)
        if name != SIGNATURE_FILE and self._sizes.get(name) != size:
            raise SignatureError(f"{self}: the signature does not cover {name} of {size} bytes")
        return size

    def read(self, name: str, offset: int, length: int, xxh3: str | None = None) -> bytes:
        """Read exactly that range, which must be a signed one."""
        data = self.store.read(name, offset, length, xxh3)
        if name != SIGNATURE_FILE and hashlib.sha256(data).hexdigest() != self._ranges.get((name, offset, length)):
            raise SignatureError(f"{self}: {length} bytes at {offset} of {name} are not what was signed")
        return data

    def unwrap(self) -> Store:
        """Return the store without the check."""
        return self.store


def sign(directory: str | os.PathLike[str], private_key: KeyLike) -> Path:
    """Verify an artifact, and write its signature `cachegen.sig` into its folder.

    Args:
        directory: the folder of the artifact.
        private_key: 32 raw bytes, or the path of a PEM file without a password.

    Returns:
        The path of the signature.

    Raises:
        ConfigError: the key cannot be read.
        ArtifactError: the artifact is damaged.
    """
    key = _private(private_key)
    store = open_folder(directory)
    reader = Reader(store)
    reader.verify()
    wanted = [(MANIFEST_FILE, 0, reader.sizes[MANIFEST_FILE])]
    for name, entry in sorted(reader.manifest.files.items()):
        wanted.append((name, 0, entry.header_bytes))
        wanted += [(name, segment.offset, segment.length) for segment in entry.segments]
    ranges = [[*signed, hashlib.sha256(store.read(*signed)).hexdigest()] for signed in wanted]
    statement = json.dumps({"ranges": ranges, "signed": _SIGNED}, separators=(",", ":")).encode()
    target = store.directory / SIGNATURE_FILE
    handle, name = tempfile.mkstemp(prefix=".", suffix=".partial", dir=store.directory)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(key.sign(statement).hex().encode() + b"\n" + statement)
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise
    return target


def read_signature(store: Store) -> bytes:
    """Return the bytes of `cachegen.sig`, not verified.

    Raises:
        ArtifactNotFoundError: there is none.
        LimitError: it is longer than every signature.
    """
    size = store.size(SIGNATURE_FILE)
    if size > MAX_SIGNATURE_BYTES:
        raise LimitError(f"{store}: {SIGNATURE_FILE} has {size} bytes, the limit is {MAX_SIGNATURE_BYTES}")
    return store.read(SIGNATURE_FILE, 0, size)


def require_current(directory: str | os.PathLike[str]) -> None:
    """Raise SignatureError unless the signature in an artifact's folder is of this artifact; its key is not checked."""
    manifest = Path(directory, MANIFEST_FILE).read_bytes()
    try:
        ranges = strict_json.loads(read_signature(LocalStore(directory)).partition(b"\n")[2])["ranges"]
        current = [MANIFEST_FILE, 0, len(manifest), hashlib.sha256(manifest).hexdigest()] in ranges
    except (ValueError, LookupError, TypeError):
        current = False
    if not current:
        raise SignatureError(f"{SIGNATURE_FILE} in {directory} is not of this artifact: sign it again, or remove it")


def sign_bytes(data: bytes, private_key: KeyLike) -> bytes:
    """Return the Ed25519 signature, 64 bytes, of `data`. Raises ConfigError for a key that is none."""
    return _private(private_key).sign(data)


def require_signature(data: bytes, signature: bytes, public_key: KeyLike, what: str) -> None:
    """Raise SignatureError unless `signature` of `data` was made with the private half of `public_key`."""
    from cryptography.exceptions import InvalidSignature

    try:
        _public(public_key).verify(signature, data)
    except InvalidSignature as error:
        raise SignatureError(f"{what} is not signed with this key") from error


def _statement(store: Store, key: Ed25519PublicKey) -> dict[tuple[str, int, int], str]:
    """Return the SHA-256 of each signed range; the file is parsed only after its signature was verified."""
    from cryptography.exceptions import InvalidSignature

    try:
        data = read_signature(store)
    except ArtifactNotFoundError as error:
        raise SignatureError(f"{store} is not signed: there is no {SIGNATURE_FILE}") from error
    head = _SIGNATURE.match(data)
    try:
        if head is None:
            raise InvalidSignature
        key.verify(bytes.fromhex(head[0].decode()), data[head.end() :])
    except InvalidSignature as error:
        raise SignatureError(f"{store} is not signed with this key") from error
    try:
        statement = strict_json.loads(data[head.end() :])
        if statement["signed"] == _SIGNED:
            return {(name, offset, length): sha256 for name, offset, length, sha256 in statement["ranges"]}
        found = repr(statement["signed"])
    except (ValueError, LookupError, TypeError):
        found = "no statement about an artifact"
    raise SignatureError(f"{store}: the key signed something else, {found:.80}")


def _public(key: KeyLike) -> Ed25519PublicKey:
    ed25519, serialization = _cryptography()
    if isinstance(key, bytes):
        return _checked(key, ed25519.Ed25519PublicKey.from_public_bytes, ed25519.Ed25519PublicKey)
    return _checked(read_key_file(key), serialization.load_pem_public_key, ed25519.Ed25519PublicKey)


def _private(key: KeyLike) -> Ed25519PrivateKey:
    ed25519, serialization = _cryptography()
    if isinstance(key, bytes):
        return _checked(key, ed25519.Ed25519PrivateKey.from_private_bytes, ed25519.Ed25519PrivateKey)
    load = partial(serialization.load_pem_private_key, password=None)
    return _checked(read_key_file(key), load, ed25519.Ed25519PrivateKey)


def _cryptography() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise MissingExtraError("signatures need cryptography: pip install 'hf_cachegen[crypto]'") from error
    return ed25519, serialization


def _checked(data: bytes, load: Callable[[bytes], Any], kind: type) -> Any:
    try:
        key = load(data)
    except (ValueError, TypeError) as error:  # never the data: it may be a private key
        raise ConfigError(f"expected an {kind.__name__}, as 32 bytes or a PEM file without a password") from error
    if not isinstance(key, kind):
        raise ConfigError(f"expected an {kind.__name__}, got a key of another kind")
    return key
