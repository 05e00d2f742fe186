"""A matrix of small integers to bytes and back: the unit that chunks are made of.

Twists:
1. Columns whose codebook entry is 0 ("always zero") are not coded; the others close ranks before they are cut into tiles.
2. A symbol outside its table's support is coded as the nearest supported one, and its true index stands in the exceptions.
3. Positions of exceptions count over all columns, coded or not: position = token * columns + column, strictly rising.

    u32 exceptions; u32 tile_bytes[tiles]; (u32 position, i32 index)[exceptions]; streams, back to back

Little-endian. The number of tiles follows from the entries of the columns, which are the artifact's side information.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from hf_cachegen.codec import rans
from hf_cachegen.codec.tables import Codebook
from hf_cachegen.errors import CorruptError, TruncatedError


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


def encode(symbols: Tensor, book: Codebook, entries: Tensor, contexts: Tensor | None = None, *, coder: str) -> bytes:
    """symbols int32 [tokens, columns]: indices into the tables, possibly outside them; entries uint8 [columns] of `book`;
    contexts uint8 [tokens, columns] for a book with three contexts. All on the CPU."""
    tables = book.table_ids(entries)
    inside = _clamp(symbols, book.low[tables.long()], book.high[tables.long()], contexts)
    position = (inside != symbols).flatten().nonzero().flatten()
    exceptions = torch.stack([position, symbols.flatten()[position].long()], 1).to(torch.int32)  # u32 positions wrap: same bits
    live = entries.nonzero().flatten()
    if len(live) < len(entries):
        inside, tables = inside[:, live], tables[live]
        contexts = contexts[:, live].contiguous() if contexts is not None else None
    streams = rans.encode(inside.to(torch.uint8), book.tables, tables, contexts, coder=coder)
    head = struct.pack(f"<{1 + len(streams)}I", len(exceptions), *map(len, streams))
    return b"".join([head, exceptions.numpy().tobytes(), *streams])


def _clamp(symbols: Tensor, low: Tensor, high: Tensor, contexts: Tensor | None) -> Tensor:
    """symbols within the support of their tables; low, high int64 [columns, contexts]."""
    bounds = []
    for bound in (low.to(torch.int32), high.to(torch.int32)):
        per_symbol = bound[:, 0]
        if contexts is not None:
            for context in range(1, bound.shape[1]):
                per_symbol = torch.where(contexts == context, bound[:, context], per_symbol)
        bounds.append(per_symbol)
    return torch.minimum(torch.maximum(symbols, bounds[0]), bounds[1])


def decode(
    cursor: Cursor, tokens: int, book: Codebook, entries: Tensor, contexts: Tensor | None = None, *, coder: str
) -> Tensor:
    """The inverse of `encode`: int32 [tokens, columns]. Raises TruncatedError or CorruptError on damaged bytes."""
    live = entries.nonzero().flatten()
    (count,) = cursor.u32(1)
    tile_bytes = cursor.u32(rans.tile_count(len(live)) if tokens else 0)
    exceptions = cursor.tensor(2 * count, torch.int32).reshape(-1, 2)
    streams = cursor.take(sum(tile_bytes))
    if contexts is not None and len(live) < len(entries):
        contexts = contexts[:, live].contiguous()
    decoded = rans.decode(streams, tile_bytes, tokens, book.tables, book.table_ids(entries[live]), contexts, coder=coder)
    if len(live) < len(entries):
        symbols = torch.full((tokens, len(entries)), book.zero, dtype=torch.int32)
        symbols[:, live] = decoded.to(torch.int32)
    else:
        symbols = decoded.to(torch.int32)
    if count:
        position = exceptions[:, 0].to(torch.int64) & 0xFFFFFFFF
        if not bool((position.diff() > 0).all()) or int(position[-1]) >= symbols.numel():
            raise CorruptError("positions of exceptions must rise and lie within the chunk")
        symbols.view(-1)[position] = exceptions[:, 1]
    return symbols
