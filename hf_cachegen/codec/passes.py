"""The passes over a chunk's values, compiled where a compiled library exists, else in torch: the same numbers.

A chunk's rows are [tokens, channels]. With anchors, the first of every `group_tokens` rows is an anchor. All other
rows are *coded rows*, and "coded rows [first, last)" counts them alone.

Symbols are bytes: an index is symbol + ZERO_INDEX, a digit's index is digit + 1. The few base symbols that no byte
holds are stored beside their matrix (`wide`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_cachegen.codec import abi, native, quantize
from hf_cachegen.codec.anchors import Anchors
from hf_cachegen.codec.tables import DIGIT_SYMBOLS, DIGIT_ZERO, ZERO_INDEX
from hf_cachegen.codec.wide import NONE_WIDE, Wide, nearest

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""enum cg_dtype."""
_BLOCK_COLUMNS = 1024
"""CG_BLOCK_COLUMNS."""


class Grid(NamedTuple):
    """The mapping between values and symbols: value = symbol x step + mean + anchor of its group.

    Attributes:
        anchors: Decoded anchors, float32 [groups, channels]; None without anchors, then group_tokens is 0.
        group_tokens: Tokens per group.
        means: float32 [channels].
        steps: float32 [channels].
    """

    anchors: Tensor | None
    group_tokens: int
    means: Tensor
    steps: Tensor

    @classmethod
    def of(cls, anchors: Anchors | None, vectors: Tensor, group_tokens: int, means: Tensor, steps: Tensor) -> Grid:
        """Return the grid of a chunk with these anchors; vectors int64 [channels] is the vector of each channel."""
        values = None if anchors is None else anchors.values(vectors)
        return cls(values, 0 if anchors is None else group_tokens, means, steps)

    def to(self, device: torch.device) -> Grid:
        """Return a copy on another device."""
        anchors = None if self.anchors is None else self.anchors.to(device)
        return Grid(anchors, self.group_tokens, self.means.to(device), self.steps.to(device))

    def positions(self, tokens: int) -> Tensor:
        """Return the positions of the coded rows in a chunk of `tokens` tokens: int64."""
        position = torch.arange(tokens)
        return position if self.anchors is None else position[position % self.group_tokens != 0]


class Symbols(NamedTuple):
    """Of all coded rows: base uint8 [rows, channels]; digits and their contexts uint8 [levels - 1, rows, channels]."""

    base: Tensor
    wide: Wide
    digits: Tensor
    contexts: Tensor


def _compiled(rows: Tensor) -> bool:
    return rows.dtype in DTYPES and native.available(rows.device)


def _chunk(rows: Tensor, grid: Grid) -> abi.Chunk:
    anchors = None if grid.anchors is None else grid.anchors.data_ptr()
    means, steps = grid.means.data_ptr(), grid.steps.data_ptr()
    return abi.Chunk(*rows.shape, grid.group_tokens, anchors, means, steps, DTYPES[rows.dtype])


