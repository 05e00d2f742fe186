"""Ranges over HTTP: whatever a server does, a read returns the right bytes or raises a typed error, in bounded time."""

from __future__ import annotations

import email.utils
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hf_cachegen.artifact import Reader, Segment
from hf_cachegen.errors import (
    ArtifactNotFoundError,
    ChangedError,
    ConfigError,
    CorruptError,
    LimitError,
    ManifestError,
    RangeError,
    StoreAccessError,
    StoreError,
    StoreTimeoutError,
    TruncatedError,
)
from hf_cachegen.stores import Access
from hf_cachegen.stores.http import HEAD_BYTES
from hf_cachegen.stores.remote import RemoteStore, open_files
from hf_cachegen.stores.retry import Patience
from tests import http_server as faults
from tests.http_server import Fault, Server, running
from tests.small_artifact import contents, write

IMPATIENT = Patience(attempts=3, timeout=0.6, backoff=0.01, min_bytes_per_second=1 << 20)
DATA = bytes(range(256)) * 1024
"""Longer than what comes with opening a file."""


@pytest.fixture
def server() -> Iterator[Server]:
    with running(Server()) as found:
        found.files["data"] = DATA
        yield found


def store_of(server: Server, folder: str = "", **options: object) -> RemoteStore:
    return RemoteStore(open_files(f"{server.url}/{folder}", **{"patience": IMPATIENT, **options}))


def artifact_on(server: Server, tmp_path: Path) -> list[tuple[str, bytes]]:
    """Put a small artifact under context/ and return its segments as a local reader reads them."""
    write(tmp_path / "context")
    server.files.update({f"context/{name}": data for name, data in contents(tmp_path / "context").items()})
    return [(s.name, server.files[f"context/{s.file}"][s.offset : s.offset + s.length]) for s in segments(server)]


def segments(server: Server) -> list:
    return list(Reader(store_of(server, "context")).manifest.segments)


def test_ranges(server: Server) -> None:
    store = store_of(server)
    assert store.size("data") == len(DATA)
    for offset, length in ((0, 10), (100, 5), (HEAD_BYTES - 3, 6), (len(DATA) - 1, 1), (len(DATA), 0), (0, len(DATA))):
        assert store.read("data", offset, length) == DATA[offset : offset + length]


@pytest.mark.parametrize("size", [0, 1, HEAD_BYTES - 1, HEAD_BYTES, HEAD_BYTES + 1])
def test_files_of_any_size(server: Server, size: int) -> None:
    server.files["data"] = DATA[:size]
    store = store_of(server)
    assert (store.size("data"), store.read("data", 0, size)) == (size, DATA[:size])


def test_a_small_file_takes_one_request(server: Server) -> None:
    server.files["data"] = b"0123456789"
    store = store_of(server)
    assert [store.size("data"), store.read("data", 0, 5), store.read("data", 5, 5)] == [10, b"01234", b"56789"]
    assert len(server.requests) == 1


def test_request_headers(server: Server) -> None:
    store_of(server, headers={"Authorization": "Bearer secret", "User-Agent": "test/1"}).size("data")
    _, headers = server.requests[0]
    assert (headers["Authorization"], headers["User-Agent"]) == ("Bearer secret", "test/1")
    assert (headers["Range"], headers["Accept-Encoding"]) == (f"bytes=0-{HEAD_BYTES - 1}", "identity")


def test_an_artifact(server: Server, tmp_path: Path) -> None:
    expected = artifact_on(server, tmp_path)
    reader = Reader(store_of(server, "context"))
    reader.prefetch(reader.manifest.segments)
    assert [(segment.name, reader.read(segment)) for segment in reader.manifest.segments] == expected
    assert reader.verify() == sum(map(len, contents(tmp_path / "context").values()))


def test_the_head_of_a_file_is_not_fetched_again(server: Server) -> None:
    store = store_of(server)
    half = HEAD_BYTES // 2
    pieces = [Segment("data", f"{offset}", offset, half, "") for offset in range(0, 10 * half, half)]
    store.prefetch(pieces)
    assert [store.read("data", s.offset, s.length) for s in pieces] == [DATA[s.offset :][: s.length] for s in pieces]
    ranges = [headers["Range"] for _, headers in server.requests]
    assert ranges == [f"bytes=0-{2 * half - 1}", f"bytes={2 * half}-{10 * half - 1}"]


