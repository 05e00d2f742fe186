"""Models with recurrent states: a context keeps checkpoints, and every prompt gets the tokens of the stock generate."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_cachegen import CacheGenCache, CacheGenConfig, detach
from hf_cachegen.artifact import STATES_FILE, Reader
from hf_cachegen.artifact.artifact import Artifact, write
from hf_cachegen.artifact.tensors import NamedTensor
from hf_cachegen.errors import (
    ConfigError,
    CorruptError,
    ManifestError,
    ReadOnlyCacheError,
    UnsupportedModelError,
    WrongModelError,
    WrongWeightsError,
)
from hf_cachegen.generation import from_cache
from hf_cachegen.models.compat import cache_argument
from hf_cachegen.models.continuation import Continuation, continuation_of
from hf_cachegen.models.kinds import layer_contents
from hf_cachegen.models.prefill import StateOptions
from hf_cachegen.models.prefix import Reuse
from hf_cachegen.models.recurrent import Checkpoint, Checkpoints, shorten
from hf_cachegen.stores import LocalStore
from tests import state_models

CONTEXT = torch.randint(3, 97, (1, 40), generator=torch.Generator().manual_seed(1))
QUESTION = torch.randint(3, 97, (1, 7), generator=torch.Generator().manual_seed(2))
OPTIONS: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
LOSSLESS = CacheGenConfig(lossless=True, chunk_tokens=16)
REFUSED = ("minimax", "rwkv", "recurrent_gemma")
FAMILIES = [name for name in state_models.NAMES if name not in REFUSED and state_models.known(name)]
SINGLE = ("mamba", "falcon_mamba", "jamba", "zamba")
"""Families that pass over their recurrent state when they read several tokens."""
PROMPTS = {
    "exact": CONTEXT,
    "shorter": CONTEXT[:, :30],
    "grown": torch.cat([CONTEXT, QUESTION], 1),
    "departs": torch.cat([CONTEXT[:, :33], QUESTION], 1),
    "other": QUESTION.repeat(1, 3),
    "batch": torch.cat([torch.cat([CONTEXT, row], 1) for row in (QUESTION, QUESTION.flip(1))]),
}


def ask(model: Any, prompt: Tensor, **options: Any) -> Tensor:
    mask = options.pop("attention_mask", torch.ones_like(prompt))
    found: Tensor = model.generate(prompt, attention_mask=mask, **{**OPTIONS, **options})
    return found


def reused(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name == "hf_cachegen.generation"]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """A model, a cache of its context, and the folder of the cache's artifact."""
    model = state_models.shared(request.param)
    cache = CacheGenCache.from_context(model, CONTEXT, LOSSLESS)
    folder = tmp_path_factory.mktemp(request.param)
    cache.save_pretrained(folder)
    return model, cache, folder


def test_every_prompt_gets_the_tokens_of_the_stock_generate(family: tuple[Any, Any, Path]) -> None:
    model, cache, folder = family
    loaded = CacheGenCache.from_pretrained(folder, model)
    for name, prompt in PROMPTS.items():
        expected = ask(model, prompt)
        assert torch.equal(ask(model, prompt, cache=cache), expected), name
        assert torch.equal(ask(model, prompt, cache=loaded), expected), name


def test_what_is_stored_is_exact(family: tuple[Any, Any, Path]) -> None:
    model, cache, folder = family
    loaded = CacheGenCache.from_pretrained(folder, model)
    assert loaded.checkpoints.tokens == cache.checkpoints.tokens == cache.report.checkpoints == (23, 39)
    for ours, theirs in zip(cache.checkpoints.all, loaded.checkpoints.all, strict=True):
        assert ours.states.keys() == theirs.states.keys()
        for key, state in ours.states.items():
            assert torch.equal(state, theirs.states[key]), key
    assert len(loaded.kv.geometry.layers) == sum(c.kind is not None for c in layer_contents(model.config))
    assert all(torch.equal(*pair) for pair in zip(cache.kv.keys, loaded.kv.keys, strict=True))
    assert loaded.report.state_bytes == cache.report.state_bytes == cache.checkpoints.nbytes > 0


