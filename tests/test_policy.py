"""Properties of the policies, and of whole streams in a simulation with its own clock."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_cachegen.errors import ConfigError
from hf_cachegen.streaming.policy import (
    TEXT,
    Adaptive,
    Costs,
    Fixed,
    Outlook,
    Paper,
    policy_of,
    refinement_order,
)
from hf_cachegen.streaming.schedule import Schedule
from hf_cachegen.streaming.work import Decode, Finished, Recompute, Stuck, Wait
from tests.policy_support import World, cheapest, outlooks, steady


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
