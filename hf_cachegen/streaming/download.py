"""The transfers of one stream, from an opened manifest on: its schedule, its threads, and the coded bytes that arrived.

Fetching begins before the artifact is validated. So this knows neither the model nor the context's tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from hf_cachegen.artifact import Segment
from hf_cachegen.artifact.artifact import Artifact
from hf_cachegen.codec.rows import spans_of
from hf_cachegen.codec.transforms import Transform
from hf_cachegen.profiles.files import Profile
from hf_cachegen.streaming.chunk import Chunk
from hf_cachegen.streaming.events import ChunkFetched, StreamStarted
from hf_cachegen.streaming.fetching import Fetcher
from hf_cachegen.streaming.policy import TEXT
from hf_cachegen.streaming.schedule import Part, Schedule
from hf_cachegen.streaming.session import Session
from hf_cachegen.streaming.sources import Source


class Download:
    """What is fetched of an artifact. `changed` guards everything that its threads and the decoding thread share.

    Args:
        session: Of the stream.
        artifact: Opened at the first source.
        sources: In the order in which they are asked.
        can_recompute: Whether the model can compute a chunk from its tokens.
    """

    def __init__(self, session: Session, artifact: Artifact, sources: Sequence[Source], *, can_recompute: bool) -> None:
        self.session, self.artifact, self._sources = session, artifact, tuple(sources)
        self.locations = tuple(source.location for source in sources)
        self.spans = spans_of(artifact.geometry.tokens, artifact.config.chunk_tokens)
        self.codec: Transform | None = None
        self.profile: Profile | None = None
        self.error: Exception | None = None
        """The last failure of a source or of decoding."""
        self._parts: dict[Part, bytes] = {}
        options = session.options
        self.decodes = options.choice != TEXT
        sources[0].open()
        self.schedule = Schedule(
            [self._chunk(index, sources[0]) for index in range(len(self.spans))],
            options.planner, session.deadline(artifact.geometry.tokens, options.prompt_tokens), options.refine,
            self._recompute_seconds, can_recompute=can_recompute,
        )  # fmt: skip
        session.bandwidth.forget()
        session.bandwidth.expect(sources[0].expected_rate)
        self.fetcher = Fetcher(self.schedule, sources, self, session.bandwidth, options.connections, options.stall)
        self.changed = self.fetcher.changed

    def _chunk(self, index: int, source: Source) -> Chunk:
        span, segments = self.spans[index], self.artifact.segments(index, self.artifact.levels)
        sizes = tuple(segment.length for segment in segments)
        wire = tuple(0 if source.is_local(segment) else segment.length for segment in segments)
        return Chunk(index, span.first, span.tokens, sizes, wire, self.artifact.levels)

    def _recompute_seconds(self, chunk: Chunk) -> float:
        seconds = self.session.speed.seconds(chunk.first, chunk.tokens)
        return math.inf if seconds is None else seconds

    def start(self) -> None:
        """Start fetching."""
        levels, chunks = range(self.artifact.levels), self.schedule.chunks
        nbytes = tuple(sum(sum(chunk.sizes[: level + 1]) for chunk in chunks) for level in levels)
        slo, tokens = self.session.options.slo, self.artifact.geometry.tokens
        self.session.events.add(StreamStarted, str(self.artifact.store), slo, tokens, len(chunks), nbytes)
        self.fetcher.start()

    def close(self, wait: float = 0.0) -> None:
        """End all threads, wait for them up to `wait` seconds, and drop the coded bytes."""
        self.fetcher.close(wait)
        with self.changed:
            self._parts.clear()
        for source in self._sources:
            source.close()

    def parts(self, chunk: int, level: int) -> list[bytes]:
        """Return the coded bytes of a chunk at a level. To be called with `changed` held."""
        return [self._parts[chunk, part] for part in range(level)]

    def drop(self, chunk: int) -> None:
        """Drop the coded bytes of a chunk. To be called with `changed` held."""
        for part in [part for part in self._parts if part[0] == chunk]:
            del self._parts[part]

    # What the fetcher reports (`fetching.Receiver`), with `changed` held.

    def segment_of(self, part: Part) -> Segment:
        """Return the segment of the artifact that holds a part."""
        return self.artifact.segments(part[0], part[1] + 1)[-1]

    def prepared(self, codec: Transform, profile: Profile | None) -> None:
        """Keep what decodes the chunks."""
        self.codec, self.profile = codec, profile

    def arrived(self, part: Part, data: bytes, wire: bool, seconds: float) -> None:
        """Keep the verified bytes of a part, unless its chunk was recomputed meanwhile."""
        if not self.schedule.chunks[part[0]].text:
            self._parts[part] = data
        self.session.tally.arrived(part, len(data), wire, seconds)
        self.session.events.add(ChunkFetched, part[0], part[1], len(data), wire, self.session.bandwidth.rate())

    def failed(self, location: str, error: Exception, part: Part | None) -> None:
        """Record a failure of a source."""
        self.error = error
        self.session.source_failed(location, error, part)
