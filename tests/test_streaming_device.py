"""Streams to a device with memory of its own: the host launches chunks as they arrive, and waits per stream."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_cachegen import generate
from hf_cachegen.cache import CacheGenCache
from hf_cachegen.codec import abi, native, transfer
from hf_cachegen.codec.batch import OUTSTANDING
from hf_cachegen.codec.spread import APART_BYTES, HOST_BYTES
from hf_cachegen.codec.transforms import Transform
from hf_cachegen.config import CacheGenConfig
from hf_cachegen.errors import CorruptError, TruncatedError
from hf_cachegen.streaming import ChunkFetched, ChunkReady, Event
from hf_cachegen.streaming import loader as loading
from hf_cachegen.streaming.layers import LayerWriter
from hf_cachegen.streaming.sources import Source
from tests.lockstep import needs_compiler
from tests.separate_device import Note, separate_device
from tests.streaming_support import at_level, damage, report, same_kv, threads_end
from tests.tiny_models import shared, tokens

pytestmark = [
    needs_compiler,
    pytest.mark.skipif(not native.available(), reason="the package was installed without a C++ compiler"),
    pytest.mark.usefixtures("own_cache"),
]
MODEL = "gpt_neox"
"""Its layers have 256 channels, one tile."""
CHUNK_TOKENS, CHUNKS = 16, 40
CONTEXT = tokens(CHUNK_TOKENS * CHUNKS, seed=5)
BATCHES = CHUNKS // abi.MAX_BATCH
TRANSFORMS = ("identity", "delta")


@pytest.fixture(scope="module", params=TRANSFORMS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param) / "artifact"
    config = CacheGenConfig(transform=request.param, chunk_tokens=CHUNK_TOKENS, protect_first=2, protect_last=4)
    CacheGenCache.from_context(shared(MODEL), CONTEXT, config).save_pretrained(path)
    return path


@pytest.fixture
def device() -> Iterator[list[Note]]:
    with separate_device(busy=True) as notes:
        yield notes


def order(notes: list[Note]) -> str:
    """Return the copies of coded bytes to the device (u) and the waits for it (w), in order."""
    return "".join({"upload": "u", "wait": "w"}.get(name, "") for name, _ in notes)


class AtHand:
    """Lets no chunk be decoded before all of them have arrived up to a level: for `on_event`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, level: int):
        self.events: list[Event] = []
        self._left, self._arrived = CHUNKS * level, threading.Event()
        decoder = Source.decoder
        monkeypatch.setattr(Source, "decoder", lambda source: (self._arrived.wait(30), decoder(source))[1])

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        self._left -= isinstance(event, ChunkFetched)
        if self._left == 0:
            self._arrived.set()


@pytest.mark.parametrize("level", [1, 3])
def test_the_host_waits_for_batches_not_for_chunks(
    folder: Path, device: list[Note], monkeypatch: pytest.MonkeyPatch, level: int
) -> None:
    at_hand = AtHand(monkeypatch, 1)
    cache = CacheGenCache.stream(folder, shared(MODEL), level=level, on_event=at_hand)
    found = order(device)
    if level == 1:
        assert found == "uuuwuwuwww"
    assert found.count("w") == found.count("u") < CHUNKS / 2  # a busy machine hands over fewer chunks together
    assert not any(name == "send" for name, _ in device)
    assert same_kv(cache, at_level(folder, level))
    ready = [event for event in at_hand.events if isinstance(event, ChunkReady)]
    assert sorted(event.chunk_index for event in ready) == list(range(CHUNKS))


