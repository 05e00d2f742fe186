"""Generating from a stream: the SLO, the first token, and refinements that arrive while the model generates."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor

import hf_cachegen
from hf_cachegen.cache import CacheGenCache
from hf_cachegen.errors import (
    ArtifactNotFoundError,
    ConfigError,
    PromptMismatchError,
    StoreAccessError,
    WrongModelError,
)
from hf_cachegen.generation import attach, detach, generate
from hf_cachegen.models.compat import CACHE_ARGUMENT
from hf_cachegen.models.prefix import Reuse, match
from hf_cachegen.streaming import Event, FirstToken, StreamFinished, StreamReport, SwapIn
from tests import http_server as faults
from tests.generation_support import MODES
from tests.http_server import Request, Server, running
from tests.streaming_support import CONTEXT, CONTEXT_TOKENS, at_level, exact, same_kv, serve, threads_end, write
from tests.tiny_models import shared, tokens

pytestmark = pytest.mark.usefixtures("own_cache")

QUESTION = tokens(7, seed=11)
PROMPT = torch.cat([CONTEXT, QUESTION], 1)
NEW = 10


class Gate(LogitsProcessor):
    """Hold refinements back on the server until the third step; call `check` from the fourth on."""

    def __init__(self, server: Server, check: Callable[[], None]) -> None:
        self.check, self.steps, self.open = check, 0, threading.Event()
        self.cache: CacheGenCache | None = None
        server.always = self.answer

    def answer(self, request: Request, body: bytes, headers: dict[str, str]) -> None:
        if "refine" in request.path:
            self.open.wait(30)
        request.answer(206, body, headers)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps += 1
        if self.steps == 3:
            assert self.cache is not None
            assert self.cache.refinement is not None
            assert not self.cache.refinement.done
            self.open.set()
            assert self.cache.refinement.wait(30)
        if self.steps > 3:
            self.check()
        return scores


@pytest.fixture
def swaps(monkeypatch: pytest.MonkeyPatch) -> list[SwapIn]:
    """Record the swapping processors that generate makes."""
    made: list[SwapIn] = []
    init = SwapIn.__init__

    def remember(self: SwapIn, *args: Any) -> None:
        made.append(self)
        init(self, *args)

    monkeypatch.setattr(SwapIn, "__init__", remember)
    return made


def left_padded() -> dict[str, Tensor]:
    """Return three questions of different length about the context, and a prompt that leaves it after 60 tokens."""
    rows = [torch.cat([CONTEXT[0], tokens(n, seed=n)[0]]) for n in (3, 9, 6)]
    longest = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows])
    mask = torch.stack([torch.arange(longest) >= longest - len(row) for row in rows]).long()
    return {"input_ids": ids, "attention_mask": mask}


def cropped() -> dict[str, Tensor]:
    ids = torch.cat([CONTEXT[:, :60], tokens(20, seed=2)], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


PROMPTS: dict[str, dict[str, Tensor]] = {
    "whole": {"input_ids": PROMPT, "attention_mask": torch.ones_like(PROMPT)},
    "batch": left_padded(),
    "cropped": cropped(),
}
WAYS = {name: MODES[name] for name in ("greedy", "sampling", "beams", "num_return_sequences", "static cache",
                                       "static cache with beams", "guidance")}  # fmt: skip
WAYS["prompt lookup"] = {"prompt_lookup_num_tokens": 3, "do_sample": False}
WAYS["assistant"] = {"assistant_model": shared("llama", 1), "do_sample": False}


def holds(live: Any, finest: CacheGenCache, reuse: Reuse) -> None:
    """Check that every position of the context in a generation's cache has the finest level, and that there is one."""
    for layer, keys, values in zip(live.layers, finest.kv.keys, finest.kv.values, strict=True):
        seen = int(getattr(layer, "cumulative_length_int", None) or layer.get_seq_length())
        held = range(max(0, seen - layer.keys.shape[2]) if layer.is_sliding else 0, reuse.length)
        repeats = layer.keys.shape[0] // len(reuse.pads)
        for row in range(layer.keys.shape[0]):
            pads = reuse.pads[row // repeats]
            for position in held:
                if position >= pads:
                    assert torch.equal(layer.keys[row, :, position - held.start], keys[0, :, position - pads])
                    assert torch.equal(layer.values[row, :, position - held.start], values[0, :, position - pads])
        assert layer.is_sliding or len(held) > 30


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "deepseek"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", PROMPTS)
def test_refinements_reach_a_generation_between_two_steps(
    server: Server, tmp_path: Path, swaps: list[SwapIn], name: str, way: str, kind: str
) -> None:
    if way in ("prompt lookup", "assistant") and kind == "batch":
        pytest.skip("assisted decoding takes one row")
    folder = write(name, tmp_path / name)
    finest = at_level(folder)
    prompt = PROMPTS[kind]
    reuse = match(CONTEXT[0], prompt["input_ids"], prompt["attention_mask"])
    gate = Gate(server, lambda: holds(swaps[0]._cache, finest, reuse))
    gate.cache = cache = CacheGenCache.stream(serve(server, folder), shared(name), refine="while_generating")
    assert same_kv(cache, at_level(folder, 1))
    torch.manual_seed(0)
    # A random model may end a text at once.
    generate(shared(name), **prompt, cache=cache, max_new_tokens=NEW, min_new_tokens=NEW, logits_processor=[gate],
             **WAYS[way])  # fmt: skip
    assert gate.steps > 3
    assert same_kv(cache, finest)
    assert threads_end()


def test_tokens_equal_those_of_a_cache_that_is_exchanged_by_hand(server: Server, tmp_path: Path) -> None:
    """Decode greedily: four steps from the coarsest level, then from the finest."""
    model, folder = shared("llama"), write("llama", tmp_path / "artifact")
    coarse, finest = at_level(folder, 1), at_level(folder)
    past, ids, logits = coarse.to_dynamic(), PROMPT, []
    feed = QUESTION
    for step in range(NEW):
        if step == 4:
            for layer, keys, values in zip(past.layers, finest.kv.keys, finest.kv.values, strict=True):
                layer.keys = torch.cat([keys, layer.keys[:, :, CONTEXT_TOKENS:]], 2)
                layer.values = torch.cat([values, layer.values[:, :, CONTEXT_TOKENS:]], 2)
        with torch.no_grad():
            logits.append(model(input_ids=feed, **{CACHE_ARGUMENT: past}).logits[:, -1])
        feed = logits[-1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, feed], 1)

    gate = Gate(server, lambda: None)
    gate.cache = cache = CacheGenCache.stream(serve(server, folder), model, refine="while_generating")
    found = generate(
        model, PROMPT, cache=cache, max_new_tokens=NEW, do_sample=False, logits_processor=[gate],
        output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    assert torch.equal(found.sequences, ids)
    for score, expected in zip(found.scores, logits, strict=True):
        torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-4)
    assert isinstance(past, DynamicCache)


