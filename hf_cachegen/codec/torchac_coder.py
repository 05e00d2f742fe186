"""The paper's coder: the same symbols through torchac's arithmetic coder (an optional extra, GPL-3.0, never vendored).

Twists:
1. torchac codes with 16-bit cumulative frequencies in which no symbol may be impossible: every symbol gets 1 and its share of
   the rest. That costs up to 0.6 % of the bits at 256 symbols.
2. Its decoder reads zeros past the end of a stream and turns any bytes into symbols, in silence. So a stream ends with a CRC-32
   of its symbols.

    stream = torchac's bytes; u32 CRC-32 of the tile's symbols [tokens, columns]        little-endian
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

from hf_cachegen.codec.rans_reference import TILE_COLUMNS
from hf_cachegen.errors import CorruptError, MissingExtraError, TensorError, TruncatedError

PRECISION_BITS = 16
_CRC = struct.Struct("<I")
Array = NDArray[Any]


def _torchac() -> Any:
    """torchac, which compiles itself when it is imported."""
    try:
        return import_module("torchac")
    except Exception as error:  # its build fails with whatever class the compiler driver likes
        message = "coder='torchac' needs torchac, ninja and a C++ compiler: pip install 'hf_cachegen[torchac]'"
        raise MissingExtraError(f"{message} (importing torchac failed: {error})") from error


def _cumulative(frequencies: Array, prob_bits: int) -> Array:
    """int64 [tables, symbols + 1] from 0 to 2^16, rising strictly."""
    symbols = frequencies.shape[1]
    below = np.pad(frequencies.astype(np.int64).cumsum(1), ((0, 0), (1, 0)))
    return np.arange(symbols + 1) + (below * ((1 << PRECISION_BITS) - symbols) >> prob_bits)


def _table_of(first: int, shape: tuple[int, int], table_ids: Array, contexts: Array | None, n_tables: int) -> Array:
    """[tokens, width]: the table of every symbol of the tile whose first column is `first`."""
    tokens, width = shape
    ids = table_ids[first : first + width].astype(np.int64)
    if (ids >= n_tables).any():
        raise IndexError("a table id names no table")
    if contexts is None:
        return np.broadcast_to(ids[:, 0], shape)
    chosen = contexts[:, first : first + width].astype(np.int64)
    if (chosen > 2).any():
        raise IndexError("a context is none of 0, 1, 2")
    return np.take_along_axis(np.broadcast_to(ids, (tokens, width, 3)), chosen[:, :, None], axis=2)[:, :, 0]


def _cdf(cumulative: Array, table: Array) -> torch.Tensor:
    """int16 [tokens, width, symbols + 1], the upper bound 2^16 wrapping to 0, as torchac wants it."""
    return torch.from_numpy(cumulative.astype(np.uint16).view(np.int16)[table])


def encode(symbols: Array, frequencies: Array, prob_bits: int, table_ids: Array, contexts: Array | None) -> list[bytes]:
    """Arguments as in `rans.encode`, checked there, as arrays."""
    torchac = _torchac()
    cumulative = _cumulative(frequencies, prob_bits)
    streams = []
    for tile, first in enumerate(range(0, symbols.shape[1], TILE_COLUMNS)):
        mine = np.ascontiguousarray(symbols[:, first : first + TILE_COLUMNS])
        try:
            table = _table_of(first, mine.shape, table_ids, contexts, len(frequencies))
            possible = bool(frequencies[table, mine].all())
        except IndexError as error:
            raise TensorError(f"tile {tile} of the section cannot be encoded: {error}") from error
        if not possible:
            raise TensorError(f"tile {tile} of the section cannot be encoded: a symbol has no frequency in its table")
        coded = torchac.encode_int16_normalized_cdf(_cdf(cumulative, table), torch.from_numpy(mine.astype(np.int16)))
        streams.append(coded + _CRC.pack(zlib.crc32(mine.tobytes())))
    return streams


def decode(
    streams: memoryview,
    tile_bytes: Sequence[int],
    tokens: int,
    frequencies: Array,
    prob_bits: int,
    table_ids: Array,
    contexts: Array | None,
) -> Array:
    """Arguments as in `rans.decode`, checked there, as arrays. Returns uint8 [tokens, columns]."""
    torchac = _torchac()
    cumulative = _cumulative(frequencies, prob_bits)
    symbols = np.empty((tokens, len(table_ids)), dtype=np.uint8)
    end = 0
    for tile, size in enumerate(tile_bytes):
        end += size
        if size < _CRC.size:
            raise TruncatedError(f"tile {tile} of the section cannot be decoded: {size} bytes hold no checksum")
        mine = symbols[:, tile * TILE_COLUMNS : (tile + 1) * TILE_COLUMNS]
        try:
            table = _table_of(tile * TILE_COLUMNS, mine.shape, table_ids, contexts, len(frequencies))
        except IndexError as error:
            raise CorruptError(f"tile {tile} of the section cannot be decoded: {error}") from error
        coded = bytes(streams[end - size : end - _CRC.size])
        mine[:] = torchac.decode_int16_normalized_cdf(_cdf(cumulative, table), coded).numpy()
        if zlib.crc32(mine.tobytes()) != _CRC.unpack(streams[end - _CRC.size : end])[0]:
            raise CorruptError(f"tile {tile} of the section cannot be decoded: its checksum is not that of its symbols")
    return symbols
