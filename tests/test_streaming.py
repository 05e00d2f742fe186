"""Streams on a working network give the tensors of `from_pretrained` or of a prefill, and a report."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_cachegen.cache import CacheGenCache
from hf_cachegen.config import CacheGenConfig
from hf_cachegen.errors import (
    ArtifactNotFoundError,
    ConfigError,
    LevelError,
    PromptMismatchError,
    StreamCancelledError,
    WrongModelError,
)
from hf_cachegen.streaming import (
    Adaptive,
    ChunkChosen,
    ChunkFetched,
    ChunkReady,
    ContextReady,
    Event,
    Fixed,
    StreamFinished,
    StreamReport,
    StreamStarted,
    measure,
)
from hf_cachegen.streaming.prefill_speed import speed_of
from tests import http_server as faults
from tests.http_server import Server
from tests.streaming_support import (
    CHUNKS,
    CONTEXT_TOKENS,
    at_level,
    exact,
    same_kv,
    serve,
    threads_end,
    write,
)
from tests.tiny_models import SUPPORTED, shared, tokens

pytestmark = pytest.mark.usefixtures("own_cache")

ROOT = Path(__file__).resolve().parent.parent


def stream(location: Any, name: str = "llama", **options: Any) -> CacheGenCache:
    return CacheGenCache.stream(location, shared(name), **options)


def stream_report(cache: CacheGenCache) -> StreamReport:
    assert isinstance(cache.report, StreamReport)
    return cache.report


@pytest.mark.parametrize("name", SUPPORTED)
@pytest.mark.parametrize("level", [1, 3])
def test_a_fixed_level_equals_loading_that_level(server: Server, tmp_path: Path, name: str, level: int) -> None:
    folder = write(name, tmp_path / name)
    cache = stream(serve(server, folder), name, level=level)
    assert same_kv(cache, at_level(folder, level))
    report = stream_report(cache)
    assert (report.level, {chunk.level for chunk in report.chunks}) == (level, {level})
    assert threads_end()


@pytest.mark.parametrize("name", SUPPORTED)
def test_text_equals_a_prefill(server: Server, tmp_path: Path, name: str) -> None:
    cache = stream(serve(server, write(name, tmp_path / name)), name, level="text")
    prefilled = exact(name).kv
    for found, expected in zip(cache.kv.keys + cache.kv.values, prefilled.keys + prefilled.values, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    report = stream_report(cache)
    assert (report.level, report.text_chunks, report.wire_bytes) == (None, CHUNKS, 0)


@pytest.mark.parametrize("options", [
    {},
    {"slo": 30.0},
    {"slo": 30.0, "policy": Adaptive(text=False, caution=1.0)},
    {"policy": Fixed()},
    {"connections": 1},
], ids=str)  # fmt: skip
def test_with_enough_time_the_finest_level_is_streamed(url: str, folder: Path, options: dict[str, Any]) -> None:
    cache = stream(url, **options)
    assert same_kv(cache, at_level(folder))
    assert cache.refinement is not None
    assert cache.refinement.done
    assert threads_end()


def test_without_refining_each_chunk_is_fetched_once_at_the_middle_level_or_finer(url: str) -> None:
    report = stream_report(stream(url, slo=30.0, refine="off"))
    levels = [chunk.level for chunk in report.chunks]
    assert levels == [chunk.first_level for chunk in report.chunks]
    assert set(levels) <= {2, 3}  # the middle level until the throughput is known


def test_a_folder_streams(folder: Path) -> None:
    cache = stream(folder, slo=30.0)
    assert same_kv(cache, at_level(folder))
    assert stream_report(cache).wire_bytes == 0


def test_segments_on_this_disk_are_not_fetched_again(server: Server, url: str, folder: Path) -> None:
    stream(url)
    before = len(server.requests)
    cache = stream(url, slo=30.0)
    assert same_kv(cache, at_level(folder))
    assert stream_report(cache).wire_bytes == 0
    assert [path for path, _ in server.requests[before:]] == ["cachegen.json"]


def test_the_paper_policy_recomputes_where_that_fits(url: str) -> None:
    measure(shared("llama"))
    report = stream_report(stream(url, slo=30.0, policy="paper"))
    assert report.text_chunks == CHUNKS
    assert "recomputing all that remains" in report.chunks[0].why


def test_neighbours_share_requests(server: Server, tmp_path: Path) -> None:
    """Each file is opened once, and its remaining segments are fetched in runs."""
    config = CacheGenConfig(transform="identity", chunk_tokens=8)
    context = tokens(1600, seed=9)
    folder = tmp_path / "artifact"
    CacheGenCache.from_context(shared("llama"), context, config).save_pretrained(folder)
    cache = stream(serve(server, folder), connections=2)
    assert same_kv(cache, at_level(folder))
    paths = [path for path, _ in server.requests]
    assert len(paths) < 40 < len(stream_report(cache).chunks)


def test_the_report_and_the_events(url: str, folder: Path) -> None:
    events: list[Event] = []
    measure(shared("llama"))
    cache = stream(url, slo=30.0, on_event=events.append)
    report = stream_report(cache)
    assert report.context_tokens == CONTEXT_TOKENS
    assert (report.slo, report.ttft, report.met, report.finished, report.faults) == (30.0, None, None, True, ())
    assert 0 < report.wire_bytes <= (report.loaded_bytes or 0) <= sum(f.stat().st_size for f in folder.iterdir())
    assert report.loaded_bytes == at_level(folder).report.loaded_bytes
    for index, chunk in enumerate(report.chunks):
        assert (chunk.index, chunk.first) == (index, 16 * index)
        assert chunk.choice == "level 3"
        assert chunk.nbytes == chunk.wire_bytes > 0
        assert all((chunk.why, chunk.transfer_seconds, chunk.decode_seconds, chunk.prefill_seconds))
        assert chunk.recompute_seconds is None
    assert report.to_dict()["chunks"][0]["choice"] == "level 3"
    kinds = [type(event) for event in events]
    assert [kinds[0], *kinds[-2:]] == [StreamStarted, ContextReady, StreamFinished]
    assert {ChunkChosen, ChunkFetched, ChunkReady} < set(kinds)
    assert [event.seconds for event in events] == sorted(event.seconds for event in events)
    names = {event.name for event in events}
    assert "hf_cachegen.stream.chunk.ready" in names
    fetched = next(event for event in events if isinstance(event, ChunkFetched))
    assert fetched.attributes()["hf_cachegen.stream.nbytes"] == fetched.nbytes
    assert isinstance(events[-1].attributes()["hf_cachegen.stream.report"], dict)


def test_a_stream_survives_a_callback_that_fails(url: str, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fail(event: Event) -> None:
        raise RuntimeError("a bug of the user's")

    assert same_kv(stream(url, on_event=fail), at_level(folder))
    assert "a bug of the user's" in caplog.text


def test_a_stream_can_be_cancelled(server: Server, url: str) -> None:
    """Cancel while chunks arrive a byte at a time."""
    cancel = threading.Event()
    slow = faults.trickle(0.05)
    server.always = lambda request, body, headers: (
        slow(request, body, headers) if "refine" in request.path else request.answer(206, body, headers)
    )

    def on_event(event: Event) -> None:
        if isinstance(event, ChunkFetched):
            cancel.set()

    with pytest.raises(StreamCancelledError):
        stream(url, cancel=cancel, on_event=on_event)
    assert threads_end()


def test_refining_continues_after_the_call_returns(url: str, folder: Path) -> None:
    cache = stream(url, refine="while_generating")
    assert cache.refinement is not None
    assert all(chunk.first_level == 1 for chunk in stream_report(cache).chunks)
    assert cache.refinement.wait(30)
    assert same_kv(cache, at_level(folder))
    report = stream_report(cache)
    assert (report.level, report.finished) == (3, True)
    assert all(chunk.first_level == 1 and chunk.level == 3 for chunk in report.chunks)


def test_cancelling_a_refinement_leaves_no_thread(server: Server, url: str, folder: Path) -> None:
    """Refinements hang in mid-body; the context does not change."""
    hanging = faults.stall_in_body(20)
    server.always = lambda request, body, headers: (
        hanging(request, body, headers) if "refine" in request.path else request.answer(206, body, headers)
    )
    cache = stream(url, refine="while_generating", stall_seconds=0.5)
    assert cache.refinement is not None
    cache.refinement.cancel()
    assert cache.refinement.done
    assert same_kv(cache, at_level(folder, 1))
    assert threads_end()


def test_saving_a_streamed_cache_copies_the_artifact(url: str, folder: Path, tmp_path: Path) -> None:
    cache = stream(url, level=1)
    cache.save_pretrained(tmp_path / "copy")
    assert same_kv(at_level(tmp_path / "copy"), at_level(folder))


@pytest.mark.parametrize("options", [
    {"slo": 0.0}, {"slo": -1.0}, {"refine": "sometimes"}, {"prompt_tokens": -1}, {"stall_seconds": 0.0},
    {"connections": 0}, {"policy": "best"}, {"level": 0}, {"level": "exact"},
], ids=str)  # fmt: skip
def test_options_out_of_range_are_refused(url: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        stream(url, **options)


def test_a_missing_level_is_refused(url: str) -> None:
    with pytest.raises(LevelError):
        stream(url, level=4)


def test_another_model_is_refused(url: str) -> None:
    with pytest.raises(WrongModelError):
        stream(url, "qwen3")
    assert threads_end()


def test_a_prompt_without_the_context_is_refused(url: str) -> None:
    ids = tokens(20, seed=77)
    with pytest.raises(PromptMismatchError):
        stream(url, prompt=(ids, torch.ones_like(ids)))
    assert threads_end()


def test_a_missing_location_is_an_error(server: Server) -> None:
    with pytest.raises(ArtifactNotFoundError):
        stream(server.url)


@pytest.mark.slow
def test_peak_memory_is_the_context_and_a_few_chunks(tmp_path: Path) -> None:
    """Measure in a process of its own: the peak of a stream above the memory before it, in units of the context."""
    script = tmp_path / "peak.py"
    script.write_text(PEAK, encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    made = subprocess.run(
        [sys.executable, str(script), "write", str(tmp_path / "big")], env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    done = subprocess.run(
        [sys.executable, str(script), "stream", str(tmp_path / "big")], env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    peak, context, chunk = map(int, done.stdout.split())
    # A chunk that is decoded, and the bytes that were read ahead of it.
    assert peak < context + 5 * chunk


PEAK = """
import resource, sys, torch
import transformers as hf
from hf_cachegen.cache import CacheGenCache
from hf_cachegen.config import CacheGenConfig

