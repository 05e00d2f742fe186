"""One stream: the calling thread opens the artifact, decodes and recomputes; other threads fetch (`fetching`).

    open -> manifest, fingerprint -> fetchers begin: side information, profile, chunks
                                  -> tokens                                                  (meanwhile)
                                  -> as the schedule says: decode, recompute, wait; until the context is in place

Memory: the context's tensors, a chunk being decoded, the runs under way (at most 8 MiB a connection), and the coded
bytes of chunks that may still be refined or have not been decoded yet.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from hf_cachegen.artifact.artifact import Artifact
from hf_cachegen.codec.context import checked_level
from hf_cachegen.codec.rows import spans_of
from hf_cachegen.codec.transforms import Transform
from hf_cachegen.errors import ArtifactError, NativeError, StoreError, StreamCancelledError, UnsupportedModelError
from hf_cachegen.models.layers import KVTensors
from hf_cachegen.models.opening import OpenContext
from hf_cachegen.models.requirements import positions_change
from hf_cachegen.profiles.files import Profile
from hf_cachegen.streaming.bandwidth import Bandwidth
from hf_cachegen.streaming.events import (
    ChunkChosen,
    ChunkFetched,
    ChunkReady,
    Event,
    SourceFailed,
    StreamStarted,
)
from hf_cachegen.streaming.fetching import WAKE_SECONDS, Fetcher
from hf_cachegen.streaming.options import StreamOptions
from hf_cachegen.streaming.placing import Placer
from hf_cachegen.streaming.policy import TEXT, Fixed
from hf_cachegen.streaming.prefill_speed import PROBES, PrefillSpeed, probe, speed_of
from hf_cachegen.streaming.recompute import recompute
from hf_cachegen.streaming.report import StreamReport
from hf_cachegen.streaming.schedule import Chunk, Decode, Finished, Part, Recompute, Schedule, Stuck, Wait
from hf_cachegen.streaming.sources import Source
from hf_cachegen.streaming.tally import Tally

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOG = logging.getLogger("hf_cachegen.streaming")
RESERVE = 0.05
"""Share of the SLO that is kept for what no estimate knows."""
QUESTION_VARIES = 0.4
"""By so much more than its estimate reading a question may take, on a machine that other work shares."""
PROBE = 0.02
"""Share of the SLO that one measurement of the model may be expected to take, while nothing else can be done."""


class Loader:
    """Brings one context in. `run` returns when it is in place; `refine` goes on with finer levels.

    began: time.monotonic() of the call whose SLO it is. lock: held while keys and values change; changes: the chunks
    that were decoded, in order. question_tokens: follow the context. profile: that decoding took.
    """

    def __init__(self, model: PreTrainedModel, options: StreamOptions, began: float) -> None:
        self.options, self._config = options, model.config  # not the model, which a cache must not keep
        self.bandwidth = Bandwidth(smoothing=options.policy.smoothing)
        self.lock = threading.Lock()
        self.changes: list[int] = []
        self.stopped = False
        self.began = began
        self.question_tokens = options.prompt_tokens
        self._speed: PrefillSpeed = speed_of(model)
        self._events: deque[Event] = deque()
        self._telling = threading.Lock()
        self._parts: dict[Part, bytes] = {}
        self.profile: Profile | None = None
        self._codec: Transform | None = None
        self.tally = Tally()
        self._choice = options.policy.choice if isinstance(options.policy, Fixed) else None

    def begin(self, artifact: Artifact, sources: list[Source]) -> None:
        """The manifest is read: fetching begins, from the first source."""
        self.artifact, self.stopped, policy = artifact, False, self.options.policy
        self._codec = self.profile = None
        self.spans = spans_of(artifact.geometry.tokens, artifact.config.chunk_tokens)
        self._places = [source.place for source in sources]
        first, chunks = sources[0], []
        first.open()
        for index, span in enumerate(self.spans):
            segments = artifact.segments(index, artifact.levels)
            sizes = tuple(segment.length for segment in segments)
            wire = tuple(0 if first.here(segment) else segment.length for segment in segments)
            chunks.append(Chunk(index, span.first, span.tokens, sizes, wire, artifact.levels))
        self.schedule = Schedule(
            chunks, policy, self._deadline(), self.options.refine, partial(_recompute_seconds, self._speed),
            can_recompute=not positions_change(self._config, 1, artifact.geometry.tokens),
        )  # fmt: skip
        self.bandwidth.forget()
        self.bandwidth.expect(first.expected)
        self.fetcher = Fetcher(
            self.schedule, sources, lambda part: artifact.segments(part[0], part[1] + 1)[-1], self.bandwidth,
            self.options.connections, self.options.stall, None if self._choice == TEXT else self._prepare,
            self._arrived, self._failed,
        )  # fmt: skip
        totals = [sum(chunk.sizes[part] for chunk in chunks) for part in range(artifact.levels)]
        levels = tuple(sum(totals[: level + 1]) for level in range(artifact.levels))
        self.tell(StreamStarted, str(artifact.store), self.options.slo, artifact.geometry.tokens, len(chunks), levels)
        self.fetcher.start()

    def opened(self, found: OpenContext, question_tokens: int) -> None:
        """The artifact belongs to the model. Raises LevelError, UnsupportedModelError for a choice that it has not."""
        if self._choice == TEXT and not self.schedule.can_recompute:
            raise UnsupportedModelError("this model's rotation depends on the whole length: no chunk can be recomputed")
        if self._choice is not None and self._choice != TEXT:
            checked_level(self._choice, self.artifact.levels)
        self.found, self.question_tokens = found, question_tokens
        self.schedule.deadline = self._deadline()
        self.placer = Placer(self.artifact.geometry, found.places or [])

    # Running.

    def run(self, model: PreTrainedModel) -> KVTensors:
        """Until all chunks are in place. Raises what a source raised last, where nothing else helps."""
        probes = [] if self.options.slo is None or self._speed.known else list(PROBES[:-1])
        while True:
            due = bool(probes) and self._doubtful(probes[0])
            work = self._next_work(patient=not due)
            if isinstance(work, Finished):
                break
            if isinstance(work, Stuck):
                raise self.fetcher.error or StoreError(f"chunk {work.chunk} cannot be had")
            if isinstance(work, Decode):
                self._decode(work)
            elif isinstance(work, Recompute):
                self._recompute_chunk(model, work.chunk)
            elif due:
                probe(model, self._speed, probes.pop(0))
                self.schedule.deadline = self._deadline()
        kv = self.placer.kv()
        self._speed.save()
        self.tally.ready = time.monotonic() - self.began
        return kv

    def _doubtful(self, tokens: int) -> bool:
        """Whether the model's speed may matter, and can be measured with so many tokens at little cost."""
        with self.fetcher.changed:
            plan = self.schedule.plan(time.monotonic(), self.bandwidth.rate())
        expected = self._speed.seconds(0, tokens) or 0.0
        return expected <= PROBE * (self.options.slo or 0.0) and (plan is None or plan.sure < self.schedule.levels)

    def refine(self) -> None:
        """Everything that can still be made finer, until that is done or `stopped`."""
        self.schedule.generating = True
        while not self.stopped:
            work = self._next_work()
            if isinstance(work, Decode):
                self._decode(work)
            elif not isinstance(work, Wait):
                break

    def close(self, wait: float = 0.0) -> None:
        """Ends all threads of the stream; waits for them up to so many seconds."""
        self.stopped = True
        if hasattr(self, "fetcher"):
            self.fetcher.close(wait)
            with self.fetcher.changed:
                self._parts.clear()

    @property
    def more(self) -> bool:
        """Whether finer levels could still come."""
        schedule = self.schedule
        return schedule.refines and any(not c.text and c.level < c.best for c in schedule.chunks)

    def _next_work(self, *, patient: bool = True) -> Decode | Recompute | Wait | Finished | Stuck:
        with self.fetcher.changed:
            if self.fetcher.crash is not None:
                raise self.fetcher.crash
            if self.options.cancel is not None and self.options.cancel.is_set():
                raise StreamCancelledError("the stream was cancelled")
            self.fetcher.watch()
            work = self.schedule.next_work(time.monotonic(), self.bandwidth.rate())
            if isinstance(work, Wait) and patient:
                self.fetcher.changed.wait(WAKE_SECONDS)
            decisions, self.schedule.decisions = self.schedule.decisions, []
        left = self.schedule.left(time.monotonic())
        for chunk, choice in decisions:
            self.tell(ChunkChosen, chunk.index, choice, chunk.why, chunk.rate, None if left == math.inf else left)
        self.deliver()
        return work

    def _prepare(self, source: Source) -> Callable[[], None]:
        """What decodes; called by a thread of the fetcher, which may not count any more when it is here."""
        codec, profile = source.decoder()

        def install() -> None:
            self._codec, self.profile = codec, profile

        return install

    def _decode(self, work: Decode) -> None:
        span, start = self.spans[work.chunk], time.perf_counter()
        with self.fetcher.changed:
            codec = self._codec
            if self.stopped or codec is None:  # by another thread, which took the parts away
                return
            parts = [self._parts[work.chunk, part] for part in range(work.level)]
        try:
            refined = self.schedule.chunks[work.chunk].level > 0
            if refined:
                rows = self.placer.rows(codec, parts, span)
            else:
                self.placer.decode(codec, parts, span)
        except (ArtifactError, NativeError) as error:
            with self.fetcher.changed:
                self.fetcher.error = error
                self.tally.fault(work.chunk, f"level {work.level} cannot be decoded: {error}")
                self.schedule.unobtainable(work.chunk, work.level - 1)
            return
        with self.lock:
            if self.stopped:  # those who read now do so without a lock
                return
            if refined:
                self.placer.put(rows, span)
            self.changes.append(work.chunk)
        seconds = time.perf_counter() - start
        with self.fetcher.changed:
            self.schedule.placed(work.chunk, work.level, seconds)
            self.tally.decoded(work.chunk, seconds)
            chunk = self.schedule.chunks[work.chunk]
            if not self.schedule.refines or chunk.level >= chunk.best:
                self._drop(work.chunk)
        self.tell(ChunkReady, work.chunk, work.level, seconds, refined)

    def _recompute_chunk(self, model: PreTrainedModel, index: int) -> None:
        span = self.spans[index]
        self.placer.settle()
        start = time.perf_counter()
        recompute(model, self.found.input_ids, self.placer.keys, self.placer.values, span.first, span.tokens)
        if self.placer.keys[0].is_cuda:
            torch.cuda.synchronize(self.placer.keys[0].device)
        seconds = time.perf_counter() - start
        self._speed.add(span.first, span.tokens, seconds)
        with self.fetcher.changed:
            self.schedule.recomputed(index)
            self.tally.recomputed(index, seconds)
            self._drop(index)
        self.tell(ChunkReady, index, None, seconds)

    # What others tell, with `changed` held.

    def _arrived(self, part: Part, data: bytes, wire: bool, seconds: float) -> None:
        chunk = self.schedule.chunks[part[0]]
        if not chunk.text and not self.stopped:
            self._parts[part] = data
        self.tally.arrived(part, len(data), wire, seconds)
        self.tell(ChunkFetched, part[0], part[1], len(data), wire, self.bandwidth.rate())

    def _failed(self, place: str, error: Exception, part: Part | None) -> None:
        self.tally.failed(place, error, part)
        self.tell(SourceFailed, place, f"{type(error).__name__}: {error}")

    def _drop(self, chunk: int) -> None:
        for part in [part for part in self._parts if part[0] == chunk]:
            del self._parts[part]

    # Numbers.

    def _deadline(self) -> float | None:
        slo = self.options.slo
        if slo is None:
            return None
        question = 0.0
        if self.question_tokens:
            question = self._speed.seconds(self.artifact.geometry.tokens, self.question_tokens) or 0.0
        return self.began + (1 - RESERVE) * slo - (1 + QUESTION_VARIES) * question

    def tell(self, kind: Callable[..., Event], *values: Any) -> None:
        """An event happened; `deliver` tells it."""
        if self.options.on_event is not None:
            self._events.append(kind(time.monotonic() - self.began, *values))

    def deliver(self) -> None:
        """Tells `on_event` what has happened; not to be called with a lock held, since it may do anything."""
        while self._events and self._telling.acquire(blocking=False):
            try:
                while self._events and self.options.on_event is not None:
                    self.options.on_event(self._events.popleft())
            except Exception:  # noqa: PERF203
                LOG.exception("on_event failed")
            finally:
                self._telling.release()

    def learn_question(self, tokens: int, seconds: float) -> None:
        """So long a model took to read so many tokens after the context."""
        self._speed.add(self.artifact.geometry.tokens, tokens, seconds)
        self._speed.save()

    def report(self, *, finished: bool) -> StreamReport:
        """How it stands."""
        with self.fetcher.changed:
            return self.tally.report(
                self.artifact, self.schedule, self._speed, self.options.slo, self.bandwidth.rate(),
                self._places, finished=finished,
            )  # fmt: skip


def _recompute_seconds(speed: PrefillSpeed, chunk: Chunk) -> float:
    seconds = speed.seconds(chunk.first, chunk.tokens)
    return math.inf if seconds is None else seconds
