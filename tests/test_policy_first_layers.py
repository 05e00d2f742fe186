"""The first layers of a prediction in plans and streams: they overlap transfers, and text needs none of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_cachegen.streaming.policy import Adaptive, Costs, Missing, Outlook, Paper
from tests.policy_support import World, cheapest, outlooks


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
