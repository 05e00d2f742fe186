"""The left operands of matrix products on a device: gathered from decoded coefficients by one compiled call.

A *source* says what one number of an operand's row is: a constant, a number that a prediction reads, or a coefficient:
whole, what its rounding to bfloat16 leaves of it, or as the coarsest level decodes it. The operands of several products
have a list of sources each, of one length.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from hf_cachegen.codec import abi, native
from hf_cachegen.codec.passes import DTYPES

GATHER = "cg_gather_operands"
INDEX_BITS = 28
"""Of a source, below its kind."""


class Kind(IntEnum):
    """enum cg_operand."""

    ZERO = 0
    ONE = 1
    NUMBER = 2
    COEFFICIENT = 3
    ROUNDING = 4
    COARSEST = 5


def listed(kind: Kind, first: int, count: int) -> Tensor:
    """Return the sources of `count` numbers of a kind, from number `first` on: int32 [count]."""
    return torch.arange(first, first + count, dtype=torch.int32) + (kind << INDEX_BITS)


class Coefficients(NamedTuple):
    """Decoded coefficients of some tokens, and what the sources need to know of them.

    Attributes:
        values: float32 [tokens, components].
        factors: float32 [tokens], by which a token's coefficients are multiplied. None: all are 1.
        step: Of the coarsest level.
        finer: Range of the tokens whose values are finer than the coarsest level's.
    """

    values: Tensor
    factors: Tensor | None
    step: float
    finer: slice


def gather(found: Coefficients, numbers: Tensor, sources: Tensor, to: Tensor) -> None:
    """Write operands: in one compiled call, or in torch where the library cannot. All tensors are on one device.

    Args:
        found: The coefficients.
        numbers: float32 [tokens, n], contiguous.
        sources: Of each product, int32 [products, width].
        to: Receives the operands: float32 or bfloat16 [products, tokens, width], contiguous.
    """
    y = found.values
    if not native.offers(GATHER, y.device):
        to.copy_(_gathered_by_torch(found, numbers, sources))
        return
    job = abi.Operands(
        y.data_ptr(), y.stride(0), len(y), y.shape[1], None if found.factors is None else found.factors.data_ptr(),
        numbers.data_ptr(), numbers.shape[1], found.finer.start, found.finer.stop, sources.data_ptr(), len(sources),
        sources.shape[1], to.data_ptr(), found.step, DTYPES[to.dtype],
    )  # fmt: skip
    native.call(GATHER, job, device=y.device)


def _gathered_by_torch(found: Coefficients, numbers: Tensor, sources: Tensor) -> Tensor:
    """Return the operands, float32 [products, tokens, width]."""
    coarse, ordinary = found.values.clone(), found.finer
    coarse[ordinary] = (coarse[ordinary] / found.step).round() * found.step
    factors = 1 if found.factors is None else found.factors[:, None]
    whole, coarse = found.values * factors, coarse * factors
    constants = torch.tensor([[0.0, 1.0]], device=whole.device).expand(len(whole), 2)
    table = torch.cat([constants, numbers, whole, whole - whole.bfloat16().float(), coarse], 1)
    kind, index = sources >> INDEX_BITS, sources & ((1 << INDEX_BITS) - 1)
    first, columns = 2 + numbers.shape[1], whole.shape[1]
    starts = torch.tensor([0, 1, 2, first, first + columns, first + 2 * columns], device=whole.device)
    return table[:, starts[kind.long()] + index].transpose(0, 1)
