"""Uniform quantisation of a KV cache with a scale and an offset for each vector, a common baseline.

A vector is one token's head (head_dim values). Scale and offset are float16, so a value takes bits + 32 / head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

SIDE_BITS = 32
"""Bits of scale and offset, float16 each."""


def pack(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise vectors.

    Args:
        x: [..., head_dim] of any float dtype.
        bits: 1 to 8.

    Returns:
        (levels uint8 [..., head_dim], scale float16 [..., 1], offset float16 [..., 1]).
    """
    exact = x.float()
    low, high = exact.amin(-1, keepdim=True), exact.amax(-1, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).half()
    levels = ((exact - low.half().float()) / _divisor(scale)).round().clamp(0, 2**bits - 1)
    return levels.to(torch.uint8), scale, low.half()


def unpack(levels: Tensor, scale: Tensor, low: Tensor, dtype: torch.dtype) -> Tensor:
    """Dequantise the result of `pack` to `dtype`."""
    return (levels * _divisor(scale) + low.float()).to(dtype)


def quantise(x: Tensor, bits: int) -> Tensor:
    """Return x [..., head_dim], quantised and dequantised, in its own dtype."""
    return unpack(*pack(x, bits), x.dtype)


def _divisor(scale: Tensor) -> Tensor:
    """Return the scale as float32, never zero: all values of a vector may be equal."""
    return scale.float().clamp_min(torch.finfo(torch.float16).tiny)


def bits_per_element(bits: int, head_dim: int) -> float:
    """Return the bits of a value, scale and offset included."""
    return bits + SIDE_BITS / head_dim
