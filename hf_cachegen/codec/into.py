"""Decode in place: a section's streams to values in the layers' own tensors, in one compiled pass.

Symbols become values while they are decoded (section 5.2 of the paper has the arithmetic; `passes.restore` does the
same in separate steps) and are written to their final address. On a CUDA device one launch decodes a section of all
layers.

Implementation notes:
1. A `Target` holds the address of each channel's values. It is made once and serves every chunk of an artifact.
2. `Sections.finish` reports errors in the streams. Before that, nothing waits for the device.
3. A channel whose table entry is 0 has no stream. Its symbols are zero, and are filled in.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_cachegen.codec import abi, native, ops, transfer
from hf_cachegen.codec.passes import DTYPES, Grid
from hf_cachegen.codec.section import Coded

_BLOCK = ops.TILE_COLUMNS
_INDEX = 3
"""CG_UINT8: write indices, not values."""


@dataclass(frozen=True)
class Target:
    """The memory that values are written to.

    Attributes:
        places: int64 [channels, 2]: the address of each channel's first row, and the bytes from row to row.
        dtype: Of the values.
        kept: The tensors that the addresses point into.
    """

    places: Tensor
    dtype: torch.dtype
    kept: tuple[Tensor, ...]

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self.places.device

    @cached_property
    def vectors(self) -> Tensor | None:
        """The addresses of every 8th channel, int64 [ceil(channels / 8), 2]; None if 8 values are not one store.

        They are one store if the channels between follow one another and all addresses are multiples of 16 bytes.
        """
        width, align = abi.VECTOR_COLUMNS, abi.BATCH_ALIGNMENT
        for x in self.kept:
            outer = [stride * x.element_size() % align for stride in x.stride()[:-1]]
            cut = x.dim() > 2 and x.shape[-1] % width  # the last channels of a matrix may be fewer
            if cut or x.stride(-1) != 1 or x.data_ptr() % align or any(outer):
                return None
        return self.places[::width].contiguous()

    @classmethod
    def layers(cls, tensors: Sequence[Tensor]) -> Target:
        """Make a target of tensors [batch, heads, tokens, dim]: K and V of each layer in turn, of one dtype, on one
        device.
        """
        offsets: dict[object, np.ndarray] = {}
        found = []
        for x in tensors:  # numpy: there may be hundreds, and each torch operation yields to other threads
            shape = x.shape, x.stride()
            if shape not in offsets:
                batch, heads, _, dim = (np.arange(n) * s * x.element_size() for n, s in zip(*shape, strict=True))
                element = (batch[:, None, None] + heads[:, None] + dim).ravel()
                offsets[shape] = np.stack([element, np.full_like(element, x.stride(2) * x.element_size())], 1)
            found.append(offsets[shape] + (x.data_ptr(), 0))
        places = transfer.keep(torch.from_numpy(np.concatenate(found)), tensors[0].device)
        return cls(places, tensors[0].dtype, tuple(tensors))

    @staticmethod
    def memory(tokens: int, channels: int, device: torch.device) -> Tensor:
        """Allocate float32 [tokens, channels] that has `vectors`: every row begins at a multiple of 16 bytes."""
        width = -(-channels // abi.VECTOR_COLUMNS) * abi.VECTOR_COLUMNS
        return torch.empty(tokens, width, device=device)[:, :channels]

    @classmethod
    def matrix(cls, rows: Tensor) -> Target:
        """Make a target of rows [tokens, channels]."""
        column = torch.arange(rows.shape[1], device=rows.device)
        address = rows.data_ptr() + column * rows.stride(1) * rows.element_size()
        stride = torch.full_like(address, rows.stride(0) * rows.element_size())
        return cls(torch.stack([address, stride], 1), rows.dtype, (rows,))

    def put(self, rows: Tensor, row: int) -> None:
        """Copy rows [tokens, channels], of the host or the device, to rows [row, row + tokens) of the target."""
        rows = rows if rows.device == self.device else transfer.send(rows, self.device)
        at, last = 0, row + len(rows)
        for x in self.kept:
            if x.dim() == 2:
                x[row:last] = rows
                return
            width = x.shape[0] * x.shape[1] * x.shape[3]
            part = rows[:, at : at + width].reshape(len(rows), x.shape[0], x.shape[1], x.shape[3])
            x[:, :, row:last] = part.permute(1, 2, 0, 3)
            at += width


class Rows(NamedTuple):
    """The coded rows of a chunk that a section's tokens are: from `first` on, and from token `gap_at` on `gap` rows
    further.
    """

    first: int = 0
    gap_at: int = 0
    gap: int = 0


class Sections:
    """Decode the sections of one chunk into a target.

    Args:
        target: Receives the values.
        row: The target's row of the chunk's first token.
        tokens: Number of tokens of the chunk.
        coded: Number of coded rows of the chunk.
        columns: Number of channels of the chunk.
    """

    def __init__(self, target: Target, row: int, tokens: int, coded: int, columns: int):
        self.target, self.row, self.tokens, self.coded, self.columns = target, row, tokens, coded, columns
        self.device = target.device
        self._statuses: list[Tensor] = []
        self._kept: list[object] = []
        nothing = torch.empty(0, device=self.device)
        self._plain = Grid(None, 0, nothing, nothing)

    def index(self, section: Coded, rows: Rows, coarser: Sequence[Tensor]) -> Tensor:
        """Decode to indices, which other sections refine: uint8 [blocks, coded, 256], the layout of cg_output."""
        blocks = -(-self.columns // _BLOCK)
        found = torch.empty(blocks, self.coded, _BLOCK, dtype=torch.uint8, device=self.device)
        # On a GPU another stream could still be writing what is kept, so it is computed again.
        make = _kept_block_places if transfer.is_host(self.device) else _block_places
        places = make(self.columns, self.coded, self.device).clone()
        places[:, 0] += found.data_ptr()
        target = Target(places, torch.uint8, (found,))
        self._decode(section, self._output(target, self._plain, 0, self.coded, rows, coarser))
        return found

    def values(self, section: Coded, rows: Rows, coarser: Sequence[Tensor], grid: Grid) -> None:
        """Decode to values. The grid is on the target's device, at the step of the decoded symbols."""
        self._decode(section, self._output(self.target, grid, self.row, self.tokens, rows, coarser))

    def refine(self, sections: Sequence[Coded], rows: Rows, base: Tensor, grid: Grid) -> None:
        """Decode the digits of one refinement after the other, which refine a base. The last one writes the values."""
        coarser = [base]
        for section in sections[:-1]:
            coarser.append(self.index(section, rows, coarser))
        for section in sections[-1:]:
            self.values(section, rows, coarser, grid)

    def anchors(self, grid: Grid) -> None:
        """Write the chunk's anchors, if there are any."""
        if grid.anchors is not None and len(grid.anchors):
            anchors, output = (
                grid.anchors.contiguous(),
                self._output(self.target, grid, self.row, self.tokens, Rows(), []),
            )
            native.call("cg_rows_into", anchors, len(anchors), 0, grid.group_tokens, output, device=self.device)

    def _decode(self, section: Coded, output: abi.Output) -> None:
        if section.tokens == 0:
            return
        tables, ids, live, dead = section.columns.on(self.device)
        view = ops.Section(tables, ids, None, section.tokens, section.columns.tables_per_tile)
        found = ops.offsets_of(section.tile_bytes, view.tiles, section.streams)
        parts = (section.streams, found, section.positions, section.indices)
        streams, offsets, positions, indices = transfer.send_all(parts, self.device)
        statuses = torch.empty(view.tiles, dtype=torch.int32, device=self.device)
        buffers = (streams, streams.numel(), offsets, _of(output, live) if len(dead) else output, statuses)
        native.call("cg_decode_into", view.view, *buffers, device=self.device)
        if len(dead):
            native.call("cg_fill_into", section.tokens, len(dead), _of(output, dead), device=self.device)
        if len(section.positions):
            native.call("cg_patch_into", section.tokens, positions, indices, len(indices), output, device=self.device)
        self._statuses.append(statuses)
        self._kept.append((view, streams, offsets, positions, indices, output))

    def _output(
        self, target: Target, grid: Grid, row: int, tokens: int, rows: Rows, coarser: Sequence[Tensor]
    ) -> abi.Output:
        dtype = _INDEX if target.dtype == torch.uint8 else DTYPES[target.dtype]
        anchors = None if grid.anchors is None else grid.anchors.data_ptr()
        scale = (grid.group_tokens, anchors, grid.means.data_ptr(), grid.steps.data_ptr(), dtype)
        chunk = ctypes.pointer(abi.Chunk(tokens, self.columns, *scale))
        addresses = (ctypes.c_void_p * 2)(*(matrix.data_ptr() for matrix in coarser))
        self._kept.append((target, grid, coarser))
        return abi.Output(chunk, *rows, row, target.places.data_ptr(), None, addresses, len(coarser))

    def planes(self, section: Coded) -> None:
        """Decode the bytes of values (`transforms.lossless`): a section without dead channels, in whole tiles."""
        view = ops.Section(section.columns.book.tables.native, section.columns.table_ids, None, section.tokens)
        offsets = ops.offsets_of(section.tile_bytes, view.tiles, section.streams)
        statuses = torch.empty(view.tiles, dtype=torch.int32)
        output = self._output(self.target, self._plain, self.row, self.tokens, Rows(), [])
        buffers = (section.streams, section.streams.numel(), offsets, output, statuses)
        native.call("cg_decode_planes", view.view, *buffers, device=self.device)
        if len(section.positions):
            patches = (section.positions, section.indices, len(section.indices))
            native.call("cg_patch_planes", *patches, output, device=self.device)
        self._statuses.append(statuses)

    def include(self, others: Sections) -> None:
        """Report the errors of other sections with those of this chunk."""
        self._statuses += others._statuses
        self._kept.append(others)

    def launched(self) -> transfer.Check:
        """Return what waits for the device, and raises as `finish` does."""
        statuses = transfer.Download(torch.cat(self._statuses)) if self._statuses else None

        def check() -> None:
            native.check_decoded(statuses.wait().tolist() if statuses is not None else [])
            self._kept.clear()

        return check

    def finish(self) -> None:
        """Wait for the device. Raises TruncatedError or CorruptError for streams that no encoder wrote."""
        self.launched()()


