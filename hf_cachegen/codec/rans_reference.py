"""The rANS coder (Duda 2013, arXiv:1311.2540) in numpy, slow and readable. It defines a stream.

The native coder produces the same bytes. Conventions:
1. Direction: the encoder runs backwards from the last symbol, so that the decoder reads forwards.
2. Bounds: states are 32-bit, in [2^15, 2^31). Words are 16-bit. States stay in range for any words if the initial
   states are in range. The decoder needs no other check in its loop.
3. Interleave: a tile of w channels has up to 32 lanes of one state each. Lane l owns the per_lane = ceil(w / 32)
   channels from l * per_lane on (the last lane may have fewer). They share the 24 bits that a state costs. All lanes
   share one sequence of words. After each step (token t, the c-th channel of every lane that has one), the lanes whose
   state fell below 2^15 take one word each, in lane order.
4. Ends: the encoder starts every lane at 2^15. A decoder that does not end there, or not at the last word, reports
   corrupt bytes. This check costs nothing, but it is no checksum: a flipped bit in a lane's last word can give another
   valid stream (one in some thousands). Code that stores streams must add a checksum.

    stream = u32 state[lanes]; u16 word[...]        little-endian

All tiles of one width are coded at once: arrays are [tile, lane].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hf_cachegen.codec.native import TileStatus, check_decoded, check_encoded

TILE_COLUMNS = 256
LANES = 32
WORD_BITS = 16
STATE_BITS = 31
MIN_STATE = 1 << 15

Array = NDArray[Any]


class Side(NamedTuple):
    """The inputs of both directions beside the symbols. `rans.encode` defines and checks their shapes."""

    frequencies: Array
    prob_bits: int
    table_ids: Array
    contexts: Array | None


class _Tiles:
    """Adjacent tiles of one width: the lane of each channel, the table of each symbol, and the status of each tile."""

    def __init__(self, side: Side, first_channel: int, count: int, width: int):
        self.channels = slice(first_channel, first_channel + count * width)
        self.shape = (count, width)
        self.per_lane = -(-width // LANES)
        self.lanes = -(-width // self.per_lane)
        self.head_bytes = 4 * self.lanes
        self.status = np.zeros(count, dtype=np.int32)
        self.ids = side.table_ids[self.channels].astype(np.int64).reshape(count, width, -1)
        self.contexts = None if side.contexts is None else self.split(side.contexts)
        if self.contexts is not None:
            bad = (self.contexts > 2).any(axis=(0, 2))
            self.fail(bad, TileStatus.BAD_CONTEXT)
            self.contexts[:, bad] = 0
        bad = (self.ids >= len(side.frequencies)).any(axis=(1, 2))
        self.fail(bad, TileStatus.BAD_TABLE_ID)
        self.ids[bad] = 0

    def fail(self, tiles: Array | np.bool_, status: TileStatus) -> None:
        """Set the status of tiles that have not failed before."""
        self.status[tiles & (self.status == TileStatus.OK)] = status

    def split(self, matrix: Array) -> Array:
        """Reshape [tokens, all channels] to [tokens, tile, width]."""
        return matrix[:, self.channels].astype(np.int64).reshape(len(matrix), *self.shape)

    def step(self, t: int, c: int) -> tuple[slice, Array, Array]:
        """Return the lanes that have a c-th channel, those channels, and the tables [tile, lane] of their symbols of
        token t.
        """
        channels: Array = np.arange(self.lanes) * self.per_lane + c
        channels = channels[channels < self.shape[1]]
        ids = self.ids[:, channels]
        chosen = 0 if self.contexts is None else self.contexts[t][:, channels, None]
        table = np.take_along_axis(ids, np.broadcast_to(chosen, (*ids.shape[:2], 1)), axis=2)[:, :, 0]
        return slice(len(channels)), channels, table


def _by_width(side: Side) -> Iterator[_Tiles]:
    whole, rest = divmod(len(side.table_ids), TILE_COLUMNS)
    if whole:
        yield _Tiles(side, 0, whole, TILE_COLUMNS)
    if rest:
        yield _Tiles(side, whole * TILE_COLUMNS, 1, rest)


def encode(symbols: Array, side: Side) -> list[bytes]:
    """Encode uint8 [tokens, channels] to one stream per tile. Raises TensorError for symbols that cannot be encoded."""
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
            lanes, channels, table = tiles.step(t, c)
            f, start = (array[table, split[t][:, channels]] for array in (frequencies, starts))
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
    """Decode one stream per tile to uint8 [tokens, channels]. Raises TruncatedError or CorruptError."""
    frequencies = side.frequencies.astype(np.int64)
    starts = frequencies.cumsum(1) - frequencies
    symbol_of = np.stack([np.repeat(np.arange(len(row)), row) for row in frequencies])  # [table, slot]
    symbols = np.empty((tokens, len(side.table_ids)), dtype=np.uint8)
    status: list[int] = []
    for tiles in _by_width(side):
        mine = streams[len(status) : len(status) + tiles.shape[0]]
        decoded = _decode_tiles(tiles, mine, tokens, frequencies, starts, symbol_of, side.prob_bits)
        symbols[:, tiles.channels] = decoded.reshape(tokens, -1)
        status += tiles.status.tolist()
    check_decoded(status)
    return symbols


def _heads_and_words(tiles: _Tiles, streams: Sequence[memoryview]) -> tuple[Array, list[Array]]:
    """Return the initial states [tile, lane] and each tile's words; valid substitutes for a tile that fails here."""
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
    words = np.concatenate([*per_tile, np.zeros(1, "<u2")]).astype(np.int64)  # the last one is read past an end
    end = np.cumsum([len(w) for w in per_tile])
    cursor = end - [len(w) for w in per_tile]
    symbols = np.empty((tokens, *tiles.shape), dtype=np.uint8)
    for t in range(tokens):
        for c in range(tiles.per_lane):
            lanes, channels, table = tiles.step(t, c)
            x = state[:, lanes]
            slot = x & ((1 << prob_bits) - 1)
            symbol = symbol_of[table, slot]
            x = frequencies[table, symbol] * (x >> prob_bits) + slot - starts[table, symbol]
            low = x < MIN_STATE
            at = cursor[:, None] + low.cumsum(1) - 1
            word = words[np.where(low & (at < end[:, None]), at, -1)]
            state[:, lanes] = np.where(low, x << WORD_BITS | word, x)
            cursor = cursor + low.sum(1)
            symbols[t][:, channels] = symbol
    tiles.fail(cursor > end, TileStatus.TRUNCATED)
    tiles.fail((state != MIN_STATE).any(1) | (cursor != end), TileStatus.CORRUPT)
    return symbols
