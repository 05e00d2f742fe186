"""The command stream: the answer, the report, and the live view."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from hf_cachegen.cli import errors as cli_errors
from hf_cachegen.cli.stream_view import StreamView, chunk_table
from hf_cachegen.streaming import (
    ChunkFetched,
    ChunkReady,
    ChunkReport,
    FirstToken,
    SourceFailed,
    StreamReport,
    StreamStarted,
)
from tests.cli_support import run, run_json, save_model, text
from tests.http_server import Request, Server, running
from tests.streaming_support import serve, threads_end

pytestmark = pytest.mark.usefixtures("own_cache")

QUESTION = text(5, seed=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    folder = tmp_path_factory.mktemp("artifacts")
    (folder / "context.txt").write_text(f"{text(120)}\n", encoding="utf-8")
    run_json("encode", folder / "context.txt", "--model", model, "--out", folder / "artifact", "--chunk-tokens", 32)
    return folder / "artifact"


@pytest.fixture
def url(artifact: Path) -> Iterator[str]:
    with running(Server()) as server:
        yield serve(server, artifact)


def test_the_answer_is_that_of_generate(url: str, artifact: Path, model: Path) -> None:
    asked = ("--model", model, "--prompt", QUESTION, "--max-new-tokens", 8)
    expected = run_json("generate", artifact, *asked)
    found = run_json("stream", url, *asked, "--slo", 60, "--refine", "before")
    assert {name: found[name] for name in ("text", "context_tokens", "question_tokens", "new_tokens")} == {
        name: expected[name] for name in ("text", "context_tokens", "question_tokens", "new_tokens")
    }
    report = found["report"]
    assert report["met"] is True
    assert 0 < report["load_seconds"] < report["ttft"] < 60
    assert [chunk["choice"] for chunk in report["chunks"]] == ["level 3"] * 4
    assert threads_end()


def test_a_terminal_gets_the_answer_and_a_table(url: str, model: Path) -> None:
    done = run("stream", url, "--model", model, "--prompt", QUESTION, "--max-new-tokens", 4, "--slo", 60)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.strip()
    assert "the SLO of 60 s was met" in done.stderr
    assert "level" in done.stderr


def test_without_an_slo_the_table_says_that_the_bases_came_first(artifact: Path, model: Path) -> None:
    """The server holds the refinements back until the answer is complete, so level 1 is not the target."""
    gate = threading.Event()

    def answer(request: Request, body: bytes, headers: dict[str, str]) -> None:
        if "refine" in request.path:
            gate.wait(30)
        request.answer(206, body, headers)

    command = ("--model", model, "--prompt", QUESTION, "--max-new-tokens", 1)
    with running(Server()) as server:
        server.always = answer
        try:
            done = run("stream", serve(server, artifact), *command, "--stall-seconds", 0.3)
        finally:
            gate.set()
        shown = " ".join(done.stderr.split())
        assert "no SLO: the finest level" in shown
        assert "level 1" in shown
        assert "the level above is the target; the bases came first" in shown
        assert "0 of 4 chunks were refined while the model generated" in shown
    with running(Server()) as server:
        shown = run("stream", serve(server, artifact), *command, "--refine", "before").stderr
    assert "is the target" not in shown


def test_the_table_shows_both_levels_of_a_refined_chunk() -> None:
    chunks = (
        ChunkReport(0, 0, 16, 3, 1, "a reason"), ChunkReport(1, 16, 16, 1, 1, "a reason"),
        ChunkReport(2, 32, 8, None, None, "no source has it"),
    )  # fmt: skip
    console = Console(width=120)
    with console.capture() as captured:
        console.print(chunk_table(StreamReport(40, 1000, chunks=chunks), bases_first=True))
    shown = captured.get()
    assert "level 3, first 1" in shown
    assert "chunks 0 to 1: a reason" in shown
    assert "chunk 2: no source has it" in shown
    assert "1 of 3 chunks were refined" in shown


@pytest.mark.parametrize("level", ["1", "text"])
def test_one_choice_for_all_chunks(url: str, model: Path, level: str) -> None:
    found = run_json("stream", url, "--model", model, "--prompt", QUESTION, "--max-new-tokens", 2, "--level", level)
    expected = "text" if level == "text" else "level 1"
    assert {chunk["choice"] for chunk in found["report"]["chunks"]} == {expected}


def test_a_fallback_takes_over(url: str, artifact: Path, model: Path) -> None:
    with running(Server()) as broken:
        half = serve(broken, artifact)
        broken.files = {name: data for name, data in broken.files.items() if "refine" not in name}
        options = ("--fallback", url, "--refine", "before", "--max-new-tokens", 2)
        found = run_json("stream", half, "--model", model, "--prompt", QUESTION, *options)
    assert found["report"]["level"] == 3
    assert half in found["report"]["faults"][0]


@pytest.mark.parametrize("first", ["nowhere", "http://127.0.0.1:9/context"])
def test_a_fallback_of_a_location_that_has_nothing(first: str, artifact: Path, model: Path) -> None:
    options = ("--model", model, "--prompt", QUESTION, "--refine", "before", "--max-new-tokens", 2)
    found = run_json("stream", first, "--fallback", artifact, *options, "--stall-seconds", 0.2)
    assert found["report"]["level"] == 3
    assert first in found["report"]["faults"][0]
    for fallback in ((), ("--fallback", "elsewhere")):
        assert first in str(run_json("stream", first, *fallback, *options, code=3 if first == "nowhere" else 7))


@pytest.mark.parametrize(
    "options", [("--slo", 0), ("--level", "0"), ("--level", "fine"), ("--connections", 0)], ids=str
)
def test_options_out_of_range(url: str, model: Path, options: tuple[object, ...]) -> None:
    done = run("stream", url, "--model", model, "--prompt", QUESTION, *options)
    assert done.exit_code == cli_errors.USAGE


def test_the_view_follows_the_stream() -> None:
    view = StreamView(slo=2.0)
    view.begin()
    view.take(StreamStarted(0.0, "place", 2.0, 100, 4, (10, 20, 30)))
    view.take(ChunkFetched(0.1, 3, 0, 1000, True, 1e6))
    view.take(ChunkFetched(0.1, 2, 0, 1000, True, 1e6))
    view.take(ChunkReady(0.2, 3, 2, 0.01))
    view.take(ChunkReady(0.3, 0, None, 0.01))
    view.take(SourceFailed(0.3, "place", "StoreError: gone"))
    console = Console(width=120)
    with console.capture() as captured:
        console.print(view)
    shown = captured.get()
    assert "T.-2" in shown
    assert "8.0 Mbit/s" in shown
    assert "of 2 s" in shown
    assert "StoreError: gone" in shown
    view.take(FirstToken(1.5, True))
    with console.capture() as captured:
        console.print(view)
    assert "first token after 1.500 s" in captured.get()


def test_a_sealed_artifact(artifact: Path, model: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.key"
    secret.write_bytes(bytes(range(32)))
    run_json("seal", artifact, tmp_path / "sealed", "--key", secret)
    asked = ("--model", model, "--prompt", QUESTION, "--max-new-tokens", 2, "--refine", "before")
    assert run_json("stream", tmp_path / "sealed", *asked, "--key", secret)["report"]["level"] == 3
