"""Export streams to Prometheus: an `on_event` that counts (extra `prometheus`).

    exporter = PrometheusExporter()                        # in the default registry
    CacheGenCache.stream(url, model, slo=1.0, on_event=exporter)

One exporter serves any number of streams, from any threads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_cachegen.errors import MissingExtraError
from hf_cachegen.streaming.events import (
    ChunkFetched,
    ChunkReady,
    ContextReady,
    Event,
    FirstToken,
    SourceFailed,
    StreamStarted,
)

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

SECONDS = (0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 100.0)
"""Bounds of the histograms of times."""


class PrometheusExporter:
    """Counts the events of streams.

    Args:
        registry: A prometheus_client registry. Default: the library's own.

    Raises:
        MissingExtraError: prometheus_client is not installed.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        try:
            from prometheus_client import REGISTRY, Counter, Gauge, Histogram
        except ImportError as error:
            raise MissingExtraError("metrics need prometheus_client: pip install 'hf_cachegen[prometheus]'") from error
        where: dict[str, Any] = {"registry": REGISTRY if registry is None else registry}
        self._streams = Counter("hf_cachegen_streams", "Streams that started.", **where)
        self._chunks = Counter("hf_cachegen_chunks", "Chunks by their first level, or text.", ["choice"], **where)
        self._refined = Counter("hf_cachegen_chunks_refined", "Chunks that became finer.", ["level"], **where)
        self._bytes = Counter("hf_cachegen_fetched_bytes", "Coded bytes, by network or disk.", ["origin"], **where)
        self._work = Counter("hf_cachegen_work_seconds", "Time of decoding and recomputing.", ["kind"], **where)
        self._failures = Counter("hf_cachegen_source_failures", "Failures of sources.", ["error"], **where)
        self._ttft = Histogram("hf_cachegen_ttft_seconds", "Time to first token.", buckets=SECONDS, **where)
        self._ready = Histogram("hf_cachegen_ready_seconds", "Time to context.", buckets=SECONDS, **where)
        self._slo = Counter("hf_cachegen_slo", "First tokens by whether the SLO was met.", ["met"], **where)
        self._rate = Gauge("hf_cachegen_throughput_bytes_per_second", "The last estimate.", **where)

    def __call__(self, event: Event) -> None:
        """Count one event."""
        if isinstance(event, StreamStarted):
            self._streams.inc()
        elif isinstance(event, ChunkFetched):
            self._bytes.labels("network" if event.wire else "disk").inc(event.nbytes)
            if event.wire and event.bytes_per_second:
                self._rate.set(event.bytes_per_second)
        elif isinstance(event, ChunkReady):
            self._work.labels("recompute" if event.level is None else "decode").inc(event.work_seconds)
            if event.refined:
                self._refined.labels(str(event.level)).inc()
            else:
                self._chunks.labels("text" if event.level is None else f"level {event.level}").inc()
        elif isinstance(event, SourceFailed):
            self._failures.labels(event.error.partition(":")[0]).inc()
        elif isinstance(event, ContextReady):
            self._ready.observe(event.seconds)
        elif isinstance(event, FirstToken):
            self._ttft.observe(event.seconds)
            if event.met is not None:
                self._slo.labels("yes" if event.met else "no").inc()
