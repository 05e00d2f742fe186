"""A server without byte ranges: files are fetched whole, once, with all checks."""

from __future__ import annotations

import io
import logging
import socketserver
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from hf_cachegen.artifact import PROFILE_FILE, Limits, Reader
from hf_cachegen.cache import CacheGenCache
from hf_cachegen.errors import CorruptError, LimitError, StoreError
from hf_cachegen.stores import Access, Patience, RemoteStore, open_store
from hf_cachegen.stores import http as store_http
from hf_cachegen.stores.profiles import fetch
from hf_cachegen.stores.remote import open_files
from hf_cachegen.stores.survey import pull
from tests import http_server as faults
from tests.http_server import Server
from tests.small_artifact import contents
from tests.streaming_support import CHUNKS, at_level, report, same_kv, stream, write
from tests.tiny_models import shared

pytestmark = pytest.mark.usefixtures("own_cache")
BIG = bytes(range(251)) * 8000  # more than is taken when a file is opened
IMPATIENT = Patience(attempts=2, timeout=5, backoff=0.01)


class Plain(SimpleHTTPRequestHandler):
    """The handler of `python -m http.server`, which records the requested paths."""

    asked: list[str]

    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        super().do_GET()

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def serving(folder: Path, kind: type[socketserver.TCPServer] = ThreadingHTTPServer) -> Iterator[Any]:
    with kind(("127.0.0.1", 0), partial(Plain, directory=str(folder))) as web:
        web.asked = []  # type: ignore[attr-defined]
        web.handle_error = lambda *_: None  # type: ignore[method-assign]
        web.url = f"http://127.0.0.1:{web.server_address[1]}"  # type: ignore[attr-defined]
        thread = threading.Thread(target=web.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        with patch.dict("os.environ", {"no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}):
            yield web
        web.shutdown()
        thread.join()


@pytest.fixture(params=[ThreadingHTTPServer, HTTPServer], ids=["threads", "one request at a time"])
def web(request: pytest.FixtureRequest, folder: Path) -> Iterator[Any]:
    with serving(folder.parent, request.param) as found:
        yield found


@pytest.fixture(params=[1 << 20, 100], ids=["small files", "large files"])
def head(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """A file is large above this size: its bytes do not come with opening it."""
    monkeypatch.setattr(store_http, "WHOLE_HEAD_BYTES", request.param)
    monkeypatch.setattr(store_http, "HEAD_BYTES", min(request.param, store_http.HEAD_BYTES))
    return int(request.param)


def test_loading(web: Any, folder: Path, head: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "hf_cachegen.stores"):
        for _ in range(2):
            found = CacheGenCache.from_pretrained(f"{web.url}/artifact", patience=IMPATIENT)
            assert same_kv(found, at_level(folder))
    (said,) = [record for record in caplog.records if "ignores byte ranges" in record.getMessage()]
    assert web.url.removeprefix("http://") in said.getMessage()
    for name in contents(folder):
        # The second time only the manifest is asked for; a large file is opened, then fetched.
        most = 2 + 2 * (head < 1000) if name == "cachegen.json" else 1 + (head < 1000)
        assert web.asked.count(f"/artifact/{name}") <= most


@pytest.mark.parametrize("options", [{}, {"slo": 20.0}, {"level": 1}, {"refine": "while_generating"}], ids=str)
def test_streaming(web: Any, folder: Path, head: int, options: dict[str, Any]) -> None:
    cache = CacheGenCache.stream(f"{web.url}/artifact", shared("llama"), **options)
    if cache.refinement is not None:
        assert cache.refinement.wait(30)
    assert report(cache).text_chunks == 0
    assert same_kv(cache, at_level(folder, options.get("level")))
    assert not report(cache).faults
    assert all(web.asked.count(f"/artifact/{name}") <= 2 for name in contents(folder))


def test_a_copy_a_profile_and_a_check(web: Any, folder: Path, tmp_path: Path) -> None:
    pull(f"{web.url}/artifact", tmp_path / "copy", Access(patience=IMPATIENT))
    assert contents(tmp_path / "copy") == contents(folder)
    (folder / PROFILE_FILE).write_bytes(BIG)
    assert fetch(f"{web.url}/artifact", Access(patience=IMPATIENT), Limits())[0] == BIG
    with pytest.raises(LimitError):
        fetch(f"{web.url}/artifact", Access(patience=IMPATIENT), Limits(max_profile_bytes=len(BIG) - 1))


def test_a_large_file_is_fetched_once_by_all_threads(tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(BIG)
    with serving(tmp_path) as web:
        files = open_files(web.url, patience=IMPATIENT)
        store = RemoteStore(files)
        assert store.size("big") == len(BIG)
        found: list[bool] = []

        def read(start: int) -> None:
            found.append(store.read("big", start, 1000) == BIG[start : start + 1000])

        threads = [threading.Thread(target=read, args=(start,)) for start in range(100_000, 900_000, 100_000)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [True] * 8
        assert web.asked == ["/big", "/big"]


def test_flipped_bits_are_found_after_a_second_fetch(tmp_path: Path, head: int) -> None:
    write("llama", tmp_path / "artifact")
    path = tmp_path / "artifact" / "base.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with serving(tmp_path) as web:
        with pytest.raises(CorruptError):
            CacheGenCache.from_pretrained(f"{web.url}/artifact", patience=IMPATIENT)
        assert web.asked.count("/artifact/base.safetensors") >= 2
        cache = stream(f"{web.url}/artifact", level=1)
        assert report(cache).text_chunks == 1
        assert report(cache).text_chunks < CHUNKS


def test_a_size_that_is_not_the_manifests_is_not_fetched(tmp_path: Path) -> None:
    """A size that a server announces is never trusted, by a reader or a prefetch."""
    write("llama", tmp_path / "artifact")
    with open(tmp_path / "artifact" / "base.safetensors", "ab") as file:
        file.truncate(1 << 32)
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "cachegen.json").write_bytes(b" " * (2 << 20))
    with serving(tmp_path) as web:
        reader = Reader(open_store(f"{web.url}/artifact", Access(patience=IMPATIENT)))
        reader.prefetch(reader.manifest.segments)
        with pytest.raises(CorruptError, match=f"got {1 << 32}; "):
            reader.verify()
        assert web.asked.count("/artifact/base.safetensors") == 1
        with pytest.raises(LimitError):
            Reader(open_store(f"{web.url}/plain", Access(patience=IMPATIENT)))


def test_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "big").write_bytes(BIG)
    monkeypatch.setattr("hf_cachegen.stores.whole.shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with serving(tmp_path) as web:
        store = RemoteStore(open_files(web.url, patience=IMPATIENT))
        store.size("big")
        with pytest.raises(StoreError, match=f"all {len(BIG)} bytes are needed, and {tempfile.gettempdir()} has 1000"):
            store.read("big", len(BIG) - 10, 10)


def test_a_server_that_stops_serving_ranges(server: Server) -> None:
    """A range of the middle is cut short; the next answer is the whole file."""
    server.files["data"] = BIG
    store = RemoteStore(open_files(server.url, patience=IMPATIENT))
    store.size("data")
    server.faults = [faults.cut(0.5), faults.ignore_range]
    assert store.read("data", 1_000_000, 1000) == BIG[1_000_000:1_001_000]
    assert store.read("data", 2_000_000, 1000) == BIG[2_000_000:2_001_000]
    assert len(server.requests) == 4


def test_a_file_that_changes_in_between(tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(BIG)
    with serving(tmp_path) as web:
        store = RemoteStore(open_files(web.url, patience=IMPATIENT))
        store.size("big")
        (tmp_path / "big").write_bytes(io.BytesIO(BIG).read(len(BIG) - 1))
        with pytest.raises(StoreError, match=r"ignores byte ranges|changed"):
            store.read("big", 1_000_000, 10)
