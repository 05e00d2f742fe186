"""The safetensors header of an artifact's file: what it must be, given the segments.

    file   = [0:8) length n of the JSON, u64 little-endian | [8:8+n) JSON, spaces up to a multiple of 8 | data area
    JSON   = {"chunk-00000":{"data_offsets":[0,42],"dtype":"U8","shape":[42]},...}, in the order of the data

There is no parser. The format lays down the header's every byte, so a reader builds the header that the manifest
implies and compares: nothing of a stranger's file is interpreted before its checksum is known to be right.
Any safetensors library reads the result.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

TOKENS_FILE = "tokens.safetensors"
"""The one file whose tensors are not U8 [length] but I64 [1, length / 8]."""
ALIGNMENT = 8
"""Bytes; the data area starts at a multiple of the widest item (I64), as in the safetensors library."""
INPUT_ID_BYTES = 8


def build(file: str, segments: Iterable[tuple[str, int]]) -> bytes:
    """The bytes before the data area of `file`, for segments (name, length in bytes) that follow each other."""
    tensors, position = {}, 0
    for name, length in segments:
        dtype, shape = ("I64", [1, length // INPUT_ID_BYTES]) if file == TOKENS_FILE else ("U8", [length])
        tensors[name] = {"data_offsets": [position, position + length], "dtype": dtype, "shape": shape}
        position += length
    text = json.dumps(tensors, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
