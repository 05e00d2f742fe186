"""Code a matrix of small integers to bytes, and back. Chunks consist of such sections.

Rules:
1. Channels whose codebook entry is 0 ("always zero") are not coded. The others are compacted, then cut into tiles.
2. A symbol outside its table's support is coded as the nearest supported one. Its true index is stored as an exception.
3. Positions of exceptions count over all channels, coded or not: position = token * channels + channel. They strictly
   ascend.

    u32 exceptions; u32 tile_bytes[tiles]; (u32 position, i32 index)[exceptions]; streams, back to back

Little-endian. The number of tiles follows from the entries of the channels, which are in the artifact's side
information.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from hf_cachegen.codec import passes, rans
from hf_cachegen.codec.quantize import LARGEST_SYMBOL
from hf_cachegen.codec.tables import ZERO_INDEX, Codebook
from hf_cachegen.codec.transfer import Resident, keep
from hf_cachegen.codec.wide import NONE_WIDE, Wide, nearest
from hf_cachegen.errors import CorruptError, TruncatedError

MAX_RUNS = 16
LARGEST_INDEX = LARGEST_SYMBOL + ZERO_INDEX


class _Lent:
    """Bytes that claim to be writable, which torch requires. An array made from this object keeps the bytes alive."""

    def __init__(self, data: memoryview):
        self.data = data
        interface = np.frombuffer(data, np.uint8).__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}


def stream_of(data: memoryview) -> Tensor:
    """Return these bytes as uint8, without a copy. They must not be written to."""
    return torch.from_numpy(np.asarray(_Lent(data))) if len(data) else torch.empty(0, dtype=torch.uint8)


class Cursor:
    """Read a segment from front to back, and never past its end."""

    def __init__(self, data: bytes | memoryview):
        self.data = memoryview(data)
        self.at, self._end = 0, len(self.data)

    def take(self, count: int) -> memoryview:
        """Return the next `count` bytes. Raises TruncatedError."""
        if count > self._end - self.at:
            found = f"at byte {self.at} of a segment, which ends at byte {self._end}"
            raise TruncatedError(f"expected {count} bytes {found}")
        self.at += count
        return self.data[self.at - count : self.at]

    def tensor(self, count: int, dtype: torch.dtype) -> Tensor:
        """Return the next `count` little-endian values as a writable copy. Raises TruncatedError."""
        data = self.take(count * dtype.itemsize)
        return torch.frombuffer(bytearray(data), dtype=dtype) if count else torch.empty(0, dtype=dtype)

    def stream(self, count: int) -> Tensor:
        """Return the next `count` bytes as uint8, without a copy. They must not be written to. Raises TruncatedError.
        """
        return stream_of(self.take(count))

    def u32(self, count: int) -> list[int]:
        """Return the next `count` unsigned 32-bit integers. Raises TruncatedError."""
        return list(struct.unpack(f"<{count}I", self.take(4 * count)))

    def rest(self) -> memoryview:
        """Return the remaining bytes without reading them."""
        return self.data[self.at :]

    def finish(self) -> None:
        """Raise CorruptError unless all bytes were read."""
        if self.at != len(self.data):
            raise CorruptError(f"expected a segment of {self.at} bytes, got {len(self.data)} bytes")


class Assignment:
    """The table of a codebook that codes each channel.

    Args:
        book: The codebook.
        entries: uint8 [channels].

    Attributes:
        live: int32: the channels that are coded.
        coded: The number of these.
        dead: int32: the channels whose symbols are all zero.
        table_ids: uint8 [live, contexts].
    """

    def __init__(self, book: Codebook, entries: Tensor):
        self.book, self.entries = book, entries
        # numpy: torch's threads would occupy the coder's cores for milliseconds, whatever the size.
        live, dead = (torch.from_numpy(np.flatnonzero(which)) for which in (entries.numpy(), entries.numpy() == 0))
        self.live, self.dead = live.int(), dead.int()
        self.coded, self._length = len(live), len(entries)  # a tensor takes microseconds to tell its length
        self.table_ids = book.table_ids(entries[live])
        self._resident = Resident()
        self._bounds: dict[torch.device, tuple[Tensor, Tensor] | None] = {}

    def __len__(self) -> int:
        return self._length

    @cached_property
    def zeros(self) -> Tensor:
        """The share of zeros that each channel's table expects, of refinements after zeros: float32 [channels]."""
        found = np.ones(len(self), np.float32)
        found[self.live.numpy()] = self.book.zeros.numpy()[self.table_ids[:, 0].numpy()]
        return torch.from_numpy(found)

    def on(self, device: torch.device) -> tuple[Tensor, ...]:
        """Return (tables for the compiled coder, table_ids, live, dead) on a device, copied there once."""
        own = self._resident.get(
            device, "ids", lambda: tuple(keep(x, device) for x in (self.table_ids, self.live, self.dead))
        )
        return (self.book.tables.on(device), *own)

    @cached_property
    def tables_per_tile(self) -> int:
        """The largest number of different tables in a tile, for channels with one context; 0 for others, whose tables
        are too many for shared memory.
        """
        if self.book.contexts > 1:
            return 0
        tiles = self.table_ids[:, 0].split(rans.TILE_COLUMNS)
        return max((len(set(ids.tolist())) for ids in tiles), default=0)

    @cached_property
    def order(self) -> Tensor:
        """The live channels, then the dead ones: int32 [channels]."""
        return torch.cat([self.live, self.dead])

    @cached_property
    def _runs(self) -> list[slice]:
        """Ranges of adjacent live channels; empty if there are too many to copy one by one."""
        edges = (self.live.diff() != 1).nonzero().flatten() + 1
        if len(edges) >= MAX_RUNS:
            return []
        parts = self.live.tensor_split(edges.tolist())
        return [slice(int(part[0]), int(part[-1]) + 1) for part in parts if len(part)]

    def close(self, x: Tensor) -> Tensor:
        """Remove the dead channels from x [tokens, channels]."""
        if not len(self.dead):
            return x
        if self._runs:
            return torch.cat([x[:, run] for run in self._runs], 1)
        return x.index_select(1, self.live.to(x.device))

    def open(self, symbols: Tensor) -> Tensor:
        """Insert the dead channels as zeros into symbols uint8 [tokens, live channels]. Inverse of `close`."""
        if not len(self.dead):
            return symbols
        opened, at = symbols.new_full((len(symbols), len(self)), self.book.zero), 0
        for run in self._runs:
            width = run.stop - run.start
            opened[:, run], at = symbols[:, at : at + width], at + width
        return opened if self._runs else opened.index_copy_(1, self.live.long().to(symbols.device), symbols)

    def bounds(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """Return the lowest and the highest index of each table's support, cached per device.

        Returns:
            Two uint8 [channels, contexts], stored context by context; None where every index is supported.
        """
        if device not in self._bounds:
            entries = self.entries.numpy()  # numpy selects bytes faster than torch
            low, high = (
                torch.from_numpy(bound.numpy().reshape(-1, self.book.contexts).T.take(entries, axis=1))
                for bound in (self.book.low, self.book.high)
            )
            outside = len(self) and (int(low.max()) > 0 or int(high.min()) < self.book.tables.frequencies.shape[1] - 1)
            self._bounds[device] = (low.to(device).T, high.to(device).T) if outside else None
        return self._bounds[device]


def encode(
    symbols: Tensor,
    assignment: Assignment,
    contexts: Tensor | None = None,
    wide: Wide = NONE_WIDE,
    *,
    coder: str,
) -> bytes:
    """Encode a section.

    Args:
        symbols: Indices, uint8 [tokens, channels], possibly outside their tables' support.
        assignment: The tables of the channels.
        contexts: uint8 [tokens, channels], on the symbols' device, for a book with three contexts.
        wide: The indices that no byte holds, on the CPU.
        coder: "rans" or "torchac".
    """
    inside, position, device = symbols, NONE_WIDE.positions, symbols.device
    if (bounds := assignment.bounds(device)) is not None:
        inside, position = passes.clamp(symbols, *bounds, contexts)
    index = symbols.view(-1)[position.to(device)].int().cpu()
    if len(wide.positions):
        position = torch.cat([position, wide.positions]).unique()
        index = symbols.view(-1)[position.to(device)].int().cpu()
        index[torch.searchsorted(position, wide.positions)] = wide.indices
    inside = assignment.close(inside)
    contexts = assignment.close(contexts) if contexts is not None else None
    streams = rans.encode(inside, assignment.book.tables, assignment.table_ids, contexts, coder=coder)
    head = struct.pack(f"<{1 + len(streams)}I", len(position), *map(len, streams))
    exceptions = torch.stack([position.to(torch.int32), index], 1)  # u32 positions wrap: the same bits
    return b"".join([head, exceptions.numpy().tobytes(), *streams])


@dataclass(frozen=True)
class Coded:
    """A section that is read but not decoded, on the CPU.

    Attributes:
        columns: The tables of its channels.
        tokens: Number of tokens.
        tile_bytes: int64 [tiles].
        positions: int64, ascending: of the exceptions.
        indices: int32: of the exceptions.
        streams: uint8 [bytes].
    """

    columns: Assignment
    tokens: int
    tile_bytes: Tensor
    positions: Tensor
    indices: Tensor
    streams: Tensor

    @cached_property
    def wide(self) -> Wide:
        """The exceptions whose index is outside their tables."""
        if not len(self.indices):
            return NONE_WIDE
        which = (self.indices < 0) | (self.indices >= self.columns.book.tables.frequencies.shape[1])
        return Wide(self.positions[which], self.indices[which]) if bool(which.any()) else NONE_WIDE

    def within_bytes(self) -> Coded:
        """Return the section with the nearest indices that bytes hold in place of wide ones."""
        return replace(self, indices=nearest(self.indices))

    def decode(self, contexts: Tensor | None = None, *, coder: str) -> Tensor:
        """Decode to uint8 [tokens, channels], on the CPU. An index that no byte holds becomes the nearest one.

        Raises:
            TruncatedError, CorruptError: The bytes are damaged.
        """
        assignment, tokens = self.columns, self.tokens
        contexts = assignment.close(contexts) if contexts is not None else None
        tables, streams = assignment.book.tables, self.streams.numpy().data
        sizes = self.tile_bytes.tolist()
        symbols = rans.decode(streams, sizes, tokens, tables, assignment.table_ids, contexts, coder=coder)
        symbols = assignment.open(symbols)
        symbols.view(-1)[self.positions] = self.indices.clamp(0, tables.frequencies.shape[1] - 1).to(torch.uint8)
        return symbols


def read(cursor: Cursor, tokens: int, assignment: Assignment) -> Coded:
    """Read the section at the cursor. Raises TruncatedError or CorruptError for damaged bytes.

    cuda_ext/core/parts.h reads those of a batch of chunks by the same rules.
    """
    [count] = cursor.u32(1)
    if count and not tokens:
        raise CorruptError("a section without tokens must have no exceptions")
    tile_bytes = torch.tensor(cursor.u32(rans.tile_count(assignment.coded) if tokens else 0), dtype=torch.int64)
    found = cursor.tensor(2 * count, torch.int32).view(-1, 2)
    streams = cursor.stream(int(tile_bytes.sum()))
    position, index = found[:, 0].long() & 0xFFFFFFFF, found[:, 1].contiguous()
    if count:
        if not bool((position.diff() > 0).all()) or int(position[-1]) >= tokens * len(assignment):
            raise CorruptError("positions of exceptions must ascend and be within the chunk")
        if int(index.min()) < -LARGEST_INDEX or int(index.max()) > LARGEST_INDEX:
            raise CorruptError(f"the index of an exception must be within {LARGEST_INDEX} of zero")
    return Coded(assignment, tokens, tile_bytes, position, index, streams)


def read_narrow(cursor: Cursor, tokens: int, assignment: Assignment) -> Coded:
    """Read the section at the cursor, which must have no wide indices. Raises TruncatedError or CorruptError."""
    found = read(cursor, tokens, assignment)
    if len(found.wide.positions):
        raise CorruptError("the index of an exception must be within its tables")
    return found
