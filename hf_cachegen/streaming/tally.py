"""Count what a stream does, and make its report."""

from __future__ import annotations

import logging
from collections import defaultdict
from typing import TYPE_CHECKING

from hf_cachegen.artifact import refine_file
from hf_cachegen.streaming.report import ChunkReport, StreamReport
from hf_cachegen.streaming.schedule import Part

if TYPE_CHECKING:
    from hf_cachegen.streaming.download import Download

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

    def report(self, download: Download, *, finished: bool) -> StreamReport:
        """Return the report of a stream. finished: whether nothing more will arrive."""
        session, artifact, schedule = download.session, download.artifact, download.schedule
        chunks = []
        for chunk in schedule.chunks:
            used = [self._nbytes.get((chunk.index, part), (0, False)) for part in range(chunk.level)]
            chunks.append(
                ChunkReport(
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
                    prefill_seconds=session.speed.seconds(chunk.first, chunk.tokens),
                    bytes_per_second=chunk.rate,
                    faults=tuple(self._chunk_faults[chunk.index]),
                )
            )
        levels = [chunk.level for chunk in chunks if chunk.level is not None]
        files = artifact.manifest.files
        fixed = artifact.nbytes_at(1) - sum(chunk.sizes[0] for chunk in schedule.chunks)
        fixed += sum(files[refine_file(number)].header_bytes for number in range(1, max(levels, default=1)))
        return StreamReport(
            context_tokens=artifact.geometry.tokens,
            exact_bytes=artifact.geometry.nbytes,
            loaded_bytes=fixed + sum(chunk.nbytes for chunk in chunks),
            level=min(levels, default=None),
            load_seconds=self.ready,
            encoding=artifact.report,
            slo=session.options.slo,
            ttft=self.ttft,
            chunks=tuple(chunks),
            faults=tuple(self.faults),
            bytes_per_second=session.bandwidth.rate(),
            wire_bytes=sum(nbytes for nbytes, wire in self._nbytes.values() if wire),
            sources=download.locations,
            finished=finished,
        )