def test_a_query_stays_behind_the_path(server: Server) -> None:
    store = RemoteStore(open_files(f"{server.url}/?signature=abc", patience=IMPATIENT))
    assert store.size("data") == len(DATA)
    server.always = faults.status(418)
    with pytest.raises(StoreError) as caught:
        store.read("data", HEAD_BYTES, 1)
    assert "abc" not in str(caught.value)


PASSING: dict[str, Fault] = {
    "408": faults.status(408),
    "429": faults.status(429),
    "429 now": faults.status(429, Retry_After="0"),
    "500": faults.status(500),
    "502": faults.status(502),
    "503": faults.status(503),
    "504": faults.status(504),
    "cut at once": faults.cut(0),
    "cut in the middle": faults.cut(0.5),
    "cut without a length": faults.cut_without_length,
    "reset at once": faults.reset_at_once,
    "reset in the middle": faults.reset_in_body,
    "no HTTP": faults.no_http,
    "silent": faults.silent(1),
    "stalls in the body": faults.stall_in_body(1),
}
"""Faults that another attempt mends."""


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING.keys())
def test_a_passing_fault_is_retried(server: Server, fault: Fault) -> None:
    store = store_of(server)
    assert store.size("data") == len(DATA)
    server.faults = [fault, fault]
    assert store.read("data", HEAD_BYTES, 10_000) == DATA[HEAD_BYTES : HEAD_BYTES + 10_000]
    assert not server.faults


LASTING: dict[str, tuple[Fault, type[Exception], str]] = {
    "ignores ranges, another length": (faults.with_other_length, RangeError, f"byte ranges .* expected {len(DATA)}"),
    "ignores ranges, no length": (faults.whole_without_length, RangeError, "ignores byte ranges .* got 'none'"),
    "ignores ranges, another ETag": (faults.whole_of_another, ChangedError, "changed while"),
    "ignores ranges, cut always": (faults.whole_cut, StoreError, "bytes early, in every attempt"),
    "no Content-Range": (faults.with_headers(Content_Range=None), RangeError, "sent ''"),
    "another range": (faults.other_range, RangeError, "sent 'bytes 1-"),
    "a strange Content-Range": (faults.with_headers(Content_Range="lines 1-2/3"), RangeError, "lines 1-2/3"),
    "a huge Content-Range": (faults.with_headers(Content_Range=f"bytes 0-9/{'9' * 99}"), RangeError, "sent"),
    "size unknown": (faults.with_headers(Content_Range="bytes 70000-70099/*"), RangeError, "sent"),
    "wrong Content-Length": (faults.with_headers(Content_Length="3"), RangeError, "announced '3'"),
    "gzip": (faults.with_headers(Content_Encoding="gzip"), RangeError, "got gzip"),
    "another ETag": (faults.with_headers(ETag='"other"'), ChangedError, "changed while"),
    "no ETag any more": (faults.with_headers(ETag=None), ChangedError, "changed while"),
    "another size": (faults.with_headers(Content_Range="bytes 70000-70099/70100"), ChangedError, "changed while"),
    "401": (faults.status(401), StoreAccessError, "token"),
    "403": (faults.status(403, X_Error_Message="gated: ask first"), StoreAccessError, "gated: ask first"),
    "404": (faults.status(404), ArtifactNotFoundError, "no http"),
    "410": (faults.status(410), ArtifactNotFoundError, "no http"),
    "412": (faults.status(412), ChangedError, "412"),
    "416": (faults.status(416), RangeError, "416"),
    "416, now shorter": (faults.status(416, Content_Range="bytes */7"), ChangedError, "became 7"),
    "418": (faults.status(418), StoreError, "418"),
    "501": (faults.status(501), StoreError, "501"),
    "500 always": (faults.status(500), StoreError, "500 .* in every attempt"),
    "429 for an hour": (faults.status(429, Retry_After="3600"), StoreError, "429"),
    "cut always": (faults.cut(0), StoreError, "bytes early, in every attempt"),
    "reset always": (faults.reset_at_once, StoreError, "in every attempt"),
    "no HTTP": (faults.no_http, StoreError, "in every attempt"),
    "silent always": (faults.silent(1), StoreTimeoutError, "in time, in every attempt"),
    "stalls always": (faults.stall_in_body(1), StoreTimeoutError, "in time, in every attempt"),
    "trickles": (faults.trickle(0.1), StoreTimeoutError, "in time, in every attempt"),
    "headers trickle": (faults.trickle_headers(0.1), StoreTimeoutError, "in time, in every attempt"),
    "redirects for ever": (faults.status(302, Location="/data"), StoreError, "302"),
    "redirects to a file": (faults.status(302, Location="file:///etc/passwd"), StoreError, "not followed|302"),
}
"""Faults that stay: how they end, and what the message says."""


