"""Reconstruction points: decode a symbol to the mean of the coefficients that it stands for.

A symbol q other than zero stands for the coefficients between (|q| - 1/2) and (|q| + 1/2) steps. Small coefficients are
more frequent than large ones, so their mean is nearer to zero than |q| steps. At the coarse levels most components have
a spread below the step, and the difference is a fifth of a step and more. Decoding to (|q| - p) steps leaves a smaller
error for the same bytes: at level 1 of SmolLM2-135M 7 to 9 % fewer bits at equal error (docs/rate_distortion.md).

p is learnt with the profile, for each level and component, and stored as one byte: p = byte / UNITS.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_cachegen.codec import quantize

if TYPE_CHECKING:
    from collections.abc import Sequence

UNITS = 512
"""A byte is so many times p: at most 255 / 512, just below half a step."""
USUAL, WEIGHT = 0.25, 8.0
"""p of a component without symbols, and how many symbols that counts for."""
CODES_PER_LEVEL = quantize.STEPS_PER_OCTAVE * math.log2(quantize.RATIO)
"""Distance of two levels, in step codes."""


class PointSums:
    """Sums over coefficients, to learn the points from.

    Args:
        levels: Number of levels.
        components: Number of components.
    """

    def __init__(self, levels: int, components: int):
        self.excess = torch.zeros(levels, components, dtype=torch.float64)
        self.count = torch.zeros(levels, components, dtype=torch.float64)

    def add(self, y: Tensor, step: Tensor) -> None:
        """Add coefficients.

        Args:
            y: float32 [tokens, components].
            step: The finest step, float32, one number or [components].
        """
        levels = len(self.count)
        for index in range(levels):
            size = (y / (step * quantize.step_factor(index + 1, levels))).abs()
            symbol = size.round()
            coded = symbol > 0
            self.excess[index] += (symbol.sub_(size) * coded).sum(0, dtype=torch.float64).cpu()
            self.count[index] += coded.sum(0).cpu()

    def points(self) -> Tensor:
        """Return the points, uint8 [levels, components]."""
        mean = (self.excess + WEIGHT * USUAL) / (self.count + WEIGHT)
        return (mean * UNITS).round().clamp(0, 255).to(torch.uint8)


def are_sound(points: Tensor | None, levels: int, components: int) -> bool:
    """Return whether untrusted points are absent, or fit these levels and components."""
    return points is None or (points.dtype == torch.uint8 and tuple(points.shape) == (levels, components))


def shifts(points: Tensor, level: int, offset: int) -> Tensor:
    """Return p at a level, float32 [components].

    Args:
        points: uint8 [levels, components].
        level: From 1.
        offset: Step codes that the steps are above those that the points were learnt at. Between two levels p is
            interpolated, beyond the last it stays.
    """
    at = min(max(level - 1 - offset / CODES_PER_LEVEL, 0.0), len(points) - 1.0)
    low = min(int(at), max(len(points) - 2, 0))
    high = min(low + 1, len(points) - 1)
    return torch.lerp(points[low].float(), points[high].float(), at - low) / UNITS


def moved(y: Tensor, shift: Tensor, kept: Sequence[int]) -> Tensor:
    """Move decoded coefficients towards zero, in place; zeros stay.

    Args:
        y: float32 [tokens, components]: multiples of a step.
        shift: float32 [components], on the device of y, below the step.
        kept: Tokens that are not moved.
    """
    part = torch.minimum(torch.maximum(y, -shift), shift)
    if len(kept):
        part[list(kept)] = 0
    return y.sub_(part)
