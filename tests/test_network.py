"""The network lab: a link keeps its settings, a stream crosses it end to end, and nothing is left behind.

Needs root, ip, tc and nginx; skipped, with the reason, where one of them is lacking.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from tiny_models import shared, tokens

from benchmarks.network import __main__ as program
from benchmarks.network import lab as labs
from benchmarks.network import summary, uniform8
from benchmarks.network.delay_line import enter
from benchmarks.network.lab import URL, Lab, LabError
from eval import adaptation, traces, uniform
from hf_cachegen import CacheGenCache, CacheGenConfig
from hf_cachegen.codec.geometry import Geometry, LayerGeometry
from hf_cachegen.stores import Patience, RemoteStore
from hf_cachegen.stores.remote import open_files

WHY_NOT = labs.why_not()
needs_lab = pytest.mark.skipif(WHY_NOT is not None, reason=f"no network lab: {WHY_NOT}")
TOKENS = 160


def within(namespace: str, work: Callable[[], Any]) -> Any:
    """Return the result of `work`, run in a thread of that namespace; threads that it starts are in it too."""
    found: list[Any] = []

    def run() -> None:
        try:
            enter(namespace)
            found.append(work())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    if not found:
        pytest.fail("hangs")
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


def own_namespaces() -> list[str]:
    return [line for line in labs.run("ip", "netns", "list").splitlines() if f"{labs.PREFIX}-{os.getpid()}-" in line]


@needs_lab
def test_a_stream_over_a_slow_link_that_loses_packets(tmp_path: Path) -> None:
    model = shared("llama")
    ids = tokens(TOKENS)
    served = tmp_path / "served"
    CacheGenCache.from_context(model, ids, CacheGenConfig(chunk_tokens=32)).save_pretrained(served / "context")
    (served / "data").write_bytes(os.urandom(1 << 20))
    expected = CacheGenCache.from_pretrained(served / "context", model)
    log = tmp_path / "requests"

    def load() -> tuple[CacheGenCache, float, float]:
        cache = CacheGenCache.stream(f"{URL}/context", model, level=3, cache_dir=tmp_path / "segments")
        store = RemoteStore(open_files(URL, patience=Patience(timeout=20)))
        store.size("data")
        start = time.monotonic()
        data = store.read("data", 0, 1 << 20)
        middle = time.monotonic()
        assert data == (served / "data").read_bytes()
        with lab.replay(traces.step(2e6, 1e9, 0.3)):
            assert store.read("data", 0, 1 << 20) == data
        return cache, middle - start, time.monotonic() - middle

    with Lab(served, rate=20e6, delay=0.01, loss=0.01, log=log) as lab:
        assert len(own_namespaces()) == 2
        cache, steady, stepped = within(lab.client, load)
    for one, other in zip(cache.kv.keys + cache.kv.values, expected.kv.keys + expected.kv.values, strict=True):
        assert torch.equal(one, other)
    # At most the rate of the link, and the first rate of the trace for 0.3 s.
    assert steady >= 0.9 * 8 * (1 << 20) / 20e6
    assert stepped >= 0.25
    assert "GET /context/cachegen.json" in log.read_text()
    assert not own_namespaces()


@needs_lab
def test_a_lab_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail() -> None:
        with Lab(tmp_path, delay=0.001) as lab:
            started.append(lab.start(lab.client, ["sleep", "100"]))
            raise KeyboardInterrupt

    started: list[Any] = []
    with pytest.raises(KeyboardInterrupt):
        fail()
    assert started[0].poll() is not None
    assert not own_namespaces()
    with pytest.raises(LabError, match="congctl"):
        Lab(tmp_path, congestion="no-such-algorithm").__enter__()
    assert not own_namespaces()


@needs_lab
def test_a_lab_removes_what_a_killed_lab_left(tmp_path: Path) -> None:
    process = labs.subprocess.Popen(["true"])
    process.wait()
    name = f"{labs.PREFIX}-{process.pid}-server"
    labs.run("ip", "netns", "add", name)
    with Lab(tmp_path):
        assert name not in labs.run("ip", "netns", "list")


def test_missing_rights_are_reported_and_the_lab_is_skipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(program, "why_not", lambda: "no root")
    done = CliRunner().invoke(program.main, ["--work", str(tmp_path)])
    assert done.exit_code == program.SKIPPED == 77
    assert "SKIPPED: no network lab can be built here: no root" in done.stderr
    monkeypatch.setattr(labs, "why_not", lambda: "no root")
    with pytest.raises(LabError, match="no root"):
        Lab(tmp_path).__enter__()


def test_missing_programs_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labs, "PROGRAMS", ("ip", "no-such-program"))
    assert "no-such-program not installed" in str(labs.why_not())
    monkeypatch.setattr(labs, "PROGRAMS", ())
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "need root" in str(labs.why_not())
    monkeypatch.setattr(labs.sys, "platform", "darwin")
    assert "Linux" in str(labs.why_not())


def test_eight_bits_equal_those_of_the_evaluation(tmp_path: Path) -> None:
    x = [torch.randn(1, 2, 70, 16).bfloat16() for _ in range(4)]
    nbytes = uniform8.write(x[:2], x[2:], 32, tmp_path)
    assert nbytes == sum(t.numel() + 4 * t.numel() // 16 for t in x)
    geometry = Geometry((LayerGeometry("full", 2, 16, 2, 16),) * 2, tokens=70, batch=1, dtype="bfloat16")
    store = RemoteStore(open_files(tmp_path.as_uri()))
    keys, values, fetched = uniform8.fetch(store, geometry)
    assert fetched > nbytes
    for got, exact in zip([*keys, *values], x, strict=True):
        assert torch.equal(got, uniform.quantise(exact, 8))


RECORDS = [
    {"context": "larger", "how": "text", "slo": None, "ttft": 9.0},
    *({"context": "larger", "rate": 1e9, "how": "level 1", "slo": None, "ttft": ttft, "ready": ttft - 0.1,
       "bytes": 125_000_000, "chunk_decode": 0.05} for ttft in (1.15, 1.5, 1.05)),
    {"context": "larger", "rate": 1e9, "how": "adaptive", "slo": 1.0, "ttft": 1.2, "choices": ["text", "level 2"]},
    {"context": "larger", "trace": "paper x 1, seed 0", "how": "level 1", "slo": None, "ttft": 1.5},
    {"context": "larger", "trace": "paper x 1, seed 0", "how": "adaptive", "slo": 2.0, "ttft": 2.5},
    {"context": "larger", "trace": "paper x 1, seed 1", "how": "level 1", "slo": None, "error": "broken"},
    {"context": "larger", "trace": "paper x 1, seed 1", "how": "adaptive", "slo": 2.0, "ttft": 2.5},
]  # fmt: skip


def test_the_tables_show_the_measurements() -> None:
    head, rows = summary.ttft_table(RECORDS)
    assert head == ["contestant", "1 Gbps"]
    assert ["text", "9.00"] in rows
    assert ["level 1", "1.15"] in rows
    assert ["adaptive, SLO 1 s", "1.20, missed 1 of 1 (1L2 1text)"] in rows
    _, rows = summary.overhead_table(RECORDS)
    assert rows == [["level 1", "1", "1.000", "0.050", "1.050", "0.050", "1.150", "yes"]]
    _, rows = summary.trace_table(RECORDS)
    assert rows == [["paper x 1, SLO 2 s", "2", "1/2", "0/0", "0/0", "0/0", "1/1", "2/2", "0/1"]]
    typical = summary.with_typical_question([{"ttft": 2.0, "ready": 1.0}, {"ttft": 5.0, "ready": 1.5}, RECORDS[0]])
    assert [record["ttft"] for record in typical] == [3.25, 3.75, 9.0]
    link = {"rtt_ms": 1, "loss": 0, "congestion": "cubic", "mtu": 1500}
    contexts = {"larger": {"tokens": 8192, "bytes": {"level 1": 125_000_000}}}
    found = {"link": link, "contexts": contexts, "records": RECORDS, "hardware": "", "date": ""}
    assert "paper x 1, SLO 2 s" in summary.markdown(json.loads(json.dumps(found)))


@pytest.mark.parametrize("command", [program.main, adaptation.main], ids=["network", "adaptation"])
def test_the_document_names_every_option(command: Any) -> None:
    document = (Path(labs.ROOT) / "docs" / "network.md").read_text()
    for parameter in command.params:
        assert f"`{parameter.opts[0]}`" in document or f"{parameter.opts[0]} " in document, parameter.opts[0]
