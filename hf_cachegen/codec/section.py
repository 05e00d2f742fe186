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
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_cachegen.codec import passes, rans
from hf_cachegen.codec.passes import NONE_WIDE, Wide
from hf_cachegen.codec.quantize import LARGEST_SYMBOL
from hf_cachegen.codec.tables import ZERO_INDEX, Codebook
from hf_cachegen.errors import CorruptError, TruncatedError

MAX_RUNS = 16
LARGEST_INDEX = LARGEST_SYMBOL + ZERO_INDEX


class _Lent:
    """Bytes as numpy takes them for writable: torch takes no others. Whoever holds the array holds them."""

    def __init__(self, data: memoryview):
        self.data = data
        interface = np.frombuffer(data, np.uint8).__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}


def stream_of(data: memoryview) -> Tensor:
    """These bytes where they lie, uint8: never to be written to."""
    return torch.from_numpy(np.asarray(_Lent(data))) if len(data) else torch.empty(0, dtype=torch.uint8)


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

    def stream(self, count: int) -> Tensor:
        """The next `count` bytes where they lie, uint8: never to be written to."""
        return stream_of(self.take(count))

    def u32(self, count: int) -> list[int]:
        return list(struct.unpack(f"<{count}I", self.take(4 * count)))

    def rest(self) -> memoryview:
        """What is left."""
        return self.data[self.at :]

    def finish(self) -> None:
        if self.at != len(self.data):
            raise CorruptError(f"a segment of {len(self.data)} bytes has {len(self.data) - self.at} bytes too many")


