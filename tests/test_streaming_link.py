"""Throughput, sharing a link, the measured speed of a model, and the metrics."""

from __future__ import annotations

import builtins
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from hf_cachegen.cache import CacheGenCache
from hf_cachegen.errors import ConfigError, MissingExtraError
from hf_cachegen.streaming import Link
from hf_cachegen.streaming.bandwidth import SAMPLE_BYTES, Bandwidth
from hf_cachegen.streaming.metrics import PrometheusExporter
from hf_cachegen.streaming.prefill_speed import PrefillSpeed
from tests import http_server as faults
from tests.http_server import Server
from tests.streaming_support import CHUNKS, at_level, same_kv, serve, write
from tests.tiny_models import shared

pytestmark = pytest.mark.usefixtures("own_cache")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_the_rate_is_unknown_before_the_first_byte(clock: Clock) -> None:
    bandwidth = Bandwidth(clock=clock)
    assert bandwidth.rate() is None
    bandwidth.began()
    clock.now += 0.05
    assert bandwidth.rate() is None
    clock.now += 0.1
    assert bandwidth.rate() == 0.0


def test_the_rate_is_that_of_the_last_sample(clock: Clock) -> None:
    bandwidth = Bandwidth(clock=clock)
    bandwidth.began()
    for nbytes in (1000, 3000):
        clock.now += 0.2
        bandwidth.add(nbytes)
    assert bandwidth.rate() == pytest.approx(15_000)


def test_the_rate_can_be_smoothed(clock: Clock) -> None:
    bandwidth = Bandwidth(smoothing=0.75, clock=clock)
    bandwidth.began()
    for nbytes in (1000, 3000):
        clock.now += 0.2
        bandwidth.add(nbytes)
    assert bandwidth.rate() == pytest.approx(0.75 * 5_000 + 0.25 * 15_000)


def test_pauses_between_requests_do_not_count(clock: Clock) -> None:
    bandwidth = Bandwidth(clock=clock)
    for _ in range(2):
        request = bandwidth.began()
        clock.now += 0.04
        bandwidth.add(SAMPLE_BYTES)
        bandwidth.ended(request)
        clock.now += 1000
    assert bandwidth.rate() == pytest.approx(SAMPLE_BYTES / 0.04)
    assert bandwidth.silence() == 0


def test_silence_lowers_the_rate(clock: Clock) -> None:
    bandwidth = Bandwidth(clock=clock)
    bandwidth.began()
    clock.now += 0.2
    bandwidth.add(20_000)
    rates = []
    for _ in range(3):
        clock.now += 1
        rates.append(bandwidth.rate() or 0)
    assert rates == [0, 0, 0]
    assert bandwidth.silence() == pytest.approx(3)
    bandwidth.add(30_000)
    assert bandwidth.rate() == pytest.approx(10_000)


def test_an_earlier_rate_holds_until_the_first_sample(clock: Clock) -> None:
    bandwidth = Bandwidth(clock=clock)
    bandwidth.expect(5000.0)
    assert bandwidth.rate() == 5000.0
    bandwidth.forget()
    assert bandwidth.rate() is None


