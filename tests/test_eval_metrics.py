"""Metrics: pure functions of raw records, paired with the exact cache."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from eval import intervals, metrics
from eval.measure import compare
from eval.report import findings
from eval.report.tables import kl, percent, times, total


def variant(codec: str, outputs: list[str], **changed: Any) -> dict[str, Any]:
    n = len(outputs)
    plain = {
        "codec": codec, "level": None, "bytes": 1000, "encode_seconds": None, "decode_seconds": 0.5,
        "prefill_seconds": 0.0, "outputs": outputs, "kl": [0.0] * n, "agreement": [1.0] * n, "nll": [2.0] * n,
        "layers": [],
    }  # fmt: skip
    return {**plain, **changed}


def record(number: int, *variants: dict[str, Any], answers: list[str]) -> dict[str, Any]:
    return {
        "example": str(number), "context_tokens": 100, "text_bytes": 400, "elements": 4000, "exact_bytes": 8000,
        "prefill_seconds": 1.0, "first_token_seconds": 0.1, "completion_tokens": [4] * len(answers),
        "questions": [{"text": "?", "answers": [answer]} for answer in answers], "variants": list(variants),
    }  # fmt: skip


def records() -> list[dict[str, Any]]:
    """Return ten contexts of two questions; the lossy codec gets one of the two wrong in every second context."""
    found = []
    for n in range(10):
        lossy = variant("uniform-4", ["11", "22" if n % 2 else "9"], bytes=2000, kl=[0.1, 0.3], agreement=[1.0, 0.5],
                        nll=[2.4, 2.4], layers=[{"k_bits": float(n)}])  # fmt: skip
        found.append(record(n, variant("exact", ["11", "22"], bytes=8000), lossy, answers=["11", "22"]))
    return found


def test_sizes_scores_and_differences_are_computed() -> None:
    found = metrics.summarise(records(), ["line"])
    exact, lossy = found["variants"]
    assert (found["examples"], found["questions"], found["exact_bits"]) == (10, 20, 16.0)
    assert lossy["bits_per_element"] == 4.0
    assert lossy["ratio_to_fp16"] == 4.0
    assert exact["scores"]["line"]["mean"] == 1.0
    assert exact["scores"]["line"]["difference_low"] == exact["scores"]["line"]["difference_high"] == 0.0
    line = lossy["scores"]["line"]
    assert line["mean"] == lossy["same_answer"]["mean"] == 0.75
    assert line["difference"] == pytest.approx(-0.25)
    assert line["difference_low"] < -0.25 < line["difference_high"] < 0
    assert lossy["kl"]["mean"] == pytest.approx(0.2)
    assert lossy["agreement"]["mean"] == pytest.approx(0.75)
    assert exact["perplexity"]["mean"] == pytest.approx(math.exp(0.5))
    assert lossy["perplexity"]["difference"] == pytest.approx(math.exp(0.1) - 1)
    assert lossy["layers"] == [{"k_bits": 4.5}]


def test_metrics_are_plain_values_and_repeatable() -> None:
    first = metrics.summarise(records(), ["line"])
    assert json.loads(json.dumps(first)) == first == metrics.summarise(records(), ["line"])
    assert first["intervals"] == intervals.METHOD


def test_a_context_is_one_observation() -> None:
    """Questions whose scores depend on each other do not narrow the interval."""
    n, rng = 40, np.random.default_rng(0)
    right = rng.integers(0, 2, n).astype(float)
    found = metrics.share(8 * right, np.full(n, 8.0))
    width = 2 * 2.0227 * math.sqrt(right.mean() * (1 - right.mean()) / (n - 1))
    assert found["high"] - found["low"] == pytest.approx(width, rel=1e-4)


def test_a_paired_difference_is_narrower() -> None:
    rng = np.random.default_rng(1)
    base, ones = rng.random(30), np.ones(30)
    found = metrics.compared(base - 0.01 - 0.001 * rng.random(30), base, ones)
    assert found["difference_high"] - found["difference_low"] < 0.001
    assert found["high"] - found["low"] > 0.1


@pytest.mark.parametrize(("freedom", "expected"), [(9, 2.262157), (19, 2.093024), (49, 2.009575), (999, 1.962341)])
def test_quantiles_of_student_are_those_of_tables(freedom: int, expected: float) -> None:
    assert intervals.student_quantile(freedom) == pytest.approx(expected, abs=1e-4)


def test_intervals_have_their_coverage() -> None:
    """At ten contexts of different length, 95 % of the intervals contain the mean."""
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(2000):
        counts = rng.integers(1, 6, 10).astype(float)
        found = intervals.interval(counts * rng.normal(3.0, 1.0, 10), counts)
        assert found is not None
        hits += found[0] <= 3.0 <= found[1]
    assert 0.93 < hits / 2000 < 0.97


def test_few_contexts_have_no_interval() -> None:
    few = metrics.summarise(records()[:9], ["line"])["variants"][1]
    assert few["kl"]["low"] is few["agreement"]["high"] is few["perplexity"]["difference_low"] is None
    assert few["scores"]["line"]["difference_high"] is None
    assert few["scores"]["line"]["mean"] == pytest.approx(0.5 + 0.5 * 4 / 9)
    assert kl(few["kl"]) == "0.2000"
    assert percent(few["agreement"]) == "75.0%"


def test_a_ceiling_has_the_rule_of_three() -> None:
    ones = np.ones(30)
    assert metrics.share(ones, ones) == {"mean": 1.0, "low": pytest.approx(0.9), "high": 1.0}
    assert metrics.share(0 * ones, ones) == {"mean": 0.0, "low": 0.0, "high": pytest.approx(0.1)}
    found = metrics.compared(ones, ones, ones)
    assert (found["difference"], found["difference_low"], found["difference_high"]) == (0, -0.1, 0.1)
    exact = metrics.compared(ones, None, ones)
    assert exact["difference_low"] == exact["difference_high"] == 0
    assert metrics.divergence(0 * ones, ones) == {"mean": 0.0, "low": 0.0, "high": 0.0}


def test_a_divergence_is_not_negative() -> None:
    found = metrics.divergence(np.array([1.0] + [0.0] * 11), np.ones(12))
    assert found["low"] == 0
    assert percent(None) == "–"


def test_empty_answers_agree_with_no_answer() -> None:
    rows = records()
    for row in rows:
        row["completion_tokens"] = [0, 0]
        for one in row["variants"]:
            one["agreement"], one["nll"] = [None, None], [0.0, 0.0]
    found = metrics.summarise(rows, ["line"])
    assert found["variants"][1]["agreement"] is None
    assert "perplexity" not in found["variants"][1]


def test_records_of_other_codecs_are_refused() -> None:
    rows = records()
    rows[3]["variants"].pop()
    with pytest.raises(ValueError, match="other codecs"):
        metrics.summarise(rows, ["line"])


def test_time_to_the_first_token_is_fetch_decode_and_prefill() -> None:
    found = metrics.summarise(records(), ["line"])
    parts = metrics.time_to_first_token(found, found["variants"][1], 0.1)
    assert parts == {"fetch": pytest.approx(2000 * 8 / 1e8), "decode": 0.5, "prefill": pytest.approx(0.1)}
    assert total(parts) == pytest.approx(sum(parts.values()))


def test_a_time_that_was_not_measured_is_not_zero() -> None:
    found = metrics.summarise(records(), ["line"])
    found["variants"][1]["decode_seconds"] = None
    parts = metrics.time_to_first_token(found, found["variants"][1], 0.1)
    assert parts["decode"] is None
    assert total(parts) is None
    assert times("x", found).rows[1][2:5:2] == ("–", "–")


def test_teacher_forcing_compares_token_by_token() -> None:
    exact = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]]).log()
    lossy = torch.tensor([[0.1, 0.8, 0.1], [0.1, 0.8, 0.1], [0.5, 0.3, 0.2]]).log()
    kl, same, nll = compare(exact, lossy, torch.tensor([0, 1, 2]), 2)
    assert same == 0.5
    assert nll == pytest.approx(-math.log(0.8) - math.log(0.2), rel=1e-5)
    assert kl == pytest.approx(float((exact.exp() * (exact - lossy)).sum() / 3))
    assert compare(exact, exact, torch.tensor([0, 1, 2]), 0) == (0.0, None, 0.0)


def test_the_rule_for_without_loss() -> None:
    found = metrics.summarise(records(), ["line"])
    exact, lossy = found["variants"]
    assert findings.keeps(exact, "line")
    assert not findings.keeps(lossy, "line")
    assert not findings.keeps(lossy, None)
    for low, kept in ((-0.001, True), (0.001, False), (None, True)):
        assert findings.keeps({"perplexity": {"difference": 0.005, "difference_low": low}}, None) is kept
    assert findings.smallest([exact, lossy], "line") is exact
    assert findings.smallest([lossy], "line") is None
    assert findings.able(found, "line")
    for row in (rows := records()):
        row["variants"][0]["outputs"] = ["0", "0"]
    assert not findings.able(metrics.summarise(rows, ["line"]), "line")
