"""The report of a stream: what was done for each chunk, and why."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from typing import Any

from hf_cachegen.report import CacheReport


@dataclass(frozen=True)
class ChunkReport:
    """One chunk of a stream. Sizes in bytes, times in seconds; None where something did not happen or is not known.

    Args:
        index: The number of the chunk.
        first: Its first token.
        tokens: Its number of tokens.
        level: In place now; None where it was recomputed from its tokens ("text"). Text is exact where all chunks
            before it are text; else it is as good as they were when it was recomputed.
        first_level: The level before any refinement.
        why: The reason of the choice.
        nbytes: Coded bytes that were used.
        wire_bytes: Those of them that did not come from this disk.
        transfer_seconds: From the first request for it to its last byte.
        decode_seconds: Time of decoding it, on the decoder's device; a launch's time is shared by its chunks' tokens.
        recompute_seconds: Time of recomputing it.
        prefill_seconds: What recomputing it would take, by the measured speed of the model.
        bytes_per_second: The throughput estimate when its level was chosen.
        faults: What failed for it.
    """

    index: int
    first: int
    tokens: int
    level: int | None
    first_level: int | None
    why: str
    nbytes: int = 0
    wire_bytes: int = 0
    transfer_seconds: float | None = None
    decode_seconds: float | None = None
    recompute_seconds: float | None = None
    prefill_seconds: float | None = None
    bytes_per_second: float | None = None
    faults: tuple[str, ...] = ()

    @property
    def choice(self) -> str:
        """Return "text", or the level in place, such as "level 2"."""
        return "text" if self.level is None else f"level {self.level}"


@dataclass(frozen=True)
class StreamReport(CacheReport):
    """A CacheReport of a stream.

    `level` is the coarsest of all chunks, None where all are text. `loaded_bytes` counts all parts that were used, the
    manifest, the tokens and the side information. `load_seconds` is the time from the call until the whole context was
    in place.

    Args:
        slo: The SLO that was asked for, in seconds.
        ttft: Seconds from the call to the first token; None before it, and without `generate`.
        chunks: The report of each chunk.
        faults: The sources that failed, and how.
        bytes_per_second: The last throughput estimate.
        wire_bytes: Coded bytes that did not come from this disk.
        sources: The locations of the stream, in the order in which they are asked.
        finished: Whether nothing more will arrive.
    """

    slo: float | None = None
    ttft: float | None = None
    chunks: tuple[ChunkReport, ...] = ()
    faults: tuple[str, ...] = ()
    bytes_per_second: float | None = None
    wire_bytes: int = 0
    sources: tuple[str, ...] = ()
    finished: bool = True

    @property
    def met(self) -> bool | None:
        """Return whether the SLO was met; None without one, or before the first token."""
        return None if self.slo is None or self.ttft is None else self.ttft <= self.slo

    @property
    def text_chunks(self) -> int:
        """Return the number of chunks that were recomputed."""
        return sum(chunk.level is None for chunk in self.chunks)

    @property
    def places(self) -> tuple[str, ...]:
        """The old name of `sources`."""
        warnings.warn("StreamReport.places is now StreamReport.sources", DeprecationWarning, stacklevel=2)
        return self.sources

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, with `met`, and the `choice` of each chunk."""
        chunks = [{**asdict(chunk), "choice": chunk.choice} for chunk in self.chunks]
        # "places" is the old name of "sources", which readers of earlier output still use.
        return {**asdict(self), "chunks": chunks, "met": self.met, "places": self.sources}
