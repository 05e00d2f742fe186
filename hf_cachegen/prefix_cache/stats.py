"""What a prefix cache has done: counters, their snapshot, and a Prometheus collector."""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from hf_cachegen.errors import MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from prometheus_client import CollectorRegistry


@dataclass(frozen=True)
class PrefixCacheStats:
    """Sums since a prefix cache was made, and what its directory holds now.

    Attributes:
        calls: calls of generate that looked for a prefix.
        hits: those that reused one.
        declined: those that found one but computed it, because that was expected to be faster.
        unsupported: calls that cannot start from a cache, which went to the stock generate.
        tokens_reused, tokens_computed: prompt tokens that came from the prefix cache, and those that did not.
        tokens_stored, blocks_stored: what was encoded and stored.
        checkpoints_stored: checkpoints of recurrent states that were stored.
        bytes_read, bytes_written: of block files, from the local tier and others; into the local tier.
        bytes_fetched, bytes_published: of block files, from and to locations on the network.
        blocks_coarse: blocks of other locations that were loaded below their stored level, to meet an SLO.
        blocks_damaged: blocks that were not what was written; they were removed and computed again.
        blocks_refused: blocks that the budget had no room for, or whose predecessor was gone.
        blocks_dropped: blocks that the full queue did not take.
        errors: failures of a disk or location; their blocks were computed.
        load_seconds: time spent reading and decoding.
        saved_seconds: measured prefill time of the reused tokens, less load_seconds; as far as the speed is known.
        blocks, nbytes: blocks and checkpoints in the local tier, and their bytes.
        queued_bytes: bytes that wait to be encoded.
    """

    calls: int = 0
    hits: int = 0
    declined: int = 0
    unsupported: int = 0
    tokens_reused: int = 0
    tokens_computed: int = 0
    tokens_stored: int = 0
    blocks_stored: int = 0
    checkpoints_stored: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    bytes_fetched: int = 0
    bytes_published: int = 0
    blocks_coarse: int = 0
    blocks_damaged: int = 0
    blocks_refused: int = 0
    blocks_dropped: int = 0
    errors: int = 0
    load_seconds: float = 0.0
    saved_seconds: float = 0.0
    blocks: int = 0
    nbytes: int = 0
    queued_bytes: int = 0

    def to_dict(self) -> dict[str, int | float]:
        """Return plain values."""
        return asdict(self)


GAUGES = ("blocks", "nbytes", "queued_bytes")
"""Fields that are a present state, not a sum."""
_SUMS = tuple(field.name for field in fields(PrefixCacheStats) if field.name not in GAUGES)


class Counters:
    """Sums that threads add to. What was added since the last `take` can be carried to the index."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums: dict[str, float] = dict.fromkeys(_SUMS, 0)
        self._new: dict[str, float] = {}

    def add(self, **amounts: float) -> None:
        """Add to named sums."""
        with self._lock:
            for name, amount in amounts.items():
                self._sums[name] += amount
                self._new[name] = self._new.get(name, 0) + amount

    def take(self) -> dict[str, float]:
        """Return what was added since the last call."""
        with self._lock:
            new, self._new = self._new, {}
        return {name: amount for name, amount in new.items() if amount}

    def snapshot(self, **gauges: int) -> PrefixCacheStats:
        """Return the sums, with these present values."""
        with self._lock:
            sums = dict(self._sums)
        return stats_of(sums, **gauges)


def stats_of(sums: Mapping[str, float], **gauges: int) -> PrefixCacheStats:
    """Return named sums as stats; unknown names are ignored."""
    typed: dict[str, Any] = {
        name: float(sums.get(name, 0)) if name.endswith("_seconds") else int(sums.get(name, 0)) for name in _SUMS
    }
    return PrefixCacheStats(**typed, **gauges)


class PrefixCacheCollector:
    """Show the stats of a prefix cache to Prometheus: `PrefixCacheCollector(prefix_cache)` registers itself.

    Args:
        prefix_cache: anything with a `stats()` method.
        registry: default prometheus_client's own.

    Raises:
        MissingExtraError: prometheus_client is not installed.
    """

    def __init__(self, prefix_cache: Any, registry: CollectorRegistry | None = None) -> None:
        try:
            from prometheus_client import REGISTRY
        except ImportError as error:
            raise MissingExtraError("metrics need prometheus_client: pip install 'hf_cachegen[prometheus]'") from error
        self._prefix_cache = prefix_cache
        (REGISTRY if registry is None else registry).register(self)

    def collect(self) -> Iterable[Any]:
        """Yield one metric for each field of the stats."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        for name, value in self._prefix_cache.stats().to_dict().items():
            kind = GaugeMetricFamily if name in (*GAUGES, "saved_seconds") else CounterMetricFamily
            yield kind(f"hf_cachegen_prefix_cache_{name}", f"{name} of the prefix cache.", value=value)
