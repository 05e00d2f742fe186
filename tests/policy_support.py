"""What the tests of policies share: drawn states of streams, and a simulation of whole streams with its own clock."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from hf_cachegen.streaming.chunk import Chunk
from hf_cachegen.streaming.policy import Costs, Missing, Outlook
from hf_cachegen.streaming.schedule import Schedule
from hf_cachegen.streaming.work import Decode, Finished, Recompute, Stuck

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
