"""The space where an error of any coefficient costs the same divergence: products with a sensitivity's roots."""

from __future__ import annotations

import torch
from torch import Tensor


def roots(sensitivity: Tensor) -> tuple[Tensor, Tensor]:
    """Return the square root of a sensitivity [heads, dim, dim] and its inverse, float64 of the same shape."""
    values, vectors = torch.linalg.eigh(sensitivity.double())
    root, inverse = ((vectors * scale[:, None]) @ vectors.mT for scale in (values.sqrt(), values.rsqrt()))
    return root, inverse


def by_head(x: Tensor, heads: Tensor) -> Tensor:
    """Multiply x [n, heads * dim] by a block-diagonal matrix, given as its blocks [heads, dim, dim]."""
    found = torch.empty(len(x), *heads.shape[:2], dtype=x.dtype)
    torch.bmm(x.reshape(found.shape).transpose(0, 1), heads, out=found.transpose(0, 1))
    return found.flatten(1)


def both_sides(x: Tensor, heads: Tensor) -> Tensor:
    """Multiply a symmetric x [channels, channels] by a symmetric block-diagonal matrix from both sides."""
    return by_head(by_head(x, heads).mT, heads)


def principal(x: Tensor) -> Tensor:
    """Return the eigenvectors of a symmetric matrix, as float64 rows, the one of the largest eigenvalue first.

    They are computed in float32, which takes less than half the time. They are orthogonal to within its rounding, and
    only those of eigenvalues that differ by less than a millionth of the largest one are mixed.
    """
    return torch.linalg.eigh(x.float())[1].flip(1).mT.double()
