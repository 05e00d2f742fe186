"""Nested uniform quantisation: one fine symbol, read at any of its levels.

A value y is rounded once, at the finest step: f = round(y / step). Level l of n has a step 3^(n - l) times as large.
The decision boundaries of a mid-tread quantiser of step 3s are also boundaries of the one of step s. So the coarse
symbol is a function of the fine one, c = floor((f + 1) / 3), and the difference is one digit in {-1, 0, 1}: f = 3c + d.
A base of coarse symbols and one ternary refinement per level together cost what the fine symbols alone would.
(CacheGen, section 5.3, has one stream per level instead.)
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

STEPS_PER_OCTAVE = 4
UNIT_CODE = 160
"""A step is one byte, code -> 2^((code - 160) / 4): from 2^-40, far below any cache's spread, to 2^23."""
MEANS_PER_STEP = 16
"""A mean is an int16 multiple of 1/16 of the coarsest step."""
LARGEST_MEAN = 2**15 - 1

RATIO = 3
"""Ratio of the steps of adjacent levels; odd, so that the levels nest."""
LARGEST_SYMBOL = 2**30
"""Fine symbols are int32. A larger one means that a channel's step does not fit its values."""


def fine_symbols(y: Tensor, step: Tensor) -> Tensor:
    """Return round(y / step) as int32, clamped to +-LARGEST_SYMBOL. y float32 [tokens, channels], step float32
    [channels].
    """
    return (y / step).round_().clamp_(-LARGEST_SYMBOL, LARGEST_SYMBOL).to(torch.int32)


def split(fine: Tensor, levels: int) -> tuple[Tensor, list[Tensor]]:
    """Split fine symbols into (base symbols, digits of each refinement from coarse to fine); all int32 of one shape."""
    digits = []
    for _ in range(levels - 1):
        coarse = torch.div(fine + 1, RATIO, rounding_mode="floor")
        digits.append(fine - RATIO * coarse)
        fine = coarse
    return fine, digits[::-1]


def refine(symbols: Tensor, digits: Tensor) -> Tensor:
    """Return the symbols one level finer."""
    return RATIO * symbols + digits


def contexts(symbols: Tensor) -> Tensor:
    """Return the context that selects a refinement's table: 0 where the coarser symbol is zero, 1 positive, 2 negative;
    uint8.
    """
    return (symbols > 0).to(torch.uint8) + 2 * (symbols < 0).to(torch.uint8)


def step_factor(level: int, levels: int) -> int:
    """Return the step of `level` in units of the finest step."""
    return int(RATIO ** (levels - level))


def step_codes(steps: Tensor) -> Tensor:
    """Return the codes nearest to these steps, float64 and positive; uint8. Steps beyond the grid get its nearest end.
    """
    return ((steps.log2() * STEPS_PER_OCTAVE).round() + UNIT_CODE).clamp(0, 255).to(torch.uint8)


@lru_cache(maxsize=1)
def _steps() -> Tensor:
    """Return the step of every code, float32 [256]: exact powers of two times one of four constants."""
    quarters = torch.arange(256) - UNIT_CODE
    fraction = torch.tensor([2.0 ** (i / STEPS_PER_OCTAVE) for i in range(STEPS_PER_OCTAVE)])
    return torch.ldexp(fraction[quarters % STEPS_PER_OCTAVE], quarters.div(STEPS_PER_OCTAVE, rounding_mode="floor"))


def steps_of(codes: Tensor) -> Tensor:
    """Return the steps, float32, equal on every machine."""
    return _steps().to(codes.device)[codes.to(torch.int64)]
