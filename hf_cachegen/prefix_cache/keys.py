"""Keys of blocks: which stored block belongs to which tokens of which model.

A prompt is cut into blocks of a fixed number of tokens. The key of a block hashes its tokens together with the key of
the block before it, so one key stands for all tokens up to the end of its block. The first block is chained with the
salt, the hash of everything else that determines a stored block: the fingerprint of the model (configuration, weights,
dtype, adapters), the codec, the level and the block length. A lookup with another model, adapter or codec therefore
finds nothing, and no client has to name anything.
"""

from __future__ import annotations

import hashlib
import json
import sys
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

KEY_BYTES = 32
"""Length of a key, a SHA-256."""
_DOMAIN = b"hf_cachegen prefix cache 1\0"
"""Separates salts from every other use of SHA-256 in this package."""
FINGERPRINT_FIELDS = ("config", "weights", "dtype", "adapters", "checksum", "buffers", "adapter_checksums")
"""Fields of a fingerprint that determine a key or a value of the cache; the others are names for messages."""

NAMES = ("model_id", "transformers")
"""Fields of a family for messages and exports alone: the same weights under another name are the same model."""
PROBE = "probe"
"""Field of a family: what its model computed for some fixed tokens (`models.probe`). It is compared within rounding, so
it cannot be a part of the salt. Imported blocks have none."""


@dataclass(frozen=True)
class Family:
    """What all blocks of one model, codec and level share.

    Attributes:
        fields: plain JSON values: "fingerprint", "codec", "level", "profile", "block_tokens", and the NAMES.
    """

    fields: dict[str, Any]

    @property
    def text(self) -> str:
        """The fields as canonical JSON."""
        return json.dumps(self.fields, sort_keys=True, separators=(",", ":"))

    @property
    def salt(self) -> bytes:
        """The key that first blocks are chained with. Names are not part of it."""
        hashed = {name: value for name, value in self.fields.items() if name not in (*NAMES, PROBE)}
        text = json.dumps(hashed, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(_DOMAIN + text.encode()).digest()

    @property
    def block_tokens(self) -> int:
        """Tokens of a block."""
        return int(self.fields["block_tokens"])


def pack_tokens(tokens: Sequence[int]) -> bytes:
    """Return token ids as little-endian 64-bit integers."""
    packed = array("q", tokens)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_tokens(data: bytes) -> list[int]:
    """Return the inverse of `pack_tokens`."""
    ids = array("q", data)
    if sys.byteorder == "big":
        ids.byteswap()
    return ids.tolist()


def block_key(parent: bytes, packed: bytes) -> bytes:
    """Return the key of a block with these packed tokens that follows the block of key `parent`."""
    return hashlib.sha256(parent + packed).digest()


def checkpoint_key(key: bytes) -> bytes:
    """Return the key of the checkpoint of states at the end of the block of this key: a child without tokens."""
    return block_key(key, b"")


def chain(salt: bytes, tokens: Sequence[int], block_tokens: int) -> list[bytes]:
    """Return the keys of all whole blocks of a text, in order.

    Args:
        salt: the salt of the family.
        tokens: the token ids of the text.
        block_tokens: tokens of a block.
    """
    packed, width = memoryview(pack_tokens(tokens)), 8 * block_tokens
    keys, parent = [], salt
    for first in range(0, len(packed) - width + 1, width):
        parent = hashlib.sha256(parent + packed[first : first + width]).digest()
        keys.append(parent)
    return keys


def family_of(
    fingerprint: Mapping[str, Any], config: Mapping[str, Any], level: int | None, profile: str | None,
    block_tokens: int, probe: str | None = None,
) -> Family:  # fmt: skip
    """Return the family of blocks with these properties.

    Args:
        fingerprint: the model's fingerprint, as plain values.
        config: the codec's options, as plain values.
        level: how many levels are stored; None for all.
        profile: what names the profile's content; None where none is used.
        block_tokens: tokens of a block.
        probe: what the model computes for some fixed tokens; None where there is no model.
    """
    kept = {name: fingerprint.get(name) for name in FINGERPRINT_FIELDS}
    fields = {name: list(value) if isinstance(value, tuple) else value for name, value in kept.items()}
    found = {} if probe is None else {PROBE: probe}
    return Family({**found,
        "fingerprint": fields, "codec": dict(config), "level": level,
        "profile": profile, "block_tokens": block_tokens, **{name: fingerprint[name] for name in NAMES},
    })  # fmt: skip
