"""The rANS coder, slow and readable: what the stream is, in numpy. The native coder gives the same bytes.

Twists:
1. The encoder runs backwards, last symbol first, so that the decoder reads forwards.
2. A tile of w columns has up to 32 lanes, each one 32-bit state in [2^15, 2^31). Lane l owns the per_lane = ceil(w / 32)
   columns from l * per_lane on (the last lane maybe fewer), so that a lane's cost of about 24 bits is shared by all of them.
3. The lanes share one sequence of 16-bit words: after each step (token t, c-th column of every lane), the lanes whose state
   fell below 2^15 take one word each, in lane order.
4. The encoder starts every lane at 2^15. A decoder that does not end there, or not at the last word, was given other bytes:
   an integrity check for nothing.
5. States stay in their range whatever the words are, if the first states are; that is all a decoder must check on the way.

    stream = u32 state[lanes]; u16 word[...]        little-endian

Everything here works on all tiles of one width at once: arrays are [tile, lane].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_cachegen.native import TileStatus, check_decoded, check_encoded

TILE_COLUMNS = 256
LANES = 32
WORD_BITS = 16
MIN_STATE = 1 << 15
MAX_STATE = 1 << 31

Array = NDArray[Any]


class _Tiles:
    """Adjacent tiles of one width: who owns which column, and every column's tables."""

    def __init__(self, first_tile: int, count: int, width: int, frequencies: Array, table_ids: Array):
        self.tiles = slice(first_tile, first_tile + count)
        self.columns = slice(first_tile * TILE_COLUMNS, first_tile * TILE_COLUMNS + count * width)
        self.shape = (count, width)
        self.per_lane = -(-width // LANES)
        self.lanes = -(-width // self.per_lane)
        self.ids = table_ids[self.columns].astype(np.int64).reshape(count, width, -1)
        self.bad_ids = (self.ids >= len(frequencies)).any(axis=(1, 2))
        self.ids[self.bad_ids] = 0

    def split(self, matrix: Array) -> Array:
        """[tokens, all columns] to [tokens, tile, width]."""
        return matrix[:, self.columns].astype(np.int64).reshape(len(matrix), *self.shape)

    def lane_columns(self, c: int) -> Array:
        """The c-th column of every lane that has one: the lanes are the first ones."""
        columns = np.arange(self.lanes) * self.per_lane + c
        return columns[columns < self.shape[1]]

    def tables(self, columns: Array, contexts: Array | None) -> Array:
        """[tile, lane]: the table of each symbol of a step; contexts [tile, width] of its token."""
        ids = self.ids[:, columns]
        if contexts is None:
            return ids[:, :, 0]
        return np.take_along_axis(ids, contexts[:, columns, None], axis=2)[:, :, 0]


def _by_width(columns: int, frequencies: Array, table_ids: Array) -> Iterator[_Tiles]:
    whole, rest = divmod(columns, TILE_COLUMNS)
    if whole:
        yield _Tiles(0, whole, TILE_COLUMNS, frequencies, table_ids)
    if rest:
        yield _Tiles(whole, 1, rest, frequencies, table_ids)


def _split_contexts(group: _Tiles, contexts: Array | None, status: Array) -> Array | None:
    if contexts is None:
        return None
    split = group.split(contexts)
    bad = (split > 2).any(axis=(0, 2))
    status[group.tiles][bad] = TileStatus.BAD_CONTEXT
    split[:, bad] = 0
    return split


def encode(symbols: Array, frequencies: Array, prob_bits: int, table_ids: Array, contexts: Array | None) -> list[bytes]:
    """Arguments as in `rans.encode`, checked there, as arrays."""
    frequencies = frequencies.astype(np.int64)
    starts = frequencies.cumsum(1) - frequencies
    # Symbols beyond a table have no frequency there.
    frequencies, starts = (np.pad(a, ((0, 0), (0, 256 - a.shape[1]))) for a in (frequencies, starts))
    status = np.zeros(-(-symbols.shape[1] // TILE_COLUMNS), dtype=np.int32)
    streams: list[bytes] = []
    for group in _by_width(symbols.shape[1], frequencies, table_ids):
        streams += _encode_tiles(group, symbols, frequencies, starts, prob_bits, contexts, status)
    check_encoded(status)
    return streams


def _encode_tiles(
    group: _Tiles, symbols: Array, frequencies: Array, starts: Array, prob_bits: int, contexts: Array | None, status: Array
) -> list[bytes]:
    tokens, count = len(symbols), group.shape[0]
    state = np.full((count, group.lanes), MIN_STATE)
    words = np.zeros((tokens, group.per_lane, count, group.lanes), dtype="<u2")
    given = np.zeros(words.shape, dtype=bool)
    split, ctx = group.split(symbols), _split_contexts(group, contexts, status)
    for t in reversed(range(tokens)):
        for c in reversed(range(group.per_lane)):
            columns = group.lane_columns(c)
            active = slice(0, len(columns))
            table = group.tables(columns, ctx[t] if ctx is not None else None)
            f, start = (a[table, split[t][:, columns]] for a in (frequencies, starts))
            status[group.tiles][(f == 0).any(1)] = TileStatus.BAD_SYMBOL
            f = np.maximum(f, 1)
            x = state[:, active]
            full = x >= f << (31 - prob_bits)
            given[t, c, :, active] = full
            words[t, c, :, active] = x & 0xFFFF
            x = np.where(full, x >> WORD_BITS, x)
            state[:, active] = (x // f << prob_bits) + x % f + start
    status[group.tiles][group.bad_ids] = TileStatus.BAD_TABLE_ID
    heads = state.astype("<u4")
    return [heads[i].tobytes() + words[:, :, i][given[:, :, i]].tobytes() for i in range(count)]


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
    frequencies = frequencies.astype(np.int64)
    starts = frequencies.cumsum(1) - frequencies
    symbol_of = np.stack([np.repeat(np.arange(len(row)), row) for row in frequencies])  # [table, slot]
    status = np.zeros(len(tile_bytes), dtype=np.int32)
    symbols = np.empty((tokens, len(table_ids)), dtype=np.uint8)
    ends = np.cumsum(tile_bytes)
    for group in _by_width(len(table_ids), frequencies, table_ids):
        parts = [streams[end - size : end] for end, size in zip(ends[group.tiles], tile_bytes[group.tiles])]
        out = _decode_tiles(group, parts, tokens, frequencies, starts, symbol_of, prob_bits, contexts, status)
        symbols[:, group.columns] = out.reshape(tokens, -1)
    check_decoded(status)
    return symbols


def _decode_tiles(
    group: _Tiles,
    parts: list[memoryview],
    tokens: int,
    frequencies: Array,
    starts: Array,
    symbol_of: Array,
    prob_bits: int,
    contexts: Array | None,
    status: Array,
) -> Array:
    out = np.empty((tokens, *group.shape), dtype=np.uint8)
    mine = status[group.tiles]  # a view
    ctx = _split_contexts(group, contexts, status)
    mine[group.bad_ids] = TileStatus.BAD_TABLE_ID
    head = 4 * group.lanes
    for i, part in enumerate(parts):
        if mine[i] == TileStatus.OK and len(part) < head:
            mine[i] = TileStatus.TRUNCATED
        elif mine[i] == TileStatus.OK and len(part) % 2:
            mine[i] = TileStatus.CORRUPT
    sound = [part if ok else bytes(head) for part, ok in zip(parts, mine == TileStatus.OK)]
    state = np.stack([np.frombuffer(part[:head], dtype="<u4").astype(np.int64) for part in sound])
    in_range = ((state >= MIN_STATE) & (state < MAX_STATE)).all(1)
    mine[(mine == TileStatus.OK) & ~in_range] = TileStatus.CORRUPT
    state[~in_range] = MIN_STATE
    words = np.concatenate([np.frombuffer(part[head:], dtype="<u2") for part in sound] + [np.zeros(1, "<u2")]).astype(np.int64)
    end = np.cumsum([(len(part) - head) // 2 for part in sound])
    cursor = end - [(len(part) - head) // 2 for part in sound]
    short = np.zeros(len(parts), dtype=bool)
    for t in range(tokens):
        for c in range(group.per_lane):
            columns = group.lane_columns(c)
            active = slice(0, len(columns))
            table = group.tables(columns, ctx[t] if ctx is not None else None)
            x = state[:, active]
            slot = x & ((1 << prob_bits) - 1)
            symbol = symbol_of[table, slot]
            x = frequencies[table, symbol] * (x >> prob_bits) + slot - starts[table, symbol]
            low = x < MIN_STATE
            at = cursor[:, None] + low.cumsum(1) - 1
            inside = at < end[:, None]
            word = words[np.where(low & inside, at, -1)]  # past the end a word is 0
            state[:, active] = np.where(low, x << WORD_BITS | word, x)
            cursor = cursor + low.sum(1)
            short |= cursor > end
            out[t][:, columns] = symbol
    finished = (state == MIN_STATE).all(1) & (cursor == end)
    mine[(mine == TileStatus.OK) & short] = TileStatus.TRUNCATED
    mine[(mine == TileStatus.OK) & ~finished] = TileStatus.CORRUPT
    return out
