"""The file of one block: everything that decoding it takes, in one piece that is either whole or refused.

    magic "cgblock1" | length n of the header, u32 little-endian | XXH3-128 of the header [16]
    header [n], JSON  | segments, one after the other | optionally "cgsign01" and an Ed25519 signature [64]

    header = {"key", "parent", "depth", "family", "geometry", "config", "segments": [[name, length, XXH3-128], ...]}
    segments = "tokens" (int64 [block_tokens]), "side", then "part-0" (the base), "part-1", ... up to the stored level

A checkpoint of recurrent states is a file of the same form without tokens (`checkpoint.py`).

A block carries its side information (steps, tables) itself. Contexts share blocks, so no context could keep it for
them, and a block that is fetched or evicted alone stays readable. docs/prefix_cache.md says what that costs.

The header is believed only as far as it can be proved: the key must be the hash of the parent and the tokens, and
every segment must have its checksum. The signature covers all bytes before it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hf_cachegen import strict_json
from hf_cachegen.artifact.manifest import digest
from hf_cachegen.errors import CorruptError, LimitError, ManifestError, TruncatedError
from hf_cachegen.prefix_cache.keys import KEY_BYTES, Family, block_key, pack_tokens, unpack_tokens

MAGIC = b"cgblock1"
SIGNATURE_MAGIC = b"cgsign01"
SIGNATURE_BYTES = len(SIGNATURE_MAGIC) + 64
_DIGEST_BYTES = 16
_FIXED_BYTES = len(MAGIC) + 4 + _DIGEST_BYTES
MAX_HEADER_BYTES = 1 << 20
"""Bounds what is parsed before anything is proved; a header has a few kilobytes."""
MAX_PARTS = 3
"""Of a block: one for each level (`CacheGenConfig`)."""
MAX_STATES = 4096
"""Parts of a checkpoint: one for each state of a layer."""
MAX_DEPTH = 1 << 24


@dataclass(frozen=True)
class Block:
    """One encoded block.

    Attributes:
        key, parent: of this block and of the one before it; the parent of a first block is the salt of the family.
        depth: number of blocks before it.
        family: what it belongs to.
        tokens: its token ids; none in a checkpoint.
        geometry: the geometry of its tensors, as plain values.
        config: the codec's options, as plain values.
        side: the codec's side information.
        parts: the coded bytes, the base first, then refinements.
        missing: number of the finest refinements that were not fetched.
    """

    key: bytes
    parent: bytes
    depth: int
    family: Family
    tokens: tuple[int, ...]
    geometry: dict[str, Any]
    config: dict[str, Any]
    side: bytes
    parts: tuple[bytes, ...]
    missing: int = 0


def dump(block: Block) -> bytes:
    """Return the bytes of a block's file, without a signature."""
    named = [("tokens", pack_tokens(block.tokens)), ("side", block.side)]
    named += [(f"part-{index}", part) for index, part in enumerate(block.parts)]
    header = json.dumps(
        {
            "key": block.key.hex(), "parent": block.parent.hex(), "depth": block.depth, "family": block.family.fields,
            "geometry": block.geometry, "config": block.config,
            "segments": [[name, len(data), digest(data)] for name, data in named],
        },
        sort_keys=True, separators=(",", ":"),
    ).encode()  # fmt: skip
    fixed = MAGIC + len(header).to_bytes(4, "little") + bytes.fromhex(digest(header))
    return b"".join([fixed, header, *(data for _, data in named)])


def load(data: bytes, expected: bytes | None = None) -> Block:
    """Parse and prove the bytes of a block's file; a signature at its end is skipped (see `split_signature`).

    Args:
        data: the whole file.
        expected: the key that the block must have; None accepts any.

    Raises:
        TruncatedError: the file ends too early.
        CorruptError: it is not what was written, or another block.
        ManifestError: the header lacks a field or has one of another type.
        LimitError: a count is above the limits.
    """
    body, _ = split_signature(data)
    header, position = _header(body)
    return _proved(header, _segments(header, body, position), expected)


def load_beginning(data: bytes, expected: bytes) -> Block:
    """Parse and prove the beginning of a block's file, which ends with one of its parts.

    Args:
        data: the beginning.
        expected: the key that the block must have.

    Raises:
        ArtifactError: as `load` does.
    """
    header, position = _header(data)
    rows, end = _rows(header), position
    held = []
    for row in rows:
        end += row[1]
        if end > len(data):
            break
        held.append(row)
    end = position + sum(row[1] for row in held)
    block = _proved(header, _segments({**header, "segments": held}, data[:end], position), expected)
    return replace(block, missing=len(rows) - len(held))


def part_ends(head: bytes, read: Callable[[int, int], bytes]) -> list[int]:
    """Return the byte at which each part of a block's file ends, the base first.

    Args:
        head: the first bytes of the file.
        read: returns (first, length) of its bytes, for a header that is longer.

    Raises:
        ArtifactError: the file does not begin as a block's does.
    """
    length = int.from_bytes(head[len(MAGIC) : len(MAGIC) + 4], "little")
    missing = _FIXED_BYTES + length - len(head)
    if 0 < missing <= MAX_HEADER_BYTES and len(head) >= _FIXED_BYTES:
        head += read(len(head), missing)
    header, position = _header(head)
    ends = []
    for name, size, _ in _rows(header):
        position += size
        if name.startswith("part-"):
            ends.append(position)
    if not ends:
        raise ManifestError("a block's file has no parts")
    return ends


