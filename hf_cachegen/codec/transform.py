"""Rows of a chunk to what is quantised, and back.

*identity* leaves rows as they are.

*delta* is CacheGen as published (section 5.2): groups of `group_tokens` tokens, the first of each the anchor, coded with 8 bits at a
scale of its own per vector (all channels of one layer's K or V); every other token becomes its difference to the *decoded*
anchor, so that errors do not add up and all tokens of a group decode in parallel. Groups begin anew with every chunk.

Tokens of a chunk are thus *anchors* or *coded* tokens; identity has no anchors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hf_cachegen.config import CacheGenConfig

ANCHOR_PEAK = 127
"""Anchors are 8-bit: symbols -127..127."""


class Anchors(NamedTuple):
    """symbols int32 [anchors, columns]; scales bfloat16 [anchors, vectors]."""

    symbols: Tensor
    scales: Tensor

    def values(self, vectors: Tensor) -> Tensor:
        """Decoded anchors, float32 [anchors, columns]; vectors int64 [columns] names each column's vector."""
        return self.symbols.float() * self.scales.float()[:, vectors]


def anchor_count(tokens: int, config: CacheGenConfig) -> int:
    return -(-tokens // config.group_tokens) if config.transform == "delta" else 0


def coded_positions(tokens: int, config: CacheGenConfig) -> Tensor:
    """int64 positions, within a chunk, of the tokens that are not anchors."""
    position = torch.arange(tokens)
    return position[position % config.group_tokens != 0] if config.transform == "delta" else position


def forward(rows: Tensor, vectors: Tensor, config: CacheGenConfig) -> tuple[Tensor, Anchors | None]:
    """rows float32 [tokens, columns] to (y float32 [coded tokens, columns], anchors)."""
    if config.transform == "identity":
        return rows, None
    anchors = quantise_anchors(rows[:: config.group_tokens], vectors)
    coded = coded_positions(len(rows), config).to(rows.device)
    return rows[coded] - anchors.values(vectors)[coded // config.group_tokens], anchors


def inverse(y: Tensor, anchors: Anchors | None, vectors: Tensor, tokens: int, config: CacheGenConfig) -> Tensor:
    """The inverse of `forward`: float32 [tokens, columns]."""
    if anchors is None:
        return y
    values = anchors.values(vectors)
    coded = coded_positions(tokens, config)
    rows = torch.empty(tokens, values.shape[1])
    rows[:: config.group_tokens] = values
    rows[coded] = y.add_(values[coded // config.group_tokens])
    return rows


def quantise_anchors(rows: Tensor, vectors: Tensor) -> Anchors:
    """Anchor rows float32 [anchors, columns] to 8 bits, each vector at a scale of its own."""
    peak = torch.zeros(rows.shape[0], int(vectors[-1]) + 1, device=rows.device)
    peak.scatter_reduce_(1, vectors.expand_as(rows), rows.abs(), "amax")
    scales = bf16_at_least(peak / ANCHOR_PEAK).clamp_min(torch.finfo(torch.bfloat16).tiny)
    symbols = (rows / scales.float()[:, vectors]).round_().clamp_(-ANCHOR_PEAK, ANCHOR_PEAK)
    return Anchors(symbols.to(torch.int32), scales)


def bf16_at_least(x: Tensor) -> Tensor:
    """The smallest bfloat16 that is not below x (float32, finite, not negative)."""
    near = x.to(torch.bfloat16)
    above = (near.view(torch.int16) + 1).view(torch.bfloat16)
    return torch.where(near.float() < x, above, near)
