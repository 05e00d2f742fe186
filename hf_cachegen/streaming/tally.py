"""Keeps count while a stream runs, and makes its report."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence

from hf_cachegen.artifact import refine_file
from hf_cachegen.artifact.artifact import Artifact
from hf_cachegen.streaming.prefill_speed import PrefillSpeed
from hf_cachegen.streaming.report import ChunkReport, StreamReport
from hf_cachegen.streaming.schedule import Part, Schedule

LOG = logging.getLogger("hf_cachegen.streaming")


class Tally:
    """Not for several threads at once. ready: seconds until the context was in place. ttft: to the first token."""

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
        self._nbytes[part] = nbytes, wire
        self._transfer[part[0]] = max(seconds, self._transfer.get(part[0], 0.0))

    def decoded(self, chunk: int, seconds: float) -> None:
        self._decode[chunk] = self._decode.get(chunk, 0.0) + seconds

    def recomputed(self, chunk: int, seconds: float) -> None:
        self._recompute[chunk] = seconds

    def fault(self, chunk: int, what: str) -> None:
        """A chunk has to do without something, and may stay coarser for it: that shall not go unseen."""
        LOG.warning("chunk %d: %.500s", chunk, what)
        self._chunk_faults[chunk].append(what)

    def failed(self, place: str, error: Exception, part: Part | None) -> None:
        what = f"{place}: {type(error).__name__}: {error}"
        self.faults.append(what)
        if part is None:
            LOG.warning("%.500s", what)
        else:
            self.fault(part[0], what)

    def report(
        self,
        artifact: Artifact,
        schedule: Schedule,
        speed: PrefillSpeed,
        slo: float | None,
        rate: float | None,
        places: Sequence[str],
        *,
        finished: bool,
    ) -> StreamReport:
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
                    prefill_seconds=speed.seconds(chunk.first, chunk.tokens),
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
            slo=slo,
            ttft=self.ttft,
            chunks=tuple(chunks),
            faults=tuple(self.faults),
            bytes_per_second=rate,
            wire_bytes=sum(nbytes for nbytes, wire in self._nbytes.values() if wire),
            places=tuple(places),
            finished=finished,
        )