def test_a_chunk_is_launched_though_none_before_it_is_done(
    folder: Path, device: list[Note], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However chunks arrive: the host waits only for the oldest of three launches, and at the end."""
    cache = CacheGenCache.stream(folder, shared(MODEL), level=2)
    found = order(device)
    streaming = found[: found.rindex("u")]
    for at, name in enumerate(streaming):
        if name == "w":
            assert streaming[:at].count("u") - streaming[:at].count("w") == OUTSTANDING + 1
    assert same_kv(cache, at_level(folder, 2))


def test_a_stream_that_has_ended_keeps_no_memory_of_its_decoder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    released = list[object]()

    def release(self: Transform) -> None:
        released.append(self)

    monkeypatch.setattr(Transform, "release", release)
    for refine in ("off", "while_generating"):
        cache = CacheGenCache.stream(folder, shared(MODEL), refine=refine)
        assert cache.refinement is not None
        assert cache.refinement.wait(60)
        assert threads_end()
        assert released
        released.clear()


def test_launches_that_are_done_are_checked_at_once(folder: Path) -> None:
    with separate_device() as notes:
        cache = CacheGenCache.stream(folder, shared(MODEL), level=2)
    assert "uuu" not in order(notes)
    assert same_kv(cache, at_level(folder, 2))


def test_the_time_of_a_batch_is_shared_by_its_chunks(
    folder: Path, device: list[Note], monkeypatch: pytest.MonkeyPatch
) -> None:
    at_hand = AtHand(monkeypatch, 1)
    monkeypatch.setattr(transfer.Timer, "seconds", lambda _: 8.0)
    found = report(CacheGenCache.stream(folder, shared(MODEL), level=1, on_event=at_hand))
    assert [chunk.decode_seconds for chunk in found.chunks] == pytest.approx([1.0] * CHUNKS, abs=0.1)
    ready = [event.work_seconds for event in at_hand.events if isinstance(event, ChunkReady)]
    assert ready == pytest.approx([1.0] * CHUNKS, abs=0.1)


def test_a_damaged_chunk_is_found_among_others(
    folder: Path, device: list[Note], monkeypatch: pytest.MonkeyPatch
) -> None:
    at_hand = AtHand(monkeypatch, 1)
    damage(monkeypatch, (5, 0), (20, 0))
    cache = CacheGenCache.stream(folder, shared(MODEL), level=1, on_event=at_hand)
    chunks = report(cache).chunks
    assert [chunk.index for chunk in chunks if chunk.level is None] == [5, 20]
    for chunk in chunks:
        assert len(chunk.faults) == (chunk.level is None)
    assert "level 1 cannot be decoded" in chunks[20].faults[0]
    assert not any(torch.isnan(x).any() for x in (*cache.kv.keys, *cache.kv.values))
    stored = at_level(folder, 1)
    for first, last in ((0, 5), (6, 20), (21, CHUNKS)):
        assert same_kv(cache, stored, slice(CHUNK_TOKENS * first, CHUNK_TOKENS * last))
    assert not same_kv(cache, stored, slice(CHUNK_TOKENS * 5, CHUNK_TOKENS * 6))


def test_a_damaged_refinement_leaves_the_level_before(
    folder: Path, device: list[Note], monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(monkeypatch, (7, 2))
    monkeypatch.setattr("hf_cachegen.streaming.stream.positions_change", lambda *_: True)  # nothing is recomputed
    cache = CacheGenCache.stream(folder, shared(MODEL), level=3)
    assert [chunk.level for chunk in report(cache).chunks] == [3] * 7 + [2] + [3] * (CHUNKS - 8)
    assert same_kv(cache, at_level(folder, 2), slice(CHUNK_TOKENS * 7, CHUNK_TOKENS * 8))


def test_damage_that_nothing_repairs_ends_the_call(
    folder: Path, device: list[Note], monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(monkeypatch, (CHUNKS - 1, 0))
    monkeypatch.setattr("hf_cachegen.streaming.stream.positions_change", lambda *_: True)
    with pytest.raises((CorruptError, TruncatedError)):
        CacheGenCache.stream(folder, shared(MODEL), level=1)


def test_recomputing_reads_only_what_was_checked(
    folder: Path, device: list[Note], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And chunks that another chunk's recomputing would have read are repaired first."""
    at_hand = AtHand(monkeypatch, 1)
    damage(monkeypatch, (2, 0), (30, 0))
    recompute, recomputed = loading.recompute, []

    def noted(model: Any, ids: Any, geometry: Any, keys: Any, values: Any, span: Any) -> None:
        assert order(device).count("w") == order(device).count("u")
        recomputed.append(span.first // CHUNK_TOKENS)
        recompute(model, ids, geometry, keys, values, span)

    monkeypatch.setattr(loading, "recompute", noted)
    CacheGenCache.stream(folder, shared(MODEL), level=1, on_event=at_hand)
    assert recomputed == [2, 30]


@pytest.mark.parametrize("lost", [False, True])
def test_refinements_are_copied_once_they_are_known_to_be_sound(
    folder: Path, device: list[Note], monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    """One launch after the other, so that no reader waits for a second one."""
    if lost:
        damage(monkeypatch, (9, 1))
    put = LayerWriter.put

    def checked(writer: LayerWriter, apart: Any) -> None:
        assert order(device).count("w") == order(device).count("u")
        put(writer, apart)

    monkeypatch.setattr(LayerWriter, "put", checked)
    cache = CacheGenCache.stream(folder, shared(MODEL), refine="while_generating")
    assert cache.refinement is not None
    assert cache.refinement.wait(60)
    levels = [chunk.level for chunk in report(cache).chunks]
    assert levels == [3] * CHUNKS if not lost else [3] * 9 + [1] + [3] * (CHUNKS - 10)
    stored = at_level(folder, 3)
    assert same_kv(cache, stored, slice(0, CHUNK_TOKENS * 9))
    assert same_kv(cache, stored, slice(CHUNK_TOKENS * 10, None))
    assert same_kv(cache, at_level(folder, 1 if lost else 3), slice(CHUNK_TOKENS * 9, CHUNK_TOKENS * 10))


def test_a_generation_sees_sound_values_alone(
    folder: Path, device: list[Note], monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(monkeypatch, (3, 0), (11, 1))
    prompt = torch.cat([CONTEXT, tokens(5, seed=9)], 1)
    found = generate(shared(MODEL), prompt, cache=folder, refine="while_generating", max_new_tokens=8, do_sample=False)
    assert found.shape == (1, prompt.shape[1] + 8)


def test_a_refinement_that_is_cancelled_while_the_device_works_changes_nothing(
    folder: Path, device: list[Note], monkeypatch: pytest.MonkeyPatch
) -> None:
    launched, go_on, rows = threading.Event(), threading.Event(), LayerWriter.rows

    def then_wait(*arguments: Any) -> Any:
        launch = rows(*arguments)
        launched.set()
        go_on.wait(30)
        return launch

    monkeypatch.setattr(LayerWriter, "rows", then_wait)
    cache = CacheGenCache.stream(folder, shared(MODEL), refine="while_generating")
    assert cache.refinement is not None
    assert launched.wait(30)
    threading.Timer(0.2, go_on.set).start()
    cache.refinement.cancel()
    assert threads_end()
    assert same_kv(cache, at_level(folder, 1))
    assert [chunk.level for chunk in report(cache).chunks] == [1] * CHUNKS


def test_launches_beside_the_tensors_are_bounded(folder: Path, device: list[Note]) -> None:
    cache = at_level(folder, 1)
    writer = LayerWriter(cache.kv.geometry, [torch.device("cpu")] * len(cache.kv.keys))
    of_token = cache.kv.geometry.nbytes // cache.kv.geometry.tokens
    assert writer.together(16, apart=True) == writer.together(10**9, apart=False) == abi.MAX_BATCH
    assert writer.together(APART_BYTES // of_token // 3, apart=True) == 3
    assert writer.together(10**9, apart=True) == 1


def test_launches_on_the_host_are_bounded(folder: Path) -> None:
    cache = at_level(folder, 1)
    writer = LayerWriter(cache.kv.geometry, [torch.device("cpu")] * len(cache.kv.keys))
    of_token = cache.kv.geometry.nbytes // cache.kv.geometry.tokens
    assert (writer.ahead, writer.together(16, apart=False), writer.together(16, apart=True)) == (0, abi.MAX_BATCH, 1)
    assert writer.together(HOST_BYTES // of_token // 3, apart=False) == 3
    assert writer.together(10**9, apart=False) == 1


def test_a_timer_is_two_events_of_the_current_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = object()
    happened: list[object] = []

    class Marker:
        def __init__(self, enable_timing: bool = False):
            assert enable_timing

        def record(self, on: object) -> None:
            happened.append(on)

        def query(self) -> bool:
            return bool(happened and happened[-1] == "waited")

        def synchronize(self) -> None:
            happened.append("waited")

        def elapsed_time(self, end: Marker) -> float:
            assert end is not self
            return 250.0

    monkeypatch.setattr(torch.cuda, "Event", Marker)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    timer = transfer.Timer(torch.device("cuda", 0))
    timer.stop()
    assert happened == [stream, stream]
    assert not timer.done
    assert timer.seconds() == 0.25
    assert timer.done
