"""Contexts of encoder-decoder models: the encoder is not run, and the tokens are those of a call without a cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache as remember
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_cachegen.artifact.artifact import Artifact, write
from hf_cachegen.artifact.encoded import encode_kv
from hf_cachegen.artifact.tensors import NamedTensor
from hf_cachegen.cache import CacheGenCache
from hf_cachegen.config import CacheGenConfig
from hf_cachegen.errors import (
    ConfigError,
    CorruptError,
    MismatchError,
    PromptMismatchError,
    TensorError,
    UnsupportedModelError,
    WrongModelError,
    WrongWeightsError,
)
from hf_cachegen.generation import generate
from hf_cachegen.models.encoder_decoder import EncoderState
from hf_cachegen.stores import open_store
from tests import tiny_models
from tests.encoder_support import MAKERS, inputs, make, shared

LOSSLESS = CacheGenConfig(lossless=True)
PREFIX = torch.tensor([[3, 7, 9, 11]])
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "beams": {"num_beams": 3},
    "sequences": {"do_sample": True, "num_return_sequences": 2},
    "beam sampling": {"do_sample": True, "num_beams": 2, "num_return_sequences": 2},
}
PROMPTS = {
    "none": None,
    "the prefix": PREFIX,
    "longer": torch.cat([PREFIX, torch.tensor([[5, 6]])], dim=1),
    "another": torch.tensor([[3, 7, 8, 8, 8]]),
}
each_model = pytest.mark.parametrize("name", MAKERS)


def generated(model: Any, given: dict[str, Any], decoder: Any = None, **options: Any) -> torch.Tensor:
    torch.manual_seed(0)
    more = {} if decoder is None else {"decoder_input_ids": decoder}
    found: torch.Tensor = model.generate(**given, **more, max_new_tokens=8, **{"do_sample": False, **options})
    return found


@contextmanager
def passes(model: Any) -> Iterator[tuple[list[int], list[int]]]:
    """Record the rows of every call of the encoder, and the tokens of every call of the decoder."""
    encoder: list[int] = []
    decoder: list[int] = []
    hooks = [
        model.get_encoder().register_forward_hook(lambda _, given, output: encoder.append(len(output[0]))),
        model.get_decoder().register_forward_hook(lambda _, given, output: decoder.append(output[0].shape[1])),
    ]
    yield encoder, decoder
    for hook in hooks:
        hook.remove()


@remember
def cached(name: str, prefix: bool = True) -> CacheGenCache:
    decoder = {"decoder_input_ids": PREFIX} if prefix else {}
    return CacheGenCache.from_context(shared(name), {**inputs(name), **decoder})


@remember
def stock(name: str) -> Any:
    return make(name)


@each_model
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_tokens_are_those_of_a_call_without_a_cache(name: str, mode: str, prompt: str) -> None:
    if name == "whisper" and PROMPTS[prompt] is not None and "num_return_sequences" in MODES[mode]:
        pytest.skip("the stock call fails: it loses all but the first sequence")
    expected = generated(stock(name), inputs(name), PROMPTS[prompt], **MODES[mode])
    for prefix in (False, True):
        found = generated(shared(name), inputs(name), PROMPTS[prompt], cache=cached(name, prefix), **MODES[mode])
        assert torch.equal(found, expected)


@each_model
def test_the_encoder_is_not_run_and_the_prefix_is_not_read(name: str) -> None:
    model, cache = shared(name), cached(name)
    generated(model, inputs(name), cache=cache)  # the hooks below make another probe necessary
    with passes(model) as (encoder, decoder):
        model.generate(**inputs(name), cache=cache, max_new_tokens=1)
        encoder.clear(), decoder.clear()
        generated(model, inputs(name), PROMPTS["longer"], cache=cache)
    assert not encoder
    assert decoder[:2] == [2, 1]


@each_model
def test_another_input_is_computed(name: str) -> None:
    given = inputs(name, 2)
    expected = generated(stock(name), given)
    assert not torch.equal(expected, generated(stock(name), inputs(name))), "the input matters"
    assert torch.equal(generated(shared(name), given, cache=cached(name)), expected)
    with pytest.raises(PromptMismatchError, match="of the context in every row"):
        generated(shared(name), given, cache=cached(name), on_mismatch="error")


@each_model
def test_rows_of_one_context(name: str) -> None:
    given = inputs(name, rows=2)
    expected = generated(stock(name), given, num_beams=2)
    assert torch.equal(generated(shared(name), given, cache=cached(name), num_beams=2), expected)


def test_a_batch_with_another_text_or_pads_is_computed() -> None:
    ids = inputs("bart")["input_ids"]
    padded = torch.cat([ids, torch.zeros(1, 3, dtype=torch.long)], dim=1)
    for given in (
        {"input_ids": torch.cat([ids, ids.flip(1)])},
        {"input_ids": padded, "attention_mask": (padded != 0).long()},
    ):
        expected = generated(stock("bart"), given)
        assert torch.equal(generated(shared("bart"), given, cache=cached("bart")), expected)


@each_model
def test_round_trip_through_an_artifact(name: str, tmp_path: Path) -> None:
    cached(name).save_pretrained(tmp_path / "a", LOSSLESS)
    model = make(name)
    loaded = CacheGenCache.from_pretrained(tmp_path / "a", model=model)
    for prompt in PROMPTS.values():
        expected = generated(stock(name), inputs(name), prompt)
        assert torch.equal(generated(model, inputs(name), prompt, cache=loaded), expected)
    loaded.save_pretrained(tmp_path / "b")
    files = [{path.name: path.read_bytes() for path in (tmp_path / part).iterdir()} for part in "ab"]
    assert files[0] == files[1]
    assert ("media" in Artifact(open_store(tmp_path / "a")).manifest.required) == (name == "whisper")


@each_model
def test_lossy_levels_are_near(name: str, tmp_path: Path) -> None:
    cached(name).save_pretrained(tmp_path)
    exact = cached(name).kv.keys
    errors = []
    for level in (1, 3):
        loaded = CacheGenCache.from_pretrained(tmp_path, model=shared(name), level=level)
        errors.append(max(float((a - b).norm() / b.norm()) for a, b in zip(loaded.kv.keys, exact, strict=True)))
    assert errors[1] <= errors[0] < 1
    generated(shared(name), inputs(name), cache=loaded)


def test_whisper_with_timestamps_and_a_prompt() -> None:
    given, options = inputs("whisper"), {"decoder_input_ids": PREFIX, "num_beams": 2}
    expected = generated(stock("whisper"), given, **options)
    assert torch.equal(generated(shared("whisper"), given, cache=cached("whisper"), **options), expected)


def test_a_model_with_a_generate_of_its_own_needs_the_cache_before(tmp_path: Path) -> None:
    cached("whisper").save_pretrained(tmp_path, LOSSLESS)
    model = make("whisper")
    with pytest.raises(UnsupportedModelError, match="make the cache before the call"):
        model.generate(**inputs("whisper"), cache=CacheGenCache.from_pretrained(tmp_path, model=model))


def test_another_model_is_refused(tmp_path: Path) -> None:
    cached("bart").save_pretrained(tmp_path, LOSSLESS)
    with pytest.raises(WrongModelError):
        CacheGenCache.from_pretrained(tmp_path, model=shared("t5"))
    with pytest.raises(MismatchError):
        CacheGenCache.from_pretrained(tmp_path, model=tiny_models.shared("llama"))
    edited = make("bart")
    edited.get_encoder().layers[0].fc1.weight.data[0, 0] += 1
    with pytest.raises(WrongWeightsError):
        CacheGenCache.from_pretrained(tmp_path, model=edited)
    hooked = make("bart")
    hooked.get_encoder().register_forward_hook(lambda _, given, output: output.last_hidden_state.add_(0.5) and None)
    with pytest.raises((WrongWeightsError, RuntimeError)):
        CacheGenCache.from_pretrained(tmp_path, model=hooked)


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "pads": ({"input_ids": [[4, 5, 0]], "attention_mask": [[1, 1, 0]]}, TensorError, "without pads"),
    "rows": ({"input_ids": [[4, 5], [6, 7]]}, TensorError, "one row of token ids"),
    "features": ({"input_features": torch.ones(1, 8, 64)}, UnsupportedModelError, "expected input_ids"),
    "unknown": ({"input_ids": [4, 5], "head_mask": torch.ones(1)}, UnsupportedModelError, r"leave out \['head_mask'\]"),
}


@pytest.mark.parametrize(("given", "error", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_contexts_are_refused(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CacheGenCache.from_context(shared("bart"), given)


def test_two_sounds_are_refused() -> None:
    with pytest.raises(TensorError, match="input_features as a tensor of one row"):
        CacheGenCache.from_context(shared("whisper"), inputs("whisper", rows=2))


CALLS: dict[str, dict[str, Any]] = {
    "prompt_lookup": {"prompt_lookup_num_tokens": 2},
    "static": {"cache_implementation": "static"},
    "output_attentions": {"output_attentions": True},
    "use_cache=False": {"use_cache": False},
    "encoder_outputs": {"encoder_outputs": torch.ones(1)},
}


@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS.keys())
def test_calls_that_cannot_start_from_a_cache(options: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match="generating from a cache does not support"):
        generate(shared("bart"), **inputs("bart"), cache=cached("bart"), max_new_tokens=2, **options)


def test_what_an_encoder_context_cannot_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"use model\.generate"):
        cached("bart").to_dynamic()
    with pytest.raises(ConfigError, match="leave out profile="):
        CacheGenCache.from_context(shared("bart"), inputs("bart"), profile=tmp_path)
    cached("bart").save_pretrained(tmp_path / "a", LOSSLESS)
    with pytest.raises(UnsupportedModelError, match="is not streamed"):
        CacheGenCache.stream(tmp_path / "a", shared("bart"))


def _state(**changes: Any) -> list[NamedTensor]:
    state = cached("bart").encoder
    assert state is not None
    return [
        NamedTensor(named.name, changes.get(named.name.replace("-", "_"), named.tensor))
        for named in state.named()
        if changes.get(named.name.replace("-", "_"), 0) is not None
    ]


DAMAGED: dict[str, dict[str, Any]] = {
    "another length": {"encoder_output": torch.ones(1, 19, 32)},
    "two rows": {"encoder_output": torch.ones(2, 20, 32)},
    "floats for ids": {"decoder_ids": torch.ones(1, 4)},
    "more ids": {"decoder_ids": torch.ones(1, 5, dtype=torch.long)},
    "missing keys": {"decoder_keys_1": None},
    "another dtype": {"decoder_values_2": torch.ones(1, 4, 4, 8, dtype=torch.float64)},
}


@pytest.mark.parametrize("changes", DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_states_are_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    cache = cached("bart")
    encoded = encode_kv(cache.kv.keys, cache.kv.values, LOSSLESS)
    write(
        encoded, tmp_path, input_ids=cache.input_ids[0].tolist(), fingerprint=cache.fingerprint.to_dict(),
        tensors=_state(**changes),
    )  # fmt: skip
    with pytest.raises(CorruptError, match="expected a tensor"):
        CacheGenCache.from_pretrained(tmp_path, model=shared("bart"))


def test_an_artifact_without_an_encoder_is_refused(tmp_path: Path) -> None:
    cache = cached("bart")
    encoded = encode_kv(cache.kv.keys, cache.kv.values, LOSSLESS)
    write(encoded, tmp_path, input_ids=cache.input_ids[0].tolist(), fingerprint=cache.fingerprint.to_dict())
    with pytest.raises(WrongModelError, match="expected the output of an encoder"):
        CacheGenCache.from_pretrained(tmp_path, model=shared("bart"))
    write(
        encode_kv(cache.kv.keys[:1], cache.kv.values[:1], LOSSLESS), tmp_path / "b",
        input_ids=cache.input_ids[0].tolist(), fingerprint=cache.fingerprint.to_dict(),
        tensors=[named for named in _state() if named.name == "encoder-output"],
    )  # fmt: skip
    with pytest.raises(WrongModelError, match="cross-attention of 3 layers"):
        CacheGenCache.from_pretrained(tmp_path / "b", model=shared("bart"))


def test_the_last_token_of_a_prefix_is_computed() -> None:
    state = cached("t5").encoder
    assert isinstance(state, EncoderState)
    assert state.prefix(PREFIX) == 3
    assert state.prefix(PROMPTS["longer"]) == 4
    assert state.prefix(torch.cat([PREFIX, PROMPTS["another"][:, :4]])) == 2
    assert state.prefix(PREFIX[:, :1]) == 0
