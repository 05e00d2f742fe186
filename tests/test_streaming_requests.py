"""How little a stream does before its first chunk: requests, threads, and work that an earlier stream has done."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from hf_cachegen import strict_json
from hf_cachegen.artifact import BASE_FILE, Reader, chunk_name
from hf_cachegen.artifact.encoded import SIDE
from hf_cachegen.cache import CacheGenCache
from hf_cachegen.config import CacheGenConfig
from hf_cachegen.profiles.files import Profile
from hf_cachegen.stores import LocalStore, remote
from hf_cachegen.stores import http as store_http
from hf_cachegen.streaming import fetching
from tests.http_server import Request, Server
from tests.streaming_support import at_level, same_kv, serve, stream

pytestmark = pytest.mark.usefixtures("own_cache")
REFERENCE = Path(__file__).parent.parent / "eval" / "reference" / "model"


def ranges(server: Server, name: str) -> list[tuple[int, int]]:
    """Return the byte ranges of a file that were requested, in the order of arrival."""
    found = [headers["Range"].removeprefix("bytes=").split("-") for path, headers in server.requests if name in path]
    return [(int(first), int(last) + 1) for first, last in found]


@pytest.fixture
def small_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a file's opening fetch less than the side information, as it is in artifacts of real models."""
    monkeypatch.setattr(store_http, "HEAD_BYTES", 64)


@pytest.mark.usefixtures("small_heads")
def test_one_request_opens_the_base_and_fetches_its_side_information(server: Server, folder: Path, url: str) -> None:
    side = Reader(LocalStore(folder)).manifest.segment(BASE_FILE, SIDE)
    end = side.offset + side.length
    assert side.length > 64
    cache = stream(url, level=1)
    assert same_kv(cache, at_level(folder, 1))
    assert [(first, last) for first, last in ranges(server, BASE_FILE) if first < end] == [(0, end)]


@pytest.mark.usefixtures("small_heads")
def test_long_side_information_takes_a_request_of_its_own(
    server: Server, folder: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "MOST_FIRST_BYTES", 100)
    side = Reader(LocalStore(folder)).manifest.segment(BASE_FILE, SIDE)
    assert same_kv(stream(url, level=1), at_level(folder, 1))
    assert {(0, 64), (side.offset, side.offset + side.length)} <= set(ranges(server, BASE_FILE))


def test_the_manifest_is_parsed_once(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[bytes] = []
    real = strict_json.loads
    monkeypatch.setattr(strict_json, "loads", lambda data: (parsed.append(data), real(data))[1])
    stream(url, level=1)
    assert len(parsed) == 1


def late(request: Request, body: bytes, headers: dict[str, str]) -> None:
    time.sleep(0.2)
    request.answer(206, body, headers)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the threads that streams start."""
    found: list[str] = []

    class Noted(threading.Thread):
        def start(self) -> None:
            found.append(self.name)
            super().start()

    monkeypatch.setattr(fetching.threading, "Thread", Noted)
    return found


def test_few_threads_start_where_few_have_a_task(url: str, started: list[str]) -> None:
    stream(url, level=1, connections=8)
    # One fetches the side information, one the chunks, which are one request, and one finds nothing to do.
    assert 1 <= started.count("hf_cachegen-fetch") <= 3


def test_a_slow_request_does_not_hold_up_others(
    server: Server, folder: Path, url: str, started: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk = Reader(LocalStore(folder)).manifest.segment(BASE_FILE, chunk_name(0))
    monkeypatch.setattr(fetching, "request_bytes", lambda *_: chunk.length)
    monkeypatch.setattr(store_http, "HEAD_BYTES", 64)
    server.always = late
    stream(url, level=1, connections=4)
    assert started.count("hf_cachegen-fetch") == 4


class Counted:
    """Counts how often a profile's file is read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reads = 0
        real = Profile.from_bytes

        def from_bytes(*args: Any) -> Profile:
            self.reads += 1
            return real(*args)

        monkeypatch.setattr(Profile, "from_bytes", from_bytes)


def test_a_profile_is_read_once_for_a_model(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = hf.AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.bfloat16)
    config, ids = CacheGenConfig(transform="klt", chunk_tokens=64), torch.arange(100)[None] + 3
    CacheGenCache.from_context(model, ids, config).save_pretrained(tmp_path / "artifact")
    url, counted, profiles = serve(server, tmp_path / "artifact"), Counted(monkeypatch), []
    gc.collect()
    for _ in range(2):
        cache = CacheGenCache.stream(url, model, level=1)
        assert cache.profile is not None
        profiles.append(weakref.ref(cache.profile))
        del cache
        gc.collect()
    assert profiles[0]() is profiles[1]() is not None
    assert counted.reads <= 1
    del model
    gc.collect()
    assert profiles[0]() is None
