"""Stream a context so that the first token meets the SLO, whatever the network does (docs/streaming.md)."""

from __future__ import annotations

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
from hf_cachegen.streaming.stream import stream_context

__all__ = [
    "CONNECTIONS",
    "Adaptive",
    "ChunkChosen",
    "ChunkFetched",
    "ChunkReady",
    "ChunkReport",
    "ContextReady",
    "Event",
    "Fallback",
    "FirstToken",
    "Fixed",
    "Link",
    "Missing",
    "Outlook",
    "Paper",
    "Plan",
    "Policy",
    "Refine",
    "Refinement",
    "SourceFailed",
    "StreamFinished",
    "StreamOptions",
    "StreamReport",
    "StreamStarted",
    "SwapIn",
    "measure",
    "policy_of",
    "stream_context",
]
