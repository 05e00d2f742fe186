"""What a stream tells while it runs: `on_event` is called with one of these, named as OpenTelemetry names things.

An event's `name` and `attributes()` go into a span or a log record as they are. A callback is called by the thread that
streams, generates or refines, one call at a time, in order; what it raises is logged and does not harm the stream.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from hf_cachegen.streaming.report import StreamReport


@dataclass(frozen=True)
class Event:
    """seconds: since the call that began the stream."""

    name: ClassVar[str] = "hf_cachegen.stream"
    seconds: float

    def attributes(self) -> dict[str, Any]:
        """The fields under names such as "hf_cachegen.stream.chunk_index"; a report as a dictionary."""
        found = {f"{Event.name}.{field.name}": getattr(self, field.name) for field in fields(self)}
        return {name: value.to_dict() if hasattr(value, "to_dict") else value for name, value in found.items()}


@dataclass(frozen=True)
class StreamStarted(Event):
    """The manifest is read, fetching begins. bytes_per_level: of all chunks at level 1, 2, ..."""

    name: ClassVar[str] = "hf_cachegen.stream.started"
    place: str
    slo: float | None
    tokens: int
    chunks: int
    bytes_per_level: tuple[int, ...]


@dataclass(frozen=True)
class ChunkChosen(Event):
    """What was decided for a chunk: choice is "level 2" or "text"; bytes_per_second: the estimate, if there is one."""

    name: ClassVar[str] = "hf_cachegen.stream.chunk.chosen"
    chunk_index: int
    choice: str
    why: str
    bytes_per_second: float | None
    seconds_left: float | None


@dataclass(frozen=True)
class ChunkFetched(Event):
    """A part of a chunk arrived and is what was written. wire: whether it came from elsewhere than this disk."""

    name: ClassVar[str] = "hf_cachegen.stream.chunk.fetched"
    chunk_index: int
    part: int
    nbytes: int
    wire: bool
    bytes_per_second: float | None


@dataclass(frozen=True)
class ChunkReady(Event):
    """A chunk's keys and values are in place; level None: recomputed from its tokens. Told again for each refinement.

    work_seconds: what decoding or recomputing took. refined: whether it was there before, coarser.
    """

    name: ClassVar[str] = "hf_cachegen.stream.chunk.ready"
    chunk_index: int
    level: int | None
    work_seconds: float
    refined: bool = False


@dataclass(frozen=True)
class SourceFailed(Event):
    """A place failed, or gave something wrong; what was asked of it is had elsewhere."""

    name: ClassVar[str] = "hf_cachegen.stream.source.failed"
    place: str
    error: str


@dataclass(frozen=True)
class ContextReady(Event):
    """The whole context is in place: generation may begin."""

    name: ClassVar[str] = "hf_cachegen.stream.ready"
    report: StreamReport


@dataclass(frozen=True)
class FirstToken(Event):
    """`seconds` is the TTFT. met: whether that is within the SLO, None without one."""

    name: ClassVar[str] = "hf_cachegen.stream.first_token"
    met: bool | None


@dataclass(frozen=True)
class StreamFinished(Event):
    """Nothing more will arrive."""

    name: ClassVar[str] = "hf_cachegen.stream.finished"
    report: StreamReport
