"""Streams on a network that fails: another source, a coarser level or text; every stream ends."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_cachegen.artifact.artifact import Artifact, write
from hf_cachegen.artifact.encoded import encode_kv
from hf_cachegen.cache import CacheGenCache
from hf_cachegen.codec.launching import Launches
from hf_cachegen.config import CacheGenConfig
from hf_cachegen.errors import (
    CorruptError,
    StoreError,
    StreamCancelledError,
    UnsupportedModelError,
)
from hf_cachegen.models.requirements import positions_change
from hf_cachegen.stores import LocalStore
from hf_cachegen.streaming import Adaptive, Event, SourceFailed, measure
from hf_cachegen.streaming.failover import ROUNDS
from hf_cachegen.streaming.sources import Source
from tests import http_server as faults
from tests.http_server import Request, Server
from tests.streaming_support import (
    CHUNKS,
    CONFIG,
    FAILURES,
    at_level,
    damaged,
    offset,
    only,
    report,
    same_kv,
    serve,
    silent_side,
    stream,
    threads_end,
)
from tests.tiny_models import shared, tokens

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("options", [{}, {"slo": 20.0}, {"level": 2}], ids=str)
def test_a_fallback_gives_what_the_first_source_fails_to_give(
    server: Server, spare: Server, folder: Path, failure: str, options: dict[str, Any]
) -> None:
    events: list[Event] = []
    server.always = only("refine", FAILURES[failure]())
    cache = stream(serve(server, folder), fallback=[serve(spare, folder)], on_event=events.append, **options)
    assert same_kv(cache, at_level(folder, options.get("level")))
    assert server.url in "".join(report(cache).faults)
    assert any(isinstance(event, SourceFailed) and event.location == server.url for event in events)


@pytest.mark.parametrize("failure", ["lost connection", "wrong bytes", "server error"])
def test_without_a_fallback_refinements_are_recomputed_or_left_out(server: Server, folder: Path, failure: str) -> None:
    """Their chunks are recomputed if there is time, else they stay coarse."""
    server.always = only("refine-2", FAILURES[failure]())
    cache = stream(serve(server, folder), refine="while_generating")
    assert cache.refinement is not None
    cache.refinement.wait(60)
    assert same_kv(cache, at_level(folder, 2))
    assert report(cache).level == 2
    assert report(cache).faults

    cache = stream(server.url)
    assert report(cache).text_chunks == CHUNKS
    exact = CacheGenCache.from_context(shared("llama"), cache.input_ids)
    for one, other in zip(cache.kv.keys, exact.kv.keys, strict=True):
        assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("failure", ["stall in the body", "lost connection", "server error", "gone"])
def test_without_a_fallback_the_base_is_recomputed(server: Server, folder: Path, failure: str) -> None:
    """The heads of files arrive with the side information, then nothing more."""
    big = CacheGenCache.from_context(shared("llama"), tokens(2000, seed=6), CacheGenConfig(transform="identity"))
    big.save_pretrained(folder.parent / "big", CacheGenConfig(transform="identity", lossless=True, levels=1))
    failing = FAILURES[failure]()

    def fault(request: Request, body: bytes, headers: dict[str, str]) -> None:
        head = request.headers["Range"].startswith("bytes=0-")
        (request.answer(206, body, headers) if head or "base" not in request.path else failing(request, body, headers))

    server.always = fault
    cache = stream(serve(server, folder.parent / "big"), slo=40.0)
    assert report(cache).text_chunks > 0
    assert same_kv(cache, big) or max(
        float((a - b).abs().max()) for a, b in zip(cache.kv.keys, big.kv.keys, strict=True)
    ) < 1e-3  # fmt: skip


def test_a_chunk_that_is_damaged_everywhere_is_recomputed(server: Server, spare: Server, folder: Path) -> None:
    url, other = serve(server, folder), serve(spare, folder)
    where = offset(folder, "base.safetensors", "chunk-00003")
    for each in (server, spare):
        damaged(each, "base.safetensors", where)
    cache = stream(url, fallback=[other])
    choices = [chunk.choice for chunk in report(cache).chunks]
    assert choices == ["level 3"] * 3 + ["text"] + ["level 3"] * (CHUNKS - 4)
    assert report(cache).chunks[3].faults
    assert same_kv(cache, at_level(folder), slice(0, 48))
    assert same_kv(cache, at_level(folder), slice(64, None))


def test_a_refinement_that_is_damaged_everywhere_is_left_out(
    server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only its chunk is recomputed, or stays coarse where recomputing is not possible."""
    url = serve(server, folder)
    damaged(server, "refine-1.safetensors", offset(folder, "refine-1.safetensors", "chunk-00002"))
    cache = stream(url)
    assert [chunk.level for chunk in report(cache).chunks] == [3, 3, None] + [3] * (CHUNKS - 3)
    assert report(cache).chunks[2].why == "no source has it finer than level 1"
    assert same_kv(cache, at_level(folder, 3), slice(48, 100))

    monkeypatch.setattr("hf_cachegen.streaming.stream.positions_change", lambda *_: True)
    cache = stream(url)
    assert [chunk.level for chunk in report(cache).chunks] == [3, 3, 1] + [3] * (CHUNKS - 3)
    assert same_kv(cache, at_level(folder, 1), slice(32, 48))


