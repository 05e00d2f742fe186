"""The rANS coder (Duda 2013, arXiv:1311.2540), slow and readable: the definition of a stream, in numpy.

The native coder gives the same bytes. Conventions:

1. Direction: the encoder runs backwards, last symbol first, so that the decoder reads forwards.
2. Bounds: states are 32-bit, in [2^15, 2^31); words are 16-bit. If the first states are in range, so are all others,
   whatever the words are: a decoder checks nothing else on its way.
3. Interleave: a tile of w columns has up to 32 lanes of one state each. Lane l owns the per_lane = ceil(w / 32) columns
   from l * per_lane on (the last lane maybe fewer): they share the 24 bits that a state costs. All lanes share one
   sequence of words: after each step (token t, the c-th column of every lane that has one), the lanes whose state fell
   below 2^15 take one word each, in lane order.
4. Ends: the encoder starts every lane at 2^15. A decoder that does not end there, or not at the last word, was given
   other bytes: a check that costs nothing. It is no checksum: a flipped bit in a lane's last word may make another
   valid stream (one in some thousands), so an artifact adds one.

    stream = u32 state[lanes]; u16 word[...]        little-endian

All tiles of one width are coded at once: arrays are [tile, lane].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hf_cachegen.native import TileStatus, check_decoded, check_encoded

TILE_COLUMNS = 256
LANES = 32
WORD_BITS = 16
STATE_BITS = 31
MIN_STATE = 1 << 15

Array = NDArray[Any]


class Side(NamedTuple):
    """What both directions need beside the symbols; shapes as in `rans.encode`, and checked there."""

    frequencies: Array
    prob_bits: int
    table_ids: Array
    contexts: Array | None


class _Tiles:
    """Adjacent tiles of one width: which lane owns which column, every symbol's table, and what became of each tile."""

    def __init__(self, side: Side, first_column: int, count: int, width: int):
        self.columns = slice(first_column, first_column + count * width)
        self.shape = (count, width)
        self.per_lane = -(-width // LANES)
        self.lanes = -(-width // self.per_lane)
        self.head_bytes = 4 * self.lanes
        self.status = np.zeros(count, dtype=np.int32)
        self.ids = side.table_ids[self.columns].astype(np.int64).reshape(count, width, -1)
        self.contexts = None if side.contexts is None else self.split(side.contexts)
        if self.contexts is not None:
            bad = (self.contexts > 2).any(axis=(0, 2))
            self.fail(bad, TileStatus.BAD_CONTEXT)
            self.contexts[:, bad] = 0
        bad = (self.ids >= len(side.frequencies)).any(axis=(1, 2))
        self.fail(bad, TileStatus.BAD_TABLE_ID)
        self.ids[bad] = 0

    def fail(self, tiles: Array | np.bool_, status: TileStatus) -> None:
        """The first failure of a tile stands."""
        self.status[tiles & (self.status == TileStatus.OK)] = status

    def split(self, matrix: Array) -> Array:
        """[tokens, all columns] to [tokens, tile, width]."""
        return matrix[:, self.columns].astype(np.int64).reshape(len(matrix), *self.shape)

    def step(self, t: int, c: int) -> tuple[slice, Array, Array]:
        """The lanes that have a c-th column, those columns, and the tables [tile, lane] of their symbols of token t."""
        columns: Array = np.arange(self.lanes) * self.per_lane + c
        columns = columns[columns < self.shape[1]]
        ids = self.ids[:, columns]
        chosen = 0 if self.contexts is None else self.contexts[t][:, columns, None]
        table = np.take_along_axis(ids, np.broadcast_to(chosen, (*ids.shape[:2], 1)), axis=2)[:, :, 0]
        return slice(len(columns)), columns, table


def _by_width(side: Side) -> Iterator[_Tiles]:
    whole, rest = divmod(len(side.table_ids), TILE_COLUMNS)
    if whole:
        yield _Tiles(side, 0, whole, TILE_COLUMNS)
    if rest:
        yield _Tiles(side, whole * TILE_COLUMNS, 1, rest)


def encode(symbols: Array, side: Side) -> list[bytes]:
    """uint8 [tokens, columns] to one stream per tile. Raises TensorError for what cannot be encoded."""
    n_tables, n_symbols = side.frequencies.shape
    frequencies = np.zeros((n_tables, 256), dtype=np.int64)  # a symbol beyond a table has no frequency there
    frequencies[:, :n_symbols] = side.frequencies
    starts = frequencies.cumsum(1) - frequencies
    groups = list(_by_width(side))
    streams = [_encode_tiles(group, symbols, frequencies, starts, side.prob_bits) for group in groups]
    check_encoded(np.concatenate([group.status for group in groups]))
    return [stream for group in streams for stream in group]


def _encode_tiles(tiles: _Tiles, symbols: Array, frequencies: Array, starts: Array, prob_bits: int) -> list[bytes]:
    tokens, count = len(symbols), tiles.shape[0]
    split = tiles.split(symbols)
    state = np.full((count, tiles.lanes), MIN_STATE)
    words = np.zeros((count, tokens, tiles.per_lane, tiles.lanes), dtype="<u2")
    given = np.zeros(words.shape, dtype=bool)
    for t in reversed(range(tokens)):
        for c in reversed(range(tiles.per_lane)):
            lanes, columns, table = tiles.step(t, c)
            f, start = (array[table, split[t][:, columns]] for array in (frequencies, starts))
            tiles.fail((f == 0).any(1), TileStatus.BAD_SYMBOL)
            f = np.maximum(f, 1)
            x = state[:, lanes]
            full = x >= f << (STATE_BITS - prob_bits)
            given[:, t, c, lanes] = full
            words[:, t, c, lanes] = x & 0xFFFF
            x = np.where(full, x >> WORD_BITS, x)
            state[:, lanes] = (x // f << prob_bits) + x % f + start
    heads = state.astype("<u4")
    return [heads[i].tobytes() + words[i][given[i]].tobytes() for i in range(count)]


def decode(streams: Sequence[memoryview], tokens: int, side: Side) -> Array:
    """The inverse of `encode`: uint8 [tokens, columns]. Raises TruncatedError or CorruptError."""
    frequencies = side.frequencies.astype(np.int64)
    starts = frequencies.cumsum(1) - frequencies
    symbol_of = np.stack([np.repeat(np.arange(len(row)), row) for row in frequencies])  # [table, slot]
    symbols = np.empty((tokens, len(side.table_ids)), dtype=np.uint8)
    status: list[int] = []
    for tiles in _by_width(side):
        mine = streams[len(status) : len(status) + tiles.shape[0]]
        decoded = _decode_tiles(tiles, mine, tokens, frequencies, starts, symbol_of, side.prob_bits)
        symbols[:, tiles.columns] = decoded.reshape(tokens, -1)
        status += tiles.status.tolist()
    check_decoded(status)
    return symbols


def _heads_and_words(tiles: _Tiles, streams: Sequence[memoryview]) -> tuple[Array, list[Array]]:
    """Initial states [tile, lane] and each tile's words; those of a tile that fails here are made up, and harmless."""
    size = np.array([len(stream) for stream in streams])
    tiles.fail(size < tiles.head_bytes, TileStatus.TRUNCATED)
    tiles.fail(size % 2 != 0, TileStatus.CORRUPT)
    sound = [s if ok else bytes(tiles.head_bytes) for s, ok in zip(streams, tiles.status == 0, strict=True)]
    state = np.stack([np.frombuffer(s[: tiles.head_bytes], dtype="<u4").astype(np.int64) for s in sound])
    outside = ((state < MIN_STATE) | (state >= 1 << STATE_BITS)).any(1)
    tiles.fail(outside, TileStatus.CORRUPT)
    state[outside] = MIN_STATE
    return state, [np.frombuffer(s[tiles.head_bytes :], dtype="<u2") for s in sound]


def _decode_tiles(
    tiles: _Tiles,
    streams: Sequence[memoryview],
    tokens: int,
    frequencies: Array,
    starts: Array,
    symbol_of: Array,
    prob_bits: int,
) -> Array:
    state, per_tile = _heads_and_words(tiles, streams)
    words = np.concatenate([*per_tile, np.zeros(1, "<u2")]).astype(np.int64)  # the last one stands for all past an end
    end = np.cumsum([len(w) for w in per_tile])
    cursor = end - [len(w) for w in per_tile]
    symbols = np.empty((tokens, *tiles.shape), dtype=np.uint8)
    for t in range(tokens):
        for c in range(tiles.per_lane):
            lanes, columns, table = tiles.step(t, c)
            x = state[:, lanes]
            slot = x & ((1 << prob_bits) - 1)
            symbol = symbol_of[table, slot]
            x = frequencies[table, symbol] * (x >> prob_bits) + slot - starts[table, symbol]
            low = x < MIN_STATE
            at = cursor[:, None] + low.cumsum(1) - 1
            word = words[np.where(low & (at < end[:, None]), at, -1)]
            state[:, lanes] = np.where(low, x << WORD_BITS | word, x)
            cursor = cursor + low.sum(1)
            symbols[t][:, columns] = symbol
    tiles.fail(cursor > end, TileStatus.TRUNCATED)
    tiles.fail((state != MIN_STATE).any(1) | (cursor != end), TileStatus.CORRUPT)
    return symbols
