"""Which source to ask after a failure, and what to give up: a state machine without threads, clock or I/O.

Sources are asked in turn. A failure is one of two kinds. A source that does not answer may answer later: each may fail
ROUNDS times without a part arriving in between. A source that gives wrong bytes gives them again: such a part is asked
of every source once, and is lost when all of them gave it wrong.

After ROUNDS rounds of failures the parts that no source gave are given up, together with all finer ones. Coarser parts
are asked for again: a source may lack one file only.

The caller reports failures and times; each method returns what to do. Not for several threads at once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from hf_cachegen.streaming.schedule import Part

ROUNDS = 2
"""How often each source may fail, in turn with the others, before parts are given up."""
SILENCES, SLACK_SECONDS = 2, 1.0
"""A source is left after SILENCES time limits without a byte and SLACK_SECONDS more. Its requests, each of which is
made twice, should have ended by themselves before."""


@dataclass(frozen=True)
class Action:
    """What to do about a failure, in the order of the fields. Without `failed` there is nothing to do.

    Args:
        failed: The location to report as failed; None: the failure does not count.
        lost: A part that no source can give.
        undecodable: No source can give what decoding takes.
        leave: Void all requests under way, and ask the current source for what has not arrived.
        cut_off: Give up that part of every chunk, and all finer ones.
    """

    failed: str | None = None
    lost: Part | None = None
    undecodable: bool = False
    leave: bool = False
    cut_off: int | None = None


NOTHING = Action()


class Failover:
    """The sources of one stream, by their locations.

    Args:
        locations: Names of the sources, in the order in which they are asked.
        stall: Seconds of silence after which a request has failed.
    """

    def __init__(self, locations: Sequence[str], stall: float) -> None:
        self.epoch = 0
        """Grows with every change of the source. Requests of an earlier epoch are not waited for."""
        self.over = False
        """Whether no source is left to ask."""
        self._locations, self._stall = tuple(locations), stall
        self._asked = list(range(len(locations)))
        self._turn = 0
        self._failures: list[tuple[str, int]] = []  # each one's location, and the part that it was about
        self._failed_at = -math.inf
        self._wrong: Counter[Part] = Counter()
        self._unprepared = 0

    @property
    def current(self) -> int:
        """The index of the source to ask."""
        return self._asked[self._turn]

    def arrived(self) -> None:
        """Forget the failures before a part that arrived."""
        self._failures.clear()

    def cannot_open(self, *, wrong: bool) -> Action:
        """The current source gave no manifest. wrong: it has another artifact, so it is not asked again."""
        failed = self._location
        if wrong and len(self._asked) > 1:
            del self._asked[self._turn]
            self._turn -= 1
            self._failures.clear()
        else:
            self._failures.append((failed, 0))
        return self._leave(failed)

    def cannot_prepare(self, *, wrong: bool) -> Action:
        """The current source did not give what decoding takes.

        These failures are counted apart from those of parts, since a profile may come from another location.
        """
        failed = self._location
        self._unprepared += ROUNDS if wrong else 1
        if self._unprepared >= ROUNDS * len(self._asked):
            return Action(failed, undecodable=True)
        return self._leave(failed) if len(self._asked) > 1 else Action(failed)

    def cannot_fetch(self, part: Part, *, wrong: bool, began: float, now: float) -> Action:
        """The current source did not give a part.

        Args:
            part: The first part of the request that has not arrived.
            wrong: Whether wrong bytes arrived, rather than none.
            began: When the request began, on the clock of `now`.
            now: The time.
        """
        failed = self._location
        if wrong:
            self._wrong[part] += 1
            if self._wrong[part] >= len(self._asked):
                return Action(failed, lost=part)
            return self._leave(failed)
        if began <= self._failed_at:
            return NOTHING  # of several requests that fail together one counts
        self._failed_at = now
        self._failures.append((failed, part[1]))
        if len(self._asked) == 1 and len(self._failures) < ROUNDS:
            return Action(failed)  # there is no other source, and the other requests may succeed
        return self._leave(failed)

    def silent(self, seconds: float) -> Action:
        """No byte has arrived for a number of seconds while requests are under way."""
        if self.over or seconds <= SILENCES * self._stall + SLACK_SECONDS:
            return NOTHING
        failed = self._location
        self._failures.append((failed, 0))
        return self._leave(failed)

    @property
    def _location(self) -> str:
        return self._locations[self.current]

    def _leave(self, failed: str) -> Action:
        """Ask the next source, unless too many have failed."""
        self.epoch += 1
        cut_off = self._cut_off() if len(self._failures) >= ROUNDS * len(self._asked) else None
        self.over = cut_off == 0
        if not self.over:
            self._turn = (self._turn + 1) % len(self._asked)
        return Action(failed, leave=True, cut_off=cut_off)

    def _cut_off(self) -> int:
        """The coarsest part that the source which failed least could not give."""
        coarsest: dict[str, int] = {}
        for location, part in self._failures:
            coarsest[location] = min(part, coarsest.get(location, part))
        self._failures.clear()
        return max(coarsest.values())
