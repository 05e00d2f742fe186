"""The next step of a stream, in cases that the simulated streams of test_policy.py do not reach."""

from __future__ import annotations

from typing import Any

import pytest

from hf_cachegen.streaming.chunk import Chunk
from hf_cachegen.streaming.policy import Adaptive, Outlook, Plan
from hf_cachegen.streaming.schedule import POLL_SECONDS, Schedule
from hf_cachegen.streaming.work import Decode, Finished, Recompute, Settle, Wait

RECOMPUTE = 0.064
"""Time of recomputing any chunk, in seconds."""


def made(chunks: int, levels: int, policy: Any, slo: float | None, refine: Any = "before") -> Schedule:
    """Return a schedule of chunks of 64 tokens, whose parts have 100 bytes each."""
    sizes = (100,) * levels
    found = [Chunk(index, 64 * index, 64, sizes, sizes, levels) for index in range(chunks)]
    return Schedule(found, policy, slo, refine, lambda _: RECOMPUTE)


@pytest.mark.parametrize(
    ("slo", "refine", "can_recompute", "expected"),
    [
        (None, "before", True, Recompute(0)),
        (None, "before", False, Finished()),
        (None, "while_generating", True, Finished()),  # the call returns with the bases
        (1.0, "before", True, Recompute(0)),
        (0.01, "before", True, Finished()),  # recomputing takes 0.064 s
    ],
)
def test_a_chunk_whose_finer_parts_no_source_has_is_recomputed_last_if_there_is_time(
    slo: float | None, refine: str, can_recompute: bool, expected: Recompute | Finished
) -> None:
    schedule = made(1, 3, Adaptive(), slo, refine)
    schedule.prepared()
    schedule.can_recompute = can_recompute
    schedule.arrived(0, 0)
    schedule.unobtainable(0, 1)
    assert schedule.next_work(0, 1e6) == Decode(0, 1)
    schedule.decoded(0, 1, 1e-3)
    assert schedule.next_work(0, 1e6) == expected
    assert schedule.next_run(0, 1e6, 1e6) == []
    if isinstance(expected, Recompute):
        assert schedule.chunks[0].why == "no source has it finer than level 1"
        schedule.recomputed(0)
        assert schedule.next_work(0, 1e6) == Finished()


@pytest.mark.parametrize("rate", [None, 0.0, 1e6])
def test_silence_does_not_end_a_stream_that_has_time(rate: float | None) -> None:
    """This also holds while another source is opened."""
    schedule = made(1, 3, Adaptive(), 1.0)
    schedule.prepared()
    schedule.arrived(0, 0)
    schedule.decoded(0, 1, 1e-3)
    assert schedule.next_work(0.5, rate) == Wait()
    assert schedule.next_run(0.5, rate, 1e6) == [(0, 1)]
    assert schedule.next_run(0.5, rate, 1e6) == [(0, 2)]
    assert schedule.next_work(1.1, rate) == Finished()


@pytest.mark.parametrize(("slo", "first"), [(5.0, Wait()), (0.14, Recompute(0)), (0.05, Wait()), (-1.0, Recompute(0))])
def test_without_side_information_recomputing_begins_at_the_last_moment(
    slo: float, first: Wait | Recompute
) -> None:
    schedule = made(2, 1, Adaptive(), slo)
    for index in range(2):
        schedule.arrived(index, 0)
    assert schedule.next_work(0, 1e6) == first
    schedule.prepared()
    assert schedule.next_work(0, 1e6) == Decode(1, 1)


def test_without_a_decoder_everything_is_recomputed() -> None:
    for happens in ("undecodable", "cut_off"):
        schedule = made(2, 1, Adaptive(), None)
        schedule.arrived(0, 0)
        getattr(schedule, happens)()
        for index in range(2):
            assert schedule.next_work(0, 1e6) == Recompute(index)
            schedule.recomputed(index)
        assert schedule.next_work(0, 1e6) == Finished()


def test_a_chunk_that_the_policy_wants_as_text_is_fetched_where_recomputing_is_not_possible() -> None:
    """A policy of the user may choose text."""

    class Own:
        smoothing, refines = 0.0, False

        def plan(self, outlook: Outlook) -> Plan:
            return Plan(1, 1, len(outlook.missing), 1.0, "my own way")

    schedule = made(3, 1, Own(), 1.0)
    schedule.prepared()
    schedule.can_recompute = False
    assert schedule.next_run(0, 1e6, 1e6) == [(0, 0), (1, 0), (2, 0)]


