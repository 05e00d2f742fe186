"""A stream in simulated time: the product's policy and bandwidth estimate over a link that is a trace.

Three twists. There are two workers, as in the product: the wire, which carries one request at a time, and the calling
thread, which decodes what arrived or recomputes chunks from the front of the context. Chunks are fetched from the
back, so that what is missing when a link dies is a front part, which can be recomputed. A policy that refines
goes on until the time is up, and no longer: nothing is begun that would not be in place by then at the present rate.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from eval.traces import Link
from hf_cachegen.errors import ConfigError
from hf_cachegen.streaming import Missing, Outlook, Plan, Policy
from hf_cachegen.streaming.bandwidth import Bandwidth
from hf_cachegen.streaming.policy import refinement_order

SLICES = 16
"""Pieces in which a request's bytes arrive."""


@dataclass(frozen=True)
class Chunk:
    """parts[p]: bytes of the base (p = 0) and of each refinement. Seconds: decoding it at any level, recomputing it."""

    parts: tuple[float, ...]
    decode_seconds: float
    recompute_seconds: float


@dataclass(frozen=True)
class Outcome:
    """ttft in seconds; choices: the level of each chunk, None for text; nbytes: carried in all."""

    ttft: float
    choices: tuple[int | None, ...]
    nbytes: float


class _Run:
    def __init__(
        self, chunks: Sequence[Chunk], link: Link, policy: Policy, slo: float, question: float, round_trip: float
    ) -> None:
        self.chunks, self.link, self.policy, self.round_trip = chunks, link, policy, round_trip
        self.until = slo - question
        self.now = 0.0
        self.bandwidth = Bandwidth(smoothing=policy.smoothing, clock=lambda: self.now)
        count = len(chunks)
        self.here = [0] * count
        self.placed: list[int | None] = [None] * count
        self.text = [False] * count
        # The last is what wakes a stream that waits for a refinement.
        self.events: list[tuple[float, int, str, int, float]] = [(self.until, 0, "time is up", -1, 0.0)]
        self.sent = 0.0
        self.wire: int | None = None
        self.worker: int | None = None

    def done(self, index: int) -> bool:
        return self.text[index] or self.placed[index] is not None

    def missing(self) -> list[int]:
        return [index for index in range(len(self.chunks)) if not self.done(index)]

    def plan(self, missing: Sequence[int]) -> Plan:
        """The policy's, for what is missing now."""
        costs = []
        for index in missing:
            chunk, here = self.chunks[index], self.here[index]
            left = tuple(sum(chunk.parts[here : level + 1]) for level in range(len(chunk.parts)))
            costs.append(Missing(left, chunk.decode_seconds, chunk.recompute_seconds))
        return self.policy.plan(Outlook(self.until - self.now, self.bandwidth.rate(), tuple(costs)))

    def next_request(self, missing: Sequence[int], plan: Plan | None) -> int | None:
        """The chunk whose next part is fetched; None: nothing to fetch."""
        if plan is not None:
            for index in reversed(missing[plan.text :]):
                if self.here[index] < plan.sure and index != self.worker:
                    return index
            coming = [index for index in missing[plan.text :] if self.here[index]]
            if len(coming) < len(missing) - plan.text:
                return None
        return self.refinement() if self.policy.refines else None

    def refinement(self) -> int | None:
        """The chunk to refine next, if that is sure to be in place in time."""
        rate = self.bandwidth.rate()
        if rate is None or not rate:
            return None
        order = refinement_order(len(self.chunks))
        order.sort(key=lambda index: self.here[index])
        waiting = sum(
            chunk.decode_seconds for i, chunk in enumerate(self.chunks) if self.here[i] > (self.placed[i] or 0)
        )
        for index in order:
            chunk, here = self.chunks[index], self.here[index]
            if not self.text[index] and 0 < here < len(chunk.parts):
                seconds = chunk.parts[here] / rate + 2 * self.round_trip + waiting + 2 * chunk.decode_seconds
                return index if self.now + seconds <= self.until else None
        return None

    def send(self, index: int) -> None:
        """Puts the arrivals of a request's slices among the events."""
        self.wire = index
        self.bandwidth.began()
        nbytes = self.chunks[index].parts[self.here[index]]
        at = self.now + self.round_trip
        for number in range(SLICES):
            at = self.link.finish(at, nbytes / SLICES, index)
            kind = "last" if number == SLICES - 1 else "slice"
            heapq.heappush(self.events, (at, number, kind, index, nbytes / SLICES))

    def to_decode(self, plan: Plan | None) -> int | None:
        """The chunk to decode next: one that is missing, from the back, else a refinement that is in place in time."""
        better = []
        for index in reversed(range(len(self.chunks))):
            if self.text[index] or self.here[index] <= (self.placed[index] or 0):
                continue
            if self.placed[index] is not None:
                better.append(index)
            elif plan is not None and self.here[index] >= min(plan.sure, len(self.chunks[index].parts)):
                return index
        in_time = (index for index in better if self.now + self.chunks[index].decode_seconds <= self.until)
        return None if plan is not None else next(in_time, None)

    def work(self, missing: Sequence[int], plan: Plan | None) -> None:
        """Gives the calling thread something to do, if there is something."""
        if (index := self.to_decode(plan)) is not None:
            self.worker = index
            event = (self.now + self.chunks[index].decode_seconds, 0, "decoded", index, float(self.here[index]))
            heapq.heappush(self.events, event)
        elif plan is not None and plan.text and missing[0] != self.wire:
            index = missing[0]
            if all(self.done(before) for before in range(index)):
                self.worker = index
                heapq.heappush(self.events, (self.now + self.chunks[index].recompute_seconds, 0, "text", index, 0.0))

    def happen(self) -> None:
        """The next event."""
        at, _, kind, index, amount = heapq.heappop(self.events)
        if at == math.inf:
            raise ConfigError("the link stops for ever, and the policy waits for it")
        self.now = at
        if kind in ("slice", "last"):
            self.bandwidth.add(round(amount))
            self.sent += amount
        if kind == "last":
            self.bandwidth.ended()
            self.wire = None
            self.here[index] += 1
        elif kind == "decoded":
            self.worker = None
            self.placed[index] = max(int(amount), self.placed[index] or 0)
        elif kind == "text":
            self.worker = None
            self.text[index] = True

    def run(self) -> float:
        """Until the context is in place, and nothing more is fetched for it; returns when."""
        while True:
            missing = self.missing()
            plan = self.plan(missing) if missing else None
            if self.wire is None and (index := self.next_request(missing, plan)) is not None:
                self.send(index)
            if self.worker is None:
                self.work(missing, plan)
            if not missing and self.worker is None and (self.wire is None or self.now >= self.until):
                return self.now
            if not self.events:
                raise ConfigError("the policy leaves chunks missing, and asks for nothing")
            self.happen()


def simulate(
    chunks: Sequence[Chunk], link: Link, policy: Policy, slo: float, question_seconds: float = 0.0,
    round_trip: float = 0.0,
) -> Outcome:  # fmt: skip
    """One context of such chunks over a link. slo: seconds to the first token; question_seconds: the prefill of the
    question, which comes after the context; round_trip: of each request.

    Raises ConfigError where the link stops for ever and the policy waits for it.
    """
    if not chunks or len({len(chunk.parts) for chunk in chunks}) != 1:
        raise ConfigError("a context has one or more chunks, of equally many parts")
    run = _Run(chunks, link, policy, slo, question_seconds, round_trip)
    ready = run.run()
    choices = tuple(None if text else level for text, level in zip(run.text, run.placed, strict=True))
    return Outcome(ready + question_seconds, choices, run.sent)
