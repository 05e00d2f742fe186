"""Properties of a model beside its weights: learnt positions, and state that an earlier call has left."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import transformers as hf

from hf_cachegen.cache import CacheGenCache
from hf_cachegen.errors import UnsupportedModelError
from hf_cachegen.models.running import evaluation_mode
from hf_cachegen.models.state import fresh_state
from tests import tiny_models
from tests.generation_support import CONTEXT, fed, prompt, seeded

SMALL: dict[str, Any] = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LEARNT = {
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config(**SMALL, n_positions=64, n_embd=16, n_layer=2, n_head=2)),
    "gpt_neo": (
        hf.GPTNeoForCausalLM,
        hf.GPTNeoConfig(**SMALL, max_position_embeddings=64, hidden_size=16, num_layers=2, num_heads=2,
                        attention_types=[[["global", "local"], 1]]),
    ),
    "opt": (
        hf.OPTForCausalLM,
        hf.OPTConfig(**SMALL, max_position_embeddings=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                     ffn_dim=16, word_embed_proj_dim=16),
    ),
    "gptj": (hf.GPTJForCausalLM, hf.GPTJConfig(**SMALL, n_positions=64, n_embd=16, n_layer=2, n_head=2, rotary_dim=4)),
}  # fmt: skip


@pytest.mark.parametrize(("model_class", "config"), LEARNT.values(), ids=LEARNT.keys())
def test_a_context_beyond_the_learnt_positions_is_refused_before_the_prefill(model_class: Any, config: Any) -> None:
    model = model_class(config).eval()
    with fed(model) as lengths, pytest.raises(UnsupportedModelError, match=r"has 64 learnt positions.*100 tokens"):
        CacheGenCache.from_context(model, tiny_models.tokens(100))
    assert not lengths
    assert CacheGenCache.from_context(model, tiny_models.tokens(64)).kv.geometry.tokens == 64


def dynamic_ntk() -> Any:
    torch.manual_seed(0)
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    config = hf.LlamaConfig(
        **SMALL, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=40, rope_parameters=rope, initializer_range=0.3,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config).eval()


def test_state_of_a_longer_input_is_reset() -> None:
    """At exactly the original length the stock rotary module keeps the frequencies of the longest input seen."""
    expected = CacheGenCache.from_context(dynamic_ntk(), CONTEXT).kv.keys
    model = dynamic_ntk()
    with torch.no_grad():
        model(tiny_models.tokens(90))
    left_behind = model.model.rotary_emb.inv_freq.clone()
    found = CacheGenCache.from_context(model, CONTEXT).kv.keys
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert torch.equal(model.model.rotary_emb.inv_freq, left_behind), "restored: other callers see what they left"
    fresh = dynamic_ntk()
    ids = prompt(-5)
    right = seeded(fresh.generate, ids, do_sample=False)
    cache = CacheGenCache.from_context(fresh, CONTEXT[:, :20])
    with torch.no_grad():
        fresh(tiny_models.tokens(90))
    assert torch.equal(seeded(fresh.generate, ids, cache=cache, do_sample=False), right)


def test_position_offsets_of_an_earlier_picture_are_reset() -> None:
    model = tiny_models.make("llama")
    model.model.rope_deltas = left_behind = torch.tensor([[7]])
    with fresh_state(model):
        assert model.model.rope_deltas is None
    assert model.model.rope_deltas is left_behind


def test_the_last_of_several_threads_restores_training_mode() -> None:
    """The first that leaves would turn on dropout in the passes of the others."""
    model = tiny_models.make("gpt2").train()
    model.transformer.drop.eval()
    first, second = evaluation_mode(model), evaluation_mode(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not any(module.training for module in model.modules())
    second.__exit__(None, None, None)
    assert [module for module in model.modules() if not module.training] == [model.transformer.drop]


def test_a_prompt_that_leaves_the_context_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_models.make("llama")
    cache = CacheGenCache.from_context(model, CONTEXT)
    ids = prompt(9)
    with caplog.at_level(logging.INFO, "hf_cachegen"):
        model.generate(ids, cache=cache, max_new_tokens=2)
        assert not caplog.records, "nothing to say where the whole context is reused"
        ids[0, 1] = 50
        model.generate(ids, cache=cache, max_new_tokens=2)
    message = "the prompt leaves the context after 1 of 40 tokens; 1 are reused, and 39 tokens of the context are lost"
    assert [record.getMessage() for record in caplog.records] == [message]


def _prophetnet() -> Any:
    config = hf.ProphetNetConfig(
        **SMALL, hidden_size=16, num_decoder_layers=2, num_encoder_layers=2, num_decoder_attention_heads=2,
        num_encoder_attention_heads=2, decoder_ffn_dim=16, encoder_ffn_dim=16, max_position_embeddings=64,
        is_decoder=True, is_encoder_decoder=False,
    )  # fmt: skip
    return hf.ProphetNetForCausalLM(config)


def _cpmant() -> Any:
    config = hf.CpmAntConfig(
        vocab_size=97, hidden_size=16, num_attention_heads=2, dim_head=8, dim_ff=16, num_hidden_layers=2,
        prompt_length=4, prompt_types=4, segment_types=4,
    )  # fmt: skip
    return hf.CpmAntForCausalLM(config)


def _mllama() -> Any:
    from transformers.models.mllama.configuration_mllama import MllamaTextConfig

    config = MllamaTextConfig(
        **SMALL, hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, cross_attention_layers=[1], max_position_embeddings=128,
    )  # fmt: skip
    return hf.MllamaForCausalLM(config)


def _gemma3n() -> Any:
    config = hf.Gemma3nTextConfig(
        **SMALL, hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, num_kv_shared_layers=2, vocab_size_per_layer_input=97, hidden_size_per_layer_input=8,
        laurel_rank=4, sliding_window=16, activation_sparsity_pattern=[0.0] * 4,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    return hf.Gemma3nForCausalLM(config)


def _moshi() -> Any:
    config = hf.MoshiConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, head_dim=8,
        ffn_dim=64, sliding_window=16, max_position_embeddings=256, pad_token_id=0,
    )  # fmt: skip
    return hf.MoshiForCausalLM(config)


REASONS = {
    "ProphetNetForCausalLM cannot read a question after a cached context": _prophetnet,
    "those of CpmAntForCausalLM change with later tokens": _cpmant,
    r"layer 1 of MllamaForCausalLM holds 0 tokens after a context of 40 \(cross-attention": _mllama,
}


@pytest.mark.parametrize("reason", REASONS, ids=["prophetnet", "cpmant", "mllama"])
def test_models_without_a_reusable_cache_are_refused_with_the_reason(reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        CacheGenCache.from_context(REASONS[reason]().eval(), CONTEXT)


SUPPORTED = {
    "gemma3n": _gemma3n,  # layers that read the keys of others
    "moshi": _moshi,  # a sliding cache without a sliding mask
    "mpt": lambda: hf.MptForCausalLM(hf.MptConfig(**SMALL, d_model=16, n_heads=2, n_layers=2, max_seq_len=64)),
    "gpt_bigcode": lambda: hf.GPTBigCodeForCausalLM(
        hf.GPTBigCodeConfig(**SMALL, n_positions=64, n_embd=16, n_layer=2, n_head=2)
    ),
}


@pytest.mark.parametrize("make", SUPPORTED.values(), ids=SUPPORTED.keys())
def test_models_with_unusual_layers_work(make: Any) -> None:
    model = make().eval()
    expected = seeded(model.generate, prompt(9), do_sample=False)
    cache = CacheGenCache.from_context(model, CONTEXT)
    assert torch.equal(seeded(model.generate, prompt(9), cache=cache, do_sample=False), expected)
