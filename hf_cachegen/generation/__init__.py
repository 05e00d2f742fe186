"""generate() from a cached context, of token ids or of a text."""

from __future__ import annotations

from hf_cachegen.generation.attached import detach
from hf_cachegen.generation.from_cache import attach, generate
from hf_cachegen.generation.from_text import TextAnswer, generate_text

__all__ = ["TextAnswer", "attach", "detach", "generate", "generate_text"]