def _proved(header: dict[str, Any], segments: dict[str, bytes], expected: bytes | None) -> Block:
    """Return the block of a header and the segments that are at hand."""
    tokens = segments.pop("tokens")
    key, parent = _key(header, "key"), _key(header, "parent")
    if expected is not None and key != expected:
        raise CorruptError(f"expected block {expected.hex()[:16]}, found block {key.hex()[:16]}")
    if block_key(parent, tokens) != key:
        raise CorruptError(f"block {key.hex()[:16]} holds other tokens than its key says; it is recomputed")
    family = Family(header["family"])
    width, name = family.fields.get("block_tokens"), family.fields.get("model_id")
    if type(width) is not int or width < 1 or type(name) is not str:
        raise ManifestError(
            f"expected a number of block_tokens and a model_id in the family of block {key.hex()[:16]}, "
            f"found {width!r:.40} and {name!r:.40}; the block is recomputed"
        )
    # A child without tokens is a checkpoint of states (checkpoint.py); its key is no block's.
    if tokens and len(tokens) != 8 * width:
        raise ManifestError(f"expected {width!r:.40} tokens of 8 bytes, found {len(tokens)} bytes of them")
    depth = header["depth"]
    if not 0 <= depth < MAX_DEPTH or (depth == 0 and parent != family.salt):
        raise ManifestError(f"block {key.hex()[:16]} claims number {depth}, which its parent contradicts")
    side = segments.pop("side")
    names = [f"part-{index}" for index in range(len(segments))]
    if not names or list(segments) != names:
        raise ManifestError(f"expected the segments tokens, side, {', '.join(names)}; found {list(segments)[:8]}")
    parts = tuple(segments.values())
    return Block(
        key, parent, depth, family, tuple(unpack_tokens(tokens)), header["geometry"], header["config"], side, parts
    )


def split_signature(data: bytes) -> tuple[bytes, bytes | None]:
    """Return the bytes that a signature covers, and the signature of 64 bytes if there is one."""
    at = len(data) - SIGNATURE_BYTES
    if at >= _FIXED_BYTES and data[at : at + len(SIGNATURE_MAGIC)] == SIGNATURE_MAGIC:
        header, position = _header(data)
        if position + sum(length for _, length, _ in _rows(header)) == at:
            return data[:at], data[at + len(SIGNATURE_MAGIC) :]
    return data, None


def _header(data: bytes) -> tuple[dict[str, Any], int]:
    """Return the parsed header and the position of the first segment."""
    if len(data) < _FIXED_BYTES:
        raise TruncatedError(f"a block's file has at least {_FIXED_BYTES} bytes, this one has {len(data)}")
    if data[: len(MAGIC)] != MAGIC:
        raise CorruptError(f"expected a block's file, which begins with {MAGIC!r}, found {data[: len(MAGIC)]!r}")
    length = int.from_bytes(data[len(MAGIC) : len(MAGIC) + 4], "little")
    if length > MAX_HEADER_BYTES:
        raise LimitError(f"the header claims {length} bytes, the limit is {MAX_HEADER_BYTES}")
    text = data[_FIXED_BYTES : _FIXED_BYTES + length]
    if len(text) < length:
        raise TruncatedError(f"the header has {len(text)} of {length} bytes")
    if digest(text) != data[len(MAGIC) + 4 : _FIXED_BYTES].hex():
        raise CorruptError("the header of a block is not what was written")
    try:
        header = strict_json.loads(text)
    except ValueError as error:
        raise ManifestError(f"the header of a block is no JSON: {error}") from error
    kinds = {"key": str, "parent": str, "depth": int, "family": dict, "geometry": dict, "config": dict,
             "segments": list}  # fmt: skip
    wrong = [name for name, kind in kinds.items() if not isinstance(header, dict) or type(header.get(name)) is not kind]
    if wrong:
        raise ManifestError(f"the header of a block lacks {wrong}, or has values of another type there")
    return header, _FIXED_BYTES + length


def _rows(header: dict[str, Any]) -> list[Sequence[Any]]:
    """Return (name, length, checksum) of every segment."""
    rows = header["segments"]
    if len(rows) > 2 + MAX_STATES:
        raise LimitError(f"a block has {len(rows)} segments, the limit is {2 + MAX_STATES}")
    for row in rows:
        if not isinstance(row, list) or [type(value) for value in row] != [str, int, str] or row[1] < 0:
            raise ManifestError(f"expected a segment [name, length, checksum], found {row!r:.80}")
    if len(rows) > 2 + MAX_PARTS and any(row[0] == "tokens" and row[1] for row in rows):
        raise LimitError(f"a block of tokens has {len(rows) - 2} parts, the limit is {MAX_PARTS}")
    return rows


def _segments(header: dict[str, Any], data: bytes, position: int) -> dict[str, bytes]:
    rows, found = _rows(header), {}
    end = position + sum(length for _, length, _ in rows)
    if len(data) != end:
        error = TruncatedError if len(data) < end else CorruptError
        raise error(f"a block's file has {len(data)} bytes, its header says {end}")
    for name, length, checksum in rows:
        found[name] = data[position : position + length]
        if digest(found[name]) != checksum:
            raise CorruptError(f"segment {name!r:.40} of a block is not what was written; the block is recomputed")
        position += length
    if len(found) != len(rows) or not {"tokens", "side"} <= found.keys():
        raise ManifestError(f"expected the segments tokens, side and parts, found {[row[0] for row in rows][:8]}")
    return found


def _key(header: dict[str, Any], name: str) -> bytes:
    try:
        key = bytes.fromhex(header[name])
    except ValueError as error:
        raise ManifestError(f"{name} of a block is no key: {header[name]!r:.80}") from error
    if len(key) != KEY_BYTES:
        raise ManifestError(f"{name} of a block has {len(key)} bytes, expected {KEY_BYTES}")
    return key
