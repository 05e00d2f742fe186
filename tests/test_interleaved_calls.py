"""Calls of all kinds on one model, in any order: each gives what a fresh model gives."""

from __future__ import annotations

from functools import cache as remember
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_cachegen.cache import CacheGenCache
from tests import tiny_models
from tests.generation_support import CONTEXT, batch, prompt, seeded

LONG = 90


def dynamic_ntk() -> Any:
    """A model whose rotary frequencies stretch with inputs longer than the context of the tests."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=40, rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
        initializer_range=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = hf.LlamaForCausalLM(config).eval()
    torch.set_rng_state(state)
    return model


MAKERS = {
    "dynamic rotary": dynamic_ntk,
    "sliding windows": lambda: tiny_models.make("gemma3"),
    "plain": lambda: tiny_models.make("llama"),
}
GREEDY: dict[str, Any] = {"do_sample": False}
CALLS: dict[str, dict[str, Any]] = {
    "question": {"inputs": prompt(-5), **GREEDY},
    "exact": {"inputs": prompt(-20), **GREEDY},
    "batch": {**batch(-12, -8), **GREEDY},
    "beams": {"inputs": prompt(-9), "num_beams": 2, **GREEDY},
    "prompt lookup": {"inputs": prompt(-7), "prompt_lookup_num_tokens": 3, **GREEDY},
}


@remember
def expected(name: str, call: str) -> torch.Tensor:
    return seeded(MAKERS[name]().generate, **CALLS[call])


def with_cache(model: Any, call: str) -> torch.Tensor:
    cache = CacheGenCache.from_context(model, CONTEXT[:, :20])
    return seeded(model.generate, **CALLS[call], cache=cache)


def long_input(model: Any) -> None:
    with torch.no_grad():
        model(tiny_models.tokens(LONG))


a_step = st.one_of(st.just("long input"), st.tuples(st.just("cache"), st.sampled_from(sorted(CALLS))))
steps = st.lists(a_step, min_size=2, max_size=6)


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps=steps)
def test_earlier_calls_change_nothing(name: str, steps: list[Any]) -> None:
    model = MAKERS[name]()
    for step in steps:
        if step == "long input":
            long_input(model)
        else:
            assert torch.equal(with_cache(model, step[1]), expected(name, step[1])), step


def test_offsets_of_a_picture_are_left_as_they_were() -> None:
    model = tiny_models.make("llama")
    model.model.rope_deltas = left = torch.tensor([[3]])
    assert torch.equal(with_cache(model, "question"), expected("plain", "question"))
    assert model.model.rope_deltas is left
