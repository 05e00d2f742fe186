"""Edge cases of streams: endings while work is under way, reports, and options."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from hf_cachegen.cache import CacheGenCache
from hf_cachegen.config import CacheGenConfig
from hf_cachegen.errors import ConfigError
from hf_cachegen.generation import generate
from hf_cachegen.stores import Access, Patience
from hf_cachegen.streaming import (
    Adaptive,
    Event,
    FirstToken,
    SourceFailed,
    StreamOptions,
    StreamReport,
    StreamStarted,
)
from hf_cachegen.streaming.bandwidth import Bandwidth
from hf_cachegen.streaming.chunk import Chunk
from hf_cachegen.streaming.fetching import Fetcher
from hf_cachegen.streaming.locations import locations_of
from hf_cachegen.streaming.prefill_speed import speed_of
from hf_cachegen.streaming.schedule import Schedule
from hf_cachegen.streaming.window import request_bytes
from tests.http_server import Server
from tests.streaming_support import (
    CONTEXT,
    CONTEXT_TOKENS,
    at_level,
    refinements_wait,
    refining_waits,
    same_kv,
    serve,
    threads_end,
)
from tests.tiny_models import shared, tokens

pytestmark = pytest.mark.usefixtures("own_cache")

ROOT = Path(__file__).resolve().parent.parent
PROMPT = torch.cat([CONTEXT, tokens(7, seed=11)], 1)


# Endings while work is under way.


def test_a_complete_context_does_not_wait_for_requests_that_hang(
    server: Server, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a silent server would decide whether the SLO is met."""
    monkeypatch.setattr("hf_cachegen.streaming.stream.END_SECONDS", 60.0)
    gate = refinements_wait(server)
    start = time.monotonic()
    CacheGenCache.stream(url, shared("llama"), slo=1.0, stall_seconds=30.0)
    assert time.monotonic() - start < 10
    gate.set()
    assert threads_end()


def test_bytes_that_arrive_after_the_end_are_dropped() -> None:
    """The loader of another stream may have replaced the one that asked."""
    arrived: list[Any] = []
    sent, go_on = threading.Event(), threading.Event()

    class Slow:
        location = "slow"

        def open(self) -> None: ...

        def is_local(self, segment: Any) -> bool:
            return True

        def ranges(self, segments: Any, most: float) -> list[Any]:
            return []

        def release(self, ranges: Any) -> None: ...

        def read(self, segments: Any) -> Iterator[bytes]:
            sent.set()
            go_on.wait(20)
            yield from (b"data" for _ in segments)

    class Receiver:
        decodes = False

        def segment_of(self, part: Any) -> Any:
            return part

        def prepared(self, *_: Any) -> None: ...

        def arrived(self, *found: Any) -> None:
            arrived.append(found)

        def failed(self, *_: Any) -> None: ...

    chunk = Chunk(0, 0, 16, (4,), (0,), 1)
    schedule = Schedule([chunk], Adaptive(), None, "before", lambda _: 1.0)
    fetcher = Fetcher(schedule, [Slow()], Receiver(), Bandwidth(), 1, 5.0)  # type: ignore[list-item]
    fetcher.start()
    assert sent.wait(20)
    fetcher.close()
    go_on.set()
    fetcher.close(20)
    assert arrived == []
    assert chunk.arrived == set()


def test_nothing_is_written_after_a_refinement_was_closed(server: Server, url: str, folder: Path) -> None:
    """Generations that begin later share the tensors."""
    gate = refinements_wait(server)
    cache = CacheGenCache.stream(url, shared("llama"), refine="while_generating")
    assert cache.refinement is not None
    decoding, go_on = refining_waits(cache)
    gate.set()
    assert decoding.wait(20)
    cache.refinement.close()
    assert cache.refinement.done
    go_on.set()
    assert threads_end()
    assert same_kv(cache, at_level(folder, 1))


def test_the_silence_of_one_source_does_not_count_for_the_next() -> None:
    now = [0.0]
    bandwidth = Bandwidth(clock=lambda: now[0])
    bandwidth.began()
    now[0] = 100.0
    assert bandwidth.silence() == 100.0
    bandwidth.forget()  # the next source, while the request to the first still hangs
    bandwidth.began()
    now[0] = 101.0
    assert bandwidth.silence() == 1.0


@pytest.mark.parametrize("refine", ["off", "before", "while_generating"])
def test_tensors_are_freed_with_their_cache(url: str, refine: Any) -> None:
    """They are freed at once: many more contexts may be loaded before Python collects cycles."""
    gc.collect()
    gc.disable()
    try:
        cache = CacheGenCache.stream(url, shared("llama"), refine=refine)
        assert cache.refinement is not None
        cache.refinement.wait(30)
        cache.refinement.cancel()
        gone = weakref.ref(cache.kv.keys[0])
        assert gone() is not None
        del cache
        assert gone() is None
    finally:
        gc.enable()


def test_a_cache_does_not_keep_its_model(url: str) -> None:
    model = copy.deepcopy(shared("llama"))
    cache = CacheGenCache.stream(url, model, slo=30.0)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert cache.kv.geometry.tokens == CONTEXT_TOKENS


