"""Verified segments of a killed load are not fetched again; docs/stores.md states the limits in the code."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_cachegen.artifact import Manifest, Reader, write_artifact
from hf_cachegen.stores import Access, Patience, open_store, prefetch, remote, segment_cache
from hf_cachegen.stores.http import _PASSING
from tests.http_server import Request, Server, running
from tests.small_artifact import contents

SEGMENT_BYTES = 9 << 20
"""More than a request fetches, so that segments come one after the other."""
CHUNKS = 3


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    manifest = Manifest(geometry={}, codec={}, chunks=tuple((i, 1) for i in range(CHUNKS)))
    rows = [("base.safetensors", "side", b"side")]
    rows += [("base.safetensors", f"chunk-{i:05d}", os.urandom(1 << 20) * 9) for i in range(CHUNKS)]
    write_artifact(tmp_path / "context", manifest, rows)
    with running(Server()) as found:
        found.files = {f"context/{name}": data for name, data in contents(tmp_path / "context").items()}
        yield found


def starts(server: Server) -> list[int]:
    """Return the first bytes of the requested ranges of the base file, without its opening."""
    ranges = [headers["Range"] for path, headers in server.requests if path.endswith("base.safetensors")]
    return [int(r.removeprefix("bytes=").partition("-")[0]) for r in ranges if not r.startswith("bytes=0-")]


def test_a_killed_load_continues(server: Server, tmp_path: Path) -> None:
    limit = 2 * SEGMENT_BYTES

    def stall_late(request: Request, body: bytes, headers: dict[str, str]) -> None:
        first = int(headers["Content-Range"].removeprefix("bytes ").partition("-")[0])
        if first >= limit:
            time.sleep(20)
        request.answer(206, body, headers)

    server.always = stall_late
    code = (
        "import sys; from hf_cachegen.stores import Access, open_store; from hf_cachegen.artifact import Reader\n"
        "reader = Reader(open_store(sys.argv[1], Access(cache_dir=sys.argv[2])))\n"
        "for segment in reader.manifest.segments: reader.read(segment); print(segment.name, flush=True)"
    )
    location, cache = f"{server.url}/context", tmp_path / "cache"
    command = [sys.executable, "-c", code, location, str(cache)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        names = [process.stdout.readline().strip() for _ in range(3)]
        process.kill()
    assert names == ["side", "chunk-00000", "chunk-00001"]
    server.always = None
    server.requests.clear()
    reader = Reader(open_store(location, Access(cache_dir=cache)))
    reader.prefetch(reader.manifest.segments)
    assert reader.verify() == sum(map(len, contents(tmp_path / "context").values()))
    last = reader.manifest.segments[-1]
    assert min(starts(server)) == last.offset


def test_the_document_states_the_limits() -> None:
    text = (Path(__file__).resolve().parent.parent / "docs" / "stores.md").read_text(encoding="utf-8")
    patience = Patience()
    waits = ", ".join(f"{patience.backoff * 2**i:g}" for i in range(patience.attempts - 1))
    for said in (
        f"after {patience.attempts} attempts",
        f"below {patience.min_bytes_per_second >> 10} KiB/s",
        f"at most {patience.max_wait:.0f} s), else {waits} s",
        ", ".join(map(str, sorted(_PASSING))),
        f"over {remote.THREADS} connections",
        f"requests of up to {prefetch.REQUEST_BYTES >> 20} MiB",
        f"most {remote.AHEAD_BYTES >> 20} MiB wait",
        f"else {segment_cache.DEFAULT_LIMIT >> 30} GiB",
    ):
        assert said in text, said
