"""A context: computed by a model, loaded, or streamed."""

from __future__ import annotations

from hf_cachegen.context.cached import CachedContext
from hf_cachegen.context.computing import compute_context, wrap_cache
from hf_cachegen.context.encoding import aimed, encoded
from hf_cachegen.context.loading import load_context, stream_to_context

__all__ = [
    "CachedContext",
    "aimed",
    "compute_context",
    "encoded",
    "load_context",
    "stream_to_context",
    "wrap_cache",
]
