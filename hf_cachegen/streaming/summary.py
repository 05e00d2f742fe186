"""Make the report of a stream from its session, its artifact and its schedule."""

from __future__ import annotations

from hf_cachegen.artifact import refine_file
from hf_cachegen.streaming.download import Download
from hf_cachegen.streaming.report import StreamReport


def summarise(download: Download, *, finished: bool) -> StreamReport:
    """Return the report of a stream.

    Args:
        download: The transfers of the stream; its `changed` is held.
        finished: Whether nothing more will arrive.
    """
    session, artifact, schedule = download.session, download.artifact, download.schedule
    tally, speed = session.tally, session.speed
    chunks = [tally.chunk_report(chunk, speed.seconds(chunk.first, chunk.tokens)) for chunk in schedule.chunks]
    levels = [chunk.level for chunk in chunks if chunk.level is not None]
    files = artifact.manifest.files
    fixed = artifact.nbytes_at(1) - sum(chunk.sizes[0] for chunk in schedule.chunks)
    fixed += sum(files[refine_file(number)].header_bytes for number in range(1, max(levels, default=1)))
    return StreamReport(
        context_tokens=artifact.geometry.tokens,
        exact_bytes=artifact.geometry.nbytes,
        loaded_bytes=fixed + sum(chunk.nbytes for chunk in chunks),
        level=min(levels, default=None),
        load_seconds=tally.ready,
        encoding=artifact.report,
        slo=session.options.slo,
        ttft=tally.ttft,
        chunks=tuple(chunks),
        faults=tuple(tally.faults),
        bytes_per_second=session.bandwidth.rate(),
        wire_bytes=tally.wire_bytes,
        sources=download.locations,
        finished=finished,
    )
