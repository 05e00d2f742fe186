"""Simulate a stream: the package's schedule, policy and bandwidth estimate over a link that replays a trace.

All decisions are those of `hf_cachegen.streaming`. Simulated are the clock, the link and the calling thread. Requested
bytes arrive in the order of the requests, after a round trip, because all connections fetch the same run together. The
calling thread does one thing at a time, so an arrived chunk waits while another is decoded or recomputed.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from eval.traces import Link
from hf_cachegen.errors import ConfigError
from hf_cachegen.streaming import (
    CONNECTIONS,
    RESERVE,
    Bandwidth,
    Decode,
    Finished,
    Policy,
    Recompute,
    Schedule,
    ScheduledChunk,
    Wait,
    request_bytes,
)

SLICES = 8
"""Number of pieces in which the bytes of a part arrive."""
LONGEST = 600.0
"""Seconds of simulated time after which a stream counts as never ready."""


@dataclass(frozen=True)
class Chunk:
    """One chunk of a context.

    Attributes:
        parts: bytes of the base and of each refinement.
        decode_seconds: seconds to decode it at any level.
        recompute_seconds: seconds to recompute it.
    """


    parts: tuple[float, ...]
    decode_seconds: float
    recompute_seconds: float


@dataclass(frozen=True)
class Outcome:
    """The result of a stream.

    Attributes:
        ttft: seconds to the first token, infinite where the link never recovers.
        choices: the level of each chunk, None for text.
        nbytes: bytes received by then.
    """

    ttft: float
    choices: tuple[int | None, ...]
    nbytes: float


class _Request:
    """A requested run of parts: the slices that have not arrived yet."""

    def __init__(self, parts: Sequence[tuple[int, int]], chunks: Sequence[Chunk]) -> None:
        self.began = 0
        self.nbytes = round(sum(chunks[chunk].parts[part] for chunk, part in parts))
        self.slices = deque(
            (part, chunks[part[0]].parts[part[1]] / SLICES, number == SLICES - 1)
            for part in parts
            for number in range(SLICES)
        )


class _Run:
    def __init__(
        self, chunks: Sequence[Chunk], link: Link, policy: Policy, deadline: float, round_trip: float, connections: int
    ) -> None:
        self.chunks, self.link, self.round_trip, self.connections = chunks, link, round_trip, connections
        self.now, self.sent = 0.0, 0.0
        self.bandwidth = Bandwidth(smoothing=policy.smoothing, clock=lambda: self.now)
        progress = []
        for index, chunk in enumerate(chunks):
            sizes = tuple(map(round, chunk.parts))
            progress.append(ScheduledChunk(index, index, 1, sizes, sizes, len(sizes)))
        self.schedule = Schedule(
            progress, policy, deadline, "before", lambda found: chunks[found.index].recompute_seconds
        )
        self.schedule.prepared()
        self.waiting: deque[_Request] = deque()
        self.under_way: list[_Request] = []
        self.line_busy = self.thread_busy = False
        self.events: list[tuple[float, int, str, object]] = []
        self.number = 0
        self.wake = 0.0

    def at(self, time: float, kind: str, what: object) -> None:
        self.number += 1  # events of the same time keep their order
        heapq.heappush(self.events, (time, self.number, kind, what))

    def fetch(self) -> None:
        """Send requests while the schedule asks for parts."""
        while True:
            rate = self.bandwidth.rate()
            under_way = [request.nbytes for request in self.under_way]
            nbytes = request_bytes(rate, self.round_trip, under_way, self.connections)
            run = [] if nbytes is None else self.schedule.next_run(self.now, rate, nbytes)
            if not run:
                return
            request = _Request(run, self.chunks)
            self.under_way.append(request)
            request.began = self.bandwidth.began()
            self.at(self.now + self.round_trip, "answered", request)

    def carry(self) -> None:
        """Put the next slice on the link, if it is free."""
        if not self.line_busy and self.waiting:
            request = self.waiting.popleft()
            (chunk, _), nbytes, _ = request.slices[0]
            self.line_busy = True
            self.at(self.link.finish(self.now, nbytes, chunk), "slice", request)

    def work(self) -> bool:
        """Give the calling thread its next work, if it is free; report whether the stream is finished."""
        self.wake = self.now + Wait().seconds
        if self.thread_busy:
            return False
        work = self.schedule.next_work(self.now, self.bandwidth.rate())
        if isinstance(work, Finished):
            return True
        if isinstance(work, Decode):
            self.thread_busy = True
            self.at(self.now + self.chunks[work.chunk].decode_seconds, "decoded", work)
        elif isinstance(work, Recompute):
            self.thread_busy = True
            self.at(self.now + self.chunks[work.chunk].recompute_seconds, "recomputed", work)
        elif isinstance(work, Wait):
            self.wake = self.now + work.seconds
        return False

    def happen(self) -> None:
        """Process the next event, or advance the clock to the end of the loader's wait."""
        if not self.events or self.events[0][0] > self.wake:
            self.now = self.wake
            return
        self.now, _, kind, what = heapq.heappop(self.events)
        if isinstance(what, _Request) and kind == "answered":
            self.waiting.append(what)
        elif isinstance(what, _Request):
            part, nbytes, last = what.slices.popleft()
            self.line_busy = False
            self.sent += nbytes
            self.bandwidth.add(round(nbytes))
            if last:
                self.schedule.arrived(*part)
            if what.slices:
                self.waiting.appendleft(what)
            else:
                self.under_way.remove(what)
                self.bandwidth.ended(what.began)
        elif isinstance(what, Decode):
            self.thread_busy = False
            self.schedule.decoded(what.chunk, what.level, self.chunks[what.chunk].decode_seconds)
        elif isinstance(what, Recompute):
            self.thread_busy = False
            self.schedule.recomputed(what.chunk)

    def run(self) -> float:
        """Run until the schedule is finished; return the time in seconds, infinite where it never is."""
        while self.now < LONGEST:
            self.fetch()
            self.carry()
            if self.work():
                return self.now
            self.happen()
        return math.inf


def simulate(
    chunks: Sequence[Chunk],
    link: Link,
    policy: Policy,
    slo: float,
    question_seconds: float = 0.0,
    round_trip: float = 0.0,
    connections: int = CONNECTIONS,
) -> Outcome:
    """Simulate one context over a link.

    Args:
        chunks: the chunks of the context, each with the same number of parts.
        link: the link.
        policy: a policy of hf_cachegen.streaming.
        slo: seconds to the first token.
        question_seconds: prefill of the question, after the context.
        round_trip: seconds of each request.
        connections: number of connections.

    Raises:
        ConfigError: there are no chunks, or they differ in their number of parts.
    """
    if not chunks or len({len(chunk.parts) for chunk in chunks}) != 1:
        raise ConfigError("expected one or more chunks with the same number of parts")
    run = _Run(chunks, link, policy, (1 - RESERVE) * slo - question_seconds, round_trip, connections)
    ready = run.run()
    choices = tuple(None if chunk.text else chunk.level for chunk in run.schedule.chunks)
    return Outcome(ready + question_seconds, choices, run.sent)
