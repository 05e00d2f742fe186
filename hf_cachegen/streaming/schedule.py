"""What to fetch and what to do next in one stream: a state machine without threads, clock or bytes.

The threads that fetch ask `next_run`, the thread that decodes asks `next_work`, and both report what happened. Times
come from the caller, so tests drive the schedule with a clock of their own.

There are two passes. The first gets every chunk that is not recomputed to the plan's sure level, from the back of the
context to its front. The second, where the policy refines, gets one finer level after the other in `refinement_order`,
as long as the bytes and their decoding fit the time left. At last a chunk whose finer parts cannot be had is
recomputed, if that fits.

Until the side information and the profile have arrived nothing can be decoded, and it is not known when they will
arrive. So the schedule plans as it does before the first sample of the throughput: bases are fetched, and recomputing
begins where it would be too late afterwards.

A device decodes while the thread goes on, so a chunk is *being decoded* between `launch` and `decoded` or `damaged`.
For the plan it counts as in place, and its decoding as work that is still to be done. No chunk is recomputed, and the
context is not complete, before all of them are in place (`Settle`). Refinements are launched when those before them are
in place: a reader, which waits for the last copy, then does not wait for decoding behind which that copy was queued.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from hf_cachegen.streaming.chunk import Chunk
from hf_cachegen.streaming.options import Refine
from hf_cachegen.streaming.policy import Missing, Outlook, Plan, Policy, refinement_order
from hf_cachegen.streaming.work import WAKE_SECONDS, Decode, Finished, Recompute, Settle, Stuck, Wait, Work

PLAN_SECONDS = 0.05
"""A plan is at most this old."""
LEAST_WAIT = 1e-3
POLL_SECONDS = 2e-3
"""A wait is at most this long while chunks are being decoded, so that they are soon known to be in place."""
Part = tuple[int, int]
"""(chunk, part): part 0 is the base, the others refinements."""


class Schedule:
    """The schedule of one stream. Not for several threads at once.

    Args:
        chunks: All chunks, in the order of the context.
        policy: Plans levels and text.
        deadline: When the context must be in place, on the clock of `now`; None without an SLO.
        refine: As for `StreamOptions`.
        recompute_seconds: Seconds of recomputing a chunk after those before it; inf where that is not known.
        can_recompute: Whether the model can recompute a chunk at all.

    `first_seconds` is the time that the first layers of a prediction still take before the first chunk is decoded.
    """

    def __init__(
        self,
        chunks: Sequence[Chunk],
        policy: Policy,
        deadline: float | None,
        refine: Refine,
        recompute_seconds: Callable[[Chunk], float],
        *,
        can_recompute: bool = True,
    ) -> None:
        self.chunks, self.policy, self.deadline, self.refine = list(chunks), policy, deadline, refine
        self.recompute_seconds, self.can_recompute = recompute_seconds, can_recompute
        self.levels = len(self.chunks[0].sizes)
        self.generating, self.decodable = False, False
        self.first_seconds = 0.0
        self.decisions: list[tuple[Chunk, str]] = []
        self._decode_per_token = 0.0
        self._order = refinement_order(len(self.chunks))
        self._version, self._planned = 0, (-1, -math.inf)
        self._plan: Plan | None = None
        self._aim = 1

    # What happened.

    def arrived(self, chunk: int, part: int) -> None:
        """A part has arrived."""
        self.chunks[chunk].asked.discard(part)
        self.chunks[chunk].arrived.add(part)
        self._version += 1

    def returned(self, parts: Sequence[Part]) -> None:
        """These parts were asked for and will not arrive."""
        for chunk, part in parts:
            self.chunks[chunk].asked.discard(part)
        self._version += 1

    def unobtainable(self, chunk: int, part: int) -> None:
        """A part cannot be had from any source, or cannot be decoded. Coarser parts still count."""
        found = self.chunks[chunk]
        found.best = min(found.best, part)
        self._version += 1

    def prepared(self) -> None:
        """The side information and the profile have arrived."""
        self.decodable = True
        self._version += 1

    def undecodable(self) -> None:
        """The side information or the profile cannot be had."""
        for chunk in self.chunks:
            chunk.best = 0
        self._version += 1

    def cut_off(self, part: int = 0) -> None:
        """No source is left for that part of any chunk, nor for finer ones. Those that have arrived still count."""
        for chunk in self.chunks:
            chunk.asked = {asked for asked in chunk.asked if asked < part}
            chunk.best = chunk.first_lacking(part) if self.decodable or part else 0
        self._version += 1

    def launch(self, work: Decode, now: float, rate: float | None, most: int) -> list[Decode]:
        """Return `work` with up to `most - 1` others that are next at the same level. All are being decoded now."""
        finer, found = self.chunks[work.chunk].level > 0, list[Decode]()
        following: Decode | None = work
        while following is not None and following.level == work.level:
            self.chunks[following.chunk].decoding = following.level
            found.append(following)
            if len(found) == most:
                break
            following = self._finer(now) if finer else self._coarse(now, rate)
        self._version += 1
        return found

    def damaged(self, chunk: int, level: int) -> None:
        """A chunk cannot be decoded at a level."""
        self.chunks[chunk].decoding = 0
        self.unobtainable(chunk, level - 1)

    def decoded(self, chunk: int, level: int, seconds: float) -> None:
        """A chunk was decoded at a level. seconds: the time that it took."""
        found = self.chunks[chunk]
        found.first_level = found.first_level or level
        found.level, found.decoding = level, 0
        self._decode_per_token = seconds / found.tokens
        self._version += 1

    def recomputed(self, chunk: int) -> None:
        """A chunk was recomputed."""
        self.chunks[chunk].text = True
        self._version += 1

    # What to do.

    @property
    def complete(self) -> bool:
        """Whether all chunks are in place."""
        return all(chunk.ready for chunk in self.chunks)

    @property
    def refines(self) -> bool:
        """Whether chunks get finer levels than their first."""
        return self.policy.refines and self.refine != "off"

    def left(self, now: float) -> float:
        """Return the seconds until the deadline; inf without one."""
        return math.inf if self.deadline is None else self.deadline - now

    def decode_seconds(self, chunk: Chunk) -> float:
        """Return the expected time of decoding a chunk; 0 before the first was decoded."""
        return self._decode_per_token * chunk.tokens

    def wants_first_layers(self, now: float, rate: float | None) -> bool:
        """Return whether to run the first layers of a prediction now.

        They are not run while all chunks are to be recomputed. Nor do they delay that, as long as the throughput is not
        known and recomputing would not fit the time after them.
        """
        plan, missing = self.plan(now, rate), self._open()
        if plan is None or plan.text == len(missing):
            return False
        whole, left = sum(map(self._recompute, missing)), self.left(now)
        return not (plan.provisional and left < math.inf and left - self.first_seconds < whole <= left)

    def plan(self, now: float, rate: float | None) -> Plan | None:
        """Return the plan for the missing chunks that can be had; None where there is no such chunk."""
        version, at = self._planned
        if version != self._version or now - at >= PLAN_SECONDS:
            self._plan, self._planned = self._make_plan(now, rate), (self._version, now)
        return self._plan

    def _open(self) -> list[Chunk]:
        """Missing chunks of which at least the base can be had."""
        return [chunk for chunk in self.chunks if not chunk.ready and chunk.best]

    def _make_plan(self, now: float, rate: float | None) -> Plan | None:
        chunks = self._open()
        if not chunks:
            return None
        lost = sum(self._recompute(chunk) for chunk in self.chunks if not chunk.ready and not chunk.best)
        missing = tuple(self._missing(chunk) for chunk in chunks)
        if not self.decodable:
            rate = None
        elif rate is None and not any(chunk.wire_bytes[-1] for chunk in missing):
            rate = math.inf  # all is on this disk
        left = self.left(now) - self._launched_seconds()
        outlook = Outlook(left if left == math.inf else left - lost, rate, missing, self.first_seconds)
        plan = self.policy.plan(outlook)
        if not self.can_recompute:
            plan = replace(plan, text=0)
        self._aim = plan.level
        if not self.refines:
            return replace(plan, sure=plan.level)
        if self.deadline is None and self.refine == "while_generating":
            return replace(plan, sure=1)
        return plan

    def _missing(self, chunk: Chunk) -> Missing:
        wire, total = [], 0
        for part in range(self.levels):
            if part < chunk.best and part not in chunk.arrived:
                total += chunk.wire[part]
            wire.append(float(total))
        return Missing(tuple(wire), self.decode_seconds(chunk), self._recompute(chunk))

    def _recompute(self, chunk: Chunk) -> float:
        return self.recompute_seconds(chunk) if self.can_recompute else math.inf

    def next_work(self, now: float, rate: float | None) -> Work:
        """Return the next step of the thread that decodes."""
        work = self._coarse(now, rate) or self._next(now, rate)
        if isinstance(work, (Recompute, Finished, Stuck)) and self._launched():
            return Settle()
        if isinstance(work, Recompute):
            self._decide(self.chunks[work.chunk], "text", work.why, rate)
        return work

    def _next(self, now: float, rate: float | None) -> Work:
        """Return the next step where no missing chunk is to be decoded now."""
        plan, first = self.plan(now, rate), next((chunk for chunk in self.chunks if not chunk.ready), None)
        if first is not None:
            if not first.best:
                return Recompute(first.index, "no source has it") if self.can_recompute else Stuck(first.index)
            if plan and plan.text and self.can_recompute:
                return Recompute(first.index, plan.why)
            return self._wait(now)
        if not self.generating and (not self.refines or self.left(now) <= 0 or self._enough()):
            return self._mended(now) or Finished()
        if not any(chunk.level for chunk in self._launched()) and (finer := self._finer(now)):
            return finer
        arriving = any(chunk.asked for chunk in self.chunks) or self._refinement(now, rate, 0)
        waiting = self._wait(now) if arriving else Finished()
        return waiting if self.generating else self._mended(now) or waiting

    def _coarse(self, now: float, rate: float | None) -> Decode | None:
        """Return the next missing chunk to decode."""
        plan = self.plan(now, rate)
        for chunk in reversed(self._at_hand()):
            if plan and (chunk.have >= min(plan.sure, chunk.best) or (self.refines and self._spare(now) <= 0)):
                return Decode(chunk.index, chunk.have)
        return None

    def _finer(self, now: float) -> Decode | None:
        """Return the next chunk in place to decode at a finer level."""
        for index in self._order:
            chunk = self.chunks[index]
            wanted = chunk.level < chunk.have and not chunk.text and not chunk.decoding
            if wanted and self.decode_seconds(chunk) <= self._more(now):
                return Decode(index, chunk.have)
        return None

    def _launched(self) -> list[Chunk]:
        """Chunks that are being decoded."""
        return [chunk for chunk in self.chunks if chunk.decoding]

    def _launched_seconds(self) -> float:
        """Most seconds until these are in place."""
        return sum(map(self.decode_seconds, self._launched()))

    def _at_hand(self) -> list[Chunk]:
        """Missing chunks that could be decoded, at some level."""
        return [chunk for chunk in self.chunks if not chunk.ready and chunk.have] if self.decodable else []

    def _spare(self, now: float) -> float:
        """Seconds until the chunks at hand must be decoded as they are, to be in place at the deadline."""
        work = sum(map(self.decode_seconds, self._at_hand())) + self._launched_seconds()
        return self.left(now) - self.first_seconds - work

    def _wait(self, now: float) -> Wait:
        spare, most = self._spare(now), POLL_SECONDS if self._launched() else WAKE_SECONDS
        return Wait(min(max(spare, LEAST_WAIT), most)) if spare > 0 else Wait(most)

    def _mended(self, now: float) -> Recompute | None:
        """Recompute a chunk that stays coarser than planned, because no source has its finer parts."""
        if not self.can_recompute or self._enough():
            return None
        for chunk in self.chunks:
            lacking = not chunk.text and chunk.level >= chunk.best and chunk.best < self._aim
            if lacking and self.recompute_seconds(chunk) <= self.left(now):
                return Recompute(chunk.index, f"no source has it finer than level {chunk.best}")
        return None

    def _enough(self) -> bool:
        """Whether the call returns after the first pass: without an SLO, refinements come while the model generates."""
        return self.deadline is None and self.refine == "while_generating"

    def next_run(self, now: float, rate: float | None, run_bytes: float) -> list[Part]:
        """Return what to fetch with one request: the same part of neighbouring chunks, in their order.

        The caller fetches it, or reports that it was `returned`.

        Args:
            now: The time.
            rate: The throughput estimate, bytes per second; None before the first sample.
            run_bytes: Bytes of the request, approximately.

        Returns:
            Empty where nothing is wanted now.
        """
        run = self._first_pass(now, rate, run_bytes)
        if not run and self.refines and not self._waits():
            run = self._refinement(now, rate, run_bytes)
        for chunk, part in run:
            self.chunks[chunk].asked.add(part)
        self._version += bool(run)
        return sorted(run)

    def _waits(self) -> bool:
        """Whether refinements must not compete with the first pass yet."""
        return self._enough() and not self.generating

    def _first_pass(self, now: float, rate: float | None, run_bytes: float) -> list[Part]:
        plan = self.plan(now, rate)
        if plan is None:
            return []
        alone = plan.provisional and not self.refines
        if alone and any(chunk.asked for chunk in self.chunks):
            return []
        for chunk in reversed(self._open()[plan.text :]):
            for part in range(min(plan.sure, chunk.best)):
                if chunk.lacks(part):
                    run = self._run(chunk.index, part, 0 if alone else run_bytes, lambda other: not other.ready)
                    for index, _ in run:
                        self._decide(self.chunks[index], f"level {max(plan.sure, part + 1)}", plan.why, rate)
                    return run
        return []

    def _refinement(self, now: float, rate: float | None, run_bytes: float) -> list[Part]:
        wanted = ((index, part) for part in range(1, self.levels) for index in self._order)
        for index, part in wanted:
            chunk = self.chunks[index]
            if not chunk.text and chunk.lacks(part):
                room = self._room(now, rate) - self.decode_seconds(chunk)
                # Before the first sample, and in silence, it is tried: a refinement that is too late delays nothing.
                nbytes = room * rate if rate and room < math.inf else math.inf
                if room < 0 or chunk.wire[part] > nbytes:
                    return []
                return self._run(index, part, min(run_bytes, nbytes), lambda other: not other.text)
        return []

    def _room(self, now: float, rate: float | None) -> float:
        """Seconds left for more transfers, once the parts under way have arrived and are decoded."""
        nbytes = sum(chunk.wire[part] for chunk in self.chunks for part in chunk.asked)
        decode = sum(self.decode_seconds(chunk) for chunk in self.chunks if chunk.asked or chunk.have > chunk.level)
        left = self._more(now) - self.first_seconds
        return left - decode - (nbytes / rate if rate else 0.0)

    def _more(self, now: float) -> float:
        """Seconds left for refinements; inf once the model generates."""
        return math.inf if self.generating else self.left(now)

    def _run(self, index: int, part: int, run_bytes: float, wanted: Callable[[Chunk], bool]) -> list[Part]:
        """That part of a chunk, and of its predecessors as far as they lack it and `run_bytes` allow."""
        run, nbytes = [(index, part)], self.chunks[index].wire[part]
        for before in range(index - 1, -1, -1):
            chunk = self.chunks[before]
            nbytes += chunk.wire[part]
            if nbytes > run_bytes or not chunk.lacks(part) or not wanted(chunk):
                break
            run.append((before, part))
        return run

    def _decide(self, chunk: Chunk, choice: str, why: str, rate: float | None) -> None:
        if chunk.why != why or choice == "text":
            chunk.why, chunk.rate = why, rate
            self.decisions.append((chunk, choice))
