"""Raw predictions -> metrics: pure functions, so that a finished run can be scored again without a model.

Every codec is held against the exact cache on the same examples. Intervals are 95 % percentile intervals of a seeded
bootstrap that draws whole contexts, since the questions about one context stand or fall together; a difference to the
exact cache is taken within each draw (paired), so it is narrower than two intervals beside each other suggest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.codecs import EXACT
from eval.scorers import SCORERS

DRAWS = 2000
CONFIDENCE = 0.95
FP16_BYTES = 2

Record = dict[str, Any]
Column = NDArray[np.float64]
Statistic = Callable[[Column], Column]


def summarise(records: Sequence[Record], scores: Sequence[str], seed: int) -> dict[str, Any]:
    """The metrics of a run's records, which have the same variants in the same order.

    Means over contexts; seconds are medians, since the first uses of anything are slow.
    """
    elements = sum(record["elements"] for record in records)
    names = [(v["codec"], v["level"]) for v in records[0]["variants"]]
    for record in records:
        if [(v["codec"], v["level"]) for v in record["variants"]] != names:
            raise ValueError(f"example {record['example']!r} was measured under other codecs than the first")
    exact = names.index((EXACT, None))
    draws = np.random.default_rng(seed).integers(len(records), size=(DRAWS, len(records)))
    return {
        "examples": len(records),
        "questions": sum(len(record["questions"]) for record in records),
        "context_tokens": sum(record["context_tokens"] for record in records) / len(records),
        "exact_bits": 8 * sum(record["exact_bytes"] for record in records) / elements,
        "fp16_bytes": FP16_BYTES * elements / len(records),
        "prefill_seconds": _median([record["prefill_seconds"] for record in records]),
        "first_token_seconds": _median([record["first_token_seconds"] for record in records]),
        "variants": [_variant(records, index, exact, scores, draws) for index in range(len(names))],
    }


def _variant(records: Sequence[Record], index: int, exact: int, scores: Sequence[str], draws: Any) -> dict[str, Any]:
    rows = [record["variants"][index] for record in records]
    base = [record["variants"][exact] for record in records]
    elements = sum(record["elements"] for record in records)
    size = sum(row["bytes"] for row in rows)
    tokens = _column([sum(record["completion_tokens"]) for record in records])
    asked = _column([len(record["questions"]) for record in records])
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
        "kl": estimate(_column([sum(row["kl"]) for row in rows]), asked, draws),
        "agreement": _agreement(records, rows, draws),
        "scores": {},
        "layers": _layers(rows),
    }
    if all(any(question["answers"] for question in record["questions"]) for record in records):
        same = [
            sum(a == b for a, b in zip(r["outputs"], e["outputs"], strict=True))
            for r, e in zip(rows, base, strict=True)
        ]
        found["same_answer"] = estimate(_column(same), asked, draws)
        for name in scores:
            points, exact_points = (_points(records, part, name) for part in (rows, base))
            found["scores"][name] = compared(points, exact_points, asked, draws)
    if tokens.all():
        losses, exact_losses = (_column([sum(row["nll"]) for row in part]) for part in (rows, base))
        found["perplexity"] = perplexity(losses, exact_losses, tokens, draws)
    return found


def _points(records: Sequence[Record], rows: Sequence[Record], score: str) -> Column:
    """Sum of the scores of each context's answers."""
    return _column([
        sum(SCORERS[score](output, question["answers"])
            for output, question in zip(row["outputs"], record["questions"], strict=True))
        for row, record in zip(rows, records, strict=True)
    ])  # fmt: skip


def _agreement(records: Sequence[Record], rows: Sequence[Record], draws: Any) -> dict[str, float] | None:
    """Share of the completions' tokens, every token counting alike."""
    pairs = [
        [
            (share * n, n)
            for share, n in zip(row["agreement"], record["completion_tokens"], strict=True)
            if share is not None
        ]
        for row, record in zip(rows, records, strict=True)
    ]
    counts = _column([sum(n for _, n in pair) for pair in pairs])
    return estimate(_column([sum(hit for hit, _ in pair) for pair in pairs]), counts, draws) if counts.sum() else None


def estimate(sums: Column, counts: Column, draws: Any, statistic: Statistic = lambda x: x) -> dict[str, float]:
    """{"mean", "low", "high"} of statistic(sum / count); sums, counts: one number a context; draws [n, contexts]."""
    with np.errstate(invalid="ignore", divide="ignore"):  # a draw of contexts without any token says nothing
        drawn = statistic(sums[draws].sum(1) / counts[draws].sum(1))
    return {"mean": float(statistic(sums.sum() / counts.sum())), **_interval(drawn, "low", "high")}


def compared(sums: Column, base: Column, counts: Column, draws: Any) -> dict[str, float]:
    """`estimate`, and {"difference", "difference_low", "difference_high"} to `base` in the same draws."""
    change = (sums - base)[draws].sum(1) / counts[draws].sum(1)
    return {
        **estimate(sums, counts, draws),
        "difference": float((sums - base).sum() / counts.sum()),
        **_interval(change, "difference_low", "difference_high"),
    }


def perplexity(losses: Column, base: Column, tokens: Column, draws: Any) -> dict[str, float]:
    """exp(nats per token); its differences to `base` are relative: 0.01 is one per cent more."""
    change = np.expm1((losses - base)[draws].sum(1) / tokens[draws].sum(1))
    return {
        **estimate(losses, tokens, draws, np.exp),
        "difference": math.expm1((losses - base).sum() / tokens.sum()),
        **_interval(change, "difference_low", "difference_high"),
    }


def _interval(drawn: Column, low: str, high: str) -> dict[str, float]:
    edge = (1 - CONFIDENCE) / 2
    found = np.nanquantile(drawn, [edge, 1 - edge])
    return {low: float(found[0]), high: float(found[1])}


def _layers(rows: Sequence[Record]) -> list[dict[str, float]]:
    """Means over the contexts of what the artifacts' reports say of each layer."""
    shape = rows[0]["layers"]
    return [
        {key: sum(row["layers"][index][key] for row in rows) / len(rows) for key in layer}
        for index, layer in enumerate(shape)
    ]


def time_to_first_token(metrics: dict[str, Any], variant: dict[str, Any], gbps: float) -> dict[str, float]:
    """Seconds {"fetch", "decode", "prefill"}: computed, fetch from the bytes at `gbps` (1e9 bits a second, no latency),
    the others as measured: unpacking where it was, and the prefill of what the cache does not hold.
    """
    return {
        "fetch": 8 * variant["bytes"] / (gbps * 1e9),
        "decode": variant["decode_seconds"] or 0.0,
        "prefill": (variant["prefill_seconds"] or 0.0) + metrics["first_token_seconds"],
    }


def _median(values: Sequence[float | None]) -> float | None:
    known = sorted(value for value in values if value is not None and not math.isnan(value))
    return float(np.median(known)) if known else None


def _column(values: Sequence[float]) -> Column:
    return np.asarray(values, dtype=np.float64)