def test_beams_and_sampling_and_several_sequences(family: tuple[Any, Any, Path]) -> None:
    model, cache, _ = family
    prompt = PROMPTS["departs"]
    for options in ({"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3, "temperature": 2.0}):
        torch.manual_seed(0)
        expected = ask(model, prompt, **options)
        torch.manual_seed(0)
        assert torch.equal(ask(model, prompt, cache=cache, **options), expected), options


def test_padded_rows_are_computed(family: tuple[Any, Any, Path], caplog: pytest.LogCaptureFixture) -> None:
    model, cache, _ = family
    prompt = torch.cat([torch.zeros(1, 3, dtype=torch.long), CONTEXT, QUESTION], 1)
    prompt = torch.cat([prompt, torch.cat([CONTEXT, QUESTION, QUESTION[:, :3]], 1)])
    mask = (prompt != 0).long()
    expected = ask(model, prompt, attention_mask=mask)
    assert torch.equal(ask(model, prompt, cache=cache, attention_mask=mask), expected)


def test_a_lossy_cache_is_finite_and_close(family: tuple[Any, Any, Path], tmp_path: Path) -> None:
    model, cache, _ = family
    cache.save_pretrained(tmp_path, CacheGenConfig(chunk_tokens=16, steps=(0.1, 0.1, 0.1)))
    loaded = CacheGenCache.from_pretrained(tmp_path, model)
    options = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(PROMPTS["grown"], **{**OPTIONS, **options}).logits[0]
    got = model.generate(PROMPTS["grown"], cache=loaded, **{**OPTIONS, **options}).logits[0]
    assert bool(got.isfinite().all())
    # Large random weights amplify the errors of the keys and values.
    assert float((got - expected).norm() / expected.norm()) < 0.5


def test_how_a_model_continues_is_found(family: tuple[Any, Any, Path]) -> None:
    model, cache, _ = family
    found = continuation_of(model)
    name = next(name for name in FAMILIES if state_models.shared(name) is model)
    assert (found.several, found.single) == (name not in SINGLE, True)
    assert found.state_bytes == cache.checkpoints.all[0].nbytes
    assert continuation_of(model) is found, "it is tried once"


@pytest.mark.parametrize("name", [name for name in REFUSED if state_models.known(name)])
def test_models_that_keep_their_states_elsewhere_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=type(state_models.shared(name)).__name__):
        CacheGenCache.from_context(state_models.shared(name), CONTEXT)


@pytest.mark.parametrize("name", ["qwen3_next", "falcon_h1", "jamba"])
def test_a_static_cache_is_filled(name: str) -> None:
    model = state_models.shared(name)
    cache = CacheGenCache.from_context(model, CONTEXT)
    options = {"cache_implementation": "static", "disable_compile": True}
    expected = ask(model, PROMPTS["grown"], **options)
    assert torch.equal(ask(model, PROMPTS["grown"], cache=cache, **options), expected)


def test_generating_does_not_change_the_cache() -> None:
    model = state_models.shared("qwen3_next")
    cache = CacheGenCache.from_context(model, CONTEXT)
    before = [state.clone() for checkpoint in cache.checkpoints.all for state in checkpoint.states.values()]
    first = ask(model, PROMPTS["grown"], cache=cache)
    assert torch.equal(ask(model, PROMPTS["grown"], cache=cache), first)
    after = [state for checkpoint in cache.checkpoints.all for state in checkpoint.states.values()]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_a_cache_that_a_model_filled(tmp_path: Path) -> None:
    """Its states are those after the last token, which only a longer prompt can continue."""
    model = state_models.shared("qwen3_next")
    with torch.no_grad():
        filled = model(CONTEXT, use_cache=True)[cache_argument(model)]
    cache = CacheGenCache.from_cache(filled, CONTEXT, model)
    assert cache.checkpoints.tokens == (40,)
    for name in ("grown", "exact", "departs"):
        assert torch.equal(ask(model, PROMPTS[name], cache=cache), ask(model, PROMPTS[name])), name


def test_a_filled_cache_of_something_else_is_refused() -> None:
    model = state_models.make("qwen3_next")
    with torch.no_grad():
        filled = model(CONTEXT.flip(1), use_cache=True)[cache_argument(model)]
    cache = CacheGenCache.from_cache(filled, CONTEXT, model)
    with pytest.raises(WrongWeightsError, match="of layer 0"):
        ask(model, PROMPTS["grown"], cache=cache)


def test_a_copy_for_the_stock_model() -> None:
    model = state_models.shared("qwen3_next")
    cache = CacheGenCache.from_context(model, CONTEXT)
    with pytest.raises(ConfigError, match="needs the model"):
        cache.to_dynamic()
    copied = cache.to_dynamic(model)
    assert copied.get_seq_length() == 39
    detach(model)
    assert torch.equal(
        model.generate(PROMPTS["grown"], **{cache_argument(model): copied}, **OPTIONS), ask(model, PROMPTS["grown"])
    )


def test_the_cache_itself_is_read_only() -> None:
    model = state_models.make("qwen3_next")
    cache = CacheGenCache.from_context(model, CONTEXT, attach=False)
    with pytest.raises(ReadOnlyCacheError), torch.no_grad():
        model(QUESTION, use_cache=True, **{cache_argument(model): cache})


def test_assisted_decoding_is_refused() -> None:
    model = state_models.shared("qwen3_next")
    cache = CacheGenCache.from_context(model, CONTEXT)
    with pytest.raises(UnsupportedModelError, match="assisted decoding of a model with recurrent states"):
        ask(model, CONTEXT, cache=cache, assistant_model=state_models.make("qwen3_next", 1))


def test_many_tokens_are_not_read_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = state_models.shared("mamba")
    cache = CacheGenCache.from_context(model, CONTEXT)
    monkeypatch.setattr(from_cache, "MAX_STEPS", 7)
    monkeypatch.setattr(from_cache, "read_singly", None)
    for name in ("grown", "departs"):  # 8 and 17 tokens
        assert torch.equal(ask(model, PROMPTS[name], cache=cache), ask(model, PROMPTS[name])), name


# Where checkpoints are.

SEVERAL = Continuation(True, True, {(0, "conv_states", 0): ((1, 25), torch.float32)})


@pytest.mark.parametrize(("tokens", "every", "budget", "expected"), [
    (5000, None, 1 << 20, [3975, 4871, 4983, 4999]),
    (100, None, 1 << 20, [83, 99]),
    (100, 30, 1 << 20, [30, 60, 90, 99]),
    (91, 30, 1 << 20, [30, 60, 90]),
    (100, 30, 200, [60, 99]),
    (100, 30, 1, [99]),
    (2, 1, 1 << 20, [1]),
    (1, None, 1 << 20, [1]),
], ids=str)  # fmt: skip
def test_the_positions_of_checkpoints(tokens: int, every: int | None, budget: int, expected: list[int]) -> None:
    assert StateOptions(every, budget).positions(tokens, SEVERAL) == expected


def test_the_positions_of_models_that_continue_otherwise() -> None:
    assert StateOptions().positions(5000, Continuation(False, True, {})) == [4983, 4999]
    assert StateOptions().positions(100, Continuation(True, False, {})) == [82, 98]


@pytest.mark.parametrize("options", [{"state_every": 0}, {"state_budget": 0}], ids=str)
def test_options_out_of_range(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="must be at least 1"):
        CacheGenCache.from_context(state_models.shared("qwen3_next"), CONTEXT, **options)


def test_checkpoints_within_a_budget_are_reported_and_used(caplog: pytest.LogCaptureFixture) -> None:
    model = state_models.shared("qwen3_next")
    one = continuation_of(model).state_bytes
    cache = CacheGenCache.from_context(model, CONTEXT, state_every=8, state_budget=3 * one + 1)
    assert cache.report.checkpoints == (8, 24, 39)
    assert (cache.report.state_bytes, cache.report.state_budget) == (3 * one, 3 * one + 1)
    with caplog.at_level(logging.INFO, "hf_cachegen.generation"):
        assert torch.equal(ask(model, PROMPTS["departs"], cache=cache), ask(model, PROMPTS["departs"]))
    assert "leaves the context after 33 of 40 tokens; 24 are reused" in reused(caplog)[0]


@pytest.mark.parametrize("chunk", [5, 16, 4096])
def test_a_context_may_be_read_in_chunks(chunk: int) -> None:
    model = state_models.shared("qwen3_next")
    cache = CacheGenCache.from_context(model, CONTEXT, prefill_chunk_tokens=chunk, state_every=10)
    assert cache.checkpoints.tokens == (10, 20, 30, 39)
    assert torch.equal(ask(model, PROMPTS["shorter"], cache=cache), ask(model, PROMPTS["shorter"]))


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_short_contexts(tokens: int, tmp_path: Path) -> None:
    model = state_models.shared("qwen3_next")
    CacheGenCache.from_context(model, CONTEXT[:, :tokens]).save_pretrained(tmp_path, LOSSLESS)
    cache = CacheGenCache.from_pretrained(tmp_path, model)
    for prompt in (CONTEXT[:, :tokens], PROMPTS["grown"]):
        assert torch.equal(ask(model, prompt, cache=cache), ask(model, prompt))


def test_the_last_checkpoint_before_the_departure_is_taken() -> None:
    checkpoints = Checkpoints(tuple(Checkpoint(tokens, {}) for tokens in (10, 20, 39)))
    for length, prompt, least, expected in ((39, 40, 1, 39), (39, 40, 2, 20), (25, 60, 1, 20), (9, 60, 1, 0)):
        reuse, checkpoint = shorten(Reuse((0, 0), length, False, length), checkpoints, prompt, least)
        assert reuse.length == expected
        assert (checkpoint is None) == (expected == 0)
    assert shorten(Reuse((0, 3), 39, False, 36), checkpoints, 60, 1)[1] is None, "a row is padded"


# Artifacts.


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    CacheGenCache.from_context(state_models.shared("qwen3_next"), CONTEXT, LOSSLESS).save_pretrained(folder)
    return folder


def test_an_artifact_requires_the_feature(saved: Path) -> None:
    manifest = Reader(LocalStore(saved)).manifest
    assert "states" in manifest.required
    assert {entry.tokens for entry in manifest.states} == {23, 39}
    assert {entry.name for entry in manifest.states} >= {"conv-0-0-39", "recurrent-0-0-23"}


def test_a_loaded_cache_is_copied_with_its_states(saved: Path, tmp_path: Path) -> None:
    model = state_models.shared("qwen3_next")
    CacheGenCache.from_pretrained(saved, model).save_pretrained(tmp_path)
    assert (tmp_path / STATES_FILE).read_bytes() == (saved / STATES_FILE).read_bytes()


def test_another_model_is_refused(saved: Path) -> None:
    with pytest.raises(WrongWeightsError):
        CacheGenCache.from_pretrained(saved, state_models.make("qwen3_next", 1))


def test_a_changed_state_is_seen_by_the_probe(saved: Path) -> None:
    """A pure recurrent model has no keys: the probe compares its states."""
    model = state_models.make("mamba2")
    cache = CacheGenCache.from_context(model, CONTEXT)
    cache.check(model)
    model.backbone.layers[1].mixer.register_forward_pre_hook(lambda module, args: (args[0] * 1.5, *args[1:]))
    model.backbone.layers[0].register_forward_hook(lambda module, args, output: output * 1.5)
    with pytest.raises(WrongWeightsError, match="states of recurrent layers"):
        cache.check(model)


def rewritten(saved: Path, folder: Path, tensors: list[NamedTensor]) -> Path:
    """Write the artifact again with other named tensors."""
    stored = Artifact(LocalStore(saved))
    source = stored.read()
    object.__setattr__(source, "tensors", ())
    write(source, folder, input_ids=stored.input_ids, fingerprint=stored.fingerprint, tensors=tensors)
    return folder


def test_states_that_the_model_does_not_have_are_refused(saved: Path, tmp_path: Path) -> None:
    model, tensors = state_models.shared("qwen3_next"), list(Artifact(LocalStore(saved)).tensors())
    tensors = [NamedTensor(t.name, t.tensor, t.tokens) for t in tensors]
    wrong = {
        "fewer": tensors[1:],
        "more": [*tensors, NamedTensor("conv-9-0-39", torch.zeros(1, 2), 39)],
        "shape": [NamedTensor(tensors[0].name, tensors[0].tensor[..., :-1], tensors[0].tokens), *tensors[1:]],
        "dtype": [NamedTensor(tensors[0].name, tensors[0].tensor.half(), tensors[0].tokens), *tensors[1:]],
        "none": [NamedTensor("something", torch.zeros(1))],
    }
    for name, changed in wrong.items():
        with pytest.raises(WrongModelError, match="states"):
            CacheGenCache.from_pretrained(rewritten(saved, tmp_path / name, changed), model)


@pytest.mark.parametrize(("name", "tokens"), [("conv-0-0-39", 38), ("conv-0-0-41", 41), ("conv-0-0-0", 0)])
def test_a_position_that_contradicts_the_name_or_the_context(
    saved: Path, tmp_path: Path, name: str, tokens: int
) -> None:
    folder = rewritten(saved, tmp_path, [NamedTensor(name, torch.zeros(1, 48, 4), tokens)])
    with pytest.raises(CorruptError, match="expected a state after 1 to 40 tokens"):
        CacheGenCache.from_pretrained(folder)


def test_an_artifact_of_nothing_is_refused(tmp_path: Path) -> None:
    model = state_models.shared("mamba2")
    CacheGenCache.from_context(model, CONTEXT).save_pretrained(tmp_path / "a")
    rewritten(tmp_path / "a", tmp_path / "b", [])
    with pytest.raises(ManifestError, match="neither"):
        Artifact(LocalStore(tmp_path / "b"))
