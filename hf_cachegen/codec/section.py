"""A matrix of small integers to bytes and back: the unit that chunks are made of.

Twists:
1. Columns whose codebook entry is 0 ("always zero") are not coded; the others close ranks before they are cut into
   tiles.
2. A symbol outside its table's support is coded as the nearest supported one, and its true index stands in the
   exceptions.
3. Positions of exceptions count over all columns, coded or not: position = token * columns + column, strictly rising.

    u32 exceptions; u32 tile_bytes[tiles]; (u32 position, i32 index)[exceptions]; streams, back to back

Little-endian. The number of tiles follows from the entries of the columns, which are the artifact's side information.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from hf_cachegen.codec import passes, rans
from hf_cachegen.codec.passes import NONE_WIDE, Wide
from hf_cachegen.codec.quantize import LARGEST_SYMBOL
from hf_cachegen.codec.tables import ZERO_INDEX, Codebook
from hf_cachegen.errors import CorruptError, TruncatedError

LARGEST_INDEX = LARGEST_SYMBOL + ZERO_INDEX


class Cursor:
    """Reads a segment from front to back and never past its end."""

    def __init__(self, data: bytes | memoryview):
        self.data = memoryview(data)
        self.at = 0

    def take(self, count: int) -> memoryview:
        if count > len(self.data) - self.at:
            raise TruncatedError(f"a segment of {len(self.data)} bytes ends early: {count} bytes expected at {self.at}")
        self.at += count
        return self.data[self.at - count : self.at]

    def tensor(self, count: int, dtype: torch.dtype) -> Tensor:
        """The next `count` little-endian values, copied (so that they may be written to)."""
        data = self.take(count * dtype.itemsize)
        return torch.frombuffer(bytearray(data), dtype=dtype) if count else torch.empty(0, dtype=dtype)

    def u32(self, count: int) -> list[int]:
        return list(struct.unpack(f"<{count}I", self.take(4 * count)))

    def finish(self) -> None:
        if self.at != len(self.data):
            raise CorruptError(f"a segment of {len(self.data)} bytes has {len(self.data) - self.at} bytes too many")


def encode(
    symbols: Tensor,
    book: Codebook,
    entries: Tensor,
    contexts: Tensor | None = None,
    wide: Wide = NONE_WIDE,
    *,
    coder: str,
) -> bytes:
    """symbols uint8 [tokens, columns]: indices, possibly outside their tables; entries uint8 [columns] of `book`;
    contexts uint8 [tokens, columns] for a book with three contexts; wide: the indices that no byte holds. All on the
    CPU.
    """
    tables = book.table_ids(entries)
    low, high = book.low[tables.long()], book.high[tables.long()]
    inside, position = symbols, NONE_WIDE.positions
    if int(low.max()) > 0 or int(high.min()) < book.tables.frequencies.shape[1] - 1:
        inside, position = passes.clamp(symbols, low, high, contexts)
    index = symbols.view(-1)[position].int()
    if len(wide.positions):
        position = torch.cat([position, wide.positions]).unique()
        index = symbols.view(-1)[position].int()
        index[torch.searchsorted(position, wide.positions)] = wide.indices
    live = entries.nonzero().flatten()
    if len(live) < len(entries):
        inside, tables = inside.index_select(1, live), tables[live]
        contexts = contexts.index_select(1, live) if contexts is not None else None
    streams = rans.encode(inside, book.tables, tables, contexts, coder=coder)
    head = struct.pack(f"<{1 + len(streams)}I", len(position), *map(len, streams))
    exceptions = torch.stack([position.to(torch.int32), index], 1)  # u32 positions wrap: the same bits
    return b"".join([head, exceptions.numpy().tobytes(), *streams])


def decode(
    cursor: Cursor, tokens: int, book: Codebook, entries: Tensor, contexts: Tensor | None = None, *, coder: str
) -> Tensor:
    """The inverse of `encode`: uint8 [tokens, columns]. Raises TruncatedError or CorruptError on damaged bytes."""
    symbols, wide = decode_wide(cursor, tokens, book, entries, contexts, coder=coder)
    if len(wide.positions):
        raise CorruptError("an exception holds a number that is no index of its tables")
    return symbols


def decode_wide(
    cursor: Cursor, tokens: int, book: Codebook, entries: Tensor, contexts: Tensor | None = None, *, coder: str
) -> tuple[Tensor, Wide]:
    """As `decode`, of a matrix that may have wider indices than its tables."""
    live = entries.nonzero().flatten()
    (count,) = cursor.u32(1)
    tile_bytes = cursor.u32(rans.tile_count(len(live)) if tokens else 0)
    exceptions = cursor.tensor(2 * count, torch.int32).reshape(-1, 2)
    streams = cursor.take(sum(tile_bytes))
    tables = book.table_ids(entries[live])
    if len(live) < len(entries):
        contexts = contexts.index_select(1, live) if contexts is not None else None
    symbols = rans.decode(streams, tile_bytes, tokens, book.tables, tables, contexts, coder=coder)
    if len(live) < len(entries):
        coded = torch.cat([symbols, torch.full((tokens, 1), book.zero, dtype=torch.uint8)], 1)
        place = torch.full((len(entries),), len(live)).index_copy(0, live, torch.arange(len(live)))
        symbols = coded.index_select(1, place)
    return symbols, _correct(symbols, exceptions, book.tables.frequencies.shape[1])


def _correct(symbols: Tensor, exceptions: Tensor, indices: int) -> Wide:
    """Puts exceptions, int32 [n, (position, index)], into symbols; returns those beyond their tables' indices."""
    if not len(exceptions):
        return NONE_WIDE
    position, index = exceptions[:, 0].to(torch.int64) & 0xFFFFFFFF, exceptions[:, 1]
    if not bool((position.diff() > 0).all()) or int(position[-1]) >= symbols.numel():
        raise CorruptError("positions of exceptions must rise and lie within the chunk")
    if int(index.min()) < -LARGEST_INDEX or int(index.max()) > LARGEST_INDEX:
        raise CorruptError(f"an exception lies beyond {LARGEST_INDEX}, which no encoder writes")
    symbols.view(-1)[position] = index.clamp(0, indices - 1).to(torch.uint8)
    wide = (index < 0) | (index >= indices)
    return Wide(position[wide], index[wide])
