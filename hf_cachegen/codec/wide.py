"""Wide symbols: the few base symbols that no byte holds, such as those of attention sinks.

A matrix of symbols has the nearest byte in their place. `Wide` has the symbols themselves, and the last step of
decoding puts their values right.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hf_cachegen.codec import quantize, transfer
from hf_cachegen.codec.tables import VALUE_SYMBOLS


class Wide(NamedTuple):
    """Indices beyond a byte: positions int64, ascending, position = row x channels + channel; indices int32."""

    positions: Tensor
    indices: Tensor


NONE_WIDE = Wide(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int32))


def nearest(indices: Tensor) -> Tensor:
    """Return the nearest indices that a byte holds."""
    return indices.clamp(0, VALUE_SYMBOLS - 1)


def correct(rows: Tensor, wide: Wide, steps: Tensor, refinements: int) -> None:
    """Replace the values of the nearest bytes by those of wide symbols, exactly as if these had been decoded.

    Args:
        rows: float32 [tokens, channels], decoded without means and anchors: symbol x step.
        wide: Positions of these rows.
        steps: float32 [channels], of the decoded symbols, on the device of rows.
        refinements: Number of refinements between the base and the decoded symbols.
    """
    further = (wide.indices - nearest(wide.indices)) * quantize.RATIO**refinements
    position, further = transfer.send_all((wide.positions, further), rows.device)
    row, channel = position // rows.shape[1], position % rows.shape[1]
    step = steps[channel]
    symbols = (rows[row, channel] / step).round().to(torch.int32)
    rows[row, channel] = (symbols + further) * step


def split(wide: Wide, first: int, last: int) -> tuple[Wide, Wide]:
    """Return the symbols at positions [first, last), and the others."""
    inside = (wide.positions >= first) & (wide.positions < last)
    return Wide(wide.positions[inside], wide.indices[inside]), Wide(wide.positions[~inside], wide.indices[~inside])
