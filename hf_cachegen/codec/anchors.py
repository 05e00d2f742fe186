"""Anchors: the first token of every group of `group_tokens` tokens. The other tokens are coded as differences to it.

An anchor is coded with 8 bits, at its own scale per vector (all channels of one layer's K or V). Every other token
becomes its difference to the *decoded* anchor, so that errors do not accumulate and all tokens of a group decode in
parallel (CacheGen, section 5.2). Groups restart with every chunk. So the tokens of a chunk are *anchors* or *coded*
tokens. With group_tokens 0 there are no anchors, and all tokens are coded.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

ANCHOR_PEAK = 127
"""Anchors are 8-bit: symbols -127..127."""


class Anchors(NamedTuple):
    """Quantised anchors: symbols int32 (or float32) [anchors, channels]; scales bfloat16 [anchors, vectors]."""

    symbols: Tensor
    scales: Tensor

    def values(self, vectors: Tensor) -> Tensor:
        """Return the decoded anchors, float32 [anchors, channels].

        Args:
            vectors: int64 [channels], ascending: the vector of each channel.
        """
        if self.symbols.device.type == "cpu":  # numpy: torch's threads would occupy the coder's cores
            found = np.repeat(self.scales.float().numpy(), vectors.bincount().numpy(), 1)
            with np.errstate(all="ignore"):  # a damaged scale can have any value
                return torch.from_numpy(np.multiply(found, self.symbols.float().numpy(), out=found))
        return self.symbols * self.scales.float().index_select(1, vectors)


def anchor_count(tokens: int, group_tokens: int) -> int:
    """Return the number of anchors in a chunk of `tokens` tokens."""
    return -(-tokens // group_tokens) if group_tokens else 0


def anchors_of(rows: Tensor, vectors: Tensor, group_tokens: int) -> Anchors | None:
    """Return the anchors of rows [tokens, channels] on the CPU, or None for group_tokens 0.

    Args:
        vectors: int64 [channels], ascending: the vector of each channel.
    """
    if not group_tokens:
        return None
    found = quantise_anchors(rows[::group_tokens], vectors.to(rows.device))
    return Anchors(found.symbols.cpu(), found.scales.cpu())


def quantise_anchors(rows: Tensor, vectors: Tensor) -> Anchors:
    """Quantise anchor rows [anchors, channels] to 8 bits, each vector at its own scale.

    Args:
        vectors: int64 [channels], ascending: the vector of each channel.
    """
    rows = rows.float()
    widths = vectors.bincount().tolist()
    peak = torch.stack([part.abs().amax(1) for part in rows.split(widths, 1)], 1)
    # A tensor, not a Python number: on CUDA torch multiplies by a number's reciprocal, and rounds differently.
    scales = bf16_at_least(peak / peak.new_full((), ANCHOR_PEAK)).clamp_min(torch.finfo(torch.bfloat16).tiny)
    symbols = (rows / scales.float().index_select(1, vectors)).round_().clamp_(-ANCHOR_PEAK, ANCHOR_PEAK)
    return Anchors(symbols.to(torch.int32), scales)


def bf16_at_least(x: Tensor) -> Tensor:
    """Return the smallest bfloat16 that is not below x (float32, finite, not negative)."""
    near = x.to(torch.bfloat16)
    above = (near.view(torch.int16) + 1).view(torch.bfloat16)
    return torch.where(near.float() < x, above, near)