def test_a_wait_ends_when_the_bases_at_hand_must_be_decoded() -> None:
    """The finer level that the plan waits for may never arrive."""

    class Finest:
        smoothing, refines = 0.0, True

        def plan(self, outlook: Outlook) -> Plan:
            return Plan(3, 3, 0, 0.0, "the finest first")

    schedule = made(2, 3, Finest(), 1.0)
    schedule.prepared()
    for part in range(3):
        schedule.arrived(1, part)
    assert schedule.next_work(0.5, 1e6) == Decode(1, 3)
    schedule.decoded(1, 3, 0.04)
    schedule.arrived(0, 0)
    early = schedule.next_work(0.9, 1e6)
    assert isinstance(early, Wait)
    assert early.seconds == pytest.approx(0.06), "until the deadline, without the decoding"
    assert schedule.next_work(0.965, 1e6) == Decode(0, 1)


class Bases:
    """The bases first, then the finest level."""

    smoothing, refines = 0.0, True

    def plan(self, outlook: Outlook) -> Plan:
        return Plan(3, 1, 0, 0.0, "bases first")


def at_hand(chunks: int, parts: int) -> Schedule:
    """Return a schedule in which these parts of all chunks have arrived, one second before the deadline."""
    schedule = made(chunks, 3, Bases(), 1.0)
    schedule.prepared()
    for chunk in range(chunks):
        for part in range(parts):
            schedule.arrived(chunk, part)
    return schedule


def test_chunks_at_hand_are_launched_together_at_one_level() -> None:
    schedule = at_hand(5, 1)
    for part in (1, 2):
        schedule.arrived(2, part)
    assert schedule.launch(Decode(4, 1), 0, 1e6, 8) == [Decode(4, 1), Decode(3, 1)]
    assert schedule.next_work(0, 1e6) == Decode(2, 3)
    assert schedule.launch(Decode(2, 3), 0, 1e6, 8) == [Decode(2, 3)]
    assert schedule.launch(Decode(1, 1), 0, 1e6, 1) == [Decode(1, 1)]
    assert schedule.next_work(0, 1e6) == Decode(0, 1)


@pytest.mark.parametrize("damaged", [False, True])
def test_nothing_is_recomputed_or_finished_while_chunks_are_being_decoded(damaged: bool) -> None:
    schedule = at_hand(3, 3)
    schedule.unobtainable(1, 0)
    assert schedule.launch(Decode(2, 3), 0, 1e6, 8) == [Decode(2, 3), Decode(0, 3)]
    assert schedule.next_work(0, 1e6) == Settle()
    assert schedule.decisions == [], "recomputing is decided on later"
    schedule.decoded(2, 3, 1e-3)
    if damaged:
        schedule.damaged(0, 1)
        assert schedule.next_work(0, 1e6) == Recompute(0)
        schedule.recomputed(0)
    else:
        schedule.decoded(0, 3, 1e-3)
    assert schedule.next_work(0, 1e6) == Recompute(1)
    schedule.recomputed(1)
    assert schedule.next_work(0, 1e6) == Finished()


@pytest.mark.parametrize("generating", [False, True])
def test_refinements_are_launched_when_those_before_them_are_in_place(generating: bool) -> None:
    schedule = at_hand(2, 1)
    schedule.generating = generating
    for index in (1, 0):
        schedule.launch(Decode(index, 1), 0, 1e6, 1)
    for index in (1, 0):
        schedule.arrived(index, 1)
        schedule.decoded(index, 1, 1e-3)
    assert schedule.launch(Decode(1, 2), 0, 1e6, 1) == [Decode(1, 2)]
    schedule.chunks[0].asked.add(2)
    waiting = schedule.next_work(0, 1e6)
    assert isinstance(waiting, Wait)
    assert waiting.seconds <= POLL_SECONDS
    for index in range(2):
        schedule.unobtainable(index, 2)
    schedule.returned([(0, 2)])
    assert schedule.next_work(0, 1e6) == Settle(), "nothing more arrives"
    schedule.decoded(1, 2, 1e-3)
    assert schedule.next_work(0, 1e6) == Decode(0, 2)


def test_a_stream_does_not_end_while_the_last_refinement_is_being_decoded() -> None:
    schedule = at_hand(1, 1)
    schedule.decoded(0, 1, 1e-3)
    schedule.arrived(0, 1)
    schedule.launch(Decode(0, 2), 0, 1e6, 8)
    assert schedule.next_work(1.1, 1e6) == Settle(), "the deadline has passed"
    schedule.decoded(0, 2, 1e-3)
    assert schedule.next_work(1.1, 1e6) == Finished()


def test_chunks_that_are_being_decoded_take_time() -> None:
    """A wait ends as early as if they were not launched yet."""
    schedule = at_hand(6, 0)
    schedule.arrived(5, 0)
    schedule.decoded(5, 1, 0.1)
    for index in (4, 3):
        schedule.arrived(index, 0)
        schedule.launch(Decode(index, 1), 0, 1e6, 1)
    waiting = schedule.next_work(0.7995, 1e6)
    assert isinstance(waiting, Wait)
    assert waiting.seconds == pytest.approx(1e-3), "of 0.2005 s left, 0.2 s go to the two chunks"
