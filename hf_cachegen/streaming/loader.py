"""The thread that decodes (`decoding`) and recomputes chunks while others fetch (`download`).

Memory: the context's tensors, a chunk being decoded, the requests under way (at most 8 MiB a connection), and the coded
bytes of chunks that are not decoded yet or may still be refined.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_cachegen.codec.transforms import Transform
from hf_cachegen.errors import StoreError, StreamCancelledError
from hf_cachegen.models.first_layers import known_of
from hf_cachegen.models.layers import KVTensors
from hf_cachegen.streaming.decoding import Decoding
from hf_cachegen.streaming.download import Download
from hf_cachegen.streaming.events import ChunkChosen, ChunkReady
from hf_cachegen.streaming.layers import LayerWriter
from hf_cachegen.streaming.prefill_speed import PROBES, probe
from hf_cachegen.streaming.recompute import recompute
from hf_cachegen.streaming.report import StreamReport
from hf_cachegen.streaming.summary import summarise
from hf_cachegen.streaming.work import Decode, Finished, Recompute, Settle, Stuck, Wait, Work

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBE = 0.02
"""Share of the SLO that one measurement of the model may be expected to take, while nothing else can be done."""


class Loader:
    """Loads one context. `run` returns when it is in place; `refine` goes on with finer levels.

    Args:
        download: Of a validated artifact, started.
        writer: The context's tensors.
        input_ids: The context, int64 [1, tokens].
        question_tokens: Number of tokens that follow the context.
    """

    def __init__(self, download: Download, writer: LayerWriter, input_ids: Tensor, question_tokens: int) -> None:
        self.session, self.download, self.writer = download.session, download, writer
        self.decoding = Decoding(download, writer)
        self._codec: Transform | None = None
        self._input_ids, self._question_tokens = input_ids, question_tokens
        self._schedule, self._changed = download.schedule, download.changed
        self._set_deadline()

    # Running.

    def run(self, model: PreTrainedModel) -> KVTensors:
        """Load all chunks. Raises the last error of a source where nothing else helps."""
        session = self.session
        probes = [] if session.options.slo is None or session.speed.known else list(PROBES[:-1])
        while True:
            self.decoding.settle(wait=False)
            self._predict(model)
            due = bool(probes) and self._doubtful(probes[0])
            work = self._next_work(patient=not due)
            if isinstance(work, Finished):
                break
            if isinstance(work, Stuck):
                raise self.download.error or StoreError(f"chunk {work.chunk} cannot be had from any source")
            if isinstance(work, Decode):
                self._predict(model, wanted=True)
                if self._codec is not None:
                    self.decoding.start(self._codec, work)
            elif isinstance(work, Settle):
                self.decoding.settle()
            elif isinstance(work, Recompute):
                self._recompute(model, work.chunk)
            elif due:
                self.decoding.settle()  # the device is the model's too
                probe(model, session.speed, probes.pop(0))
                self._set_deadline()
        kv = self.writer.kv()
        session.speed.save()
        session.tally.ready = session.elapsed()
        return kv

    def refine(self) -> None:
        """Refine chunks until all are at their finest level, or until `close`."""
        self._schedule.generating = True
        try:
            while not self.decoding.stopped:
                self.decoding.settle(wait=False)
                work = self._next_work()
                if isinstance(work, Decode) and self._codec is not None:
                    self.decoding.start(self._codec, work)
                elif isinstance(work, Settle):
                    self.decoding.settle()
                elif not isinstance(work, Wait):
                    break
        finally:
            self.decoding.drop()

    def close(self, wait: float = 0.0) -> None:
        """End all threads of the stream, and wait for them up to `wait` seconds."""
        self.decoding.stopped = True
        self.download.close(wait)
        if self._codec is not None:  # the report of the stream keeps it
            self._codec.release()

    @property
    def more(self) -> bool:
        """Whether finer levels may still arrive."""
        return self._schedule.refines and any(not c.text and c.level < c.best for c in self._schedule.chunks)

    def report(self, *, finished: bool) -> StreamReport:
        """Return the state of the stream."""
        with self._changed:
            return summarise(self.download, finished=finished)

    def learn_question(self, tokens: int, seconds: float) -> None:
        """Record the measured prefill time of a suffix of the context."""
        self.session.speed.add(self.download.artifact.geometry.tokens, tokens, seconds)
        self.session.speed.save()

    # The next step.

    def _set_deadline(self) -> None:
        artifact = self.download.artifact
        tokens = artifact.geometry.tokens
        self._schedule.deadline = self.session.deadline(tokens, self._question_tokens)
        # Layer 0 alone (its projections) is not worth counting.
        layers = 0 if self._codec is not None else artifact.config.predicted or 0
        whole = self.session.speed.seconds(0, tokens) or 0.0
        self._schedule.first_seconds = whole * layers / max(len(artifact.geometry.layers), 1)

    def _doubtful(self, tokens: int) -> bool:
        """Whether the model's speed may affect the plan, and can be measured with that many tokens at little cost."""
        session = self.session
        with self._changed:
            plan = self._schedule.plan(time.monotonic(), session.bandwidth.rate())
        expected = session.speed.seconds(0, tokens) or 0.0
        cheap = expected <= PROBE * (session.options.slo or 0.0)
        return cheap and (plan is None or plan.sure < self._schedule.levels)

    def _watch(self) -> None:
        """Raise what ends the stream, and leave a silent source."""
        cancel, fetcher = self.session.options.cancel, self.download.fetcher
        with self._changed:
            if fetcher.crash is not None:
                raise fetcher.crash
            if cancel is not None and cancel.is_set():
                raise StreamCancelledError("the stream was cancelled")
            fetcher.watch()

    def _next_work(self, *, patient: bool = True) -> Work:
        session = self.session
        with self._changed:
            self._watch()
            work = self._schedule.next_work(time.monotonic(), session.bandwidth.rate())
            if isinstance(work, Wait) and patient:
                self._changed.wait(work.seconds)
            decisions, self._schedule.decisions = self._schedule.decisions, []
        left = self._schedule.left(time.monotonic())
        for chunk, choice in decisions:
            seconds_left = None if left == math.inf else left
            session.events.add(ChunkChosen, chunk.index, choice, chunk.why, chunk.rate, seconds_left)
        session.events.deliver()
        return work

    def _predict(self, model: PreTrainedModel, *, wanted: bool = False) -> None:
        """Take the codec once it was fetched. Where it predicts, run the model's first layers for it, while chunks
        arrive; not while all chunks may have to be recomputed, unless a chunk is `wanted`.
        """
        codec, layer = self.download.codec, self.download.artifact.config.predicted
        if self._codec is None and codec is not None:
            if layer and not wanted:
                with self._changed:
                    if not self._schedule.wants_first_layers(time.monotonic(), self.session.bandwidth.rate()):
                        return
            if layer is not None and (profile := self.download.profile) is not None:
                known = known_of(model, self._input_ids, profile, layer, self._watch)
                self.writer.adopt((known.scores, *known.keys, *known.values))
                codec = codec.knowing(known)
            self._codec = codec
            self._set_deadline()

    def _recompute(self, model: PreTrainedModel, index: int) -> None:
        span, writer = self.download.spans[index], self.writer
        writer.settle()
        start = time.perf_counter()
        recompute(model, self._input_ids, writer.geometry, writer.keys, writer.values, span)
        if writer.keys[0].is_cuda:
            torch.cuda.synchronize(writer.keys[0].device)
        seconds = time.perf_counter() - start
        self.session.speed.add(span.first, span.tokens, seconds)
        with self._changed:
            self._schedule.recomputed(index)
            self.session.tally.recomputed(index, seconds)
            self.download.drop(index)
        self.session.events.add(ChunkReady, index, None, seconds)
