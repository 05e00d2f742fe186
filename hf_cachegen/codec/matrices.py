"""The matrices of a profile's file: float16, or in a chain 8 bits a number.

In 8 bits a row is int8 with a scale, in the code of a quantiser's step. A matrix that was read has the same codes when
it is written again.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hf_cachegen.codec.quantize import STEPS_PER_OCTAVE, UNIT_CODE, steps_of

LARGEST = 127
TOLERANCE = 1e-3
"""In steps of the code: a row whose largest number was rounded keeps its code."""


def written(name: str, x: Tensor, *, chained: bool) -> dict[str, Tensor]:
    """Return the tensors of a file that hold a matrix float32 [rows, columns], by name."""
    if not chained:
        return {name: x.half()}
    numbers, codes = packed(x)
    return {name: numbers, f"{name}-scale": codes}


def read(tensors: Mapping[str, Tensor], name: str, *, chained: bool) -> Tensor:
    """Return the float32 matrix that `written` gave. Raises LookupError, and ValueError for another dtype or shape."""
    found = tensors[name]
    if chained:
        return unpacked(found, tensors[f"{name}-scale"])
    if found.dtype != torch.float16:
        raise ValueError(f"{name} must be float16")
    return found.float()


def written_heads(name: str, x: Tensor, *, chained: bool) -> dict[str, Tensor]:
    """Return the tensors of a file that hold a matrix for each head, float32 [heads, dim, dim]; in a chain row by row.
    """
    return written(name, x.flatten(0, 1), chained=True) if chained else {name: x}


def read_heads(tensors: Mapping[str, Tensor], name: str, *, chained: bool) -> Tensor:
    """Return what `written_heads` gave. Raises LookupError, ValueError."""
    if not chained:
        return tensors[name]
    rows = read(tensors, name, chained=True)
    if not rows.shape[1] or len(rows) % rows.shape[1]:
        raise ValueError(f"{name} must have the rows of square matrices")
    return rows.reshape(-1, rows.shape[1], rows.shape[1])


def rounded(x: Tensor, *, chained: bool) -> Tensor:
    """Round a matrix as in the file. Returns float32."""
    return unpacked(*packed(x.float())) if chained else x.half().float()


def packed(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the numbers, int8, and the code of each row's scale, uint8 [rows], of x float32 [rows, columns]."""
    largest = x.double().abs().amax(1) if x.shape[1] else x.new_zeros(len(x), dtype=torch.float64)
    codes = (largest / LARGEST).log2() * STEPS_PER_OCTAVE + UNIT_CODE - TOLERANCE
    codes = codes.ceil().clamp(0, 255).to(torch.uint8)
    return (x / steps_of(codes)[:, None]).round().clamp(-LARGEST, LARGEST).to(torch.int8), codes


def unpacked(numbers: Tensor, codes: Tensor) -> Tensor:
    """Return the matrix, float32 [rows, columns]. Raises ValueError if the tensors are no such matrix."""
    sound = numbers.dtype == torch.int8 and codes.dtype == torch.uint8
    if not sound or numbers.dim() != 2 or tuple(codes.shape) != (len(numbers),):
        raise ValueError("a matrix in 8 bits needs int8 numbers [rows, columns] and uint8 codes [rows]")
    return numbers.float() * steps_of(codes)[:, None]
