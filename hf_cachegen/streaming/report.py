"""What a stream did and why, chunk by chunk."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from hf_cachegen.report import CacheReport


@dataclass(frozen=True)
class ChunkReport:
    """One chunk of a stream. Sizes in bytes, times in seconds; None where something did not happen or is not known.

    index, first, tokens: which chunk, its first token, its tokens.
    level: in place now; None where it was recomputed from its tokens ("text"), which is exact where all before it is
        text, else as good as what was in place before it then. first_level: before any refinement.
    why: the reason of the choice. faults: what went wrong with it on the way.
    nbytes: coded bytes that were used; wire_bytes: those of them that did not come from this disk.
    transfer_seconds: from the first request for it to the last byte; decode_seconds; recompute_seconds: if it was.
    prefill_seconds: what recomputing it would have taken by the measured speed of the model.
    bytes_per_second: the estimate when it was chosen.
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
        """What the chunk came as: "text", or "level 2"."""
        return "text" if self.level is None else f"level {self.level}"


@dataclass(frozen=True)
class StreamReport(CacheReport):
    """A CacheReport of a stream. level: the coarsest of all chunks, None where all are text. loaded_bytes: of all parts
    used, of manifest, tokens and side information. load_seconds: from the call until the whole context was in place.

    slo: as asked for. ttft: seconds from the call to the first token, None before it (and without `generate`).
    chunks: one ChunkReport for each. faults: sources that failed, and how. bytes_per_second: the last estimate.
    places: which were read from. finished: whether nothing more will arrive.
    """

    slo: float | None = None
    ttft: float | None = None
    chunks: tuple[ChunkReport, ...] = ()
    faults: tuple[str, ...] = ()
    bytes_per_second: float | None = None
    wire_bytes: int = 0
    places: tuple[str, ...] = ()
    finished: bool = True

    @property
    def met(self) -> bool | None:
        """Whether the SLO was met; None without one, or before the first token."""
        return None if self.slo is None or self.ttft is None else self.ttft <= self.slo

    @property
    def text_chunks(self) -> int:
        """How many chunks were recomputed."""
        return sum(chunk.level is None for chunk in self.chunks)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with `met`, and the `choice` of each chunk."""
        chunks = [{**asdict(chunk), "choice": chunk.choice} for chunk in self.chunks]
        return {**asdict(self), "chunks": chunks, "met": self.met}
