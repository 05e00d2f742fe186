"""Properties of the policies, and of whole streams in a simulation with its own clock."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_cachegen.errors import ConfigError
from hf_cachegen.streaming.chunk import Chunk
from hf_cachegen.streaming.policy import (
    TEXT,
    Adaptive,
    Costs,
    Fixed,
    Missing,
    Outlook,
    Paper,
    policy_of,
    refinement_order,
)
from hf_cachegen.streaming.schedule import Decode, Finished, Recompute, Schedule, Stuck, Wait

seconds = st.floats(1e-3, 10.0)


@st.composite
def outlooks(draw: st.DrawFn, *, rate: bool = True, slo: bool = True) -> Outlook:
    """Draw any state of a stream with 1 to 6 chunks missing and 1 to 3 levels."""
    levels = draw(st.integers(1, 3))
    chunks = []
    for _ in range(draw(st.integers(1, 6))):
        sizes = [draw(st.integers(0, 10**6)) for _ in range(levels)]
        wire = tuple(float(sum(sizes[: level + 1])) for level in range(levels))
        recompute = draw(st.one_of(seconds, st.just(math.inf)))
        chunks.append(Missing(wire, draw(st.floats(0, 0.1)), recompute))
    speed = draw(st.floats(1e3, 1e9)) if rate else None
    return Outlook(draw(st.floats(-1, 100)) if slo else math.inf, speed, tuple(chunks))


def cheapest(costs: Costs) -> float:
    return min(costs.seconds(level, text) for level in range(1, costs.levels + 1) for text in range(costs.count + 1))


@given(outlooks())
def test_adaptive_stays_within_the_time_while_any_choice_fits(outlook: Outlook) -> None:
    plan, costs = Adaptive().plan(outlook), Costs(outlook)
    if cheapest(costs) <= outlook.seconds_left:
        assert costs.seconds(plan.level, plan.text) <= outlook.seconds_left


@given(outlooks())
def test_adaptive_takes_the_finest_level_that_fits_with_any_number_of_text_chunks(outlook: Outlook) -> None:
    plan, costs = Adaptive().plan(outlook), Costs(outlook)
    for level in range(plan.level + 1, costs.levels + 1):
        assert all(costs.seconds(level, text) > outlook.seconds_left for text in range(costs.count + 1))
    assert all(costs.seconds(plan.level, text) > outlook.seconds_left for text in range(plan.text)) or (
        cheapest(costs) > outlook.seconds_left
    )


@given(outlooks())
def test_adaptive_takes_the_fastest_choice_where_nothing_fits(outlook: Outlook) -> None:
    plan, costs = Adaptive().plan(outlook), Costs(outlook)
    too_late = 0 < outlook.seconds_left < outlook.missing[0].recompute_seconds
    if cheapest(costs) > outlook.seconds_left and not too_late:
        assert costs.seconds(plan.level, plan.text) == cheapest(costs)


@given(outlooks())
def test_no_recomputing_begins_that_would_end_too_late_while_the_link_works(outlook: Outlook) -> None:
    plan, left = Adaptive().plan(outlook), outlook.seconds_left
    if 0 < left < outlook.missing[0].recompute_seconds:
        assert plan.text == 0
        assert plan.level == 1 or Costs(outlook).seconds(plan.level, 0) <= left
    dead = Outlook(left, 0.0, outlook.missing)
    if left > 0 and all(chunk.wire_bytes[0] > 0 and chunk.recompute_seconds < math.inf for chunk in outlook.missing):
        assert Adaptive().plan(dead).text == len(outlook.missing)


@given(outlooks())
def test_the_first_level_is_never_finer_than_the_aim(outlook: Outlook) -> None:
    for policy in (Adaptive(), Adaptive(caution=1), Paper(), Fixed(), Fixed(1), Fixed(TEXT)):
        plan = policy.plan(outlook)
        assert 1 <= plan.sure <= plan.level <= len(outlook.missing[0].wire_bytes)
        assert 0 <= plan.text <= len(outlook.missing)
        assert plan.why


@given(outlooks())
def test_adaptive_without_text_recomputes_nothing(outlook: Outlook) -> None:
    assert Adaptive(text=False).plan(outlook).text == 0


@given(outlooks(slo=False))
def test_without_an_slo_the_finest_level_is_fetched(outlook: Outlook) -> None:
    plan = Adaptive().plan(outlook)
    assert (plan.level, plan.sure, plan.text) == (Costs(outlook).levels, Costs(outlook).levels, 0)


@given(outlooks())
def test_the_paper_recomputes_all_where_that_fits_else_takes_the_finest_level_that_fits(outlook: Outlook) -> None:
    plan, costs = Paper().plan(outlook), Costs(outlook)
    if costs.recompute() <= outlook.seconds_left:
        assert plan.text == costs.count
    elif plan.text == 0 and costs.transfer(plan.level) <= outlook.seconds_left:
        assert all(costs.transfer(finer) > outlook.seconds_left for finer in range(plan.level + 1, costs.levels + 1))
    else:
        assert costs.transfer(1) > outlook.seconds_left
        assert costs.seconds(1, plan.text) == min(costs.seconds(1, 0), costs.seconds(1, costs.count))


@given(outlooks(), st.floats(0, 20))
def test_the_first_layers_of_a_prediction_overlap_transfers_and_text_needs_none(outlook: Outlook, first: float) -> None:
    costs, without = Costs(replace(outlook, first_seconds=first)), Costs(outlook)
    for level in range(1, costs.levels + 1):
        assert costs.seconds(level, costs.count) == without.seconds(level, costs.count)
        for text in range(costs.count):
            assert max(first, without.seconds(level, text)) <= costs.seconds(level, text)
            assert costs.seconds(level, text) <= first + without.seconds(level, text) + 1e-9
    plan = Adaptive().plan(replace(outlook, first_seconds=first))
    if cheapest(costs) <= outlook.seconds_left:
        assert costs.seconds(plan.level, plan.text) <= outlook.seconds_left


@pytest.mark.parametrize(
    ("first", "recompute", "left", "level", "text"),
    [
        (0.0, 1.0, 2.0, 3, 0),
        (1.8, 1.0, 2.0, 3, 0),  # they overlap the 1.8 s of transfers
        (2.5, 0.5, 2.0, 3, 4),  # they are too slow, so all is recomputed
        (2.5, 9.0, 2.0, 1, 0),  # nothing fits: the fastest way
    ],
)
def test_levels_text_and_the_first_layers(first: float, recompute: float, left: float, level: int, text: int) -> None:
    chunks = tuple(Missing((1e5, 2e5, 4.5e5), 0.01, recompute) for _ in range(4))
    plan = Adaptive().plan(Outlook(left, 1e6, chunks, first))
    assert (plan.level, plan.text) == (level, text)
    paper = Paper().plan(Outlook(left, 1e6, chunks, first))
    assert (paper.level, paper.text) == ((3, 0) if first < left and recompute > 0.5 else (1, 4 if recompute < 1 else 0))


@given(outlooks(rate=False))
def test_choices_before_the_first_sample(outlook: Outlook) -> None:
    """The aim is the middle level. Adaptive fetches the base first, and recomputes at the last moment, or if it is too
    late to wait.
    """
    middle = (len(outlook.missing[0].wire_bytes) + 1) // 2
    plan, whole = Adaptive().plan(outlook), Costs(outlook).recompute()
    assert (plan.level, plan.sure) == (middle, 1)
    left = outlook.seconds_left
    assert plan.text == int(whole <= left <= 1.25 * whole or (left <= 0 and whole < math.inf))
    assert Paper().plan(outlook).level == (1 if whole <= outlook.seconds_left else middle)


def test_the_order_of_refinements_is_last_chunk_first_chunk_then_from_the_back() -> None:
    assert refinement_order(5) == [4, 0, 3, 2, 1]
    assert refinement_order(1) == [0]


@pytest.mark.parametrize("options", [{"caution": 0.5}, {"smoothing": 1.0}, {"smoothing": -0.1}, {"caution": math.nan}])
def test_options_of_policies_are_checked(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Adaptive(**options)


@pytest.mark.parametrize(("policy", "level"), [("best", None), ("adaptive", 0), ("adaptive", True), ("paper", "all")])
def test_unknown_policies_are_refused(policy: str, level: Any) -> None:
    with pytest.raises(ConfigError):
        policy_of(policy, level)


# Whole streams, in simulated time.


@dataclass
class World:
    """A link of `rate(now)` bytes per second, one request at a time, and a model whose first layers take `first`."""

    tokens: int
    sizes: tuple[int, ...]
    chunks: int
    rate: Callable[[float], float]
    token_seconds: float
    decode_seconds: float
    run_bytes: int = 10**6
    first: float = 0.0

    def recompute(self, chunk: Chunk) -> float:
        return self.token_seconds * chunk.tokens * (1 + chunk.first / 10_000)

    def schedule(self, policy: Any, slo: float | None, refine: Any = "before") -> Schedule:
        chunks = [
            Chunk(i, i * self.tokens, self.tokens, self.sizes, self.sizes, len(self.sizes)) for i in range(self.chunks)
        ]
        found = Schedule(chunks, policy, slo, refine, self.recompute)
        found.prepared()
        found.first_seconds = self.first
        return found

    def run(self, schedule: Schedule) -> float:
        """Return the time at which the context is complete, in seconds."""
        now, rate = 0.0, None
        wire: tuple[float, list[tuple[int, int]], float] | None = None
        work: tuple[float, Decode | Recompute | None, float] | None = None
        for _ in range(100_000):
            if wire is None and (run := schedule.next_run(now, rate, self.run_bytes)):
                nbytes = sum(self.sizes[part] for _, part in run)
                wire = now + self._transfer(now, nbytes), run, now
            if work is None:
                found = schedule.next_work(now, rate)
                assert not isinstance(found, Stuck)
                if isinstance(found, Finished):
                    return now
                if schedule.first_seconds and (isinstance(found, Decode) or schedule.wants_first_layers(now, rate)):
                    work = now + self.first, None, now
                elif isinstance(found, Decode):
                    work = now + self.decode_seconds, found, now
                elif isinstance(found, Recompute):
                    work = now + self.recompute(schedule.chunks[found.chunk]), found, now
            now = min(wire[0] if wire else math.inf, work[0] if work else math.inf, now + 0.2)
            if wire and wire[0] <= now:
                rate = sum(self.sizes[part] for _, part in wire[1]) / (wire[0] - wire[2])
                for part in wire[1]:
                    schedule.arrived(*part)
                wire = None
            if work and work[0] <= now:
                if work[1] is None:
                    schedule.first_seconds = 0.0
                elif isinstance(work[1], Decode):
                    schedule.decoded(work[1].chunk, work[1].level, self.decode_seconds)
                else:
                    schedule.recomputed(work[1].chunk)
                work = None
        raise AssertionError("the stream does not end")

    def _transfer(self, now: float, nbytes: float) -> float:
        """Return the seconds that a request takes from `now` on."""
        start, step = now, 0.1
        while nbytes > self.rate(now) * step:
            nbytes -= self.rate(now) * step
            now += step
        return now - start + nbytes / self.rate(now)


def steady(draw: st.DrawFn) -> World:
    rate = 10 ** draw(st.floats(5.5, 8.5))
    sizes = tuple(draw(st.integers(10_000, 2_000_000)) for _ in range(draw(st.integers(1, 3))))
    return World(
        draw(st.sampled_from([64, 512])),
        sizes,
        draw(st.integers(1, 8)),
        lambda now: rate,
        draw(st.floats(1e-5, 1e-2)),
        draw(st.floats(1e-4, 0.02)),
    )


def coarsest(schedule: Schedule) -> float:
    return min(math.inf if chunk.text else chunk.level for chunk in schedule.chunks)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_on_a_steady_link_adaptive_is_as_good_as_the_best_fixed_choice_in_hindsight(data: st.DataObject) -> None:
    """The stated bound: it is late by at most one request's transfer, one chunk's recomputing and every chunk's
    decoding. No chunk is coarser than the finest fixed level that has three times that margin.
    """
    world = steady(data.draw)
    slo = data.draw(st.floats(0.05, 20))
    schedule = world.schedule(Adaptive(), slo)
    took = world.run(schedule)

    last = schedule.chunks[-1]
    request = max(world.run_bytes, *world.sizes) / world.rate(0)
    bound = request + world.recompute(last) + (world.chunks + 1) * world.decode_seconds * len(world.sizes)
    fixed = {level: world.run(world.schedule(Fixed(level), slo)) for level in range(1, len(world.sizes) + 1)}
    text = world.run(world.schedule(Fixed(TEXT), slo))
    best = min(*fixed.values(), text)
    assert took <= max(slo, best) + bound
    if best + bound <= slo:
        assert took <= slo + world.decode_seconds
    fits = [level for level, needed in fixed.items() if needed + 3 * bound <= slo]
    assert coarsest(schedule) >= max(fits, default=0)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_on_any_link_every_stream_ends_with_all_chunks(data: st.DataObject) -> None:
    world = steady(data.draw)
    rates = data.draw(st.lists(st.floats(1e5, 1e9), min_size=1, max_size=20))
    world.rate = lambda now: rates[int(now / 0.1) % len(rates)]
    slo = data.draw(st.one_of(st.none(), st.floats(0.05, 10)))
    policy = data.draw(st.sampled_from([Adaptive(), Adaptive(text=False), Paper(), Fixed(), Fixed(1), Fixed(TEXT)]))
    schedule = world.schedule(policy, slo, data.draw(st.sampled_from(["off", "before", "while_generating"])))
    world.run(schedule)
    assert schedule.complete
    assert not any(chunk.text for chunk in schedule.chunks) or policy != Adaptive(text=False)


def test_text_grows_from_the_front_while_transfers_come_from_the_back() -> None:
    """Both together meet the SLO, one alone does not: 10 chunks, each 1 s on the wire and 1 s of recomputing."""
    world = World(1000, (10**6,), 10, lambda now: 1e6, 1e-3, 1e-3)
    schedule = world.schedule(Adaptive(), 7.5)
    assert world.run(schedule) <= 7.5
    text = [chunk.text for chunk in schedule.chunks]
    assert text == sorted(text, reverse=True)
    assert 2 <= sum(text) <= 7


def test_text_replaces_a_link_that_dies() -> None:
    """After 2 s hardly a byte arrives; the front of the context is missing then."""
    world = World(1000, (10**6,), 10, lambda now: 1e6 if now < 2 else 1.0, 2e-4, 1e-3, run_bytes=10**5)
    schedule = world.schedule(Adaptive(), 6.0)
    for chunk in schedule.chunks:
        chunk.sizes = chunk.wire = (10**6,)
    now = 0.0
    arrived = [9, 8]
    for index in arrived:
        schedule.arrived(index, 0)
    recomputed = []
    while not isinstance(work := schedule.next_work(now, 100.0 if recomputed else 1e4), Finished):
        if isinstance(work, Decode):
            schedule.decoded(work.chunk, work.level, 1e-3)
        elif isinstance(work, Recompute):
            recomputed.append(work.chunk)
            schedule.recomputed(work.chunk)
        else:
            raise AssertionError(f"{work} at {now}")
        now += 0.1
    assert recomputed == list(range(8))


def test_a_chunk_without_a_source_is_recomputed_after_those_before_it() -> None:
    schedule = World(64, (100, 100), 4, lambda now: 1e6, 1e-3, 1e-3).schedule(Adaptive(), None)
    schedule.unobtainable(2, 0)
    assert isinstance(schedule.next_work(0, 1e6), Wait)
    for index in (3, 1, 0):
        for part in (0, 1):
            schedule.arrived(index, part)
        work = schedule.next_work(0, 1e6)
        assert work == Decode(index, 2)
        schedule.decoded(index, 2, 1e-3)
    assert schedule.next_work(0, 1e6) == Recompute(2)


def test_without_sources_and_without_recomputing_a_stream_is_stuck() -> None:
    schedule = World(64, (100,), 2, lambda now: 1e6, 1e-3, 1e-3).schedule(Adaptive(), None)
    schedule.can_recompute = False
    schedule.cut_off()
    assert schedule.next_work(0, 0.0) == Stuck(0)


def test_adjacent_chunks_share_a_request() -> None:
    schedule = World(64, (100, 50), 5, lambda now: 1e6, 1e-3, 1e-3).schedule(Fixed(2), None)
    assert schedule.next_run(0, None, 250) == [(3, 0), (4, 0)]
    assert schedule.next_run(0, None, 250) == [(0, 1), (1, 1), (2, 1), (3, 1), (4, 1)]
    assert schedule.next_run(0, None, 250) == [(1, 0), (2, 0)]
    assert schedule.next_run(0, None, 250) == [(0, 0)]
    assert schedule.next_run(0, None, 250) == []


def test_chunks_on_this_disk_need_no_throughput() -> None:
    schedule = World(64, (100, 100, 100), 3, lambda now: 1e6, 1e-3, 1e-3).schedule(Adaptive(), 10.0, "off")
    for chunk in schedule.chunks:
        chunk.wire = (0, 0, 0)
    plan = schedule.plan(0.0, None)
    assert plan is not None
    assert (plan.level, plan.sure, plan.text, plan.provisional) == (3, 3, 0, False)


def test_a_stream_runs_the_first_layers_while_chunks_arrive() -> None:
    """Set aside in full, their second would leave time for level 2 alone."""
    world = World(512, (10**6, 10**6, 2 * 10**6), 4, lambda now: 1e7, 1.0, 0.01, first=1.0)
    schedule = world.schedule(Adaptive(caution=1), 1.9)
    assert world.run(schedule) <= 1.9
    assert [chunk.level for chunk in schedule.chunks] == [3] * 4


def test_first_layers_that_do_not_fit_are_not_run_where_text_does() -> None:
    world = World(512, (10**6,), 4, lambda now: 1e5, 1e-4, 0.01, first=3.0)
    schedule = world.schedule(Adaptive(), 1.0)
    assert world.run(schedule) <= 1.0
    assert all(chunk.text for chunk in schedule.chunks)
    assert schedule.first_seconds == 3.0


def test_a_link_that_dies_leaves_no_first_layers_to_run() -> None:
    world = World(512, (10**6,), 4, lambda now: 1e6, 1e-4, 0.01, first=3.0)
    schedule = world.schedule(Adaptive(), 1.0)
    schedule.cut_off()
    assert world.run(schedule) <= 1.0
    assert schedule.first_seconds == 3.0


def test_first_layers_that_took_the_time_of_the_deadline_end_in_the_coarsest_level() -> None:
    """The first layers took longer than expected: what has arrived is decoded at once."""
    world = World(512, (10**5, 10**6), 2, lambda now: 1e6, 9.0, 0.01, first=0.1)
    schedule = world.schedule(Adaptive(), 1.0)
    world.first = 1.5
    assert world.run(schedule) <= 1.6
    assert all(chunk.level >= 1 for chunk in schedule.chunks)