def take_turns(link: Link, streams: int, each: int) -> list[int]:
    """Return the stream that had each turn, where all ask at once; the first begins long before the others."""
    order: list[int] = []
    begun = threading.Barrier(streams)

    def run(number: int) -> None:
        with link.stream() as share:
            if number == 0:
                for _ in range(5):
                    with share.turn(lambda: False):
                        pass
            begun.wait()
            threads = [threading.Thread(target=one, args=(share, number)) for _ in range(each)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    def one(share: Any, number: int) -> None:
        with share.turn(lambda: False) as granted:
            assert granted
            order.append(number)
            time.sleep(0.02)

    runners = [threading.Thread(target=run, args=(number,)) for number in range(streams)]
    for runner in runners:
        runner.start()
    for runner in runners:
        runner.join()
    return order


def test_streams_of_one_link_take_turns() -> None:
    order = take_turns(Link(slots=1), 2, 8)
    assert len(order) == 16
    # The first thread may get its turn before the other stream begins.
    middle = order[3:13]
    assert abs(middle.count(0) - middle.count(1)) <= 2


def test_a_turn_without_a_waiting_stream_is_given_up() -> None:
    link, gone = Link(slots=1), threading.Event()
    with link.stream() as share, share.turn(lambda: False) as granted:
        assert granted
        threading.Timer(0.1, gone.set).start()
        with share.turn(gone.is_set) as second:
            assert not second
    with link.stream() as share, share.turn(lambda: False) as granted:
        assert granted


def test_a_stream_expects_its_share_of_the_rate_of_others() -> None:
    link = Link()
    link.bandwidth.expect(8000.0)
    with link.stream() as first, link.stream() as second:
        assert (first.expected, second.expected) == (8000.0, 4000.0)
    with pytest.raises(ConfigError):
        Link(slots=0)
    assert Link.to("https://a") is Link.to("https://a")
    assert Link.to("https://a") is not Link.to("https://b")


def test_several_streams_share_a_link(server: Server, tmp_path: Path) -> None:
    folder = write("llama", tmp_path / "artifact")
    urls = [serve(server, folder, f"copy-{number}") for number in range(4)]
    found: list[CacheGenCache] = []
    link = Link(slots=2)

    def run(url: str) -> None:
        found.append(CacheGenCache.stream(url, shared("llama"), slo=30.0, link=link))

    threads = [threading.Thread(target=run, args=(url,)) for url in urls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 4
    assert all(same_kv(cache, at_level(folder)) for cache in found)


SPEED = [(0, 100, 1.1), (0, 200, 2.1), (1000, 100, 1.1 + 1.0 * 1000 / 10_000)]
"""0.1 s for a pass and 0.01 s for a token; about a ten-thousandth of that for each token that it attends to."""


def test_a_speed_is_written_where_it_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "speed.json"
    speed = PrefillSpeed(1e-4, SPEED, path)
    speed.save()
    assert not path.exists()
    speed.add(0, 2000, 1.0)
    speed.save()
    path.unlink()
    speed.save()
    assert not path.exists()


def test_a_models_speed_is_fitted() -> None:
    speed = PrefillSpeed(1e-4, SPEED)
    assert speed.seconds(0, 400) == pytest.approx(4.1, rel=0.05)
    assert speed.seconds(10_000, 100) == pytest.approx(2.1, rel=0.05)


def test_a_speed_without_measurements_is_unknown() -> None:
    speed = PrefillSpeed(1e-4)
    assert not speed.known
    assert speed.seconds(0, 1) is None
    speed.add(0, 100, 3.0)  # a warm-up
    assert speed.seconds(0, 1) is None
    speed.add(0, 100, 2.0)
    assert speed.seconds(0, 100) == pytest.approx(2.0)
    assert (speed.seconds(0, 200) or 0) == pytest.approx(4.0, rel=0.05)


def test_the_last_measurement_of_the_same_tokens_counts() -> None:
    speed = PrefillSpeed(0.0, [(0, 100, 50.0)])
    speed.add(0, 100, 2.0)
    assert speed.seconds(0, 100) == pytest.approx(2.0)


def test_a_warm_up_does_not_count() -> None:
    speed = PrefillSpeed(1e-4, SPEED)
    for first, tokens in ((1000, 20), (0, 100), (0, 4000)):
        speed.add(first, tokens, 4000.0)
        speed.add(0, 200, 2.1)  # as before
        assert sorted(speed.samples) == sorted(SPEED)
    assert speed.seconds(0, 400) == pytest.approx(4.1, rel=0.05)


def test_a_pass_with_more_work_is_not_a_warm_up() -> None:
    """A pass over a few tokens takes as long as one over more, and one after a long context is slow."""
    speed = PrefillSpeed(1e-3, [(0, 100, 0.1)])
    speed.add(0, 1, 0.9)
    speed.add(100_000, 100, 80.0)
    assert len(speed.samples) == 3


def test_a_measurement_that_proves_to_be_a_warm_up_is_dropped() -> None:
    """The model compiles again for another shape, with no other measurement known."""
    speed = PrefillSpeed(0.0)
    speed.add(0, 20, 40.0)
    speed.add(0, 30, 30.0)
    assert speed.samples == [(0, 30, 30.0)]
    speed.add(0, 25, 0.1)
    assert speed.samples == [(0, 25, 0.1)]


def test_a_slower_machine_is_recognised() -> None:
    speed = PrefillSpeed(1e-4, SPEED)
    for number in range(2):
        speed.add(0, 300 + number, 300.0)
    assert speed.samples == SPEED
    speed.add(0, 302, 300.0)
    assert speed.samples == [(0, 302, 300.0)]
    speed.add(0, 100, 100.0)
    assert speed.seconds(0, 200) == pytest.approx(200.0, rel=0.1)


def test_measurements_that_contradict_each_other_give_no_negative_times() -> None:
    speed = PrefillSpeed(0.0, [(0, 10, 5.0), (0, 1000, 1.0), (0, 100, 3.0)])
    assert all((speed.seconds(0, tokens) or 0) > 0 for tokens in (1, 10, 10_000))


@pytest.mark.parametrize(
    "content",
    ["", "{}", "[[1]]", '[["a", 1, 1]]', "[[0, 0, 1], [0, 5, -1]]", "[[Infinity, 1, 1]]", "[" * 100_000],
    ids=lambda content: content[:10],
)
def test_an_invalid_file_of_measurements_is_ignored(tmp_path: Path, content: str) -> None:
    from hf_cachegen.streaming.prefill_speed import _read

    path = tmp_path / "speed.json"
    path.write_text(content, encoding="utf-8")
    assert _read(path) == []


def test_a_stream_is_counted_by_the_exporter(server: Server, tmp_path: Path) -> None:
    prometheus_client = pytest.importorskip("prometheus_client")
    registry = prometheus_client.CollectorRegistry()
    exporter = PrometheusExporter(registry)
    url = serve(server, write("llama", tmp_path / "artifact"))
    refuse = [faults.status(403)]
    server.always = lambda request, body, headers: (
        refuse.pop()(request, body, headers)
        if refuse and "refine" in request.path
        else request.answer(206, body, headers)
    )
    cache = CacheGenCache.stream(url, shared("llama"), refine="while_generating", on_event=exporter, fallback=[url])
    assert cache.refinement is not None
    assert cache.refinement.wait(30)
    value = registry.get_sample_value
    assert value("hf_cachegen_streams_total") == 1
    assert value("hf_cachegen_chunks_total", {"choice": "level 1"}) == CHUNKS
    assert value("hf_cachegen_chunks_refined_total", {"level": "3"}) == CHUNKS
    assert value("hf_cachegen_ready_seconds_count") == 1
    assert value("hf_cachegen_source_failures_total", {"error": "StoreAccessError"}) == 1
    sizes = (value("hf_cachegen_fetched_bytes_total", {"origin": origin}) for origin in ("network", "disk"))
    fetched = sum(size for size in sizes if size)
    # Bytes on their way from a source that failed may arrive from the other one too.
    assert fetched >= sum(chunk.nbytes for chunk in cache.report.chunks)  # type: ignore[attr-defined]


def test_metrics_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name == "prometheus_client":
            raise ImportError(name)
        return original(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match="prometheus"):
        PrometheusExporter()


def test_a_request_that_hangs_delays_others_for_a_limited_time() -> None:
    link = Link(slots=1)
    with link.stream() as hung, link.stream() as other, hung.turn(lambda: False) as first:
        assert first
        with other.turn(lambda: False, limit=0.3) as granted:
            assert granted
        with other.turn(lambda: True, limit=0.3) as granted:
            assert not granted
    with link.stream() as again, again.turn(lambda: False, limit=0.3) as granted:  # the slot is free again
        assert granted
        assert link._free == 0
    assert link._free == 1


def test_a_request_to_a_source_that_was_left_does_not_count(clock: Clock) -> None:
    """It hangs. The bytes of the next source give the rate, and the time without a request is no silence."""
    bandwidth = Bandwidth(clock=clock)
    hung = bandwidth.began()
    clock.now += 5
    bandwidth.forget()
    request = bandwidth.began()
    clock.now += 0.1
    bandwidth.add(10**6)
    bandwidth.ended(request)
    clock.now += 100
    assert bandwidth.rate() == pytest.approx(1e7)
    assert bandwidth.silence() == 0
    bandwidth.ended(hung)
    assert bandwidth.silence() == 0
