"""The prefix cache: a store of prefixes that needs no names and no bookkeeping (docs/prefix_cache.md)."""

from __future__ import annotations

from hf_cachegen.prefix_cache.cache import PrefixCache
from hf_cachegen.prefix_cache.local import Verified
from hf_cachegen.prefix_cache.stats import PrefixCacheCollector, PrefixCacheStats

__all__ = ["PrefixCache", "PrefixCacheCollector", "PrefixCacheStats", "Verified"]
