"""Count what a stream does, for its report."""

from __future__ import annotations

import logging
from collections import defaultdict

from hf_cachegen.streaming.chunk import Chunk
from hf_cachegen.streaming.report import ChunkReport
from hf_cachegen.streaming.schedule import Part

LOG = logging.getLogger("hf_cachegen.streaming")


class Tally:
    """The counters of one stream. Not for several threads at once.

    ready: seconds from the call until the context was in place. ttft: until the first token. faults: all failures.
    """

    def __init__(self) -> None:
        self.ready: float | None = None
        self.ttft: float | None = None
        self.faults: list[str] = []
        self._nbytes: dict[Part, tuple[int, bool]] = {}
        self._transfer: dict[int, float] = {}
        self._decode: dict[int, float] = {}
        self._recompute: dict[int, float] = {}
        self._chunk_faults: dict[int, list[str]] = defaultdict(list)

    def arrived(self, part: Part, nbytes: int, wire: bool, seconds: float) -> None:
        """Count a part that arrived. wire: not from this disk; seconds: since its first request."""
        self._nbytes[part] = nbytes, wire
        self._transfer[part[0]] = max(seconds, self._transfer.get(part[0], 0.0))

    def decoded(self, chunk: int, seconds: float) -> None:
        """Add the time of decoding a chunk."""
        self._decode[chunk] = self._decode.get(chunk, 0.0) + seconds

    def recomputed(self, chunk: int, seconds: float) -> None:
        """Record the time of recomputing a chunk."""
        self._recompute[chunk] = seconds

    def fault(self, chunk: int, what: str) -> None:
        """Record and log that a part of a chunk cannot be had, for which it may stay coarser."""
        LOG.warning("chunk %d: %.500s", chunk, what)
        self._chunk_faults[chunk].append(what)

    def failed(self, location: str, error: Exception, part: Part | None) -> None:
        """Record and log a failure of a source. part: the part that it gave wrong, if it was one."""
        what = f"{location}: {type(error).__name__}: {error}"
        self.faults.append(what)
        if part is None:
            LOG.warning("%.500s", what)
        else:
            self.fault(part[0], what)

    def chunk_report(self, chunk: Chunk, prefill_seconds: float | None) -> ChunkReport:
        """Return the report of one chunk of the schedule. prefill_seconds: what recomputing it would take."""
        used = [self._nbytes.get((chunk.index, part), (0, False)) for part in range(chunk.level)]
        return ChunkReport(
            index=chunk.index,
            first=chunk.first,
            tokens=chunk.tokens,
            level=None if chunk.text else chunk.level,
            first_level=None if chunk.text else chunk.first_level,
            why=chunk.why,
            nbytes=sum(nbytes for nbytes, _ in used),
            wire_bytes=sum(nbytes for nbytes, wire in used if wire),
            transfer_seconds=self._transfer.get(chunk.index),
            decode_seconds=self._decode.get(chunk.index),
            recompute_seconds=self._recompute.get(chunk.index),
            prefill_seconds=prefill_seconds,
            bytes_per_second=chunk.rate,
            faults=tuple(self._chunk_faults[chunk.index]),
        )

    @property
    def wire_bytes(self) -> int:
        """Bytes of parts that came over the network."""
        return sum(nbytes for nbytes, wire in self._nbytes.values() if wire)
