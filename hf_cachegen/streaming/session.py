"""What one call of `stream` has from its first moment on: options, clock, measurements, counters and events."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_cachegen.streaming.bandwidth import Bandwidth
from hf_cachegen.streaming.events import EventQueue, SourceFailed
from hf_cachegen.streaming.options import StreamOptions
from hf_cachegen.streaming.prefill_speed import PrefillSpeed, speed_of
from hf_cachegen.streaming.schedule import Part
from hf_cachegen.streaming.tally import Tally

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RESERVE = 0.05
"""Share of the SLO that is kept for what no estimate covers."""
QUESTION_VARIES = 0.4
"""The prefill of a question may take longer than its estimate by this share, on a machine that other work shares."""


@dataclass(frozen=True)
class Session:
    """The state of one call of `stream`.

    Args:
        options: Of the stream.
        began: time.monotonic() of the call. The SLO counts from it.
        speed: How fast the model reads tokens.
        bandwidth: Throughput of this stream.
        tally: Counts what happens, for the report.
        events: Delivers events to `on_event`.
    """

    options: StreamOptions
    began: float
    speed: PrefillSpeed
    bandwidth: Bandwidth
    tally: Tally
    events: EventQueue

    @classmethod
    def start(cls, model: PreTrainedModel, options: StreamOptions) -> Session:
        """Start the clock."""
        began = time.monotonic()
        bandwidth = Bandwidth(smoothing=options.planner.smoothing)
        return cls(options, began, speed_of(model), bandwidth, Tally(), EventQueue(options.on_event, began))

    def elapsed(self) -> float:
        """Return the seconds since the call."""
        return time.monotonic() - self.began

    def deadline(self, context_tokens: int, question_tokens: int) -> float | None:
        """Return when the context must be in place for the first token to meet the SLO; None without one."""
        slo = self.options.slo
        if slo is None:
            return None
        question = self.speed.seconds(context_tokens, question_tokens) if question_tokens else None
        return self.began + (1 - RESERVE) * slo - (1 + QUESTION_VARIES) * (question or 0.0)

    def source_failed(self, location: str, error: Exception, part: Part | None = None) -> None:
        """Record a failure of a source. part: the part that it gave wrong, if it was one."""
        self.tally.failed(location, error, part)
        self.events.add(SourceFailed, location, f"{type(error).__name__}: {error}")
