"""Compute metrics from raw predictions: pure functions, so a finished run is scored again without a model.

Every codec is compared with the exact cache on the same examples. A difference to the exact cache is taken within each
context (paired), so its interval is narrower than two intervals side by side suggest. `eval.intervals` says how
intervals are computed; those of fewer than ten contexts are None.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from eval import intervals
from eval.codecs import EXACT
from eval.intervals import Interval, Numbers
from eval.scorers import SCORERS

FP16_BYTES = 2

Record = dict[str, Any]
Estimate = dict[str, Any]
"""{"mean", "low", "high"}, and where compared {"difference", "difference_low", "difference_high"}; float, or None for
the ends of an interval where there are too few contexts for one."""


def summarise(records: Sequence[Record], scores: Sequence[str]) -> dict[str, Any]:
    """Compute the metrics of a run.

    Args:
        records: the run's predictions (eval.measure.Record), with the same variants in the same order.
        scores: names in eval.scorers.SCORERS; empty for perplexity.

    Returns:
        Plain values. Means are over contexts; seconds are medians, since the first use of anything is slow.

    Raises:
        ValueError: the records have different variants.
    """
    elements = sum(record["elements"] for record in records)
    names = [(v["codec"], v["level"]) for v in records[0]["variants"]]
    for record in records:
        if [(v["codec"], v["level"]) for v in record["variants"]] != names:
            raise ValueError(f"example {record['example']!r} was measured under other codecs than the first")
    exact = names.index((EXACT, None))
    return {
        "examples": len(records),
        "questions": sum(len(record["questions"]) for record in records),
        "context_tokens": sum(record["context_tokens"] for record in records) / len(records),
        "exact_bits": 8 * sum(record["exact_bytes"] for record in records) / elements,
        "fp16_bytes": FP16_BYTES * elements / len(records),
        "prefill_seconds": _median([record["prefill_seconds"] for record in records]),
        "first_token_seconds": _median([record["first_token_seconds"] for record in records]),
        "intervals": intervals.METHOD,
        "variants": [_variant(records, index, exact, scores) for index in range(len(names))],
    }


def _variant(records: Sequence[Record], index: int, exact: int, scores: Sequence[str]) -> dict[str, Any]:
    rows = [record["variants"][index] for record in records]
    base = [record["variants"][exact] for record in records]
    elements = sum(record["elements"] for record in records)
    size = sum(row["bytes"] for row in rows)
    tokens = _numbers([sum(record["completion_tokens"]) for record in records])
    asked = _numbers([len(record["questions"]) for record in records])
    found: dict[str, Any] = {
        "codec": rows[0]["codec"],
        "level": rows[0]["level"],
        "bytes": size / len(rows),
        "bits_per_element": 8 * size / elements,
        "ratio_to_fp16": FP16_BYTES * elements / size,
        **{
            name: _median([row[name] for row in rows])
            for name in ("encode_seconds", "decode_seconds", "prefill_seconds")
        },
        "kl": divergence(_numbers([sum(row["kl"]) for row in rows]), asked),
        "agreement": _agreement(records, rows),
        "scores": {},
        "layers": _layers(rows),
    }
    if all(any(question["answers"] for question in record["questions"]) for record in records):
        same = [
            sum(a == b for a, b in zip(r["outputs"], e["outputs"], strict=True))
            for r, e in zip(rows, base, strict=True)
        ]
        found["same_answer"] = share(_numbers(same), asked)
        for name in scores:
            points, exact_points = (_points(records, part, name) for part in (rows, base))
            found["scores"][name] = compared(points, None if index == exact else exact_points, asked)
    if tokens.all():
        losses, exact_losses = (_numbers([sum(row["nll"]) for row in part]) for part in (rows, base))
        found["perplexity"] = perplexity(losses, exact_losses, tokens)
    return found


def _points(records: Sequence[Record], rows: Sequence[Record], score: str) -> Numbers:
    """Return the sum of the scores of each context's answers."""
    return _numbers([
        sum(SCORERS[score](output, question["answers"])
            for output, question in zip(row["outputs"], record["questions"], strict=True))
        for row, record in zip(rows, records, strict=True)
    ])  # fmt: skip


