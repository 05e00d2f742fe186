"""The paper's coder: the same symbols through torchac's arithmetic coder (an optional extra, GPL-3.0, never vendored).

Implementation notes:
1. torchac codes with 16-bit cumulative frequencies in which every symbol must be possible. Every symbol gets 1 plus its
   share of the rest, which costs 0.006 bits per symbol at 256 symbols.
2. The decoder of torchac reads zeros past the end of a stream, and decodes any bytes without an error. So a stream ends
   with a CRC-32 of its symbols.

    stream = torchac's bytes; u32 CRC-32 of the tile's symbols [tokens, channels]        little-endian
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hf_cachegen.codec.rans_reference import TILE_COLUMNS, Side
from hf_cachegen.errors import CorruptError, MissingExtraError, TensorError, TruncatedError

PRECISION_BITS = 16
_CRC = struct.Struct("<I")
Array = NDArray[Any]


def _torchac() -> Any:
    """Import torchac, which compiles itself at the first import. Raises MissingExtraError."""
    try:
        return import_module("torchac")
    except Exception as error:  # a failed build can raise any class
        message = "coder='torchac' needs torchac, ninja and a C++ compiler: pip install 'hf_cachegen[torchac]'"
        raise MissingExtraError(f"{message} (importing torchac failed: {error})") from error


def _cumulative(frequencies: Array, prob_bits: int) -> Array:
    """Return cumulative frequencies, int64 [tables, symbols + 1], strictly ascending from 0 to 2^16."""
    symbols = frequencies.shape[1]
    below = np.pad(frequencies.astype(np.int64).cumsum(1), ((0, 0), (1, 0)))
    return np.arange(symbols + 1) + (below * ((1 << PRECISION_BITS) - symbols) >> prob_bits)


def _table_of(first: int, shape: tuple[int, ...], side: Side) -> Array:
    """Return the table of every symbol, [tokens, width], of the tile that begins at channel `first`.

    Raises:
        ValueError: A table id or a context is out of range.
    """
    tokens, width = shape
    ids = side.table_ids[first : first + width].astype(np.int64)
    if (ids >= len(side.frequencies)).any():
        raise ValueError("a table id is out of range")
    if side.contexts is None:
        return np.broadcast_to(ids[:, 0], (tokens, width))
    contexts = side.contexts[:, first : first + width].astype(np.int64)
    if (contexts > 2).any():
        raise ValueError("a context is not 0, 1 or 2")
    return np.take_along_axis(np.broadcast_to(ids, (tokens, width, 3)), contexts[:, :, None], axis=2)[:, :, 0]


def _cdf(cumulative: Array, table: Array) -> torch.Tensor:
    """Return int16 [tokens, width, symbols + 1]; the upper bound 2^16 wraps to 0, as torchac expects."""
    return torch.from_numpy(cumulative.astype(np.uint16).view(np.int16)[table])


def encode(symbols: Array, side: Side) -> list[bytes]:
    """Encode uint8 [tokens, channels] to one stream per tile. Raises TensorError, MissingExtraError."""
    torchac = _torchac()
    cumulative = _cumulative(side.frequencies, side.prob_bits)
    frequencies = np.zeros((len(side.frequencies), 256), dtype=np.int64)
    frequencies[:, : side.frequencies.shape[1]] = side.frequencies
    streams = []
    for tile, first in enumerate(range(0, symbols.shape[1], TILE_COLUMNS)):
        mine = np.ascontiguousarray(symbols[:, first : first + TILE_COLUMNS])
        try:
            table = _table_of(first, mine.shape, side)
            if not frequencies[table, mine].all():
                raise ValueError("a symbol has no frequency in its table")
        except ValueError as error:
            raise TensorError(f"tile {tile} of the section cannot be encoded: {error}") from error
        coded = torchac.encode_int16_normalized_cdf(_cdf(cumulative, table), torch.from_numpy(mine.astype(np.int16)))
        streams.append(coded + _CRC.pack(zlib.crc32(mine.tobytes())))
    return streams


def decode(streams: Sequence[memoryview], tokens: int, side: Side) -> Array:
    """Decode one stream per tile to uint8 [tokens, channels]. Raises TruncatedError, CorruptError, MissingExtraError.
    """
    torchac = _torchac()
    cumulative = _cumulative(side.frequencies, side.prob_bits)
    symbols = np.empty((tokens, len(side.table_ids)), dtype=np.uint8)
    for tile, stream in enumerate(streams):
        if len(stream) < _CRC.size:
            found = f"expected a checksum of {_CRC.size} bytes, got {len(stream)} bytes"
            raise TruncatedError(f"tile {tile} of the section cannot be decoded: {found}")
        mine = symbols[:, tile * TILE_COLUMNS : (tile + 1) * TILE_COLUMNS]
        try:
            table = _table_of(tile * TILE_COLUMNS, mine.shape, side)
        except ValueError as error:
            raise CorruptError(f"tile {tile} of the section cannot be decoded: {error}") from error
        coded, checksum = bytes(stream[: -_CRC.size]), stream[-_CRC.size :]
        mine[:] = torchac.decode_int16_normalized_cdf(_cdf(cumulative, table), coded).numpy()
        if zlib.crc32(mine.tobytes()) != _CRC.unpack(checksum)[0]:
            raise CorruptError(f"tile {tile} of the section cannot be decoded: the checksum of its symbols is wrong")
    return symbols
