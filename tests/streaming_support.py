"""Shared by the tests of streaming: a context's artifact on a server, and streams with a time limit."""

from __future__ import annotations

import threading
import time
from functools import cache as remember
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_cachegen.cache import CacheGenCache
from hf_cachegen.config import CacheGenConfig
from hf_cachegen.streaming import StreamReport
from hf_cachegen.streaming.download import Download
from hf_cachegen.streaming.schedule import Part
from tests.http_server import Fault, Request, Server
from tests.small_artifact import contents
from tests.tiny_models import shared, tokens

CONTEXT_TOKENS = 100
CHUNK_TOKENS = 16
CONTEXT = tokens(CONTEXT_TOKENS, seed=5)
CONFIG = CacheGenConfig(transform="identity", chunk_tokens=CHUNK_TOKENS, protect_first=2, protect_last=4)
CHUNKS = -(-CONTEXT_TOKENS // CHUNK_TOKENS)


@remember
def exact(name: str) -> CacheGenCache:
    """Return the cache of CONTEXT, from a prefill."""
    return CacheGenCache.from_context(shared(name), CONTEXT, CONFIG)


def write(name: str, folder: Path, config: CacheGenConfig | None = None) -> Path:
    exact(name).save_pretrained(folder, config)
    return folder


def serve(server: Server, folder: Path, under: str = "") -> str:
    """Put an artifact on the server, and return its URL."""
    server.files.update({f"{under}/{name}".lstrip("/"): data for name, data in contents(folder).items()})
    return f"{server.url}/{under}".rstrip("/")


def at_level(folder: Path, level: int | None = None) -> CacheGenCache:
    return CacheGenCache.from_pretrained(folder, level=level)


def same_kv(a: Any, b: Any, tokens: slice = slice(None)) -> bool:
    pairs = zip((*a.kv.keys, *a.kv.values), (*b.kv.keys, *b.kv.values), strict=True)
    return all(torch.equal(x[:, :, tokens], y[:, :, tokens]) for x, y in pairs)


LIMIT_SECONDS = 60.0
"""Far above the time of any of these streams; below that of a hang."""


def stream(location: Any, **options: Any) -> CacheGenCache:
    """Stream from a location that may fail; check that the call ends in time and leaves no thread."""
    start = time.monotonic()
    try:
        return CacheGenCache.stream(location, shared("llama"), stall_seconds=0.5, **options)
    finally:
        assert time.monotonic() - start < LIMIT_SECONDS
        assert threads_end()


def report(cache: CacheGenCache) -> StreamReport:
    assert isinstance(cache.report, StreamReport)
    return cache.report


def damage(monkeypatch: pytest.MonkeyPatch, *parts: Part) -> None:
    """Change parts after their checksum was verified."""
    arrived = Download.arrived

    def damaged(download: Download, part: Part, data: bytes, *rest: Any) -> None:
        if part in parts:
            changed = bytearray(data)
            changed[-9] ^= 64
            data = bytes(changed)
        arrived(download, part, data, *rest)

    monkeypatch.setattr(Download, "arrived", damaged)


def only(files: str, fault: Fault) -> Fault:
    """Return the fault for every request for those files; other files are served."""

    def answer(request: Request, body: bytes, headers: dict[str, str]) -> None:
        if files in request.path:
            fault(request, body, headers)
        else:
            request.answer(206, body, headers)

    return answer


def refinements_wait(server: Server) -> threading.Event:
    """Return an event; requests for refinements are answered once it is set."""
    gate = threading.Event()
    server.always = lambda request, body, headers: (
        gate.wait(20) if "refine" in request.path else None,
        request.answer(206, body, headers),
    )[1]
    return gate


def refining_waits(cache: CacheGenCache) -> tuple[threading.Event, threading.Event]:
    """Make each refinement wait while it is decoded; return the events that report one and that release it."""
    assert cache.refinement is not None
    writer, decoding, go_on = cache.refinement._loader.writer, threading.Event(), threading.Event()
    rows = writer.rows

    def slowly(*arguments: Any) -> Any:
        decoding.set()
        go_on.wait(20)
        return rows(*arguments)

    writer.rows = slowly  # type: ignore[method-assign]
    return decoding, go_on


def threads_end(within: float = 10.0) -> bool:
    """Report whether all threads of the package end within a number of seconds."""
    end = time.monotonic() + within
    while any(thread.name.startswith("hf_cachegen") for thread in threading.enumerate()):
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True
