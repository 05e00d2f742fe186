"""A server with another fault at each request: a load returns the written artifact, or raises a typed error.

The artifact, its signature or seal and its profile are loaded through all layers at once, cold and from a cache that
earlier attempts have half filled.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import xxhash

pytest.importorskip("cryptography", reason="cryptography is not installed (pip install 'hf_cachegen[crypto]')")

from hf_cachegen.artifact import PROFILE_FILE, Limits, Reader
from hf_cachegen.artifact.pin import Pin
from hf_cachegen.errors import CacheGenError
from hf_cachegen.stores import Access, Patience, open_store
from hf_cachegen.stores.profiles import fetch_pinned
from hf_cachegen.stores.sealed import seal
from hf_cachegen.stores.signed import sign
from tests import http_server as faults
from tests.http_server import Fault, Request, Server, running
from tests.signing_support import PUBLIC
from tests.small_artifact import SEGMENTS, contents, write

KEY = bytes(range(32))
PROFILE = bytes(range(256)) * 600
PIN = Pin(xxhash.xxh3_128_hexdigest(PROFILE), hashlib.sha256(PROFILE).hexdigest(), len(PROFILE))
ATTEMPTS = 150
IMPATIENT = Patience(attempts=3, timeout=5, backoff=0.001)


def other_bytes(request: Request, body: bytes, headers: dict[str, str]) -> None:
    request.answer(206, bytes(reversed(body)), headers)


def other_file(request: Request, body: bytes, headers: dict[str, str]) -> None:
    """Send the same range of another file, under this file's headers."""
    file = sorted(request.server.files)[0]
    request.answer(206, (request.server.files[file] * 9000)[: len(body)], headers)


WRONGS: list[Fault] = [
    faults.flip, faults.cut(0.5), faults.cut(0.0), faults.cut_without_length, faults.reset_at_once,
    faults.reset_in_body,
    faults.ignore_range, faults.other_range, faults.no_http, faults.status(500), faults.status(503, Retry_After="0"),
    faults.status(403), faults.status(404), faults.status(416), faults.status(204), faults.status(301, Location="/a"),
    faults.status(302, Location="http://127.0.0.1:9/a"), faults.with_headers(ETag='"other"'),
    faults.with_headers(Content_Encoding="gzip"), faults.with_headers(Content_Range=None),
    faults.with_headers(Content_Range="bytes 0-0/1"), other_bytes, other_file,
]  # fmt: skip


@pytest.fixture(params=["plain", "signed", "sealed", "signed and sealed"])
def web(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Server, dict[str, bytes]]]:
    """A server with the artifact at /a, and the options that open it."""
    folder, options = tmp_path / "context", {}
    write(folder)
    (folder / PROFILE_FILE).write_bytes(PROFILE)
    if "signed" in request.param:
        sign(folder, KEY)
        options["public_key"] = PUBLIC
    if "sealed" in request.param:
        seal(folder, tmp_path / "sealed", KEY)
        folder, options["key"] = tmp_path / "sealed", KEY
    with running(Server()) as found:
        found.files = {f"a/{name}": data for name, data in contents(folder).items()}
        yield found, options


def attempt(load: Callable[[], None]) -> bool:
    try:
        load()
    except CacheGenError:
        return False
    return True


def test_all_or_a_typed_error(web: tuple[Server, dict[str, bytes]], tmp_path: Path) -> None:
    server, options = web
    draw = random.Random(0)
    loaded = 0
    for number in range(ATTEMPTS):
        access = Access(cache_dir=tmp_path / f"cache-{number // 3}", patience=IMPATIENT, **options)

        def load(access: Access = access) -> None:
            store = open_store(f"{server.url}/a", access)
            reader = Reader(store)
            reader.prefetch(reader.manifest.segments)
            found = {(s.file, s.name): reader.read(s) for s in reader.manifest.segments}
            assert found == {(file, name): data for file, name, data in SEGMENTS}
            assert fetch_pinned(PIN, store, access, Limits()) == PROFILE

        rate = draw.choice([0.05, 0.2, 0.5])
        server.faults = [draw.choice(WRONGS) if draw.random() < rate else None for _ in range(200)]
        loaded += attempt(load)
        server.faults = []
        assert number % 3 != 2 or attempt(load), "bytes that earlier attempts cached do no harm"
    assert ATTEMPTS / 5 < loaded < ATTEMPTS
