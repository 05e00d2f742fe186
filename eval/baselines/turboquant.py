"""TurboQuant (Zandieh et al., 2025, arXiv 2504.19874): random rotation, then a scalar quantiser that needs no data.

A vector (one token's head) is stored as its norm in 16 bits and its direction. A random rotation makes every coordinate
of the direction follow one known density, proportional to (1 - x^2)^((d - 3) / 2), for which the Lloyd-Max quantiser
is computed once. The variant "with residual" (TurboQuant_prod in the paper) has one bit less in that stage and spends
it on the signs of a Gaussian projection of the residual (QJL), with the residual's norm in 16 bits: inner products are
then unbiased, at a larger error of the vector itself.

The rotation and the projection come from a seed and cost nothing. The paper's 2.5- and 3.5-bit settings give more bits
to outlier channels; these are the plain settings.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from eval.baselines.stored import Stored

SEED = 0
NORM_BITS = 16
GRID = 20001
"""Points at which the density is evaluated."""
ROUNDS = 200
"""Most iterations of Lloyd's algorithm."""
CONVERGED = 1e-6
"""Largest change of a level in the last iteration."""


def turboquant(keys: Sequence[Tensor], values: Sequence[Tensor], bits: int, residual: bool = False) -> Iterator[Stored]:
    """Yield what TurboQuant stores of a context.

    Args:
        keys: per layer [1, heads, tokens, head_dim]; head_dim at least 4.
        values: likewise.
        bits: bits of a coordinate, all stages together.
        residual: store the signs of the residual's projection, with one of the bits.
    """
    decoded: tuple[list[Tensor], list[Tensor]] = ([], [])
    spent = 0.0
    for kind, side in enumerate((keys, values)):
        for x in side:
            decoded[kind].append(_restored(x.float().cpu(), bits, residual))
            vectors = x.numel() // x.shape[-1]
            spent += bits * x.numel() + vectors * NORM_BITS * (2 if residual else 1)
    yield Stored(None, *decoded, spent)


def _restored(x: Tensor, bits: int, residual: bool) -> Tensor:
    """Quantise and dequantise the vectors [..., d]."""
    dim = x.shape[-1]
    turn = rotation(dim)
    norm = x.norm(dim=-1, keepdim=True)
    turned = (x / norm.clamp_min(1e-9)) @ turn.mT
    levels = codebook(dim, bits - 1 if residual else bits)
    middles = (levels[1:] + levels[:-1]) / 2
    coarse = levels[torch.bucketize(turned, middles)]
    if residual:
        left = turned - coarse
        signs = torch.where(left @ projection(dim).mT < 0, -1.0, 1.0)
        length = left.norm(dim=-1, keepdim=True).half().float()
        coarse = coarse + math.sqrt(math.pi / 2) / dim * length * (signs @ projection(dim))
    return (coarse @ turn) * norm.half().float()


@lru_cache(maxsize=8)
def rotation(dim: int) -> Tensor:
    """Return a random orthogonal matrix, float32 [dim, dim]."""
    made = torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64))
    return (made.Q * made.R.diagonal().sign()).float()


@lru_cache(maxsize=8)
def projection(dim: int) -> Tensor:
    """Return a matrix of independent standard normal values, float32 [dim, dim]."""
    return torch.randn(dim, dim, generator=torch.Generator().manual_seed(SEED + 1))


@lru_cache(maxsize=32)
def codebook(dim: int, bits: int) -> Tensor:
    """Return the Lloyd-Max levels of a coordinate of a random unit vector, float32 [2^bits], ascending.

    Args:
        dim: length of the vector, at least 4.
        bits: 0 gives one level, 0.
    """
    x = torch.linspace(-1, 1, GRID, dtype=torch.float64)
    weight = (1 - x**2).clamp_min(0) ** ((dim - 3) / 2)
    share = weight.cumsum(0) / weight.sum()
    wanted = (torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits
    levels = x[torch.searchsorted(share, wanted).clamp_max(GRID - 1)]
    for _ in range(ROUNDS):
        cell = torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)
        mass = torch.zeros(2**bits, dtype=torch.float64).scatter_add_(0, cell, weight)
        mean = torch.zeros(2**bits, dtype=torch.float64).scatter_add_(0, cell, weight * x)
        moved = torch.where(mass > 0, mean / mass.clamp_min(1e-300), levels)
        if torch.allclose(moved, levels, rtol=0, atol=CONVERGED):
            break
        levels = moved
    return levels.float()
