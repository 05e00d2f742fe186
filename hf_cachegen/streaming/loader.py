"""Runs a stream."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from hf_cachegen.container import Limits
from hf_cachegen.finding import ProfileLike
from hf_cachegen.layout import KVTensors
from hf_cachegen.opening import OpenContext, open_context
from hf_cachegen.stores import Access, open_store
from hf_cachegen.streaming.options import StreamOptions
from hf_cachegen.streaming.policy import TEXT, Fixed
from hf_cachegen.streaming.refine import Refinement
from hf_cachegen.streaming.report import ChunkReport, StreamReport

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def stream_context(
    path: str | os.PathLike[str],
    model: PreTrainedModel,
    options: StreamOptions,
    profile: ProfileLike,
    tokenizer: PreTrainedTokenizerBase | None,
    limits: Limits | None,
    access: dict[str, Any],
) -> tuple[OpenContext, KVTensors, StreamReport, Refinement | None]:
    """Loads a context at the level of a Fixed policy, else at the finest."""
    start = time.perf_counter()
    found = open_context(open_store(path, Access(**access), limits), model, limits, profile, tokenizer=tokenizer)
    artifact, policy = found.artifact, options.policy
    choice = policy.choice if isinstance(policy, Fixed) else None
    level = artifact.levels if choice is None or choice == TEXT else choice
    places = found.places or []
    keys, values = artifact.decode(level, places[0] if len(set(places)) == 1 else None)
    kv = KVTensors(tuple(keys), tuple(values), artifact.geometry)
    chunks = tuple(
        ChunkReport(index, first, tokens, level, level, "as asked for")
        for index, (first, tokens) in enumerate(artifact.manifest.chunks)
    )
    report = StreamReport(
        context_tokens=artifact.geometry.tokens,
        exact_bytes=artifact.geometry.nbytes,
        loaded_bytes=artifact.nbytes_at(level),
        level=level,
        load_seconds=time.perf_counter() - start,
        encoding=artifact.report,
        slo=options.slo,
        chunks=chunks,
    )
    return found, kv if len(set(places)) == 1 else kv.to(places), report, None
