"""Bandwidth traces: time and bytes agree for every trace, and trace files are read in their own format."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from eval import traces
from eval.traces import ChunkRates, Trace
from hf_cachegen.errors import ConfigError

RATES = st.one_of(st.just(0.0), st.floats(1e3, 1e10))
TIMES = st.floats(0, 100)
SIZES = st.floats(1, 1e8)


@st.composite
def made(draw: st.DrawFn, repeats: bool | None = None) -> Trace:
    lengths = draw(st.lists(st.floats(0.01, 10), min_size=1, max_size=8))
    rates = draw(st.lists(RATES, min_size=len(lengths), max_size=len(lengths)))
    starts = [math.fsum(lengths[:index]) for index in range(len(lengths))]
    if draw(st.booleans()) if repeats is None else repeats:
        assume(any(rates))
        return Trace(tuple(starts), tuple(rates), math.fsum(lengths))
    return Trace(tuple(starts), (*rates[:-1], max(rates[-1], 1e3)))


@given(made(), TIMES, SIZES)
def test_all_bytes_are_through_at_the_finish(trace: Trace, start: float, nbytes: float) -> None:
    end = trace.finish(start, nbytes)
    assert start <= end < math.inf
    assert trace.bits(end) - trace.bits(start) == pytest.approx(8 * nbytes, rel=1e-6, abs=1e-6 * trace.bits(end) + 1)


@given(made(), TIMES, SIZES)
def test_the_bytes_are_not_all_through_before_the_finish(trace: Trace, start: float, nbytes: float) -> None:
    end = trace.finish(start, nbytes)
    earlier = start + (end - start) * (1 - 1e-3)
    assert trace.bits(earlier) <= trace.bits(end)
    slack = 1e-9 * trace.bits(end) + 1e-3
    assert trace.bits(earlier) - trace.bits(start) <= 8 * nbytes + slack
    if trace.rate((earlier + end) / 2) > 1e4 and end - start > 0.01:
        assert trace.bits(earlier) < trace.bits(end)


@given(made(), TIMES, SIZES, SIZES)
def test_two_parts_take_as_long_as_the_whole(trace: Trace, start: float, one: float, two: float) -> None:
    parts, whole = trace.finish(trace.finish(start, one), two), trace.finish(start, one + two)
    # Before a silence a rounding error may fall on either side of it, so compare the bytes.
    assert trace.bits(parts) == pytest.approx(trace.bits(whole), rel=1e-6, abs=100)


@given(made(), TIMES, SIZES, st.floats(1.01, 100))
def test_more_bytes_or_a_slower_link_take_longer(trace: Trace, start: float, nbytes: float, factor: float) -> None:
    end = trace.finish(start, nbytes)
    assert trace.finish(start, nbytes * factor) >= end
    assert trace.scaled(factor).finish(0.0, nbytes) <= trace.finish(0.0, nbytes) * (1 + 1e-9)


@given(made(), st.floats(0.1, 40))
def test_steps_have_the_same_rates(trace: Trace, until: float) -> None:
    steps = list(trace.steps(until))
    assert steps[0] == (0, trace.rates[0])
    for (at, rate), following in zip(steps, [*(s for s, _ in steps[1:]), until], strict=True):
        assume(following - at > 1e-6)
        assert trace.rate((at + following) / 2) == rate


@given(st.integers(0, 1 << 32), st.integers(1, 50), st.sampled_from(["uniform", "log"]))
def test_the_rates_of_the_paper_are_seeded_and_in_their_range(seed: int, chunks: int, spread: str) -> None:
    found = traces.paper(seed, chunks, spread=spread)  # type: ignore[arg-type]
    assert found == traces.paper(seed, chunks, spread=spread)  # type: ignore[arg-type]
    assert len(found.rates) == chunks
    assert all(1e8 <= rate <= 1e10 for rate in found.rates)
    assert found.rates != traces.paper(seed + 1, chunks, spread=spread).rates  # type: ignore[arg-type]


def test_a_chunk_keeps_its_own_rate_to_its_end() -> None:
    rates = ChunkRates((8e6, 8e3))
    assert rates.finish(3.0, 1_000_000, 0) == 4.0
    assert rates.finish(3.0, 1_000_000, 1) == 1003.0
    assert rates.finish(3.0, 1_000_000, 2) == 4.0
    in_time = rates.in_time(0.5)
    assert [in_time.rate(t) for t in (0.1, 0.6, 1.1, 1.6)] == [8e6, 8e3, 8e6, 8e3]


def test_the_rates_of_each_shape() -> None:
    assert traces.steady(8e6).finish(1.0, 2_000_000) == 3.0
    down = traces.step(8e6, 8e5, 1.0)
    assert down.finish(0.0, 1_100_000) == pytest.approx(2.0)
    up = traces.saw(1e6, 4e6, 4.0, teeth=4)
    assert [up.rate(t) for t in (0.0, 1.0, 2.5, 3.9, 4.0)] == pytest.approx([1e6, 2e6, 3e6, 4e6, 1e6])
    mobile = traces.on_off(7, 1e7, 0.0)
    assert mobile == traces.on_off(7, 1e7, 0.0)
    assert set(mobile.rates) == {1e7, 0.0}
    assert mobile.rates[:3] == (1e7, 0.0, 1e7)
    assert traces.step(8e6, 0.0, 1.0).finish(0.0, 1_000_001) == math.inf


def test_a_silence_delays_only_the_bytes_after_it() -> None:
    trace = Trace((0.0, 1.0), (8e6, 0.0), 10.0)
    assert trace.finish(0.0, 1_000_000) == 1.0
    assert trace.finish(0.0, 1_000_001) == pytest.approx(10.000001)
    assert trace.finish(5.0, 1) == pytest.approx(10.000001)
    assert trace.finish(0.0, 3_000_000) == pytest.approx(21.0)
    # 800 periods to the bit, which a rounding error must not carry into the silence.
    assert Trace((0.0, 0.01), (2969803.0, 0.0), 1.01).finish(0.0, 2969803.0) == pytest.approx(799 * 1.01 + 0.01)


def test_csv_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("seconds,bits_per_second\n10,1e6\n12,2e6\n13,5e5\n")
    assert traces.load(path) == Trace((0.0, 2.0, 3.0), (1e6, 2e6, 5e5), 4.0)
    path.write_text("0,1e6\n")
    assert traces.load(path) == traces.steady(1e6)


def test_mahimahi_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text("".join(f"{ms}\n" for ms in [*range(1, 101), *range(350, 401, 10)]))
    found = traces.load(path)
    assert found.period == 0.4
    assert found.rates == pytest.approx([12e6, 0.0, 0.0, 720e3])
    assert found.bits(0.4) == pytest.approx(106 * 12_000)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", ""),
        ("a.csv", "seconds,rate\n"),
        ("a.csv", "0,1e6\nx,2\n"),
        ("a.csv", "0,1e6\n1,2,3\n"),
        ("a.csv", "0,1e6\n1,-1\n"),
        ("a.csv", "1,1e6\n0,1e6\n"),
        ("a.csv", "0,nan\n"),
        ("a.csv", "0,0\n1,0\n"),
        ("a.up", ""),
        ("a.up", "0\n0\n"),
        ("a.up", "5\n4\n"),
        ("a.up", "-1\n4\n"),
        ("a.up", "one\n"),
        ("a.up", "\xff\xfe"),
    ],
)
def test_invalid_traces_are_refused(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="latin-1")
    with pytest.raises(ConfigError):
        traces.load(path)
    with pytest.raises(ConfigError):
        traces.load(tmp_path / "missing")


@pytest.mark.parametrize(
    "make",
    [
        lambda: Trace((), ()),
        lambda: Trace((0.0, 0.0), (1.0, 1.0)),
        lambda: Trace((1.0,), (1.0,)),
        lambda: Trace((0.0,), (1.0, 2.0)),
        lambda: Trace((0.0,), (-1.0,)),
        lambda: Trace((0.0,), (math.inf,)),
        lambda: Trace((0.0, 1.0), (1.0, 1.0), 1.0),
        lambda: Trace((0.0,), (0.0,), 1.0),
        lambda: ChunkRates(()),
        lambda: ChunkRates((1.0, 0.0)),
        lambda: ChunkRates((1.0,)).in_time(0),
        lambda: traces.paper(0, 0),
        lambda: traces.paper(0, 1, 2.0, 1.0),
        lambda: traces.paper(0, 1, spread="normal"),  # type: ignore[arg-type]
        lambda: traces.saw(0, 1, 1.0, teeth=1),
        lambda: traces.on_off(0, 0.0, 1.0),
        lambda: traces.on_off(0, 1.0, 1.0, mean_on=0),
    ],
)
def test_values_out_of_range_are_refused(make: object) -> None:
    with pytest.raises(ConfigError):
        make()  # type: ignore[operator]
