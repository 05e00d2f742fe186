"""Seals and signatures of block files, by the means of `stores/sealed.py` and `stores/signed.py`.

A seal (AES-256-GCM) hides a block from anyone who can read the directory or the location. A signature (Ed25519, at the
end of the file, within the seal) proves who made it. Checksums authenticate nothing: anyone who can write into a shared
location could plant keys and values, so blocks from there can be required to be signed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_cachegen.errors import SignatureError
from hf_cachegen.prefix_cache.block import SIGNATURE_MAGIC, Block, load, load_beginning, split_signature
from hf_cachegen.stores.sealed import Secret, seal_bytes, unseal_bytes
from hf_cachegen.stores.signed import KeyLike, require_signature, sign_bytes


@dataclass(frozen=True)
class Protection:
    """What is done to a block's bytes before they are written and after they are read.

    Attributes:
        key: 32 bytes, or the path of a file that holds them: seals every file; None for plain files.
        private_key: signs new blocks; None leaves them unsigned.
        public_key: required of blocks from other locations than the local directory; None accepts all.
    """

    key: Secret | None = field(default=None, repr=False)
    private_key: KeyLike | None = field(default=None, repr=False)
    public_key: KeyLike | None = None

    def wrap(self, data: bytes, key: bytes) -> bytes:
        """Return the bytes to store of a new block of this key."""
        if self.private_key is not None:
            data += SIGNATURE_MAGIC + sign_bytes(data, self.private_key)
        return data if self.key is None else seal_bytes(data, key.hex(), self.key)

    def parse(self, stored: bytes, key: bytes) -> Block:
        """Return the block of stored bytes of the local directory. Raises ArtifactError."""
        return load(self._plain(stored, key), key)

    def parse_foreign(self, stored: bytes, key: bytes) -> Block:
        """Return the block of bytes from another location. Raises ArtifactError, SignatureError if it is not signed."""
        plain = self._plain(stored, key)
        if self.public_key is not None:
            data, signature = split_signature(plain)
            if signature is None:
                raise SignatureError(f"block {key.hex()[:16]} is not signed; expected a signature of the public key")
            require_signature(data, signature, self.public_key, f"block {key.hex()[:16]}")
        return load(plain, key)

    @property
    def partial(self) -> bool:
        """Whether the beginning of a file can be proved: a seal and a signature cover the whole."""
        return self.key is None and self.public_key is None

    def parse_beginning(self, stored: bytes, key: bytes) -> Block:
        """Return the block of the beginning of a file from another location. Raises ArtifactError."""
        return load_beginning(stored, key)

    def _plain(self, stored: bytes, key: bytes) -> bytes:
        return stored if self.key is None else unseal_bytes(stored, key.hex(), self.key)
