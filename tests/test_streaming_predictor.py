"""Streams of predicted artifacts that fail: each of their chunks equals that of a plain load, or is recomputed."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import pytest
import torch
from torch import Tensor

from hf_cachegen.artifact import PROFILE_FILE
from hf_cachegen.artifact.artifact import Artifact
from hf_cachegen.cache import CacheGenCache
from hf_cachegen.config import CacheGenConfig
from hf_cachegen.errors import (
    ArtifactError,
    CorruptError,
    MismatchError,
    ProfileError,
    StoreError,
    StreamCancelledError,
)
from hf_cachegen.generation import generate
from hf_cachegen.models.probe import PROBE_TOKENS
from hf_cachegen.profiles.learning import learn_profile
from hf_cachegen.stores import LocalStore
from hf_cachegen.streaming import StreamReport, loader, measure
from hf_cachegen.streaming.layers import LayerWriter
from hf_cachegen.streaming.schedule import Schedule
from tests import http_server as faults
from tests.http_server import Server
from tests.klt_support import samples
from tests.predicted_support import Mixed, as_reported, close, entering, hooks, loaded
from tests.streaming_support import (
    CHUNK_TOKENS,
    CHUNKS,
    CONTEXT,
    CONTEXT_TOKENS,
    FAILURES,
    damaged,
    fail_at_random,
    offset,
    only,
    refinements_wait,
    report,
    serve,
    silent_side,
    stream,
    threads_end,
)
from tests.tiny_models import make, shared, tokens

pytestmark = pytest.mark.usefixtures("own_cache")

CONFIG = CacheGenConfig(transform="klt", chunk_tokens=CHUNK_TOKENS, protect_first=2, protect_last=4)
LAYERS = (0, 2)
OTHER = tokens(CONTEXT_TOKENS, seed=6)
QUESTION = tokens(7, seed=11)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], Path]:
    """Return the artifacts of two contexts for each predictor, with their profile beside them."""
    profile = learn_profile(shared("llama"), samples(8), config=CONFIG, predict_layers=LAYERS, target_kl=0.01)
    found = {}
    for layer in LAYERS:
        for name, ids in (("context", CONTEXT), ("other", OTHER)):
            folder = tmp_path_factory.mktemp("predicted") / name
            config = CacheGenConfig(**{**vars(CONFIG), "predict_layers": layer})
            CacheGenCache.from_context(shared("llama"), ids, config, profile).save_pretrained(folder)
            profile.save(folder)
            found[layer, name] = folder
    return found


@pytest.fixture(params=LAYERS, ids=lambda layer: f"m{layer}")
def layer(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def folder(made: dict[tuple[int, str], Path], layer: int) -> Path:
    assert Artifact(LocalStore(made[layer, "context"])).config.predict_layers == layer
    return made[layer, "context"]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record each run of the first layers."""
    found: list[int] = []
    known_of = loader.known_of
    monkeypatch.setattr(loader, "known_of", lambda *given: (found.append(given[3]), known_of(*given))[1])
    return found


def test_levels_and_hidden_states_can_be_told_apart(folder: Path, layer: int) -> None:
    """Otherwise no test of this file could fail."""
    for a, b in ((1, 2), (2, 3), (1, 3)):
        for first in range(0, CONTEXT_TOKENS - 4, CHUNK_TOKENS):
            assert not close(loaded(folder, a), loaded(folder, b), slice(first, first + CHUNK_TOKENS))
    exact = CacheGenCache.from_context(shared("llama"), CONTEXT)
    for index, (mine, right) in enumerate(zip(loaded(folder).kv.keys, exact.kv.keys, strict=True)):
        assert torch.allclose(mine, right, rtol=1e-4, atol=1e-4) == (index <= layer)


@pytest.mark.parametrize("failure", FAILURES)
def test_a_fallback_gives_what_the_first_source_fails_to_give(
    server: Server, spare: Server, folder: Path, failure: str
) -> None:
    server.always = only("refine", FAILURES[failure]())
    cache = stream(serve(server, folder), fallback=[serve(spare, folder)])
    assert as_reported(cache, folder) == [3] * CHUNKS
    assert server.url in "".join(report(cache).faults)


