"""The next source after failures, and the parts that are given up, without threads or clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from hf_cachegen.streaming.failover import NOTHING, ROUNDS, Action, Failover

STALL = 0.5
Step = Callable[[Failover], Action]
A, B, C = "https://a", "https://b", "https://c"


def unopened(*, wrong: bool = False) -> Step:
    return lambda failover: failover.cannot_open(wrong=wrong)


def unprepared(*, wrong: bool = False) -> Step:
    return lambda failover: failover.cannot_prepare(wrong=wrong)


def unfetched(chunk: int, part: int, at: float, *, began: float | None = None) -> Step:
    """Return a failure of a request at a time; it began just before, or at `began`."""
    begin = at - 0.1 if began is None else began
    return lambda failover: failover.cannot_fetch((chunk, part), wrong=False, began=begin, now=at)


def wrong(chunk: int, part: int) -> Step:
    return lambda failover: failover.cannot_fetch((chunk, part), wrong=True, began=0.0, now=1.0)


def silent(seconds: float) -> Step:
    return lambda failover: failover.silent(seconds)


def arrived(failover: Failover) -> Action:
    failover.arrived()
    return NOTHING


def leave(failed: str, cut_off: int | None = None) -> Action:
    return Action(failed, leave=True, cut_off=cut_off)


@dataclass
class Case:
    """Failures in their order, the reaction to each, and the location that is asked afterwards (None without one)."""

    sources: list[str]
    steps: list[tuple[Step, Action]]
    asked: str | None
    epoch: int = field(default=-1)


CASES = {
    # One source.
    "one source fails once: what else is under way may arrive": Case(
        [A], [(unfetched(0, 0, 1.0), Action(A))], A, epoch=0
    ),
    "one source fails twice: its base is given up, and all with it": Case(
        [A], [(unfetched(0, 0, 1.0), Action(A)), (unfetched(1, 0, 2.0), leave(A, 0))], None
    ),
    "one source lacks a refinement: it and finer parts are given up, the rest is asked for again": Case(
        [A], [(unfetched(0, 2, 1.0), Action(A)), (unfetched(1, 1, 2.0), leave(A, 1))], A, epoch=1
    ),
    "parts arrive between the failures of one source": Case(
        [A], [(unfetched(0, 0, 1.0), Action(A)), (arrived, NOTHING), (unfetched(1, 0, 2.0), Action(A))], A, epoch=0
    ),
    "one source is silent twice": Case([A], [(silent(3.0), leave(A)), (silent(3.0), leave(A, 0))], None),
    "one source cannot be opened twice": Case([A], [(unopened(), leave(A)), (unopened(), leave(A, 0))], None),
    "the only source is never dropped": Case(
        [A], [(unopened(wrong=True), leave(A)), (unopened(wrong=True), leave(A, 0))], None
    ),
    "one source gives wrong bytes: that part is lost": Case([A], [(wrong(3, 1), Action(A, lost=(3, 1)))], A, epoch=0),
    "one source does not give the side information": Case(
        [A], [(unprepared(), Action(A)), (unprepared(), Action(A, undecodable=True))], A, epoch=0
    ),
    "one source gives wrong side information": Case(
        [A], [(unprepared(wrong=True), Action(A, undecodable=True))], A, epoch=0
    ),
    # Two sources.
    "two sources: the other is asked at once": Case([A, B], [(unfetched(0, 0, 1.0), leave(A))], B, epoch=1),
    "two sources fail in turn, each ROUNDS times": Case(
        [A, B],
        [
            (unfetched(0, 0, 1.0), leave(A)), (unfetched(0, 0, 2.0), leave(B)),
            (unfetched(0, 0, 3.0), leave(A)), (unfetched(0, 0, 4.0), leave(B, 0)),
        ],
        None, epoch=4,
    ),
    "the source that failed least decides what is given up": Case(
        [A, B],
        [
            (unfetched(0, 0, 1.0), leave(A)), (unfetched(0, 2, 2.0), leave(B)),
            (silent(3.0), leave(A)), (unfetched(0, 1, 4.0), leave(B, 1)),
        ],
        A, epoch=4,
    ),
    "a source with another artifact is not asked again": Case(
        [A, B, C],
        [
            (unfetched(0, 0, 1.0), leave(A)), (unopened(wrong=True), leave(B)),
            (unfetched(0, 0, 2.0), leave(C)), (unfetched(0, 0, 3.0), leave(A)),
        ],
        C, epoch=4,
    ),
    "the last source with another artifact is followed by the first": Case(
        [A, B], [(unfetched(0, 0, 1.0), leave(A)), (unopened(wrong=True), leave(B))], A, epoch=2
    ),
    "dropping a source forgets the failures before": Case(
        [A, B],
        [
            (silent(3.0), leave(A)), (unopened(wrong=True), leave(B)),
            (unfetched(0, 0, 3.0), Action(A)), (unfetched(0, 0, 4.0), leave(A, 0)),
        ],
        None,
    ),
    "wrong bytes of one source: the other may have the right ones": Case([A, B], [(wrong(3, 1), leave(A))], B),
    "wrong bytes of both sources": Case(
        [A, B], [(wrong(3, 1), leave(A)), (wrong(3, 1), Action(B, lost=(3, 1)))], B, epoch=1
    ),
    "wrong bytes of two parts are counted apart": Case([A, B], [(wrong(3, 1), leave(A)), (wrong(3, 2), leave(B))], A),
    "wrong bytes do not use up the rounds": Case(
        [A, B], [(wrong(chunk, 0), leave(A if chunk % 2 == 0 else B)) for chunk in range(6)], A, epoch=6
    ),
    "side information is asked of each source ROUNDS times": Case(
        [A, B],
        [
            (unprepared(), leave(A)), (unprepared(), leave(B)), (unprepared(), leave(A)),
            (unprepared(), Action(B, undecodable=True)),
        ],
        B, epoch=3,
    ),
    "side information that is wrong at both": Case(
        [A, B], [(unprepared(wrong=True), leave(A)), (unprepared(wrong=True), Action(B, undecodable=True))], B
    ),
    "failures of the side information do not use up the rounds of parts": Case(
        [A, B], [(unprepared(), leave(A)), (unfetched(0, 0, 1.0), leave(B)), (unprepared(), leave(A))], B
    ),
    # Failures that do not count.
    "of requests that fail together one counts": Case(
        [A], [(unfetched(0, 0, 1.0), Action(A)), (unfetched(1, 0, 1.2, began=0.9), NOTHING)], A, epoch=0
    ),
    "wrong bytes count at any time": Case(
        [A], [(unfetched(0, 0, 2.0), Action(A)), (wrong(1, 0), Action(A, lost=(1, 0)))], A
    ),
    "a silence within the time limits": Case([A, B], [(silent(2 * STALL + 1), NOTHING)], A, epoch=0),
    "a silence after the end": Case(
        [A], [(silent(3.0), leave(A)), (silent(3.0), leave(A, 0)), (silent(9.0), NOTHING)], None, epoch=2
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_reaction_to_failures(name: str) -> None:
    case = CASES[name]
    failover = Failover(case.sources, STALL)
    for number, (happens, expected) in enumerate(case.steps):
        assert happens(failover) == expected, f"step {number}"
    assert (None if failover.over else case.sources[failover.current]) == case.asked
    if case.epoch >= 0:
        assert failover.epoch == case.epoch


@pytest.mark.parametrize("count", [1, 2, 3])
def test_silent_sources_are_given_up_after_as_many_failures_as_documented(count: int) -> None:
    failover = Failover([f"https://{number}" for number in range(count)], STALL)
    failures = 0
    while not failover.over:
        assert failover.silent(100.0).failed == f"https://{failures % count}"
        failures += 1
    assert failures == ROUNDS * count
