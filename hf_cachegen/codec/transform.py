"""The anchors of the delta transform.

*identity* leaves rows as they are.

*delta* is CacheGen as published (section 5.2): groups of `group_tokens` tokens, the first of each the anchor, coded
with 8 bits at a scale of its own per vector (all channels of one layer's K or V); every other token becomes its
difference to the *decoded* anchor, so that errors do not add up and all tokens of a group decode in parallel. Groups
begin anew with every chunk.

Tokens of a chunk are thus *anchors* or *coded* tokens; identity has no anchors.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_cachegen.config import CacheGenConfig

ANCHOR_PEAK = 127
"""Anchors are 8-bit: symbols -127..127."""


class Anchors(NamedTuple):
    """symbols int32 (or float32) [anchors, columns]; scales bfloat16 [anchors, vectors]."""

    symbols: Tensor
    scales: Tensor

    def values(self, vectors: Tensor) -> Tensor:
        """Decoded anchors, float32 [anchors, columns]; vectors int64 [columns], rising, names each column's vector."""
        if self.symbols.device.type == "cpu":  # by numpy: torch's threads would spin where the coder's are to run next
            found = np.repeat(self.scales.float().numpy(), vectors.bincount().numpy(), 1)
            with np.errstate(all="ignore"):  # a damaged scale may be anything
                return torch.from_numpy(np.multiply(found, self.symbols.float().numpy(), out=found))
        return self.symbols * self.scales.float().index_select(1, vectors)


def anchor_count(tokens: int, config: CacheGenConfig) -> int:
    """Anchors of a chunk of so many tokens."""
    return -(-tokens // config.group_tokens) if config.transform == "delta" else 0


def coded_positions(tokens: int, config: CacheGenConfig) -> Tensor:
    """int64 positions, within a chunk, of the tokens that are not anchors."""
    position = torch.arange(tokens)
    return position[position % config.group_tokens != 0] if config.transform == "delta" else position


def anchors_of(rows: Tensor, vectors: Tensor, config: CacheGenConfig) -> Anchors | None:
    """The anchors of rows [tokens, columns], on the CPU; vectors int64 [columns], rising."""
    if config.transform != "delta":
        return None
    found = quantise_anchors(rows[:: config.group_tokens], vectors.to(rows.device))
    return Anchors(found.symbols.cpu(), found.scales.cpu())


def quantise_anchors(rows: Tensor, vectors: Tensor) -> Anchors:
    """Anchor rows [anchors, columns] to 8 bits, each vector at a scale of its own; vectors int64 [columns], rising."""
    rows = rows.float()
    widths = vectors.bincount().tolist()
    peak = torch.stack([part.abs().amax(1) for part in rows.split(widths, 1)], 1)
    # Not by a Python number: on CUDA torch multiplies by its reciprocal, which is not the same.
    scales = bf16_at_least(peak / peak.new_full((), ANCHOR_PEAK)).clamp_min(torch.finfo(torch.bfloat16).tiny)
    symbols = (rows / scales.float().index_select(1, vectors)).round_().clamp_(-ANCHOR_PEAK, ANCHOR_PEAK)
    return Anchors(symbols.to(torch.int32), scales)


def bf16_at_least(x: Tensor) -> Tensor:
    """The smallest bfloat16 that is not below x (float32, finite, not negative)."""
    near = x.to(torch.bfloat16)
    above = (near.view(torch.int16) + 1).view(torch.bfloat16)
    return torch.where(near.float() < x, above, near)
