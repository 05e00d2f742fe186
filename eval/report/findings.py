"""What a run says, in a sentence: pure functions of its metrics.

"Without loss" is a rule, stated on the page: the score is at most one point below the exact cache's in the mean, and
the paired interval of the difference reaches zero; for perplexity, at most one per cent above, likewise. Few examples
make wide intervals, so the mean has its own limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eval import codecs

POINT = 0.01
BASELINE_SCORE = 0.25
"""Below this the exact cache itself cannot do the task, and no codec can be seen to lose by it."""
BASELINE_PERPLEXITY = 1000.0
"""Above this the model does not know the language of the text."""


def keeps(variant: dict[str, Any], score: str | None) -> bool:
    """Whether this variant counts as without loss."""
    if score is None:
        found = variant["perplexity"]
        return bool(found["difference"] <= POINT and found["difference_low"] <= 0)
    found = variant["scores"][score]
    return bool(found["difference"] >= -POINT and found["difference_high"] >= 0)


def smallest(variants: Sequence[dict[str, Any]], score: str | None) -> dict[str, Any] | None:
    """The smallest of these without loss."""
    return min((v for v in variants if keeps(v, score)), key=lambda v: v["bytes"], default=None)


def able(metrics: dict[str, Any], score: str | None) -> bool:
    """Whether the exact cache does the task at all."""
    exact = metrics["variants"][0]
    if score is None:
        return bool(exact["perplexity"]["mean"] <= BASELINE_PERPLEXITY)
    return bool(exact["scores"][score]["mean"] >= BASELINE_SCORE)


def representatives(metrics: dict[str, Any], score: str | None) -> list[dict[str, Any]]:
    """One variant of each series for a plot of times: its smallest without loss, or else (and where the model cannot do
    the task) its finest; those whose decoding was not measured are left out.
    """
    from eval.report.plots import series

    chosen = []
    for variants in series([v for v in metrics["variants"] if v["decode_seconds"] is not None]).values():
        chosen.append((smallest(variants, score) if able(metrics, score) else None) or variants[-1])
    return chosen


def caches(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """Variants that keep a cache, the exact one apart."""
    return [v for v in metrics["variants"] if v["codec"] not in (codecs.EXACT, codecs.TEXT)]
