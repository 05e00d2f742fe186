"""The threads that fetch what a schedule wants, and what becomes of a place that fails.

All share one lock, `changed`, with the thread that decodes: under it the schedule is asked and told. A place that fails
is left for the next one; after ROUNDS rounds of failures without a segment in between none is left, and the schedule is
cut off. What one place has wrong another may have right: a part is given up when each has given it wrong.

No thread waits without a limit. Those that nobody needs any more end with the next piece that arrives for them, at the
latest when their request's time is over.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext

from hf_cachegen.container import Segment
from hf_cachegen.errors import ArtifactError, StoreTimeoutError
from hf_cachegen.streaming.bandwidth import Bandwidth
from hf_cachegen.streaming.link import Share
from hf_cachegen.streaming.schedule import Part, Schedule
from hf_cachegen.streaming.sources import GivenUp, Source

ROUNDS = 2
WINDOW_SECONDS = 0.15
"""What is under way at a time, over all connections, should take so long: more than a round trip, so that the link
never waits; little, since it arrives all together, is decoded after that, and no plan can change it any more.
"""
FIRST_WINDOW_BYTES = 4 << 20
"""Under way before anything was measured."""
LEAST_REQUESTS = 2
"""Under way in any case: one ends, the next is there."""
LEAST_RUN_BYTES, MOST_RUN_BYTES = 1 << 18, 8 << 20
WAKE_SECONDS = 0.1
"""How often a thread looks whether time alone has changed what there is to do."""

_LOCAL = threading.local()


def abandoned() -> bool:
    """Whether nobody waits any more for what the calling thread fetches."""
    given_up = getattr(_LOCAL, "given_up", None)
    return given_up is not None and given_up()


def request_bytes(rate: float | None, under_way: Sequence[int], connections: int) -> float | None:
    """Bytes that the next request should have, by the throughput and the bytes of all parts that are under way; None
    where those are enough.
    """
    window = FIRST_WINDOW_BYTES if rate is None else rate * WINDOW_SECONDS
    if len(under_way) >= LEAST_REQUESTS and sum(under_way) >= window:
        return None
    return min(MOST_RUN_BYTES, max(LEAST_RUN_BYTES, window / connections))


class Fetcher:
    """sources: the first is used until it fails. segment_of: what a part is called in the artifact. on_arrival(part,
    data, wire) and on_failure(place, error, part or None) are called with `changed` held. error: the last failure of a
    source; crash: what ended a thread that should not have ended.
    """

    def __init__(
        self,
        schedule: Schedule,
        sources: Sequence[Source],
        segment_of: Callable[[Part], Segment],
        bandwidth: Bandwidth,
        share: Share,
        connections: int,
        stall: float,
        on_arrival: Callable[[Part, bytes, bool], None],
        on_failure: Callable[[str, Exception, Part | None], None],
    ) -> None:
        self.changed = threading.Condition()
        self.schedule, self.sources, self.bandwidth, self.share = schedule, list(sources), bandwidth, share
        self.closed = False
        self.error: Exception | None = None
        self.crash: BaseException | None = None
        self._segment_of, self._connections, self._stall = segment_of, connections, stall
        self._on_arrival, self._on_failure = on_arrival, on_failure
        self._threads: list[threading.Thread] = []
        self._current, self._epoch, self._failures = 0, 0, 0
        self._wrong: Counter[Part] = Counter()
        self._begun: dict[Part, float] = {}

    def start(self) -> None:
        """Begins to fetch."""
        with self.changed:
            self._start()

    def close(self, wait: float = 0.0) -> None:
        """Ends all threads; waits for them up to so many seconds."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        end = time.monotonic() + wait
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def transfer_seconds(self, part: Part) -> float:
        """Since the request for a part began."""
        return time.monotonic() - self._begun.get(part, time.monotonic())

    def watch(self) -> None:
        """Gives up a place that has been silent for too long although its requests should have ended by themselves.

        To be called now and then, with `changed` held.
        """
        if not self.closed and self.bandwidth.silence() > 2 * self._stall + 1:
            place = self.sources[self._current].place
            self._fail(self._epoch, StoreTimeoutError(f"{place}: silent for {self.bandwidth.silence():.1f} s"), None)

    def given_up(self, epoch: int) -> bool:
        """Whether requests of that epoch (the time of one source) are not waited for any more."""
        return self.closed or epoch != self._epoch

    def _start(self) -> None:
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        for _ in range(self._connections):
            # A daemon: a process that ends shall not wait for a request's time limit.
            thread = threading.Thread(target=self._run, args=(self._epoch,), name="hf_cachegen-fetch", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _run(self, epoch: int) -> None:
        source = self.sources[self._current]
        _LOCAL.given_up = lambda: self.given_up(epoch)
        while True:
            with self.changed:
                run = self._next(epoch)
            if not run:
                return
            try:
                self._fetch(epoch, source, run)
            except GivenUp:
                self._give_back(epoch, run)
            except (ArtifactError, OSError) as error:
                self._fail(epoch, error, self._give_back(epoch, run))
            except BaseException as error:
                with self.changed:
                    self.crash, self.closed = error, True
                    self.changed.notify_all()
                return

    def _next(self, epoch: int) -> list[Part]:
        """What to fetch next, waited for; nothing once given up."""
        while not self.given_up(epoch):
            run = self._wanted()
            if run:
                now = time.monotonic()
                self._begun.update((part, now) for part in run)
                self.changed.notify_all()  # a decision may be told
                return run
            self.changed.wait(WAKE_SECONDS)
        return []

    def _wanted(self) -> list[Part]:
        """What to fetch next; nothing where enough is under way."""
        rate = self.bandwidth.rate()
        under_way = [chunk.wire[part] for chunk in self.schedule.chunks for part in chunk.asked if chunk.wire[part]]
        run_bytes = request_bytes(rate, under_way, self._connections)
        if run_bytes is None:
            return []
        return self.schedule.next_run(time.monotonic(), rate, run_bytes)

    def _fetch(self, epoch: int, source: Source, run: list[Part]) -> None:
        source.open()
        segments = [self._segment_of(part) for part in run]
        wire = [not source.here(segment) for segment in segments]
        turn = self.share.turn(lambda: self.given_up(epoch)) if any(wire) else nullcontext(True)
        with turn as granted:
            if not granted:
                raise GivenUp
            for part, far, data in zip(run, wire, source.fetch(segments), strict=True):
                with self.changed:
                    if self.closed:  # whoever asked may have begun anew, with another artifact
                        raise GivenUp
                    self._failures = 0
                    self.schedule.arrived(*part)
                    self._on_arrival(part, data, far)
                    self.changed.notify_all()

    def _give_back(self, epoch: int, run: list[Part]) -> Part | None:
        """Those of a run that did not arrive; the first of them is returned."""
        with self.changed:
            if epoch != self._epoch:
                return None
            lost = [(chunk, part) for chunk, part in run if part in self.schedule.chunks[chunk].asked]
            self.schedule.returned(lost)
            self.changed.notify_all()
            return lost[0] if lost else None

    def _fail(self, epoch: int, error: Exception, part: Part | None) -> None:
        """The source of that epoch failed, or gave that part wrong."""
        with self.changed:
            if self.given_up(epoch):
                return
            self.error = error
            wrong = part if isinstance(error, ArtifactError) else None
            self._on_failure(self.sources[self._current].place, error, wrong)
            if wrong is None:
                self._failures += 1
            else:
                self._wrong[wrong] += 1
                if self._wrong[wrong] >= len(self.sources):
                    self.schedule.unobtainable(*wrong)
                    self.changed.notify_all()
                    return
            self._epoch += 1
            for chunk in self.schedule.chunks:
                chunk.asked.clear()
            if self._failures >= ROUNDS * len(self.sources):
                self.schedule.cut_off()
            else:
                self._current = (self._current + 1) % len(self.sources)
                self.bandwidth.forget()
                self._start()
            self.changed.notify_all()
