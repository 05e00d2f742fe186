"""Tiny random models whose cache has recurrent states, one for each family that the installed Transformers has."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers as hf

VOCABULARY = 97
_COMMON: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=4, max_position_embeddings=4096, pad_token_id=0,
    bos_token_id=1, eos_token_id=2, initializer_range=0.3, tie_word_embeddings=False,
)  # fmt: skip
_ATTENTION: dict[str, Any] = dict(num_attention_heads=4, num_key_value_heads=2, intermediate_size=48)
_DELTA: dict[str, Any] = dict(
    linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8
)
_MAMBA2: dict[str, Any] = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=8)
_SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_next": ("Qwen3Next", {
        **_COMMON, **_ATTENTION, **_DELTA, "head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1,
        "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    }),
    "qwen3_5": ("Qwen3_5Text", {**_COMMON, **_ATTENTION, **_DELTA, "head_dim": 8}),
    "mamba": ("Mamba", {
        "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "initializer_range": 0.3,
    }),
    "mamba2": ("Mamba2", {
        "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "num_heads": 4,
        "head_dim": 8, "n_groups": 1, "chunk_size": 8, "initializer_range": 0.3,
    }),
    "falcon_mamba": ("FalconMamba", {
        "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "initializer_range": 0.3,
    }),
    "falcon_h1": ("FalconH1", {
        **_COMMON, **_ATTENTION, **_MAMBA2, "head_dim": 8, "mamba_d_ssm": 64, "num_hidden_layers": 2,
    }),
    "jamba": ("Jamba", {
        **_COMMON, **_ATTENTION, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1, "num_experts": 2, "num_experts_per_tok": 1, "mamba_d_state": 4, "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    }),
    "bamba": ("Bamba", {**_COMMON, **_ATTENTION, **_MAMBA2, "attn_layer_indices": [1, 3]}),
    "lfm2": ("Lfm2", {
        **_COMMON, **_ATTENTION, "layer_types": ["conv", "full_attention"] * 2, "block_ff_dim": 48,
    }),
    "granitemoehybrid": ("GraniteMoeHybrid", {
        **_COMMON, **_ATTENTION, **_MAMBA2, "layer_types": ["mamba", "attention"] * 2, "num_local_experts": 2,
        "num_experts_per_tok": 1, "shared_intermediate_size": 16,
    }),
    "zamba": ("Zamba", {
        **_COMMON, **_ATTENTION, "num_hidden_layers": 6, "n_mamba_heads": 2, "mamba_d_state": 4, "mamba_dt_rank": 4,
        "attn_layer_period": 3, "attn_layer_offset": 2, "use_mamba_kernels": False,
    }),
    "zamba2": ("Zamba2", {
        **_COMMON, **_ATTENTION, "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2,
        "num_mem_blocks": 1, "mamba_d_state": 8, "mamba_headdim": 8, "mamba_ngroups": 1, "n_mamba_heads": 8,
        "chunk_size": 8, "use_mamba_kernels": False,
    }),
    "nemotron_h": ("NemotronH", {
        **_COMMON, **_ATTENTION, "layers_block_type": ["mamba", "moe", "attention", "mamba"], "head_dim": 8,
        "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8,
        "n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16, "use_mamba_kernels": False,
    }),
    "minimax": ("MiniMax", {
        **_COMMON, **_ATTENTION, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"] * 2,
        "block_size": 8, "num_local_experts": 2, "num_experts_per_tok": 1,
    }),
    "olmo_hybrid": ("OlmoHybrid", {**_COMMON, **_ATTENTION, **_DELTA, "head_dim": 8}),
    "kimi_linear": ("KimiLinear", {
        **_COMMON, **_ATTENTION, "num_key_value_heads": 4, "kv_lora_rank": 12, "q_lora_rank": None,
        "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
        "v_head_dim": 8, "moe_intermediate_size": 16, "n_routed_experts": 2, "num_experts_per_tok": 1,
        "linear_num_heads": 2, "linear_head_dim": 8, "first_k_dense_replace": 1,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    }),
    "rwkv": ("Rwkv", {
        "vocab_size": VOCABULARY, "hidden_size": 16, "attention_hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 2, "context_length": 4096,
    }),
    "bailing_hybrid": ("BailingHybrid", {
        **_COMMON, **_ATTENTION, "num_key_value_heads": 4, "head_dim": 8, "layer_group_size": 2, "num_experts": 2,
        "num_experts_per_tok": 1, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1,
    }),
    "recurrent_gemma": ("RecurrentGemma", {
        **_COMMON, **_ATTENTION, "lru_width": 32, "attention_window_size": 16,
    }),
}  # fmt: skip
NAMES = tuple(_SETTINGS)


def known(name: str) -> bool:
    """Report whether the installed Transformers has the family."""
    return hasattr(hf, f"{_SETTINGS[name][0]}Config")


def make(name: str, seed: int = 0) -> Any:
    """Return a new model, in evaluation mode, fp32 on the CPU."""
    family, settings = _SETTINGS[name]
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    config = getattr(hf, f"{family}Config")(**settings)
    model = getattr(hf, f"{family.removesuffix('Text')}ForCausalLM")(config).eval()
    torch.set_rng_state(state)
    return model


@cache
def shared(name: str) -> Any:
    """Return the model that all tests share which do not change it."""
    return make(name)