def _differences(rows: Tensor, grid: Grid, which: Tensor | slice) -> Tensor:
    """Return some coded rows minus their anchors, float32."""
    coded = grid.positions(len(rows))[which].to(rows.device)
    y = rows[coded].float()
    return y if grid.anchors is None else y - grid.anchors[coded // grid.group_tokens]


def moments(rows: Tensor, grid: Grid, first: int, last: int) -> Tensor:
    """Sum y and its squares over coded rows [first, last), with y = value - anchor.

    The sums are float64, so that the order of addition does not affect the few bits that are kept of them.

    Returns:
        float64 [2, channels], on the CPU.
    """
    if _compiled(rows):
        sums, rows = torch.zeros(2, rows.shape[1], dtype=torch.float64, device=rows.device), rows.contiguous()
        native.call("cg_moments", _chunk(rows, grid), rows, first, last, sums[0], sums[1])
        return sums.cpu()
    y = _differences(rows, grid, slice(first, last)).double()
    return torch.stack([y.sum(0), y.square().sum(0)]).cpu()


def quantise(rows: Tensor, grid: Grid, levels: int) -> Symbols:
    """Quantise all coded rows to symbols: on the rows' device where a compiled coder exists for it, else on the CPU."""
    if not _compiled(rows):
        return _exact(rows, grid, levels, slice(None))
    rows, device = rows.contiguous(), rows.device
    shape = (len(grid.positions(len(rows))), rows.shape[1])
    base = torch.empty(shape, dtype=torch.uint8, device=device)
    digits, contexts = torch.empty(2, levels - 1, *shape, dtype=torch.uint8, device=device)
    wide = torch.empty(-(-shape[1] // _BLOCK_COLUMNS), shape[0], dtype=torch.uint8, device=device)
    native.call("cg_quantise", _chunk(rows, grid), rows, levels - 1, base, digits, contexts, wide)
    found = NONE_WIDE
    if len(again := wide.any(0).nonzero().flatten().cpu()):
        exact = _exact(rows, grid, levels, again)
        base[again], found = exact.base.to(device), exact.wide
        digits[:, again], contexts[:, again] = exact.digits.to(device), exact.contexts.to(device)
    return Symbols(base, found, digits, contexts)


def _exact(rows: Tensor, grid: Grid, levels: int, which: Tensor | slice) -> Symbols:
    """Quantise some coded rows to symbols of any size."""
    fine = quantize.fine_symbols(_differences(rows, grid, which) - grid.means, grid.steps).cpu()
    symbols, digits = quantize.split(fine, levels)
    index = symbols + ZERO_INDEX
    base = nearest(index).to(torch.uint8)
    row, channel = (base != index).nonzero(as_tuple=True)
    counted = torch.arange(len(grid.positions(len(rows))))[which]
    wide = Wide(counted[row] * rows.shape[1] + channel, index[row, channel])
    found: list[Tensor] = []
    for digit in digits:
        found += [digit + DIGIT_ZERO, quantize.contexts(symbols)]
        symbols = quantize.refine(symbols, digit)
    each = torch.stack(found).to(torch.uint8) if found else base.new_empty(0, *base.shape)
    return Symbols(base, wide, each[::2], each[1::2])


def restore(rows: Tensor, grid: Grid, first: int, base: Tensor, digits: Sequence[Tensor], wide: Wide) -> None:
    """Write the values of coded rows [first, first + len(base)) into rows.

    Args:
        rows: [tokens, channels] of any float dtype, on the CPU.
        grid: At the step that the symbols have.
        first: The first coded row to write.
        base: Indices, uint8 [coded rows to write, channels], contiguous.
        digits: Indices of each refinement's digits, in the shape of base.
        wide: The wide symbols of all coded rows of the chunk.
    """
    last, channels = first + len(base), base.shape[1]
    if _compiled(rows):
        addresses = (ctypes.c_void_p * len(digits))(*(digit.data_ptr() for digit in digits))
        native.call("cg_restore", _chunk(rows, grid), first, last, base, addresses, len(digits), rows)
    else:
        _store(rows, grid, slice(first, last), slice(None), base.int() - ZERO_INDEX, digits)
    if len(wide.positions):
        row, channel = wide.positions // channels, wide.positions % channels
        mine = (row >= first) & (row < last)
        row, channel, symbols = row[mine], channel[mine], wide.indices[mine] - ZERO_INDEX
        _store(rows, grid, row, channel, symbols, [digit[row - first, channel] for digit in digits])


def _store(
    rows: Tensor, grid: Grid, which: Tensor | slice, channels: Tensor | slice, symbols: Tensor, digits: Sequence[Tensor]
) -> None:
    for digit in digits:
        symbols = quantize.refine(symbols, digit.int() - DIGIT_ZERO)
    coded = grid.positions(len(rows))[which]
    y = symbols * grid.steps[channels] + grid.means[channels]
    rows[coded, channels] = (y if grid.anchors is None else y + grid.anchors[coded // grid.group_tokens, channels]).to(
        rows.dtype
    )


def contexts_of(symbols: Tensor, zero: int, coarser: Tensor | None = None) -> Tensor:
    """Return the context that selects a digit's table, uint8: 0 where the coarser symbol is zero, 1 positive, 2
    negative.

    Args:
        symbols: Indices of base symbols, or of digits.
        zero: The index of symbol 0.
        coarser: For digits, the contexts that these digits had. The sign of a refined symbol is that of the coarser
            one, unless this is zero.
    """
    if native.available(symbols.device):
        found = torch.empty_like(symbols)
        native.call("cg_contexts", symbols, zero, coarser, symbols.numel(), found)
        return found
    own = (symbols > zero).to(torch.uint8) + 2 * (symbols < zero).to(torch.uint8)
    return own if coarser is None else torch.where(coarser == 0, own, coarser)


def clamp(symbols: Tensor, low: Tensor, high: Tensor, contexts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Clamp symbols to the support of their tables.

    Args:
        symbols: uint8 [rows, channels].
        low: Lowest index, uint8 [channels, contexts], by the context of each symbol.
        high: Highest index, uint8 [channels, contexts].
        contexts: uint8 [rows, channels], where there are three.

    Returns:
        The clamped symbols, and the positions of the changed ones: int64, ascending, on the CPU.
    """
    device = symbols.device
    if native.available(device):
        symbols = symbols.contiguous()
        contexts = contexts if contexts is None else contexts.contiguous()
        low, high, inside = low.T.contiguous(), high.T.contiguous(), torch.empty_like(symbols)
        rows, channels = symbols.shape
        changed = torch.empty(-(-channels // _BLOCK_COLUMNS), rows, dtype=torch.uint8, device=device)
        native.call("cg_clamp", symbols, contexts, rows, channels, low, high, inside, changed)
        block, row = changed.cpu().nonzero(as_tuple=True)
        channel = block[:, None] * _BLOCK_COLUMNS + torch.arange(_BLOCK_COLUMNS)
        position = (row[:, None] * channels + channel)[channel < channels].sort().values
        there = position.to(device)
        return inside, position[(inside.view(-1)[there] != symbols.view(-1)[there]).cpu()]
    if contexts is None:
        inside = symbols.clamp(low[:, 0], high[:, 0])
    else:
        inside = symbols.clamp(*(bound.T.gather(0, contexts.long()) for bound in (low, high)))
    return inside, (inside != symbols).flatten().nonzero().flatten().cpu()


def count(counts: Tensor, symbols: Tensor, contexts: Tensor | None = None) -> None:
    """Add to `counts` how often each index occurs in each channel.

    Args:
        counts: int32 [channels, bins], on the CPU or on the device of the symbols.
        symbols: uint8 [rows, channels], on any device.
        contexts: uint8 [rows, channels]. With contexts the bin is 3 x context + index.
    """
    bins, device = counts.shape[1], symbols.device
    if native.available(device):
        here = counts if counts.device == device else torch.zeros_like(counts, device=device)
        native.call("cg_count", symbols, contexts, *symbols.shape, bins, here)
        if here is not counts:
            counts += here.cpu()
        return
    if device.type != "cpu":
        symbols, contexts = symbols.cpu(), contexts if contexts is None else contexts.cpu()
    index = symbols.to(torch.int64)
    if contexts is not None:
        index += DIGIT_SYMBOLS * contexts
    index += torch.arange(len(counts)) * bins
    found = torch.bincount(index.flatten(), minlength=counts.numel()).reshape(counts.shape)
    counts += found.to(counts.device, torch.int32)
