"""The adaptation experiment: simulated time, and the quality of mixtures of levels."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from eval import adaptation, traces
from eval.contestants import TEXT, UNIFORM
from eval.report import adaptation as reported
from eval.simulation import Chunk, Outcome, simulate
from hf_cachegen.errors import ConfigError
from hf_cachegen.streaming import Adaptive, Fixed, Paper

CHUNKS = tuple(Chunk((4e6, 4e6, 8e6), 0.01, 0.5) for _ in range(6))
TOTAL = (24e6, 48e6, 96e6)
RATES = st.floats(1e7, 1e10)


@given(RATES, st.integers(1, 3), st.floats(0, 0.05), st.integers(1, 8))
@settings(max_examples=50, deadline=None)
def test_a_level_takes_its_transfer_and_the_decoding_after_it(
    rate: float, level: int, round_trip: float, connections: int
) -> None:
    outcome = simulate(CHUNKS, traces.steady(rate), Fixed(level), 10.0, 0.1, round_trip, connections)
    transfer = 8 * TOTAL[level - 1] / rate
    assert outcome.ttft >= transfer + 0.01 + 0.1 - 1e-9
    assert outcome.ttft <= transfer + 6 * 0.01 + 0.1 + 19 * round_trip + 1e-6
    assert outcome.choices == (level,) * 6
    assert outcome.nbytes == pytest.approx(TOTAL[level - 1])


@given(RATES)
def test_text_takes_the_time_of_recomputing(rate: float) -> None:
    outcome = simulate(CHUNKS, traces.steady(rate), Fixed("text"), 1.0, 0.25)
    assert outcome == Outcome(pytest.approx(3.25), (None,) * 6, 0.0)


@given(RATES, st.integers(1, 3), st.floats(1.1, 10))
@settings(max_examples=50, deadline=None)
def test_a_faster_link_is_never_slower_for_a_fixed_level(rate: float, level: int, factor: float) -> None:
    slow, fast = (simulate(CHUNKS, traces.steady(r), Fixed(level), 1.0) for r in (rate, factor * rate))
    assert fast.ttft <= slow.ttft + 1e-9


@given(st.integers(0, 1000), st.floats(0.2, 5), st.sampled_from([Adaptive(), Paper()]))
@settings(max_examples=30, deadline=None)
def test_the_same_trace_gives_the_same_outcome(seed: int, slo: float, policy: Adaptive | Paper) -> None:
    link = traces.paper(seed, len(CHUNKS), spread="log")
    one = simulate(CHUNKS, link, policy, slo, 0.05, 0.001)
    assert one == simulate(CHUNKS, link, policy, slo, 0.05, 0.001)
    assert one.ttft < math.inf
    assert all(choice in (None, 1, 2, 3) for choice in one.choices)


@given(RATES, st.floats(0.3, 20))
@settings(max_examples=60, deadline=None)
def test_on_a_steady_link_adaptive_is_in_time_where_a_fixed_choice_is_well_in_time(rate: float, slo: float) -> None:
    link = traces.steady(rate)
    fixed = min(simulate(CHUNKS, link, Fixed(choice), slo, 0.05, 0.001).ttft for choice in (1, 2, 3, "text"))
    if fixed <= 0.85 * slo:
        assert simulate(CHUNKS, link, Adaptive(), slo, 0.05, 0.001).ttft <= slo


@pytest.mark.parametrize("slo", [0.5, 1.0, 2.0])
def test_on_the_links_of_the_paper_adaptive_is_in_time_where_a_fixed_choice_is(slo: float) -> None:
    for seed in range(100):
        link = traces.paper(seed, len(CHUNKS))
        fixed = (Fixed(level) for level in (1, 2, 3))
        if any(simulate(CHUNKS, link, policy, slo, 0.05, 0.001).ttft <= slo for policy in fixed):
            assert simulate(CHUNKS, link, Adaptive(), slo, 0.05, 0.001).ttft <= slo, f"seed {seed}"


def test_a_link_that_dies_ends_a_fixed_level_and_not_an_adaptive_stream() -> None:
    link = traces.step(1e9, 0.0, 0.1)
    assert simulate(CHUNKS, link, Fixed(3), 5.0).ttft == math.inf
    outcome = simulate(CHUNKS, link, Adaptive(), 5.0)
    assert outcome.ttft <= 5.0
    assert None in outcome.choices


def test_chunks_that_do_not_match_are_refused() -> None:
    for chunks in ((), (CHUNKS[0], Chunk((1.0,), 0.1, 0.1))):
        with pytest.raises(ConfigError):
            simulate(chunks, traces.steady(1e9), Adaptive(), 1.0)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the path without suffix of the files that a short experiment writes."""
    out = tmp_path_factory.mktemp("adaptation") / "short"
    options = ["--traces", "6", "--contexts", "2", "--slo", "0.6", "--slo", "2", "--tokens", "300", "--plot-slo", "2"]
    done = CliRunner().invoke(adaptation.main, ["--out", str(out), *options], catch_exceptions=False)
    assert done.exit_code == 0
    return out


def test_the_experiment_writes_its_results(results: Path) -> None:
    found = json.loads(results.with_suffix(".json").read_text())
    assert found["options"]["count"] == 6
    assert len(found["contexts"]) == 2
    assert list(found["kept"]) == ["uniform", "log"]
    assert all(set(kept) == {"0.6", "2"} for kept in found["kept"].values())
    rows = {(row["contestant"], row["slo"]): row for row in found["rows"] if row["spread"] == "uniform"}
    names = ["adaptive", "paper", "level 1", "level 2", "level 3", "adaptive, delta", "paper, delta", UNIFORM, TEXT]
    assert list(dict.fromkeys(name for name, _ in rows)) == names
    assert rows["text", 2.0]["kl"] == 0
    assert rows["text", 2.0]["violations"] == 1
    losses = [rows[f"level {level}", 2.0]["kl"] for level in (3, 2, 1)]
    assert losses == sorted(losses)
    assert losses[0] > 0
    assert rows["adaptive, delta", 2.0]["kl"] > rows["adaptive", 2.0]["kl"]
    assert losses[0] / 100 < rows["adaptive", 2.0]["kl"] <= losses[2] * 1.5
    assert {point["contestant"] for point in found["steady"]} == set(names)
    assert results.with_suffix(".png").stat().st_size > 10_000
    assert "<svg" in results.with_suffix(".svg").read_text()[:2000]
    assert results.with_suffix(".md").read_text().count("| adaptive |") == 4


def test_the_report_shows_the_experiment(results: Path) -> None:
    shown = reported.load(results.with_suffix(".json"))
    assert shown.plots
    assert any("adaptive" in str(table) for table in shown.tables)


def test_traces_are_read_from_files(tmp_path: Path) -> None:
    path = tmp_path / "link.csv"
    path.write_text("0,1e9\n1,1e8\n")
    assert adaptation.links_of(5, 0, 3, "log", [path]) == [traces.load(path)]
    assert adaptation.links_of(2, 7, 3, "uniform", []) == [traces.paper(7, 3), traces.paper(8, 3)]
    with pytest.raises(ConfigError):
        adaptation.links_of(2, 7, 3, "normal", [])
