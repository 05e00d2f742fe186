"""The safetensors header of an artifact's file, which follows from its segments.

    file   = [0:8) length n of the JSON, u64 little-endian | [8:8+n) JSON, spaces up to a multiple of 8 | data area
    JSON   = {"chunk-00000":{"data_offsets":[0,42],"dtype":"U8","shape":[42]},...}, in the order of the data

There is no parser. The format determines every byte of the header, so a reader builds the header that the manifest
implies and compares. No untrusted file is interpreted before its checksum is verified. Any safetensors library reads
the result.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

TOKENS_FILE = "tokens.safetensors"
"""The only file whose tensors are I64 [1, length / 8] instead of U8 [length]."""
ALIGNMENT = 8
"""Bytes. The data area starts at a multiple of the widest item (I64), as the safetensors library writes it."""
INPUT_ID_BYTES = 8


def build(file: str, segments: Iterable[tuple[str, int]]) -> bytes:
    """Return the bytes before the data area of `file`, for consecutive segments (name, length in bytes)."""
    tensors, position = {}, 0
    for name, length in segments:
        dtype, shape = ("I64", [1, length // INPUT_ID_BYTES]) if file == TOKENS_FILE else ("U8", [length])
        tensors[name] = {"data_offsets": [position, position + length], "dtype": dtype, "shape": shape}
        position += length
    text = json.dumps(tensors, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
