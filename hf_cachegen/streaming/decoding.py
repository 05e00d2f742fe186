"""Decode the chunks that have arrived into the context's tensors, for the thread that asks the schedule.

Chunks that are at hand together are launched together. On a device nothing waits then: at most `LayerWriter.ahead`
launches stay open, and a chunk counts as in place once the check of its launch has found it sound. On the CPU a launch
is done when it returns.

A check does not say which chunk of a launch is damaged. So the chunks of a failed launch are decoded again, one by one.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from hf_cachegen.codec.transforms import Transform
from hf_cachegen.errors import ArtifactError, NativeError
from hf_cachegen.streaming.download import Download
from hf_cachegen.streaming.events import ChunkReady
from hf_cachegen.streaming.layers import Launch, LayerWriter
from hf_cachegen.streaming.work import Decode


class _Open(NamedTuple):
    """A launch that is not checked yet. refined: whether its chunks were in place before."""

    works: Sequence[Decode]
    codec: Transform
    launch: Launch
    refined: bool


class Decoding:
    """The chunks of one context on their way from coded bytes to tensors.

    Args:
        download: Has the coded bytes and the schedule.
        writer: The context's tensors.

    `lock` is held while keys and values change. `changes` lists the chunks that were decoded, in order. Once `stopped`
    is set, nothing changes any more.
    """

    def __init__(self, download: Download, writer: LayerWriter) -> None:
        self.lock = threading.Lock()
        self.changes: list[int] = []
        self.stopped = False
        self._download, self._writer = download, writer
        self._schedule, self._changed = download.schedule, download.changed
        self._open: deque[_Open] = deque()

    def start(self, codec: Transform, work: Decode) -> None:
        """Launch the decoding of a chunk and of others at hand. Wait for the oldest launch if many are open."""
        with self._changed:
            chunk, rate = self._schedule.chunks[work.chunk], self._download.session.bandwidth.rate()
            most = self._writer.together(chunk.tokens, apart=chunk.level > 0)
            works = self._schedule.launch(work, time.monotonic(), rate, most)
        self._launch(codec, sorted(works, key=lambda work: work.chunk))
        while len(self._open) > self._writer.ahead:
            self._finish(self._open.popleft())

    def settle(self, *, wait: bool = True) -> None:
        """Check all launches, or only those that the device has done."""
        while self._open and (wait or self._open[0].launch.timer.done):
            self._finish(self._open.popleft())

    def drop(self) -> None:
        """Forget the launches that are not checked. Their chunks stay at their levels."""
        self._open.clear()

    def _launch(self, codec: Transform, works: Sequence[Decode]) -> None:
        with self._changed:
            if self.stopped:  # another thread has closed the stream, and dropped the parts
                return
            parts = [self._download.parts(work.chunk, work.level) for work in works]
            refined = self._schedule.chunks[works[0].chunk].level > 0
        chunks = [(own, self._download.spans[work.chunk]) for own, work in zip(parts, works, strict=True)]
        try:
            launch = (self._writer.rows if refined else self._writer.decode)(codec, chunks)
        except (ArtifactError, NativeError) as error:
            self._failed(codec, works, error)
        else:
            self._open.append(_Open(works, codec, launch, refined))

    def _finish(self, done: _Open) -> None:
        """Wait for a launch, and record that its chunks are in place."""
        works, launch, spans = done.works, done.launch, [self._download.spans[work.chunk] for work in done.works]
        try:
            launch.check()
        except (ArtifactError, NativeError) as error:
            self._failed(done.codec, works, error)
            return
        seconds, start = launch.timer.seconds(), time.perf_counter()
        with self.lock:
            if self.stopped:  # readers do not take the lock any more
                return
            for apart in launch.apart:
                self._writer.put(apart)
            self.changes += [work.chunk for work in works]
        seconds += time.perf_counter() - start
        tokens = sum(span.tokens for span in spans)
        for work, span in zip(works, spans, strict=True):
            self._in_place(work, seconds * span.tokens / tokens, refined=done.refined)

    def _in_place(self, work: Decode, seconds: float, *, refined: bool) -> None:
        session = self._download.session
        with self._changed:
            self._schedule.decoded(work.chunk, work.level, seconds)
            session.tally.decoded(work.chunk, seconds)
            chunk = self._schedule.chunks[work.chunk]
            if not self._schedule.refines or chunk.level >= chunk.best:
                self._download.drop(work.chunk)
        session.events.add(ChunkReady, work.chunk, work.level, seconds, refined)

    def _failed(self, codec: Transform, works: Sequence[Decode], error: Exception) -> None:
        if len(works) > 1:
            for work in works:
                self._launch(codec, [work])
                self.settle()
            return
        with self._changed:
            self._download.error = error
            self._download.session.tally.fault(works[0].chunk, f"level {works[0].level} cannot be decoded: {error}")
            self._schedule.damaged(works[0].chunk, works[0].level)