def test_two_generations_of_one_cache_each_get_the_refinement(server: Server, tmp_path: Path) -> None:
    """The second begins from the finest level; the coarse tensors of the first are not changed meanwhile."""
    model, folder = shared("llama"), write("llama", tmp_path / "artifact")
    gate = Gate(server, lambda: None)
    gate.cache = cache = CacheGenCache.stream(serve(server, folder), model, refine="while_generating")
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
    generate(model, PROMPT, cache=cache, logits_processor=[gate], min_new_tokens=NEW, **options)
    second = generate(model, PROMPT, cache=cache, **options)
    assert torch.equal(second, generate(model, PROMPT, cache=at_level(folder), **options))


@pytest.mark.parametrize("options", [
    {"slo": 30.0},
    {"slo": 30.0, "refine": "while_generating"},
    {"refine": "before"},
    {"stream": {"level": 3}},
    {"slo": 30.0, "stream": {"policy": "adaptive", "connections": 2}},
], ids=str)  # fmt: skip
def test_generate_streams_from_a_url(server: Server, tmp_path: Path, options: dict[str, Any]) -> None:
    model, folder = shared("llama"), write("llama", tmp_path / "artifact")
    events: list[Event] = []
    options = {**options, "stream": {**options.get("stream", {}), "on_event": events.append}}
    found = generate(model, PROMPT, cache=serve(server, folder), max_new_tokens=NEW, do_sample=False, **options)
    if options.get("refine") != "while_generating":
        assert torch.equal(found, generate(model, PROMPT, cache=at_level(folder), max_new_tokens=NEW, do_sample=False))
    first = next(event for event in events if isinstance(event, FirstToken))
    assert first.met is (True if "slo" in options else None)
    finished = next(event for event in events if isinstance(event, StreamFinished))
    assert isinstance(finished.report, StreamReport)
    assert threads_end()