def _agreement(records: Sequence[Record], rows: Sequence[Record]) -> Estimate | None:
    """Return the share of the completions' tokens; every token has the same weight."""
    pairs = [
        [
            (part * n, n)
            for part, n in zip(row["agreement"], record["completion_tokens"], strict=True)
            if part is not None
        ]
        for row, record in zip(rows, records, strict=True)
    ]
    counts = _numbers([sum(n for _, n in pair) for pair in pairs])
    return share(_numbers([sum(hit for hit, _ in pair) for pair in pairs]), counts) if counts.sum() else None


def divergence(sums: Numbers, counts: Numbers) -> Estimate:
    """Return the mean of a divergence in nats per token and its interval, which stays above 0.

    Args:
        sums: [contexts], the divergences of each context's questions, summed.
        counts: [contexts], the number of questions.
    """
    found = intervals.clipped(intervals.interval(sums, counts), 0.0)
    return {"mean": intervals.ratio(sums, counts), **_named(found, "low", "high")}


def share(sums: Numbers, counts: Numbers) -> Estimate:
    """Return the mean of values from 0 to 1 and its interval.

    Args:
        sums: [contexts], summed within each context.
        counts: [contexts], the number of values.
    """
    found = intervals.clipped(intervals.interval(sums, counts, share=True), 0.0, 1.0)
    return {"mean": intervals.ratio(sums, counts), **_named(found, "low", "high")}


def compared(sums: Numbers, base: Numbers | None, counts: Numbers) -> Estimate:
    """Return `share` and the paired difference to the exact cache, with its interval.

    Args:
        sums: [contexts], points, from 0 to 1 for each question.
        base: [contexts], the exact cache's points; None for the exact cache itself, whose difference is 0.
        counts: [contexts], the number of questions.
    """
    change: Interval | None = (0.0, 0.0)
    mean = 0.0
    if base is not None:
        mean = intervals.ratio(sums - base, counts)
        change = intervals.clipped(intervals.interval(sums - base, counts, share=True), -1.0, 1.0)
    return {**share(sums, counts), "difference": mean, **_named(change, "difference_low", "difference_high")}


def perplexity(losses: Numbers, base: Numbers, tokens: Numbers) -> Estimate:
    """Return exp(nats per token) with its interval, and its relative difference to the exact cache: 0.01 is 1 % more.

    Args:
        losses: [contexts], negative log-likelihood of each context's completions, nats.
        base: [contexts], the exact cache's.
        tokens: [contexts], the number of tokens.
    """
    own, change = intervals.interval(losses, tokens), intervals.interval(losses - base, tokens)
    return {
        "mean": math.exp(intervals.ratio(losses, tokens)),
        **_named(None if own is None else (math.exp(own[0]), math.exp(own[1])), "low", "high"),
        "difference": math.expm1(intervals.ratio(losses - base, tokens)),
        **_named(
            None if change is None else (math.expm1(change[0]), math.expm1(change[1])),
            "difference_low", "difference_high",
        ),
    }  # fmt: skip


def _named(found: Interval | None, low: str, high: str) -> Estimate:
    return {low: None, high: None} if found is None else {low: found[0], high: found[1]}


def _layers(rows: Sequence[Record]) -> list[dict[str, float]]:
    """Return the means over the contexts of the artifacts' reports on each layer."""
    shape = rows[0]["layers"]
    return [
        {key: sum(row["layers"][index][key] for row in rows) / len(rows) for key in layer}
        for index, layer in enumerate(shape)
    ]


def time_to_first_token(metrics: dict[str, Any], variant: dict[str, Any], gbps: float) -> dict[str, float | None]:
    """Compute the parts of the time to the first token.

    Args:
        metrics: a run's metrics.
        variant: one of its variants.
        gbps: bandwidth, 1e9 bits a second; latency is not counted.

    Returns:
        Seconds {"fetch", "decode", "prefill"}: fetch is computed from the bytes; decode (None where it was not
        measured) and the prefill of everything that the cache does not hold are measured.
    """
    return {
        "fetch": 8 * variant["bytes"] / (gbps * 1e9),
        "decode": variant["decode_seconds"],
        "prefill": (variant["prefill_seconds"] or 0.0) + metrics["first_token_seconds"],
    }


def _median(values: Sequence[float | None]) -> float | None:
    known = sorted(value for value in values if value is not None and not math.isnan(value))
    return float(np.median(known)) if known else None


def _numbers(values: Sequence[float]) -> Numbers:
    return np.asarray(values, dtype=np.float64)