@pytest.mark.parametrize(("fault", "error", "message"), LASTING.values(), ids=LASTING.keys())
def test_a_lasting_fault_is_a_typed_error(
    server: Server, fault: Fault, error: type[Exception], message: str
) -> None:
    store = store_of(server)
    assert store.size("data") == len(DATA)
    server.always = fault
    start = time.monotonic()
    with pytest.raises(error, match=message):
        store.read("data", 70_000, 100)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    "fault", [faults.whole_without_length, faults.with_headers(Content_Encoding="br"), faults.status(416)]
)
def test_a_server_that_cannot_serve_ranges_is_found_out_when_opening(server: Server, fault: Fault) -> None:
    server.always = fault
    with pytest.raises(RangeError):
        store_of(server).size("data")


def test_an_interrupted_body_is_continued(server: Server) -> None:
    store = store_of(server)
    store.size("data")
    server.faults = [faults.cut(0.5), faults.reset_at_once]
    assert store.read("data", 100_000, 1000) == DATA[100_000:101_000]
    asked = [headers["Range"] for _, headers in server.requests[1:]]
    assert asked == ["bytes=100000-100999", "bytes=100500-100999", "bytes=100500-100999"]


@pytest.mark.parametrize("kind", ["seconds", "date"])
def test_retry_after_is_honoured(server: Server, kind: str) -> None:
    store = store_of(server)
    store.size("data")
    asked = "1" if kind == "seconds" else email.utils.formatdate(time.time() + 2, usegmt=True)
    server.faults = [faults.status(503, Retry_After=asked)]
    start = time.monotonic()
    assert store.read("data", HEAD_BYTES, 1) == DATA[HEAD_BYTES : HEAD_BYTES + 1]
    assert 0.9 < time.monotonic() - start < 15


def test_a_refused_connection(server: Server) -> None:
    url = server.url
    server.server_close()
    with pytest.raises(StoreError, match="ConnectionRefusedError"):
        RemoteStore(open_files(url, patience=IMPATIENT)).size("data")


def test_an_unknown_host() -> None:
    with pytest.raises(StoreError, match="in every attempt"):
        RemoteStore(open_files("http://nowhere.invalid", patience=IMPATIENT)).size("data")


def test_a_redirect_is_followed_and_keeps_the_token_at_home(server: Server) -> None:
    with running(Server()) as other:
        other.files["elsewhere"] = DATA
        store = store_of(server, headers={"Authorization": "Bearer secret"})
        server.faults = [faults.status(307, Location="/data"), faults.status(302, Location=f"{other.url}/elsewhere")]
        assert store.size("data") == len(DATA)
        assert [headers["Authorization"] for _, headers in server.requests] == ["Bearer secret"] * 2
        (_, headers), *_ = other.requests
        assert headers["Authorization"] is None
        assert headers["Range"] == f"bytes=0-{HEAD_BYTES - 1}"


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_every_kind_of_redirect(server: Server, code: int) -> None:
    server.faults = [faults.status(code, Location="/data")]
    assert store_of(server).size("data") == len(DATA)