def test_a_chunk_that_is_damaged_everywhere_is_recomputed(server: Server, spare: Server, folder: Path) -> None:
    """The chunks behind it are predicted from the tokens' own hidden states all the same."""
    url, other = serve(server, folder), serve(spare, folder)
    for each in (server, spare):
        damaged(each, "base.safetensors", offset(folder, "base.safetensors", "chunk-00003"))
    cache = stream(url, fallback=[other])
    assert as_reported(cache, folder) == [3] * 3 + [None] + [3] * (CHUNKS - 4)
    assert not close(cache, loaded(folder), slice(48, 64))


def test_a_refinement_that_is_damaged_is_recomputed_or_stays_coarse(
    server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = serve(server, folder)
    damaged(server, "refine-1.safetensors", offset(folder, "refine-1.safetensors", "chunk-00002"))
    assert as_reported(stream(url), folder) == [3, 3, None] + [3] * (CHUNKS - 3)
    monkeypatch.setattr("hf_cachegen.streaming.stream.positions_change", lambda *_: True)
    assert as_reported(stream(url), folder) == [3, 3, 1] + [3] * (CHUNKS - 3)


@pytest.mark.parametrize("file", ["base", "refine-1", "refine-2"])
@pytest.mark.parametrize("share", [None, 0.5], ids=["missing", "truncated"])
def test_a_file_that_is_missing_or_truncated_everywhere(
    server: Server, spare: Server, folder: Path, file: str, share: float | None
) -> None:
    """Recomputed where there is time; else the levels before, where there is a base."""
    url, other = serve(server, folder), serve(spare, folder)
    for each in (server, spare):
        whole = each.files.pop(f"{file}.safetensors")
        if share is not None:
            each.files[f"{file}.safetensors"] = whole[: int(share * len(whole))]
    found = as_reported(stream(url, fallback=[other]), folder)
    assert None in found
    assert set(found) <= {None, 3}
    cache = stream(url, fallback=[other], refine="while_generating")
    assert cache.refinement is not None
    assert cache.refinement.wait(30)
    found = as_reported(cache, folder)
    assert None in found if file == "base" else min(found) == int(file[-1])


def test_a_chunk_that_cannot_be_decoded_is_recomputed(
    server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = LayerWriter.decode

    def failing(self: LayerWriter, codec: Any, chunks: Any) -> Any:
        launched = decode(self, codec, chunks)
        if any(span.first == 2 * CHUNK_TOKENS for _, span in chunks):
            raise CorruptError("the coder's own check failed")
        return launched

    monkeypatch.setattr(LayerWriter, "decode", failing)
    cache = stream(serve(server, folder))
    assert as_reported(cache, folder) == [3, 3, None] + [3] * (CHUNKS - 3)


def test_silence_instead_of_side_information_runs_no_first_layers(server: Server, folder: Path, ran: list[int]) -> None:
    measure(shared("llama"))
    url = serve(server, folder)
    with silent_side(server):
        cache = CacheGenCache.stream(url, shared("llama"), slo=1.5, stall_seconds=20.0)
    assert as_reported(cache, folder) == [None] * CHUNKS
    assert ran == []


@pytest.fixture
def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """No profile is in use yet, as in a process that has loaded nothing."""
    monkeypatch.setattr("hf_cachegen.profiles.finding._known", WeakValueDictionary())


@pytest.mark.usefixtures("new_process")
def test_a_profile_whose_location_is_silent_is_not_waited_for(server: Server, folder: Path, ran: list[int]) -> None:
    measure(shared("llama"))
    end = threading.Event()
    server.always = lambda request, body, headers: (
        PROFILE_FILE in request.path and end.wait(20),
        request.answer(206, body, headers),
    )[1]
    start = time.monotonic()
    try:
        cache = CacheGenCache.stream(serve(server, folder), shared("llama"), slo=1.5, stall_seconds=20.0)
        assert time.monotonic() - start < 10
    finally:
        end.set()
    assert as_reported(cache, folder) == [None] * CHUNKS
    assert ran == []
    assert threads_end()


@pytest.mark.usefixtures("new_process")
def test_a_profile_that_is_missing_is_named(server: Server, folder: Path) -> None:
    url = serve(server, folder)
    del server.files[PROFILE_FILE]
    with pytest.raises(ProfileError, match=Artifact(LocalStore(folder)).pin.digest):  # type: ignore[union-attr]
        stream(url)


def test_text_and_levels_in_one_stream(
    server: Server, folder: Path, ran: list[int], layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recomputed chunks have exact hidden states, and so does the prediction of those behind them."""
    policy, recomputed = Mixed(), Schedule.recomputed

    def counted(self: Schedule, chunk: int) -> None:
        policy.text -= 1
        recomputed(self, chunk)

    monkeypatch.setattr(Schedule, "recomputed", counted)
    # Less than a chunk, so that no request brings the neighbours of a chunk too.
    monkeypatch.setattr("hf_cachegen.streaming.fetching.request_bytes", lambda *_: 300)
    cache = stream(serve(server, folder), policy=policy)
    assert as_reported(cache, folder) == [None] * 2 + [2] * (CHUNKS - 2)
    assert ran == [layer]


@pytest.mark.parametrize("slo", [0.05, 0.3, 1.0])
def test_first_layers_that_are_slower_than_the_slo(server: Server, folder: Path, slo: float) -> None:
    """They were not expected to be: the stream ends, and each chunk is what the report says."""
    with entering(shared("llama"), lambda: time.sleep(0.7)):
        cache = stream(serve(server, folder), slo=slo)
    as_reported(cache, folder)


def test_a_source_that_dies_while_the_first_layers_run(server: Server, spare: Server, folder: Path) -> None:
    gate = refinements_wait(server)

    def die() -> None:
        server.always = faults.reset_at_once
        gate.set()

    with entering(shared("llama"), die):
        cache = stream(serve(server, folder), fallback=[serve(spare, folder)])
    assert as_reported(cache, folder) == [3] * CHUNKS


def test_cancelling_while_the_first_layers_run(server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream ends with the forward pass, and not with the last one over the context."""
    monkeypatch.setattr("hf_cachegen.models.first_layers.RUN_TOKENS", 2 * PROBE_TOKENS)
    cancel, passes, before = threading.Event(), list[int](), hooks(shared("llama"))

    def entered() -> None:
        passes.append(1)
        cancel.set()

    with entering(shared("llama"), entered), pytest.raises(StreamCancelledError):
        stream(serve(server, folder), cancel=cancel)
    assert len(passes) == 1
    assert hooks(shared("llama")) == before


def test_first_layers_in_several_passes(server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_cachegen.models.first_layers.RUN_TOKENS", 7)
    assert as_reported(stream(serve(server, folder)), folder) == [3] * CHUNKS


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=str)
def test_an_error_of_the_model_in_its_first_layers_ends_the_stream(
    server: Server, folder: Path, error: BaseException
) -> None:
    """It is raised as it is, and neither threads nor hooks are left."""

    def fail() -> None:
        raise error

    model, url = shared("llama"), serve(server, folder)
    before = hooks(model)
    with entering(model, fail), pytest.raises(type(error)):
        stream(url)
    assert hooks(model) == before
    assert as_reported(stream(url), folder) == [3] * CHUNKS


WAYS: tuple[dict[str, Any], ...] = ({}, {"slo": 5.0}, {"slo": 0.3}, {"slo": 0.5, "refine": "while_generating"})


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_a_stream_from_servers_that_fail_at_random_equals_its_report_or_is_an_error(
    server: Server, spare: Server, folder: Path, way: dict[str, Any], seed: int
) -> None:
    fail_at_random(server, seed)
    fail_at_random(spare, seed + 100)
    try:
        cache = CacheGenCache.stream(
            serve(server, folder), shared("llama"), fallback=[serve(spare, folder)], stall_seconds=0.3, **way
        )
    except (StoreError, ArtifactError):
        pass
    else:
        assert cache.refinement is not None
        assert cache.refinement.wait(60)
        as_reported(cache, folder, recomputed="refine" not in way)
    assert threads_end()


def test_another_model_is_refused_before_its_first_layers_run(server: Server, folder: Path, ran: list[int]) -> None:
    for other in (shared("llama", 1), shared("mistral")):
        with pytest.raises(MismatchError):
            CacheGenCache.stream(serve(server, folder), other)
    assert ran == []
    assert threads_end()


@pytest.mark.parametrize("shared_tokens", [CONTEXT_TOKENS, 60, 1])
def test_a_prompt_that_leaves_the_context(server: Server, folder: Path, shared_tokens: int) -> None:
    prompt = torch.cat([CONTEXT[:, :shared_tokens], QUESTION], 1)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    answer = generate(shared("llama"), prompt, cache=serve(server, folder), slo=20.0, **options)
    assert torch.equal(answer, generate(shared("llama"), prompt, cache=loaded(folder), **options))


def test_refinements_that_arrive_while_the_model_generates(server: Server, folder: Path, ran: list[int]) -> None:
    gate = refinements_wait(server)
    cache = CacheGenCache.stream(serve(server, folder), shared("llama"), refine="while_generating")
    assert as_reported(cache, folder) == [1] * CHUNKS
    steps: list[int] = []

    def step(ids: Tensor, scores: Tensor) -> Tensor:
        steps.append(ids.shape[1])
        gate.set()
        assert cache.refinement is not None
        assert cache.refinement.wait(30)
        return scores

    prompt = torch.cat([CONTEXT, QUESTION], 1)
    generate(shared("llama"), prompt, cache=cache, max_new_tokens=3, do_sample=False, logits_processor=[step])
    assert len(steps) == 3
    assert as_reported(cache, folder) == [3] * CHUNKS
    assert len(ran) == 1


def test_a_stream_within_inference_mode_is_refined(server: Server, folder: Path) -> None:
    """The thread that refines is outside of it."""
    gate = refinements_wait(server)
    with torch.inference_mode():
        cache = CacheGenCache.stream(serve(server, folder), shared("llama"), refine="while_generating")
    gate.set()
    assert cache.refinement is not None
    assert cache.refinement.wait(30)
    assert as_reported(cache, folder) == [3] * CHUNKS


def test_a_model_in_training_mode_stays_in_it(server: Server, folder: Path) -> None:
    model = make("llama")
    model.train()
    cache = CacheGenCache.stream(serve(server, folder), model)
    assert all(module.training for module in model.modules())
    assert as_reported(cache, folder) == [3] * CHUNKS


def test_two_streams_at_once_have_their_own_hidden_states(
    server: Server, made: dict[tuple[int, str], Path], layer: int
) -> None:
    """Both contexts are in the model's first layers at the same time."""
    names, found = ("context", "other"), dict[str, Any]()
    urls = {name: serve(server, made[layer, name], name) for name in names}
    model, meeting = make("llama"), threading.Barrier(2)

    def meet(_: Any, given: tuple[Tensor, ...], kwargs: Any) -> None:
        if given[0].shape[1] > PROBE_TOKENS:
            meeting.wait(20)

    # Behind the hook that takes the hidden state, and before layer m gives its keys and values.
    model.model.layers[layer].self_attn.register_forward_pre_hook(
        lambda module, given, kwargs: meet(module, (kwargs["hidden_states"],), kwargs), with_kwargs=True
    )

    def load(name: str) -> None:
        found[name] = CacheGenCache.stream(urls[name], model)

    threads = [threading.Thread(target=load, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for name in names:
        assert isinstance(found[name].report, StreamReport)
        assert as_reported(found[name], made[layer, name]) == [3] * CHUNKS
