"""Decoding straight into place: a section's streams to values in the layers' own tensors, in one compiled pass.

Symbols become values while they are decoded (section 5.2 of the paper gives the arithmetic, `passes.restore` the same
in separate steps), and are written where they are used. On a CUDA device one launch decodes a section of all layers.

Twists:
1. A `Target` says where each column's values lie; it is made once and serves every chunk of an artifact.
2. What is found in the streams is told at the end, by `Sections.finish`: on a device nothing waits before.
3. A column whose table entry is 0 has no stream; its symbols are zero, and are filled in.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_cachegen import native
from hf_cachegen.codec import ops
from hf_cachegen.codec.passes import DTYPES, Grid
from hf_cachegen.codec.section import Coded

_INDEX = 3
"""CG_UINT8: indices are written, not values."""


@dataclass(frozen=True)
class Target:
    """Where values go. places int64 [columns, 2]: the address of each column's first row, and the bytes from row to
    row.

    kept: the tensors that the addresses point into.
    """

    places: Tensor
    dtype: torch.dtype
    kept: tuple[Tensor, ...]

    @property
    def device(self) -> torch.device:
        return self.places.device

    @classmethod
    def layers(cls, tensors: Sequence[Tensor]) -> Target:
        """tensors [batch, heads, tokens, dim], K and V of each layer in turn: of one dtype, on one device."""
        found = []
        for x in tensors:
            batch, heads, _, dim = (torch.arange(n) * s for n, s in zip(x.shape, x.stride(), strict=True))
            element = (batch[:, None, None] + heads[:, None] + dim).flatten()
            address = x.data_ptr() + element * x.element_size()
            found.append(torch.stack([address, torch.full_like(address, x.stride(2) * x.element_size())], 1))
        return cls(torch.cat(found).to(tensors[0].device), tensors[0].dtype, tuple(tensors))

    @classmethod
    def matrix(cls, rows: Tensor) -> Target:
        """rows [tokens, columns]."""
        address = rows.data_ptr() + torch.arange(rows.shape[1]) * rows.stride(1) * rows.element_size()
        stride = torch.full_like(address, rows.stride(0) * rows.element_size())
        return cls(torch.stack([address, stride], 1).to(rows.device), rows.dtype, (rows,))

    def put(self, rows: Tensor, row: int) -> None:
        """Copies rows [tokens, columns] to rows [row, row + tokens)."""
        at, last = 0, row + len(rows)
        for x in self.kept:
            if x.dim() == 2:
                x[row:last] = rows
                return
            width = x.shape[0] * x.shape[1] * x.shape[3]
            part = rows[:, at : at + width].reshape(len(rows), x.shape[0], x.shape[1], x.shape[3])
            x[:, :, row:last] = part.permute(1, 2, 0, 3)
            at += width


class Sections:
    """The sections of one chunk, decoded one after the other on the target's device, the coarsest first."""

    def __init__(self, device: torch.device):
        self.device = device
        self._coarser: list[Tensor] = []
        self._statuses: list[Tensor] = []
        self._kept: list[object] = []

    def index(self, coded: Coded, columns: int) -> None:
        """Decodes to a matrix of indices, which the sections that follow refine."""
        found = torch.empty(coded.tokens, columns, dtype=torch.uint8, device=self.device)
        empty = torch.empty(0, device=self.device)
        grid = Grid(None, 0, empty, empty)
        self._decode(coded, Target.matrix(found), grid, 0, coded.tokens, columns)
        self._coarser.append(found)

    def alone(self, coded: Coded, columns: int) -> Tensor:
        """The indices of a section that others do not refine, uint8 [tokens, columns] on the device, waited for."""
        self.index(coded, columns)
        self.finish()
        return self._coarser.pop()

    def values(self, coded: Coded, target: Target, grid: Grid, row: int, tokens: int) -> None:
        """Decodes to values of a chunk of `tokens` tokens, whose first is row `row` of the target.

        coded covers all coded rows of the chunk; grid is on the target's device, at the level's step.
        """
        columns = len(grid.steps)
        self._decode(coded, target, grid, row, tokens, columns)
        if grid.anchors is not None and len(grid.anchors):
            output = self._output(target, grid, row, tokens, columns, None)
            anchors = grid.anchors.contiguous()
            native.call("cg_rows_into", anchors, len(anchors), 0, grid.group_tokens, output, device=self.device)

    def _decode(self, coded: Coded, target: Target, grid: Grid, row: int, tokens: int, columns: int) -> None:
        tables, ids, live, dead = coded.columns.on(self.device)
        section = ops.Section(tables, ids, None, coded.tokens)
        streams = coded.streams.to(self.device, non_blocking=True)
        offsets = ops.offsets_of(coded.tile_bytes, section.tiles, streams)
        statuses = torch.empty(section.tiles, dtype=torch.int32, device=self.device)
        output = self._output(target, grid, row, tokens, columns, live if len(dead) else None)
        buffers = (streams, streams.numel(), offsets, output, statuses)
        native.call("cg_decode_into", section.view, *buffers, device=self.device)
        if len(dead):
            output = self._output(target, grid, row, tokens, columns, dead)
            native.call("cg_fill_into", coded.tokens, len(dead), output, device=self.device)
        if len(coded.positions):
            positions, indices = coded.positions.to(self.device), coded.indices.to(self.device)
            output = self._output(target, grid, row, tokens, columns, None)
            native.call("cg_patch_into", coded.tokens, positions, indices, len(indices), output, device=self.device)
            self._kept.append((positions, indices))
        self._statuses.append(statuses)
        self._kept.append((section, streams, offsets))

    def _output(
        self, target: Target, grid: Grid, row: int, tokens: int, columns: int, which: Tensor | None
    ) -> native.Output:
        dtype = _INDEX if target.dtype == torch.uint8 else DTYPES[target.dtype]
        anchors = None if grid.anchors is None else grid.anchors.data_ptr()
        chunk = native.Chunk(
            tokens, columns, grid.group_tokens, anchors, grid.means.data_ptr(), grid.steps.data_ptr(), dtype
        )
        coarser = (ctypes.c_void_p * 2)(*(matrix.data_ptr() for matrix in self._coarser))
        places, named = target.places.data_ptr(), None if which is None else which.data_ptr()
        self._kept.append((target, grid, which))
        return native.Output(ctypes.pointer(chunk), 0, row, places, named, coarser, len(self._coarser))

    def finish(self) -> None:
        """Waits for all of it. Raises TruncatedError or CorruptError for streams that no encoder wrote."""
        native.check_decoded(torch.cat(self._statuses).tolist() if self._statuses else [])
        self._kept.clear()
