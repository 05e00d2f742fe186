"""Decode the chunks that have arrived into the context's tensors, for the thread that asks the schedule."""

from __future__ import annotations

import threading
import time

from torch import Tensor

from hf_cachegen.codec.transforms import Transform
from hf_cachegen.errors import ArtifactError, NativeError
from hf_cachegen.streaming.download import Download
from hf_cachegen.streaming.events import ChunkReady
from hf_cachegen.streaming.layers import LayerWriter
from hf_cachegen.streaming.schedule import Decode


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

    def decode(self, codec: Transform, work: Decode) -> None:
        """Decode a chunk."""
        download, span, start = self._download, self._download.spans[work.chunk], time.perf_counter()
        with self._changed:
            if self.stopped:  # another thread has closed the stream, and dropped the parts
                return
            parts = download.parts(work.chunk, work.level)
        pieces: list[Tensor] | None = None
        refined = self._schedule.chunks[work.chunk].level > 0
        try:
            if refined:
                pieces = self._writer.rows(codec, parts, span)
            else:
                self._writer.decode(codec, parts, span)
        except (ArtifactError, NativeError) as error:
            self._cannot_decode(work, error)
            return
        with self.lock:
            if self.stopped:  # readers do not take the lock any more
                return
            if pieces is not None:
                self._writer.put(pieces, span)
            self.changes.append(work.chunk)
        seconds, session = time.perf_counter() - start, download.session
        with self._changed:
            self._schedule.decoded(work.chunk, work.level, seconds)
            session.tally.decoded(work.chunk, seconds)
            chunk = self._schedule.chunks[work.chunk]
            if not self._schedule.refines or chunk.level >= chunk.best:
                download.drop(work.chunk)
        session.events.add(ChunkReady, work.chunk, work.level, seconds, refined)

    def _cannot_decode(self, work: Decode, error: Exception) -> None:
        with self._changed:
            self._download.error = error
            self._download.session.tally.fault(work.chunk, f"level {work.level} cannot be decoded: {error}")
            self._schedule.unobtainable(work.chunk, work.level - 1)
