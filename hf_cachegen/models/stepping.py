"""Search for the largest step whose divergence is within the targets, with few forward passes.

1. One sample shows about where the step is: a bisection over all codes.
2. From there the mean over all samples decides, a code up or down at a time, twice as far after each.
3. The finest level is measured first, since its target almost always decides. Samples are added until the sum of their
   divergences exceeds the target of all: a divergence is never negative. A level without a target is not measured.

What was measured is kept in a table, so the search can be interrupted, and asks for nothing twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

Measure = Callable[[int, int, int], dict[int, float]]
"""(code, sample, level) -> the divergences by level, in nats per token: of this level, and of others where they are
free. Levels count from 0.
"""


class StepSearch:
    """Search among the step codes.

    Args:
        known: float64 [codes, samples, levels]: the divergences, NaN where they are not measured yet; filled in place.
        targets: Of each level, in nats per token; infinite for none.
        measure: Computes divergences.
        keep: Called after each measurement.
    """

    def __init__(self, known: Tensor, targets: Sequence[float], measure: Measure, keep: Callable[[], None]):
        self.known, self.targets, self._measure, self._keep = known, targets, measure, keep

    def largest(self, start: int | None = None) -> int:
        """Return the largest code whose levels are all within their targets; 0 if there is none above 0.

        Args:
            start: The code to begin with. Default: the result for the first sample.
        """
        codes, samples, _ = self.known.shape
        start = self._bisected(0, codes, 1)[0] if start is None else start
        return self._bisected(*self._bracket(max(start, 1)), samples)[0]

    def _bracket(self, code: int) -> tuple[int, int]:
        """Return (a code that is within, or 0; a larger one that is not, or the number of codes)."""
        codes, samples, _ = self.known.shape
        stride = 1
        if self.within(code, samples):
            while code + stride < codes and self.within(code + stride, samples):
                code, stride = code + stride, 2 * stride
            return code, min(code + stride, codes)
        while code - stride > 0 and not self.within(code - stride, samples):
            code, stride = code - stride, 2 * stride
        return max(code - stride, 0), code

    def _bisected(self, low: int, high: int, samples: int) -> tuple[int, int]:
        """Narrow (within, not within) down to adjacent codes, by the mean of the first samples."""
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.within(middle, samples) else (low, middle)
        return low, high

    def within(self, code: int, samples: int) -> bool:
        """Report whether the mean divergence of the first samples is within the target of every level."""
        for level in reversed(range(len(self.targets))):
            total, most = 0.0, self.targets[level] * samples
            for sample in range(samples if most < math.inf else 0):
                total += self._divergence(code, sample, level)
                if not total <= most:  # NaN is not within
                    return False
        return True

    def _divergence(self, code: int, sample: int, level: int) -> float:
        if bool(self.known[code, sample, level].isnan()):
            for which, divergence in self._measure(code, sample, level).items():
                self.known[code, sample, which] = divergence
            self._keep()
        return float(self.known[code, sample, level])
