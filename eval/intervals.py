"""Confidence intervals of means over contexts.

The questions about one context are not independent, so a context is one observation (a cluster). A mean is a ratio of
two sums over contexts, such as points over questions; its standard error is that of the linearised ratio (Cochran,
Sampling Techniques, section 6.4), and the interval is Student's with one degree of freedom less than there are
contexts. Three rules keep small samples honest:

- fewer than LEAST_CONTEXTS contexts give no interval;
- a share that is the same in every context, such as a score at its ceiling, has no spread to measure: the rule of three
  gives 3 / contexts instead (Hanley and Lippman-Hand, JAMA 1983);
- an interval of a share stays within 0 and 1, one of a divergence above 0.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
LEAST_CONTEXTS = 10
METHOD = "Student-t over contexts"
"""Recorded in a run's metrics, and printed in its report."""
RULE_OF_THREE = 3.0
NO_SPREAD = 1e-12
"""Standard errors below this are rounding."""

Numbers = NDArray[np.float64]
Interval = tuple[float, float]


def student_quantile(freedom: int) -> float:
    """Return the quantile of Student's distribution for a two-sided interval of CONFIDENCE.

    Args:
        freedom: degrees of freedom, at least LEAST_CONTEXTS - 1; the expansion used is right to 1e-4 from there on.
    """
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))


def ratio(sums: Numbers, counts: Numbers) -> float:
    """Return sum(sums) / sum(counts), NaN where nothing was counted.

    Args:
        sums: [contexts].
        counts: [contexts], not negative.
    """
    total = float(counts.sum())
    return float(sums.sum()) / total if total else math.nan


def interval(sums: Numbers, counts: Numbers, *, share: bool = False) -> Interval | None:
    """Return the confidence interval of `ratio(sums, counts)`, None where there are too few contexts.

    Args:
        sums: [contexts], what is averaged, summed within each context.
        counts: [contexts], the number of observations in each.
        share: the mean, or the difference of two means, is of values from 0 to 1: the rule of three applies where all
            contexts agree.
    """
    contexts = int((counts > 0).sum())
    if contexts < LEAST_CONTEXTS:
        return None
    mean = ratio(sums, counts)
    residuals = (sums - mean * counts)[counts > 0]
    variance = float((residuals**2).sum()) / (contexts - 1)
    error = math.sqrt(contexts * variance) / float(counts.sum())
    if error < NO_SPREAD:
        half = min(1.0, RULE_OF_THREE / contexts) if share else 0.0
    else:
        half = student_quantile(contexts - 1) * error
    return mean - half, mean + half


def clipped(found: Interval | None, low: float, high: float = math.inf) -> Interval | None:
    """Return an interval cut to the range that its mean can take."""
    return None if found is None else (max(low, found[0]), min(high, found[1]))
