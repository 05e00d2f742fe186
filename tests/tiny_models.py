"""Tiny random models, one for each kind of cache. The weights are large, so that every token of a context matters."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import transformers as hf

from hf_cachegen.models.object_state import KNOWN

VOCABULARY = 97
WINDOW = 16
_COMMON: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=4096,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    initializer_range=0.3,
)
_GROUPED: dict[str, Any] = {**_COMMON, "num_key_value_heads": 2, "head_dim": 8}
_HYBRID = ["sliding_attention", "full_attention"] * 2


def _llama() -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**_GROUPED))


def _qwen3() -> Any:
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**_GROUPED))


def _mistral() -> Any:
    return hf.MistralForCausalLM(hf.MistralConfig(**_GROUPED, sliding_window=WINDOW))


def _gemma3() -> Any:
    config = hf.Gemma3TextConfig(
        **_GROUPED, sliding_window=WINDOW, layer_types=_HYBRID, query_pre_attn_scalar=8, tie_word_embeddings=False
    )
    return hf.Gemma3ForCausalLM(config)


def _deepseek() -> Any:
    config = hf.DeepseekV3Config(
        **_COMMON,
        num_key_value_heads=4,
        kv_lora_rank=12,
        q_lora_rank=16,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=2,
    )
    return hf.DeepseekV3ForCausalLM(config)


def _gpt_neox() -> Any:
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_COMMON, rotary_pct=0.5))


def _gpt2() -> Any:
    """Return a model with 64 learnt positions, fewer than the other models have."""
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(
            vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
        )
    )


def _mamba() -> Any:
    return hf.MambaForCausalLM(hf.MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4))


def _qwen3_next() -> Any:
    config = hf.Qwen3NextConfig(
        **_GROUPED,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )
    return hf.Qwen3NextForCausalLM(config)


def _rwkv() -> Any:
    config = hf.RwkvConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, context_length=64)
    return hf.RwkvForCausalLM(config)


def _t5() -> Any:
    config = hf.T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return hf.T5ForConditionalGeneration(config)


_MAKERS = {
    "llama": _llama,
    "qwen3": _qwen3,
    "mistral": _mistral,
    "gemma3": _gemma3,
    "deepseek": _deepseek,
    "gpt_neox": _gpt_neox,
    "gpt2": _gpt2,
    "mamba": _mamba,
    "qwen3_next": _qwen3_next,
    "rwkv": _rwkv,
    "t5": _t5,
}
SUPPORTED = ("llama", "qwen3", "mistral", "gemma3", "deepseek", "gpt_neox")
REFUSED = ("rwkv", "t5")


def make(name: str, seed: int = 0) -> Any:
    """Return a new model, in evaluation mode, fp32 on the CPU."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = _MAKERS[name]().eval()
    torch.set_rng_state(state)
    return model


@cache
def shared(name: str, seed: int = 0) -> Any:
    """Return the model that all tests share which do not change it."""
    return make(name, seed)


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    """Return random ordinary tokens, int64 [1, count]."""
    return torch.randint(3, VOCABULARY, (1, count), generator=torch.Generator().manual_seed(seed))


def drawn(build: Callable[[], Any], *kinds: type[torch.nn.Module]) -> Any:
    """Build a model in evaluation mode whose modules of these kinds have large random weights, always the same."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, kinds):
                module.weight.normal_(0, 0.3)
    torch.set_rng_state(state)
    return model


def attributes(model: Any) -> dict[str, Any]:
    """Return what a model object has, without what is known of it."""
    return {name: value for name, value in vars(model).items() if name != KNOWN}
