"""Decide what a run shows: pure functions of its metrics.

"Without loss" is a rule, stated on the page: the mean score is at most one point below the exact cache's, and the
paired interval of the difference includes zero; for perplexity, at most one per cent above, likewise. The mean has its
own limit because few contexts make wide intervals. Where there are too few for an interval, the mean alone decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eval import codecs

POINT = 0.01
BASELINE_SCORE = 0.25
"""A score below this means that the model cannot do the task, so the score cannot tell codecs apart."""
BASELINE_PERPLEXITY = 1000.0
"""A perplexity above this means that the model does not know the language of the text."""


def keeps(variant: dict[str, Any], score: str | None) -> bool:
    """Report whether a variant counts as without loss.

    Args:
        variant: one variant of a run's metrics.
        score: the score that decides; None for perplexity.
    """
    if score is None:
        found = variant["perplexity"]
        low = found["difference_low"]
        return bool(found["difference"] <= POINT and (low is None or low <= 0))
    found = variant["scores"][score]
    high = found["difference_high"]
    return bool(found["difference"] >= -POINT and (high is None or high >= 0))


def smallest(variants: Sequence[dict[str, Any]], score: str | None) -> dict[str, Any] | None:
    """Return the smallest of these variants without loss, None where there is none."""
    return min((v for v in variants if keeps(v, score)), key=lambda v: v["bytes"], default=None)


def able(metrics: dict[str, Any], score: str | None) -> bool:
    """Report whether the model can do the task from its exact cache."""
    exact = metrics["variants"][0]
    if score is None:
        return bool(exact["perplexity"]["mean"] <= BASELINE_PERPLEXITY)
    return bool(exact["scores"][score]["mean"] >= BASELINE_SCORE)


def representatives(metrics: dict[str, Any], score: str | None) -> list[dict[str, Any]]:
    """Return one variant of each series for a plot of times: its smallest without loss, else its finest.

    Where the model cannot do the task, the finest is taken. Variants whose decoding was not measured are left out.
    """
    from eval.report.plots import series

    chosen = []
    for variants in series([v for v in metrics["variants"] if v["decode_seconds"] is not None]).values():
        chosen.append((smallest(variants, score) if able(metrics, score) else None) or variants[-1])
    return chosen


def caches(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the variants that store a cache, without the exact one."""
    return [v for v in metrics["variants"] if v["codec"] not in (codecs.EXACT, codecs.TEXT)]