def test_a_segment_with_the_right_checksum_that_cannot_be_decoded_is_recomputed(
    server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = Launches.add

    def failing(self: Any, parts: Any, span: Any, row: int) -> None:
        if span.first == 16:
            raise CorruptError("the coder's own check failed")
        add(self, parts, span, row)

    monkeypatch.setattr(Launches, "add", failing)
    cache = stream(serve(server, folder))
    assert [chunk.level for chunk in report(cache).chunks][:3] == [3, None, 3]
    assert "cannot be decoded" in report(cache).chunks[1].faults[0]


def test_silence_instead_of_side_information_delays_no_stream(server: Server, folder: Path) -> None:
    """Recomputing needs no side information: it begins at the last moment, not when the source has failed."""
    measure(shared("llama"))
    url = serve(server, folder)
    with silent_side(server):
        cache = CacheGenCache.stream(url, shared("llama"), slo=1.5, stall_seconds=20.0)
    assert report(cache).text_chunks == CHUNKS
    assert not report(cache).faults


def test_a_stream_that_waits_for_side_information_can_be_cancelled(server: Server, folder: Path) -> None:
    url, cancel = serve(server, folder), threading.Event()
    threading.Timer(0.5, cancel.set).start()
    with silent_side(server), pytest.raises(StreamCancelledError):
        CacheGenCache.stream(url, shared("llama"), cancel=cancel, stall_seconds=20.0)


def test_a_decoder_of_the_source_before_is_not_used(
    server: Server, spare: Server, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest and the side information of the first source arrive, its tokens do not. The next
    source has other steps, which cannot be seen in its streams.
    """
    exact = CacheGenCache.from_context(shared("llama"), at_level(folder).input_ids)
    first = Artifact(LocalStore(folder))
    doubled = encode_kv([2 * x for x in exact.kv.keys], [2 * x for x in exact.kv.values], CONFIG)
    write(doubled, tmp_path / "other", input_ids=first.input_ids, fingerprint=first.fingerprint)
    decoder, late = Source.decoder, threading.Event()

    def slowly(self: Source) -> Any:
        found = decoder(self)
        if self.location == server.url:
            late.wait(1.0)
        return found

    monkeypatch.setattr(Source, "decoder", slowly)
    server.always = only("tokens", faults.status(404))
    cache = stream(serve(server, folder), fallback=[serve(spare, tmp_path / "other")])
    time.sleep(1.2)
    assert same_kv(cache, at_level(tmp_path / "other"))


def test_a_silent_fallback_delays_no_stream(server: Server, spare: Server, folder: Path) -> None:
    """All threads wait for its manifest; the stream waits for none of them."""
    end = threading.Event()
    server.always = only("base", faults.status(404))
    spare.always = lambda request, body, headers: (end.wait(20), request.answer(206, body, headers))[1]
    measure(shared("llama"))
    start = time.monotonic()
    try:
        cache = CacheGenCache.stream(
            serve(server, folder), shared("llama"), slo=2.0, stall_seconds=5.0, fallback=[serve(spare, folder)]
        )
        assert time.monotonic() - start < 10
        assert report(cache).text_chunks == CHUNKS
    finally:
        end.set()
    assert threads_end()


def test_losing_all_sources_is_reported_once(server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of recomputing has no effect on it while a request hangs. Refinements hang too: one that arrives
    between two rounds of silence would reset the count of rounds.
    """
    monkeypatch.setattr("hf_cachegen.streaming.bandwidth.Bandwidth.silence", lambda _: 1000.0)
    server.always = lambda request, body, headers: (
        time.sleep(3) if re.search("base|refine", request.path) else request.answer(206, body, headers)
    )
    cache = stream(serve(server, folder))
    assert report(cache).text_chunks == CHUNKS
    # On a busy machine a request for side information may also time out.
    assert sum("silent for 1000.0 s" in fault for fault in report(cache).faults) <= ROUNDS
    assert 1 <= len(report(cache).faults) <= 2 * ROUNDS


def test_without_side_information_all_is_recomputed(server: Server, folder: Path) -> None:
    url = serve(server, folder)
    damaged(server, "base.safetensors", offset(folder, "base.safetensors", "side"))
    assert report(stream(url)).text_chunks == CHUNKS


def test_without_recomputing_the_last_error_is_raised(
    server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_cachegen.streaming.stream.positions_change", lambda *_: True)
    assert not positions_change(shared("llama").config, 1, 2)
    server.always = only("base", faults.status(500))
    with pytest.raises(StoreError):
        stream(serve(server, folder), policy=Adaptive())
    server.always = None
    with pytest.raises(UnsupportedModelError):
        stream(server.url, level="text")


def test_an_interrupt_from_the_keyboard_leaves_no_thread(server: Server, folder: Path, monkeypatch: Any) -> None:
    """Interrupt the calling thread while it waits for bytes that do not arrive."""
    server.always = only("refine", faults.stall_in_body(3))

    def interrupt(self: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_cachegen.streaming.fetching.Fetcher.watch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        stream(serve(server, folder))


def test_a_thread_that_dies_of_a_bug_ends_the_stream(server: Server, folder: Path, monkeypatch: Any) -> None:
    def bug(*_: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("hf_cachegen.streaming.sources.Source.read", bug)
    with pytest.raises(ZeroDivisionError):
        stream(serve(server, folder))


def test_a_refinement_that_cannot_be_decoded_leaves_the_coarser_level(
    server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = Launches.add

    def failing(self: Any, parts: Any, span: Any, row: int) -> None:
        add(self, parts, span, row)
        if span.first == 16 and len(parts) > 1:
            raise CorruptError("the coder's own check failed")

    monkeypatch.setattr(Launches, "add", failing)
    url = serve(server, folder)
    cache = CacheGenCache.stream(url, shared("llama"), refine="while_generating")
    assert cache.refinement is not None
    assert cache.refinement.wait(30)
    assert [chunk.level for chunk in report(cache).chunks] == [3, 1] + [3] * (CHUNKS - 2)
    monkeypatch.undo()
    assert same_kv(cache, at_level(folder, 1), slice(16, 32))
