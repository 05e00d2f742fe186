"""Uniform quantisation of a KV cache, the baseline of CacheGen's evaluation: n bits a value, a scale and an offset per
vector.

A vector is one token's head (head_dim values); scale and offset are float16, so a value costs bits + 32 / head_dim in
all.
"""

from __future__ import annotations

import torch
from torch import Tensor

SIDE_BITS = 32
"""Scale and offset, float16 each."""


def pack(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """(levels uint8 [..., head_dim], scale and offset float16 [..., 1]) of x [..., head_dim]; bits: 1 to 8."""
    exact = x.float()
    low, high = exact.amin(-1, keepdim=True), exact.amax(-1, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).half()
    levels = ((exact - low.half().float()) / _divisor(scale)).round().clamp(0, 2**bits - 1)
    return levels.to(torch.uint8), scale, low.half()


def unpack(levels: Tensor, scale: Tensor, low: Tensor, dtype: torch.dtype) -> Tensor:
    """What `pack` packed, in `dtype`."""
    return (levels * _divisor(scale) + low.float()).to(dtype)


def quantise(x: Tensor, bits: int) -> Tensor:
    """x [..., head_dim] after a round trip through `bits` bits, in its own dtype."""
    return unpack(*pack(x, bits), x.dtype)


def _divisor(scale: Tensor) -> Tensor:
    """float32, and never zero: all values of a vector may be alike."""
    return scale.float().clamp_min(torch.finfo(torch.float16).tiny)


def bits_per_element(bits: int, head_dim: int) -> float:
    """Everything counted."""
    return bits + SIDE_BITS / head_dim