def test_an_attached_model_streams(server: Server, tmp_path: Path) -> None:
    model, folder = shared("llama"), write("llama", tmp_path / "artifact")
    url = serve(server, folder)
    attach(model)
    try:
        found = model.generate(PROMPT, cache=url, slo=30.0, max_new_tokens=NEW, do_sample=False)
    finally:
        detach(model)
    assert torch.equal(found, generate(model, PROMPT, cache=at_level(folder), max_new_tokens=NEW, do_sample=False))


def test_the_slo_counts_the_question_and_is_reported(server: Server, tmp_path: Path) -> None:
    cache = CacheGenCache.stream(
        serve(server, write("llama", tmp_path / "artifact")), shared("llama"), slo=30.0,
        prompt=(PROMPT, torch.ones_like(PROMPT)),
    )  # fmt: skip
    generate(shared("llama"), PROMPT, cache=cache, max_new_tokens=2)
    report = cache.report
    assert isinstance(report, StreamReport)
    assert report.ttft is not None
    assert report.ttft > (report.load_seconds or 0)
    assert report.met is True
    before = report.ttft
    generate(shared("llama"), PROMPT, cache=cache, max_new_tokens=2)
    assert isinstance(cache.report, StreamReport)
    assert cache.report.ttft == before


def test_without_an_answering_source_the_prompt_is_computed(caplog: pytest.LogCaptureFixture) -> None:
    with running(Server()) as gone:
        dead = gone.url
    model = shared("llama")
    found = generate(model, PROMPT, cache=dead, slo=5.0, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(found, model.generate(PROMPT, max_new_tokens=NEW, do_sample=False))
    assert "computed without its cache" in caplog.text


def test_a_missing_location_is_an_error(server: Server, tmp_path: Path) -> None:
    """A wrong name is not a failure of the network, so the prompt is not computed. A fallback may have the artifact."""
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "slo": 30.0}
    with pytest.raises(ArtifactNotFoundError):
        generate(shared("llama"), PROMPT, cache=f"{server.url}/mistyped", **options)
    folder = write("llama", tmp_path / "artifact")
    found = generate(shared("llama"), PROMPT, cache=f"{server.url}/mistyped", stream={"fallback": [folder]}, **options)
    expected = generate(shared("llama"), PROMPT, cache=at_level(folder), max_new_tokens=NEW, do_sample=False)
    assert torch.equal(found, expected)


def test_a_prompt_without_the_context_is_computed(server: Server, tmp_path: Path) -> None:
    model, url = shared("llama"), serve(server, write("llama", tmp_path / "artifact"))
    ids = tokens(30, seed=42)
    found = generate(model, ids, cache=url, slo=5.0, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(found, model.generate(ids, max_new_tokens=NEW, do_sample=False))
    with pytest.raises(PromptMismatchError):
        generate(model, ids, cache=url, slo=5.0, max_new_tokens=NEW, on_mismatch="error")


def test_wrong_arguments_are_errors(server: Server, tmp_path: Path) -> None:
    url = serve(server, write("llama", tmp_path / "artifact"))
    with pytest.raises(WrongModelError):
        generate(shared("qwen3"), PROMPT, cache=url, slo=5.0, max_new_tokens=2)
    with pytest.raises(ConfigError, match="loaded already"):
        generate(shared("llama"), PROMPT, cache=exact("llama"), slo=5.0, max_new_tokens=2)
    server.always = faults.status(401)
    with pytest.raises(StoreAccessError):
        hf_cachegen.generate(shared("llama"), PROMPT, cache=url, slo=5.0, max_new_tokens=2)