torch.set_num_threads(1)
torch.manual_seed(0)
config = hf.LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=8, num_attention_heads=8,
                        num_key_value_heads=8, head_dim=64, max_position_embeddings=1 << 16)
model = hf.LlamaForCausalLM(config).eval()
ids = torch.arange(4096)[None] % 64
codec = CacheGenConfig(transform="identity", chunk_tokens=64, measure=False)
if sys.argv[1] == "write":
    CacheGenCache.from_context(model, ids, codec).save_pretrained(sys.argv[2])
    CacheGenCache.from_context(model, ids[:, :256], codec).save_pretrained(sys.argv[2] + "-small")
else:
    CacheGenCache.stream(sys.argv[2] + "-small", model, level=1)  # loads the libraries
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cache = CacheGenCache.stream(sys.argv[2], model, level=1)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    nbytes = cache.kv.geometry.nbytes
    print((after - before) * 1024, nbytes, nbytes * 64 // 4096)
"""


def test_measurements_are_kept_for_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = shared("llama")
    speed = measure(model)
    assert speed.known
    assert speed_of(model) is speed
    monkeypatch.setattr("hf_cachegen.streaming.prefill_speed._known", {})
    again = speed_of(model)
    assert again is not speed
    assert again.seconds(0, 100) == speed.seconds(0, 100)
    assert (again.seconds(0, 100) or 0) > 0
