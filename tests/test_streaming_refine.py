"""Refinements with other work at the same time: generations, copies, and the end of generate()."""

from __future__ import annotations

import copy
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_cachegen.cache import CacheGenCache
from hf_cachegen.generation import generate
from hf_cachegen.streaming import Event, FirstToken, StreamFinished
from hf_cachegen.streaming.layers import LayerWriter
from hf_cachegen.streaming.prefill_speed import speed_of
from hf_cachegen.streaming.refine import Refinement
from tests.http_server import Server
from tests.streaming_support import CONTEXT, CONTEXT_TOKENS, at_level, refinements_wait, refining_waits, threads_end
from tests.tiny_models import shared, tokens

pytestmark = pytest.mark.usefixtures("own_cache")

PROMPT = torch.cat([CONTEXT, tokens(7, seed=11)], 1)


class Tally:
    """A tally in which two threads ask for the time of the first token at once."""

    def __init__(self) -> None:
        self.meeting, self.reported = threading.Barrier(2), None

    @property
    def ttft(self) -> float | None:
        found = self.reported
        with suppress(threading.BrokenBarrierError):
            self.meeting.wait(0.5)
        return found

    @ttft.setter
    def ttft(self, value: float) -> None:
        self.reported = value


def test_two_generations_at_once_have_one_first_token() -> None:
    reported: list[Any] = []
    learnt: list[Any] = []
    session = SimpleNamespace(
        tally=Tally(), options=SimpleNamespace(slo=1.0), elapsed=time.monotonic,
        events=SimpleNamespace(add=lambda *event: reported.append(event), deliver=lambda: None),
    )  # fmt: skip
    loader: Any = SimpleNamespace(session=session, learn_question=lambda *sample: learnt.append(sample))
    refinement = Refinement(loader, None)  # type: ignore[arg-type]
    threads = [threading.Thread(target=refinement.first_token, args=(1, 7, 0.1)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert [kind for kind, _ in reported] == [FirstToken]
    assert len(learnt) == 1


def test_the_time_of_a_draft_is_not_the_time_of_the_model(url: str) -> None:
    """The model reads the question after an assistant, here a slow one, has drafted."""
    assistant = copy.deepcopy(shared("llama", 1))
    passes: list[float] = []
    assistant.register_forward_pre_hook(lambda *_: (passes.append(1.0), time.sleep(1.0))[1])
    cache = CacheGenCache.stream(url, shared("llama"), level=1)
    assert cache.refinement is not None
    speed = speed_of(shared("llama"))
    for _ in range(2):
        speed.add(0, 64, 1.0)
    generate(shared("llama"), PROMPT, cache=cache, max_new_tokens=4, do_sample=False, assistant_model=assistant)
    assert len(passes) > 1
    first, count, seconds = speed.samples[-1]
    assert (first, count) == (CONTEXT_TOKENS, 7)
    assert seconds < 1.0


def test_a_copy_has_one_level_while_refinements_arrive(
    server: Server, url: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refinements arrive, if they can, after the first layer is copied and before the last one."""
    gate = refinements_wait(server)
    cache = CacheGenCache.stream(url, shared("llama"), refine="while_generating")
    assert cache.refinement is not None
    refinement, first, clone = cache.refinement, cache.kv.keys[0], torch.Tensor.clone

    def slowly(tensor: torch.Tensor, **options: Any) -> torch.Tensor:
        copied = clone(tensor, **options)
        if tensor.data_ptr() == first.data_ptr() and threading.current_thread() is threading.main_thread():
            gate.set()
            refinement._done.wait(0.7)
        return copied

    monkeypatch.setattr(torch.Tensor, "clone", slowly)
    found = cache.to_dynamic()
    monkeypatch.undo()
    gate.set()
    coarse = at_level(folder, 1).kv
    for layer, keys, values in zip(found.layers, coarse.keys, coarse.values, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)
    assert refinement.wait(30)
    finest = at_level(folder).kv
    assert torch.equal(cache.to_dynamic().layers[-1].values, finest.values[-1])
    assert cache.to_dynamic().layers[0].keys.data_ptr() != cache.kv.keys[0].data_ptr()


def test_the_end_of_a_stream_is_reported_before_generate_returns(server: Server, url: str) -> None:
    """The numbers of an exporter are then complete, also those of a thread that works on a chunk."""
    gate = refinements_wait(server)
    events: list[Event] = []
    decoding = threading.Event()
    rows = LayerWriter.rows

    def slowly(*arguments: Any) -> Any:
        decoding.set()
        threading.Event().wait(0.3)
        return rows(*arguments)

    def step(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        gate.set()
        assert decoding.wait(20)
        return scores

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayerWriter, "rows", slowly)
        generate(
            shared("llama"), PROMPT, cache=url, refine="while_generating", max_new_tokens=1, do_sample=False,
            logits_processor=[step], stream={"on_event": events.append},
        )  # fmt: skip
        ended = list(events)
        assert threads_end()
    assert isinstance(ended[-1], StreamFinished)
    assert ended[-1].report.finished
    assert events == ended


def test_the_end_is_reported_though_a_thread_does_not_end(
    server: Server, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_cachegen.streaming.refine.SETTLE_SECONDS", 0.1)
    gate = refinements_wait(server)
    events: list[Event] = []
    cache = CacheGenCache.stream(url, shared("llama"), refine="while_generating", on_event=events.append)
    assert cache.refinement is not None
    decoding, go_on = refining_waits(cache)
    gate.set()
    assert decoding.wait(20)
    cache.refinement.close()
    assert [type(event) for event in events].count(StreamFinished) == 1
    go_on.set()
    assert threads_end()
    assert isinstance(events[-1], StreamFinished)
    assert [type(event) for event in events].count(StreamFinished) == 1