class Assignment:
    """Which table of a codebook codes each column. entries: uint8 [columns].

    live, dead int32: the columns that are coded, and those whose symbols are all zero; table_ids uint8 [live,
    contexts].
    """

    def __init__(self, book: Codebook, entries: Tensor):
        self.book, self.entries = book, entries
        # By numpy: torch's threads, whatever the size, would spin for milliseconds where the coder's are to run.
        live, dead = (torch.from_numpy(np.flatnonzero(which)) for which in (entries.numpy(), entries.numpy() == 0))
        self.live, self.dead = live.int(), dead.int()
        self.table_ids = book.table_ids(entries[live])
        self._elsewhere: dict[torch.device, tuple[Tensor, ...]] = {}
        self._bounds: dict[torch.device, tuple[Tensor, Tensor] | None] = {}

    def __len__(self) -> int:
        return len(self.entries)

    def on(self, device: torch.device) -> tuple[Tensor, ...]:
        """(tables for the compiled coder, table_ids, live, dead) on a device."""
        if device not in self._elsewhere:
            tensors = (self.table_ids, self.live, self.dead)
            self._elsewhere[device] = (self.book.tables.on(device), *(x.to(device) for x in tensors))
        return self._elsewhere[device]

    @cached_property
    def tables_per_tile(self) -> int:
        """The most different tables that a tile uses, of columns with one context; 0 of others, which are too many to
        be looked up nearby.
        """
        if self.book.contexts > 1:
            return 0
        tiles = self.table_ids[:, 0].split(rans.TILE_COLUMNS)
        return max((len(set(ids.tolist())) for ids in tiles), default=0)

    @cached_property
    def _runs(self) -> list[slice]:
        """Adjacent live columns; empty where they are too many to be copied one by one."""
        edges = (self.live.diff() != 1).nonzero().flatten() + 1
        if len(edges) >= MAX_RUNS:
            return []
        parts = self.live.tensor_split(edges.tolist())
        return [slice(int(part[0]), int(part[-1]) + 1) for part in parts if len(part)]

    def close(self, x: Tensor) -> Tensor:
        """x [tokens, columns] without its dead columns."""
        if not len(self.dead):
            return x
        if self._runs:
            return torch.cat([x[:, run] for run in self._runs], 1)
        return x.index_select(1, self.live.to(x.device))

    def open(self, symbols: Tensor) -> Tensor:
        """The inverse, for symbols uint8 [tokens, live columns]: dead columns are zero."""
        if not len(self.dead):
            return symbols
        opened, at = symbols.new_full((len(symbols), len(self)), self.book.zero), 0
        for run in self._runs:
            width = run.stop - run.start
            opened[:, run], at = symbols[:, at : at + width], at + width
        return opened if self._runs else opened.index_copy_(1, self.live.long().to(symbols.device), symbols)

    def bounds(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """(lowest, highest index uint8 [columns, contexts] of each table's support), kept on that device, a context's
        columns side by side; None where every index is within it.
        """
        if device not in self._bounds:
            tables = self.book.table_ids(self.entries).long().T.contiguous()
            low, high = self.book.low[tables], self.book.high[tables]
            outside = len(self) and (int(low.max()) > 0 or int(high.min()) < self.book.tables.frequencies.shape[1] - 1)
            self._bounds[device] = (low.to(device).T, high.to(device).T) if outside else None
        return self._bounds[device]


def encode(
    symbols: Tensor,
    columns: Assignment,
    contexts: Tensor | None = None,
    wide: Wide = NONE_WIDE,
    *,
    coder: str,
) -> bytes:
    """symbols uint8 [tokens, columns]: indices, possibly outside their tables; contexts uint8 [tokens, columns] for a
    book with three contexts; wide: the indices that no byte holds. symbols and contexts on one device, wide on the CPU.
    """
    inside, position, device = symbols, NONE_WIDE.positions, symbols.device
    if (bounds := columns.bounds(device)) is not None:
        inside, position = passes.clamp(symbols, *bounds, contexts)
    index = symbols.view(-1)[position.to(device)].int().cpu()
    if len(wide.positions):
        position = torch.cat([position, wide.positions]).unique()
        index = symbols.view(-1)[position.to(device)].int().cpu()
        index[torch.searchsorted(position, wide.positions)] = wide.indices
    inside = columns.close(inside)
    contexts = columns.close(contexts) if contexts is not None else None
    streams = rans.encode(inside, columns.book.tables, columns.table_ids, contexts, coder=coder)
    head = struct.pack(f"<{1 + len(streams)}I", len(position), *map(len, streams))
    exceptions = torch.stack([position.to(torch.int32), index], 1)  # u32 positions wrap: the same bits
    return b"".join([head, exceptions.numpy().tobytes(), *streams])


@dataclass(frozen=True)
class Coded:
    """A section that is read but not decoded, on the CPU.

    tile_bytes int64 [tiles]; positions int64, rising, and indices int32 of the exceptions; streams uint8 [bytes].
    """

    columns: Assignment
    tokens: int
    tile_bytes: Tensor
    positions: Tensor
    indices: Tensor
    streams: Tensor

    @cached_property
    def wide(self) -> Wide:
        """The exceptions that are no index of their tables."""
        which = (self.indices < 0) | (self.indices >= self.columns.book.tables.frequencies.shape[1])
        return Wide(self.positions[which], self.indices[which]) if bool(which.any()) else NONE_WIDE

    def decode(self, contexts: Tensor | None = None, *, coder: str) -> Tensor:
        """uint8 [tokens, columns], on the CPU; an index that no byte holds becomes the nearest that one does.

        Raises TruncatedError or CorruptError on damaged bytes.
        """
        columns, tokens = self.columns, self.tokens
        contexts = columns.close(contexts) if contexts is not None else None
        tables, streams = columns.book.tables, self.streams.numpy().data
        sizes = self.tile_bytes.tolist()
        symbols = rans.decode(streams, sizes, tokens, tables, columns.table_ids, contexts, coder=coder)
        symbols = columns.open(symbols)
        symbols.view(-1)[self.positions] = self.indices.clamp(0, tables.frequencies.shape[1] - 1).to(torch.uint8)
        return symbols


class Arrays(NamedTuple):
    """A section that is read, as numpy sees its bytes: tile_bytes uint32 [tiles], positions int64 [n], rising, and
    indices int32 [n] of the exceptions; streams, back to back.
    """

    tile_bytes: np.ndarray
    positions: np.ndarray
    indices: np.ndarray
    streams: memoryview

    def is_wide(self, columns: Assignment) -> bool:
        """Whether an exception is no index of its tables."""
        symbols = columns.book.tables.frequencies.shape[1]
        return bool(((self.indices < 0) | (self.indices >= symbols)).any()) if len(self.indices) else False


_NO_POSITIONS, _NO_INDICES = np.empty(0, np.int64), np.empty(0, np.int32)


def read_arrays(cursor: Cursor, tokens: int, columns: Assignment) -> Arrays:
    """The section that the cursor stands before. Raises TruncatedError or CorruptError on damaged bytes."""
    (count,) = cursor.u32(1)
    tiles = rans.tile_count(len(columns.live)) if tokens else 0
    tile_bytes = np.frombuffer(cursor.take(4 * tiles), "<u4")
    exceptions = np.frombuffer(cursor.take(8 * count), "<i4").reshape(-1, 2)
    streams = cursor.take(int(tile_bytes.sum(dtype=np.int64)))
    if not count:
        return Arrays(tile_bytes, _NO_POSITIONS, _NO_INDICES, streams)
    position, index = exceptions[:, 0].astype(np.int64) & 0xFFFFFFFF, exceptions[:, 1].copy()
    if not bool((np.diff(position) > 0).all()) or int(position[-1]) >= tokens * len(columns):
        raise CorruptError("positions of exceptions must rise and lie within the chunk")
    if int(index.min()) < -LARGEST_INDEX or int(index.max()) > LARGEST_INDEX:
        raise CorruptError(f"an exception lies beyond {LARGEST_INDEX}, which no encoder writes")
    return Arrays(tile_bytes, position, index, streams)


def in_tensors(found: Arrays, tokens: int, columns: Assignment) -> Coded:
    """The same as tensors, which share the streams' memory."""
    tile_bytes = torch.from_numpy(found.tile_bytes.astype(np.int64))
    positions, indices = torch.from_numpy(found.positions), torch.from_numpy(found.indices)
    return Coded(columns, tokens, tile_bytes, positions, indices, stream_of(found.streams))


def read(cursor: Cursor, tokens: int, columns: Assignment) -> Coded:
    """As `read_arrays`, in tensors."""
    return in_tensors(read_arrays(cursor, tokens, columns), tokens, columns)


def read_narrow_arrays(cursor: Cursor, tokens: int, columns: Assignment) -> Arrays:
    """As `read_arrays`, of a matrix without wide indices. Raises CorruptError where there is one."""
    found = read_arrays(cursor, tokens, columns)
    if found.is_wide(columns):
        raise CorruptError("an exception holds a number that is no index of its tables")
    return found


def read_narrow(cursor: Cursor, tokens: int, columns: Assignment) -> Coded:
    """As `read`, of a matrix without wide indices. Raises CorruptError where there is one."""
    found = read(cursor, tokens, columns)
    if len(found.wide.positions):
        raise CorruptError("an exception holds a number that is no index of its tables")
    return found