def test_a_flipped_bit_is_fetched_again(server: Server, tmp_path: Path) -> None:
    expected = artifact_on(server, tmp_path)
    reader = Reader(store_of(server, "context"))
    server.faults = [faults.flip]  # comes with the file's first bytes, its header
    assert [(segment.name, reader.read(segment)) for segment in reader.manifest.segments] == expected


def test_a_bit_that_stays_flipped_is_an_error(server: Server, tmp_path: Path) -> None:
    artifact_on(server, tmp_path)
    reader = Reader(store_of(server, "context"))
    server.always = faults.flip
    with pytest.raises(CorruptError, match="wrong checksum"):
        reader.read(reader.manifest.segments[0])


def test_a_damaged_manifest(server: Server, tmp_path: Path) -> None:
    artifact_on(server, tmp_path)
    server.always = faults.flip
    with pytest.raises(ManifestError, match="damaged"):
        Reader(store_of(server, "context"))


def test_files_that_are_replaced_in_mid_read(server: Server) -> None:
    store = store_of(server)
    store.read("data", 70_000, 100)
    server.files["data"] = DATA[::-1]
    with pytest.raises(ChangedError, match="changed while"):
        store.read("data", 70_000, 100)


def test_another_artifact_after_the_manifest(server: Server, tmp_path: Path) -> None:
    artifact_on(server, tmp_path)
    reader = Reader(store_of(server, "context"))
    first = reader.manifest.segments[0]
    server.files[f"context/{first.file}"] = b"x" * len(server.files[f"context/{first.file}"])
    with pytest.raises(CorruptError, match="wrong checksum"):
        reader.read(first)


def test_a_manifest_as_large_as_a_disk(server: Server) -> None:
    server.files["context/cachegen.json"] = b" " * HEAD_BYTES
    server.always = faults.with_headers(Content_Range=f"bytes 0-{HEAD_BYTES - 1}/{1 << 40}")
    with pytest.raises(LimitError, match="the limit is"):
        Reader(store_of(server, "context"))


@pytest.mark.parametrize(("offset", "length"), [(0, 300_000), (300_000, 1), (-1, 2), (0, -1), (0, 1 << 62)])
def test_a_range_beyond_the_file(server: Server, offset: int, length: int) -> None:
    with pytest.raises(TruncatedError, match="has 262144 bytes"):
        store_of(server).read("data", offset, length)


@pytest.mark.parametrize("name", ["", "..", "../data", "a/b", "/etc/passwd", "data\0", "Data", "a?b", "a" * 65])
def test_invalid_file_names(server: Server, name: str) -> None:
    with pytest.raises(CorruptError, match="not the name"):
        store_of(server).size(name)
    assert not server.requests


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("data", {}),
        ("nothing://x", {}),
        ("https://me:secret@host/x", {}),
        ("https://host/x", {"storage_options": {"key": 1}}),
        ("memory://x", {"headers": {"a": "b"}}),
    ],
    ids=["no scheme", "unknown scheme", "credentials", "options of another scheme", "headers of another scheme"],
)
def test_invalid_urls(url: str, options: dict) -> None:
    with pytest.raises(ConfigError) as caught:
        open_files(url, **options)
    assert "secret" not in str(caught.value)


def test_threads_may_share_a_store(server: Server) -> None:
    store = store_of(server, patience=Patience(attempts=25, timeout=10, backoff=0.01))
    server.faults = [faults.status(503), faults.cut(0.5), None, faults.reset_in_body] * 5
    with ThreadPoolExecutor(8) as pool:
        offsets = range(0, 200_000, 5000)
        found = list(pool.map(lambda offset: store.read("data", offset, 5000), offsets))
    assert found == [DATA[offset : offset + 5000] for offset in offsets]


def test_secrets_are_not_shown() -> None:
    shown = repr(Access(token="secret", headers={"a": "secret"}, storage_options={"key": "secret"}))
    assert "secret" not in shown


@pytest.mark.parametrize(
    "wrong", [{"attempts": 0}, {"timeout": 0}, {"backoff": -1}, {"min_bytes_per_second": 0}], ids=str
)
def test_invalid_patience(wrong: dict) -> None:
    with pytest.raises(ConfigError):
        Patience(**wrong)
