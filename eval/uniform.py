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


def quantise(x: Tensor, bits: int) -> Tensor:
    """x [..., head_dim] after a round trip through `bits` bits, in its own dtype."""
    exact = x.float()
    low, high = exact.amin(-1, keepdim=True), exact.amax(-1, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).half().float().clamp_min(torch.finfo(torch.float16).tiny)
    low = low.half().float()
    levels = ((exact - low) / scale).round().clamp(0, 2**bits - 1)
    return (levels * scale + low).to(x.dtype)


def bits_per_element(bits: int, head_dim: int) -> float:
    """Everything counted."""
    return bits + SIDE_BITS / head_dim
