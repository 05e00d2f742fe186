"""What a stream reports while it runs: `on_event` is called with one of these, named as OpenTelemetry names things.

An event's `name` and `attributes()` go into a span or a log record as they are. The callback is called by the thread
that streams, generates or refines, one call at a time, in order. An error that it raises is logged, and the stream goes
on.
"""

from __future__ import annotations

import logging
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from hf_cachegen.streaming.report import StreamReport

LOG = logging.getLogger("hf_cachegen.streaming")


@dataclass(frozen=True)
class Event:
    """seconds: time since the call that began the stream."""

    name: ClassVar[str] = "hf_cachegen.stream"
    seconds: float

    def attributes(self) -> dict[str, Any]:
        """Return the fields under names such as "hf_cachegen.stream.chunk_index"; a report as a dictionary."""
        found = {f"{Event.name}.{field.name}": getattr(self, field.name) for field in fields(self)}
        return {name: value.to_dict() if hasattr(value, "to_dict") else value for name, value in found.items()}


@dataclass(frozen=True)
class StreamStarted(Event):
    """The manifest is read, and fetching begins. bytes_per_level: coded bytes of all chunks at level 1, 2, ..."""

    name: ClassVar[str] = "hf_cachegen.stream.started"
    location: str
    slo: float | None
    tokens: int
    chunks: int
    bytes_per_level: tuple[int, ...]

    @property
    def place(self) -> str:
        """The old name of `location`."""
        return _old_place(self.location)


@dataclass(frozen=True)
class ChunkChosen(Event):
    """A decision about a chunk. choice: "level 2" or "text"; bytes_per_second: the estimate, if there is one."""

    name: ClassVar[str] = "hf_cachegen.stream.chunk.chosen"
    chunk_index: int
    choice: str
    why: str
    bytes_per_second: float | None
    seconds_left: float | None


@dataclass(frozen=True)
class ChunkFetched(Event):
    """A part of a chunk arrived, and is verified. wire: whether it came over the network or from another store than
    this disk.
    """

    name: ClassVar[str] = "hf_cachegen.stream.chunk.fetched"
    chunk_index: int
    part: int
    nbytes: int
    wire: bool
    bytes_per_second: float | None


@dataclass(frozen=True)
class ChunkReady(Event):
    """A chunk's keys and values are in place. Reported again for each refinement.

    level: None where it was recomputed from its tokens. work_seconds: time of decoding or recomputing. refined: whether
    it was in place before at a coarser level.
    """

    name: ClassVar[str] = "hf_cachegen.stream.chunk.ready"
    chunk_index: int
    level: int | None
    work_seconds: float
    refined: bool = False


@dataclass(frozen=True)
class SourceFailed(Event):
    """A source failed, or gave wrong bytes. Other sources are asked, or the chunk is recomputed."""

    name: ClassVar[str] = "hf_cachegen.stream.source.failed"
    location: str
    error: str

    @property
    def place(self) -> str:
        """The old name of `location`."""
        return _old_place(self.location)


@dataclass(frozen=True)
class ContextReady(Event):
    """The whole context is in place, and generation may begin."""

    name: ClassVar[str] = "hf_cachegen.stream.ready"
    report: StreamReport


@dataclass(frozen=True)
class FirstToken(Event):
    """The first token was generated; `seconds` is the TTFT. met: whether it is within the SLO; None without one."""

    name: ClassVar[str] = "hf_cachegen.stream.first_token"
    met: bool | None


@dataclass(frozen=True)
class StreamFinished(Event):
    """Nothing more will arrive."""

    name: ClassVar[str] = "hf_cachegen.stream.finished"
    report: StreamReport


def _old_place(location: str) -> str:
    warnings.warn("the field place of events is now location", DeprecationWarning, stacklevel=3)
    return location


class EventQueue:
    """Delivers events to a callback, in order. Threads may share it.

    Args:
        on_event: The callback; None: events are not kept.
        began: time.monotonic() of the call that began the stream.
    """

    def __init__(self, on_event: Callable[[Event], None] | None, began: float) -> None:
        self._on_event, self._began = on_event, began
        self._events: deque[Event] = deque()
        self._delivering = threading.Lock()

    def add(self, kind: Callable[..., Event], *values: Any) -> None:
        """Record an event of that kind, which has these fields. `deliver` passes it on."""
        if self._on_event is not None:
            self._events.append(kind(time.monotonic() - self._began, *values))

    def deliver(self) -> None:
        """Call the callback with all recorded events. Call this without a lock held: the callback may do anything."""
        while self._on_event is not None and self._events and self._delivering.acquire(blocking=False):
            try:
                while self._events:
                    self._on_event(self._events.popleft())
            except Exception:  # noqa: PERF203
                LOG.exception("on_event failed")
            finally:
                self._delivering.release()
