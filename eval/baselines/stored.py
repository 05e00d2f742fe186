"""What a baseline stores of a context, and the entropies that several baselines share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stored:
    """One level of a baseline.

    Attributes:
        level: 1 (coarsest) to the number of levels, None where there is only one.
        keys: per layer [1, heads, tokens, head_dim], as decoded, float32.
        values: likewise.
        bits: everything that must be stored, in bits.
    """

    level: int | None
    keys: list[Tensor]
    values: list[Tensor]
    bits: float


def entropy_bits(symbols: Tensor, alphabet: int) -> float:
    """Return the bits of symbols under each channel's own distribution, the least that an entropy coder can take.

    Args:
        symbols: int64 [tokens, channels], from 0 to alphabet - 1.
        alphabet: number of different symbols.
    """
    counts = torch.zeros(symbols.shape[1], alphabet).scatter_add_(
        1, symbols.mT, torch.ones_like(symbols.mT, dtype=torch.float)
    )
    share = counts / len(symbols)
    return float(-(counts * share.clamp_min(1e-12).log2()).sum())


def rows(x: Tensor) -> Tensor:
    """Return one layer's keys or values as float32 [tokens, heads * head_dim].

    Args:
        x: [1, heads, tokens, head_dim].
    """
    return x.float().transpose(1, 2).flatten(2)[0]


def unrows(x: Tensor, like: Tensor) -> Tensor:
    """Return [tokens, heads * head_dim] in the shape of `like`, [1, heads, tokens, head_dim]."""
    _, heads, tokens, dim = like.shape
    return x.reshape(1, tokens, heads, dim).transpose(1, 2)