# Reports.


def test_a_report_waits_for_a_change_under_way(server: Server, url: str) -> None:
    gate = refinements_wait(server)
    cache = CacheGenCache.stream(url, shared("llama"), refine="while_generating")
    assert cache.refinement is not None
    found: list[Any] = []
    reader = threading.Thread(target=lambda: found.append(cache.report))
    with cache.refinement._loader.download.changed:
        reader.start()
        reader.join(0.3)
        assert not found
    reader.join(20)
    assert isinstance(found[0], StreamReport)
    gate.set()
    assert cache.refinement.wait(30)


@pytest.mark.parametrize("way", ["prompt lookup", "assistant"])
def test_the_first_token_is_not_one_of_a_draft(url: str, way: str) -> None:
    """Candidates are drafted, and pass the processors, before the model has read the question."""
    model = copy.deepcopy(shared("llama"))
    passes: list[int] = []
    model.register_forward_hook(lambda *_: passes.append(1))
    seen: list[int] = []

    def on_event(event: Event) -> None:
        if isinstance(event, FirstToken):
            seen.append(len(passes))

    ids = torch.cat([CONTEXT, CONTEXT[:, 20:28]], 1)  # an n-gram of the context: lookup has a candidate at once
    drafts: dict[str, dict[str, Any]] = {
        "prompt lookup": {"prompt_lookup_num_tokens": 3}, "assistant": {"assistant_model": shared("llama")},
    }  # fmt: skip
    cache = CacheGenCache.stream(url, model, on_event=on_event)
    passes.clear()
    generate(model, ids, cache=cache, max_new_tokens=4, do_sample=False, **drafts[way])
    assert seen
    assert seen[0] > 0


def test_the_time_of_a_batch_is_not_taken_as_that_of_one_row(url: str) -> None:
    model = shared("llama")
    cache = CacheGenCache.stream(url, model, level=1)
    assert cache.refinement is not None
    speed = speed_of(model)
    for _ in range(2):  # the first pass of a model is a warm-up
        speed.add(0, 64, 1.0)
    before = list(speed.samples)
    generate(model, PROMPT.repeat(3, 1), cache=cache, max_new_tokens=2, do_sample=False)
    assert speed.samples == before
    cache = CacheGenCache.stream(url, model, level=1)
    generate(model, PROMPT, cache=cache, max_new_tokens=2, do_sample=False)
    assert speed.samples[-1][:2] == (CONTEXT_TOKENS, 7)


# Options.


def test_text_needs_no_profile(server: Server, tmp_path: Path) -> None:
    model = hf.AutoModelForCausalLM.from_pretrained(ROOT / "eval" / "reference" / "model", dtype=torch.bfloat16)
    config = CacheGenConfig(transform="klt", chunk_tokens=64)
    exact = CacheGenCache.from_context(model, torch.arange(300)[None] % 200 + 3, config)
    exact.save_pretrained(tmp_path / "artifact")
    url = serve(server, tmp_path / "artifact")
    cache = CacheGenCache.stream(url, model, level="text", profile=None)  # the profile is not beside the artifact
    assert isinstance(cache.report, StreamReport)
    assert cache.report.text_chunks == len(cache.report.chunks)
    assert not any("profile" in path for path, _ in server.requests)


def test_a_lost_chunk_does_not_make_the_others_coarse() -> None:
    """The time of recomputing it is unknown, which has no effect without an SLO."""
    chunks = [Chunk(index, 16 * index, 16, (10, 10, 10), (10, 10, 10), 3) for index in range(4)]
    chunks[0].best = 0
    schedule = Schedule(chunks, Adaptive(), None, "off", lambda _: float("inf"))
    schedule.prepared()
    plan = schedule.plan(0.0, 1e6)
    assert plan is not None
    assert (plan.level, plan.sure) == (3, 3)


