"""Stream a context so that the first token meets the SLO, whatever the network does (docs/streaming.md)."""

from __future__ import annotations

from hf_cachegen.streaming.bandwidth import Bandwidth
from hf_cachegen.streaming.chunk import Chunk as ScheduledChunk
from hf_cachegen.streaming.events import (
    ChunkChosen,
    ChunkFetched,
    ChunkReady,
    ContextReady,
    Event,
    FirstToken,
    SourceFailed,
    StreamFinished,
    StreamStarted,
)
from hf_cachegen.streaming.link import Link
from hf_cachegen.streaming.options import CONNECTIONS, Fallback, Refine, StreamOptions
from hf_cachegen.streaming.policy import Adaptive, Fixed, Missing, Outlook, Paper, Plan, Policy, policy_of
from hf_cachegen.streaming.prefill_speed import measure
from hf_cachegen.streaming.refine import Refinement, SwapIn
from hf_cachegen.streaming.report import ChunkReport, StreamReport
from hf_cachegen.streaming.schedule import Schedule
from hf_cachegen.streaming.session import RESERVE
from hf_cachegen.streaming.stream import stream_context
from hf_cachegen.streaming.window import request_bytes
from hf_cachegen.streaming.work import Decode, Finished, Recompute, Wait

__all__ = [
    "CONNECTIONS",
    "RESERVE",
    "Wait",
    "Adaptive",
    "Bandwidth",
    "ChunkChosen",
    "ChunkFetched",
    "ChunkReady",
    "ChunkReport",
    "ContextReady",
    "Decode",
    "Event",
    "Fallback",
    "Finished",
    "FirstToken",
    "Fixed",
    "Link",
    "Missing",
    "Outlook",
    "Paper",
    "Plan",
    "Policy",
    "Recompute",
    "Refine",
    "Refinement",
    "Schedule",
    "ScheduledChunk",
    "SourceFailed",
    "StreamFinished",
    "StreamOptions",
    "StreamReport",
    "StreamStarted",
    "SwapIn",
    "measure",
    "policy_of",
    "request_bytes",
    "stream_context",
]
