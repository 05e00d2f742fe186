"""Multiply coefficients, most of which are zero, by a matrix: on the CPU, with the compiled library.

At a coarse level nine of ten coefficients are zero. Each of the others adds a row of the matrix to its token. A
coefficient takes about five times as long as in a dense product. So leading components, of which most are not zero, are
multiplied densely (`dense_width`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_cachegen.codec import abi, native
from hf_cachegen.codec.passes import DTYPES
from hf_cachegen.errors import TensorError

MULTIPLY = "cg_multiply_sparse"
BLOCK = 64
"""Components that are multiplied densely or sparsely together."""


def offered(device: torch.device) -> bool:
    """Return whether the library multiplies on this device."""
    return native.offers(MULTIPLY, device)


def multiply(
    coefficients: Tensor, matrix: Tensor, start: Tensor | None = None, coarse: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return start + coefficients x matrix, float32 [tokens, channels].

    Args:
        coefficients: float32 [tokens, components], which follow one another in a row.
        matrix: float32 [components, channels], which follow one another in a row.
        start: float32 or bfloat16 [tokens, channels], contiguous. None: zeros.
        coarse: float32 [2, tokens], contiguous, as `coarsened` takes it. None: coefficients are taken as they are.
        out: float32 [tokens, channels], contiguous: receives the result, and may be `start`. None: new memory.

    Raises:
        TensorError: The numbers of components differ, or channels or components do not follow one another.
    """
    if coefficients.shape[1] != len(matrix):
        raise TensorError(f"expected a matrix of {coefficients.shape[1]} components, got {len(matrix)}")
    for name, x in (("components", coefficients), ("channels", matrix)):
        if x.numel() and ((x.shape[1] > 1 and x.stride(1) != 1) or (len(x) > 1 and x.stride(0) < x.shape[1])):
            raise TensorError(f"the {name} of a row must follow one another in memory, got strides {x.stride()}")
    tokens, channels = len(coefficients), matrix.shape[1]
    rows = torch.empty(tokens, channels) if out is None else out
    job = abi.Sparse(tokens=tokens, components=coefficients.shape[1], channels=channels, rows=rows.data_ptr())
    job.coefficients, job.coefficient_stride = coefficients.data_ptr(), _stride(coefficients)
    job.matrix, job.matrix_stride = matrix.data_ptr(), _stride(matrix)
    if start is not None:
        job.start, job.start_dtype = start.data_ptr(), DTYPES[start.dtype]
    if coarse is not None:
        job.steps, job.factors = coarse[0].data_ptr(), coarse[1].data_ptr()
    native.call(MULTIPLY, job, device=rows.device)
    return rows


def _stride(x: Tensor) -> int:
    """Return the values from row to row of a matrix; torch gives any number where there is one row."""
    return max(x.stride(0), x.shape[1])


def coarsened(y: Tensor, coarse: Tensor) -> Tensor:
    """Return decoded coefficients of any level as the coarsest level decodes them.

    A symbol is the nearest one of the coarsest level's: steps differ by powers of 3, so none is between two.

    Args:
        y: float32 [tokens, components], in the basis's units.
        coarse: float32 [2, tokens]: the coarsest level's step of each token, 0 for tokens that have all levels' symbols
            in the base; and the factor from the coder's units to the basis's.
    """
    steps, factors = coarse[:, :, None]
    return torch.where(steps > 0, (y / (steps * factors)).round_().mul_(steps).mul_(factors), y)


def dense_width(shares: Tensor, cost: float, fixed: float) -> int:
    """Return how many leading components are cheaper to multiply densely: 0, a multiple of BLOCK, or all.

    Args:
        shares: For each component the expected share of coefficients that are not zero, float32 [components]. What was
            decoded must not decide: sums are rounded by it, and would depend on the chunks that are decoded together.
        cost: Of a coefficient that is not zero in a sparse product, in those of a dense product.
        fixed: The cost of having a dense product at all, in components.
    """
    gain = torch.cat([torch.zeros(1), (shares * cost - 1).cumsum(0) - fixed])
    widths = torch.arange(0, len(shares) + BLOCK, BLOCK).clamp_max(len(shares))
    return int(widths[gain[widths].argmax()])