def _block_places(columns: int, coded: int, device: torch.device) -> Tensor:
    """Return the addresses of a matrix in blocks, uint8 [blocks, coded, 256], that begins at address 0."""
    column = torch.arange(columns, device=device)
    address = column // _BLOCK * (coded * _BLOCK) + column % _BLOCK
    return torch.stack([address, torch.full_like(address, _BLOCK)], 1)


_kept_block_places = lru_cache(maxsize=4)(_block_places)  # all chunks of a context but the last have one shape


def _of(output: abi.Output, columns: Tensor) -> abi.Output:
    """Return the same output for some channels."""
    found = abi.Output.from_buffer_copy(output)
    found.columns = columns.data_ptr()
    return found


def indices(section: Coded, device: torch.device) -> tuple[Tensor, transfer.Check]:
    """Decode the indices of a section with one context on a device: uint8 [tokens, channels]. An index that no byte
    holds becomes the nearest one.

    Returns:
        The indices; what waits for them and raises TruncatedError or CorruptError. Nothing waits before.
    """
    columns = section.columns
    tables, ids, live, dead = columns.on(device)
    view = ops.Section(tables, ids, None, section.tokens, columns.tables_per_tile)
    largest = columns.book.tables.frequencies.shape[1] - 1
    given = section.indices.clamp(0, largest).to(torch.uint8)
    where = ops.offsets_of(section.tile_bytes, view.tiles, section.streams)
    sent = transfer.send_all((section.streams, where, section.positions, given), device)
    streams, offsets, positions, given = sent
    found = torch.empty(section.tokens, columns.coded, dtype=torch.uint8, device=device)
    statuses = torch.empty(view.tiles, dtype=torch.int32, device=device)
    native.call("cg_decode", view.view, streams, streams.numel(), offsets, found, statuses, device=device)
    if len(dead):
        opened = found.new_full((section.tokens, len(columns)), columns.book.zero)
        found = opened.index_copy_(1, live.long(), found)
    if len(section.positions):
        found.view(-1).index_copy_(0, positions, given)
    done = transfer.Download(statuses)
    return found, lambda: native.check_decoded(done.wait().tolist())


def symbols(section: Coded, device: torch.device, part_of: Sections) -> Tensor:
    """Decode the symbols (not indices) of a section that nothing refines: float32 [tokens, channels].

    Nothing waits: `part_of.launched` and `part_of.finish` report the errors in its streams too.
    """
    found = torch.empty(section.tokens, len(section.columns), device=device)
    sections = Sections(Target.matrix(found), 0, section.tokens, section.tokens, found.shape[1])
    unit = torch.ones(found.shape[1], device=device)
    sections.values(section, Rows(), [], Grid(None, 0, torch.zeros_like(unit), unit))
    part_of.include(sections)
    return found