@pytest.mark.parametrize("options", [
    {"slo": float("inf")}, {"slo": float("nan")}, {"stall_seconds": float("inf")}, {"policy": None},
    {"policy": Adaptive}, {"fallback": "https://mirror/report"}, {"fallback": ("https://mirror/report", {})},
    {"fallback": [("https://mirror/report",)]},
], ids=str)  # fmt: skip
def test_options_without_effect_are_refused(url: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        CacheGenCache.stream(url, shared("llama"), **options)


def test_old_names_of_fields_warn() -> None:
    report = StreamReport(100, 1000, sources=("https://a",))
    with pytest.warns(DeprecationWarning, match="sources"):
        assert report.places == report.sources
    assert report.to_dict()["places"] == ("https://a",)
    for event in (StreamStarted(0.0, "https://a", None, 100, 4, (10,)), SourceFailed(0.0, "https://a", "gone")):
        with pytest.warns(DeprecationWarning, match="location"):
            assert event.place == event.location


def test_the_options_are_those_of_the_stream_and_of_the_access() -> None:
    options = StreamOptions.from_keywords({"slo": 2.0, "level": 2, "token": "secret", "subfolder": "a"})
    assert (options.slo, options.choice, options.stall) == (2.0, 2, 0.5)
    assert options.access == Access(token="secret", subfolder="a")
    assert StreamOptions() == StreamOptions.from_keywords({})
    with pytest.raises(TypeError, match="colour"):
        StreamOptions.from_keywords({"colour": 1})
    with pytest.raises(TypeError, match="access"):
        StreamOptions.from_keywords({"access": Access()})


def test_a_fallback_has_the_access_of_the_first_location_but_no_credentials_for_it() -> None:
    access = Access(token="secret", headers={"Authorization": "one"}, revision="v1", patience=Patience(attempts=3))
    other = ("https://c/x", {"headers": {"Authorization": "two"}})
    options = StreamOptions(fallback=["https://b/x", other], access=access)
    first, second, third = locations_of("https://a/x", options)
    assert first.access == access
    assert second.access == Access(token="secret", patience=Patience(attempts=3))
    assert third.access.headers == {"Authorization": "two"}
    assert [location.host for location in (first, second, third)] == ["https://a", "https://b", "https://c"]
    (lone,) = locations_of("folder/x", StreamOptions(slo=4.0))
    assert (lone.host, lone.access.patience.timeout) == ("elsewhere", 1.0)  # type: ignore[union-attr]


@pytest.mark.parametrize("slo", [0, -1, float("inf"), float("nan"), "1"], ids=repr)
def test_an_slo_that_is_no_time_is_refused(slo: Any) -> None:
    with pytest.raises(ConfigError, match="slo must be above 0 seconds and finite"):
        StreamOptions(slo=slo)


CALLS: dict[str, Callable[[str], dict[str, Any]]] = {
    "without a cache": lambda url: {"slo": 5.0},
    "given twice": lambda url: {"cache": url, "slo": 5.0, "stream": {"slo": 1.0}},
    "what generate gives itself": lambda url: {"cache": url, "stream": {"prompt": (PROMPT, torch.ones_like(PROMPT))}},
}


@pytest.mark.parametrize("call", CALLS)
def test_calls_of_generate_without_effect_are_refused(url: str, call: str) -> None:
    with pytest.raises(ConfigError):
        generate(shared("llama"), PROMPT, max_new_tokens=2, **CALLS[call](url))


EXITING = """
import sys, threading, time
sys.path.insert(0, {root!r})
import torch
from hf_cachegen.streaming import refine

class Events:
    add = deliver = lambda *a: None

class Session:
    events = Events()

class Loader:
    report = lambda *a, **k: None
    session = Session()
    ended = False
    def refine(self):
        while not self.ended:  # decode, inside the interpreter and outside of it
            torch.randn(300, 300) @ torch.randn(300, 300)
    def close(self, wait=0.0):
        self.ended = True

refine.Refinement(Loader(), None).start()
time.sleep(0.05)
print("over")
"""


def test_a_process_may_end_while_a_refinement_runs() -> None:
    """Its thread ends first: a thread inside torch would abort the process."""
    script = EXITING.format(root=str(ROOT))
    done = subprocess.run([sys.executable, "-c", script], check=False, text=True, capture_output=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "over\n", "")


@pytest.mark.parametrize(
    ("rate", "round_trip", "under_way", "expected"),
    [
        (None, None, [], 1 << 19),  # nothing is known: one request per connection
        (None, 1e-3, [], 1 << 19),  # a short path: two requests
        (None, 1e-3, [1 << 19], 1 << 19),
        (None, 1e-3, [1 << 19, 1 << 19], None),
        (None, 20e-3, [1 << 19] * 7, 1 << 19),
        (None, 20e-3, [1 << 19] * 8, None),
        (125e6, 1e-3, [], 1 << 20),  # 1 Gbps for 23 ms are 2.9 MB, in a few requests
        (125e6, 1e-3, [1 << 20, 1 << 20], 1 << 20),
        (125e6, 1e-3, [1 << 20, 1 << 20, 1 << 20], None),
        (125e6, 0.1, [], 125e6 * 0.32 / 8),  # a long path: all connections, three round trips
        (125e6, 1.0, [], 125e6 * 0.5 / 8),
        (1e10, 0.1, [], 8 << 20),
        (1e6, 1e-3, [], 1 << 18),  # a slow link: small requests, two at a time
        (1e6, 1e-3, [1 << 18], 1 << 18),
        (1e6, 1e-3, [1 << 18, 1 << 18], None),
    ],
)
def test_the_size_of_the_window(
    rate: float | None, round_trip: float | None, under_way: list[int], expected: float | None
) -> None:
    found = request_bytes(rate, round_trip, under_way, 8)
    assert found == (None if expected is None else pytest.approx(expected))


def test_the_window_grows_while_the_throughput_does() -> None:
    """Where the round trip is the limit, the window exceeds the bytes of one round trip."""
    for round_trip in (1e-3, 20e-3, 0.1, 0.2):
        asked, rate = 0, 1e7
        while (
            nbytes := request_bytes(rate, round_trip, [asked] if asked < 2 else [asked // 2, asked // 2], 8)
        ) is not None:
            asked += int(nbytes)
        assert asked >= 2 * rate * round_trip
