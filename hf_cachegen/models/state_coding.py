"""Quantise recurrent states, as an option.

A row of a state (its last dim) is stored as codes and one scale: value = (code - 128) x scale, where the scale is the
row's largest magnitude / (2^(bits - 1) - 1). Codes are uint8 and compress further. Scales have the dtype of the state.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_cachegen.errors import CorruptError, TensorError

ZERO = 128
"""Code of the value 0."""


def quantise(state: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Quantise a state [..., n] to (codes uint8 [..., n], scales [..., 1] in its dtype).

    Raises:
        TensorError: a value is not finite.
    """
    values = state.detach().float()
    if not bool(values.isfinite().all()):
        raise TensorError("a recurrent state has a value that is not finite: keep the states exactly (state_bits=None)")
    most = (1 << bits - 1) - 1
    scales = (values.abs().amax(-1, keepdim=True) / most).to(state.dtype)
    steps = scales.float()
    codes = torch.where(steps > 0, values / steps, 0.0).round().clamp(-most, most)
    return (codes + ZERO).to(torch.uint8), scales


def dequantise(codes: Tensor, scales: Tensor) -> Tensor:
    """Return the state of untrusted codes and scales. Inverse of `quantise` up to rounding.

    Raises:
        CorruptError: they do not fit together.
    """
    if codes.dtype != torch.uint8 or not scales.is_floating_point() or scales.shape != (*codes.shape[:-1], 1):
        raise CorruptError(
            f"expected codes uint8 [..., n] and float scales [..., 1] of a quantised state, got {list(codes.shape)} "
            f"{codes.dtype} and {list(scales.shape)} {scales.dtype}; encode the context again"
        )
    return ((codes.float() - ZERO) * scales.float()).to(scales.dtype)
