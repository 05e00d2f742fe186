"""Shared by the tests of streaming: a context's artifact on a server, and streams with a time limit."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache as remember
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_cachegen.artifact import Reader
from hf_cachegen.cache import CacheGenCache
from hf_cachegen.config import CacheGenConfig
from hf_cachegen.stores import LocalStore
from hf_cachegen.streaming import StreamReport
from hf_cachegen.streaming.download import Download
from hf_cachegen.streaming.schedule import Part
from tests import http_server as faults
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


def damaged(server: Server, name: str, where: int) -> None:
    """Flip a bit of the file itself, so that every server gives the same wrong byte."""
    data = bytearray(server.files[name])
    data[where] ^= 1
    server.files[name] = bytes(data)


def offset(folder: Path, file: str, name: str) -> int:
    """Return the offset of a byte of that segment."""
    return Reader(LocalStore(folder)).manifest.segment(file, name).offset + 3


FAILURES: dict[str, Callable[[], Fault]] = {
    "silence": lambda: faults.silent(3),
    "stall in the body": lambda: faults.stall_in_body(3),
    "lost connection": lambda: faults.reset_in_body,
    "refused connection": lambda: faults.reset_at_once,
    "cut short": lambda: faults.cut(0.3),
    "server error": lambda: faults.status(500),
    "no right": lambda: faults.status(403),
    "gone": lambda: faults.status(404),
    "ranges ignored": lambda: faults.with_other_length,
    "wrong bytes": lambda: faults.flip,
}


@contextmanager
def silent_side(server: Server) -> Iterator[None]:
    """Answer requests for the head and the side information of the base only at the end."""
    end = threading.Event()

    def answer(request: Request, body: bytes, headers: dict[str, str]) -> None:
        if "base" in request.path and int(request.headers["Range"].removeprefix("bytes=").split("-")[0]) < 1000:
            end.wait(20)
        request.answer(206, body, headers)

    server.always = answer
    start = time.monotonic()
    try:
        yield
        assert time.monotonic() - start < 10
    finally:
        end.set()
    assert threads_end()


CHAOS = (
    faults.status(500), faults.status(403), faults.flip, faults.reset_in_body, faults.reset_at_once, faults.cut(0.5),
    faults.silent(0.4), faults.stall_in_body(0.4), faults.other_range, faults.ignore_range, faults.no_http,
    faults.trickle(0.0005),
)  # fmt: skip


def fail_at_random(server: Server, seed: int) -> None:
    """Damage every answer but the manifest, with a probability that the seed determines."""
    draw = random.Random(seed)
    share = draw.choice([0, 0.1, 0.3, 0.8])

    def answer(request: Request, body: bytes, headers: dict[str, str]) -> None:
        if "cachegen.json" not in request.path and draw.random() < share:
            draw.choice(CHAOS)(request, body, headers)
        else:
            request.answer(206, body, headers)

    server.always = answer
