"""Settings of families for which the common rules of `shrink` do not suffice."""

from __future__ import annotations

from typing import Any

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MROPE = {"rope_parameters": {**ROPE, "mrope_section": [2, 1, 1]}}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1}
SETTINGS: dict[str, dict[str, Any]] = {
    "bamba": {**MAMBA, "attn_layer_indices": [1, 3]},
    "granitemoehybrid": {**MAMBA, "layer_types": ["linear_attention", "full_attention"] * 2},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64},
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "blenderbot": {"max_position_embeddings": 512, "encoder_layers": 4},
    "chameleon": {"vocabulary_map": {"<image>": 90, "IMGIMGA": 91}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "dots3_note_text": {"head_dim": 16},
    "dory": {
        "layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4, "n_input_layers": 1,
        "n_recurrent_layers": 2, "n_output_layers": 1,
    },
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"] * 2}},
    "deepseek_vl_hybrid": {"high_res_vision_config": {"global_attn_indexes": [1]}},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]}}},
    "apertus1p5": {"image_token_offset": 10, "audio_token_offset": 74, "text_config": {"vocab_size": 138}},
    "emu3": {"vocabulary_map": {"<image>": 90, "<|visual token 0|>": 91}},
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "granite4_vision": {"deepstack_layer_map": [[0, 0]], "qformer_config": {"num_attention_heads": 4}},
    "hrm_text": {"num_hidden_layers": 8, "num_layers_per_stack": 1},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "nemotron_h": {"n_groups": 2},
    "xlm": {"causal": True},
    "xlstm": {"qk_dim_factor": 1.0, "v_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"n_mamba_heads": 8, "mamba_d_state": 8, "attention_hidden_size": 64},
    "glm4v_text": MROPE,
    "glm4v_moe_text": {"rope_parameters": {**ROPE, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}},
    "glm_ocr_text": MROPE,
    "paddleocr_vl_text": MROPE,
    "qwen2_vl_text": MROPE,
    "qwen2_5_vl_text": MROPE,
    "qwen3_vl_text": MROPE,
    "qwen3_vl_moe_text": MROPE,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "molmo2": {"adapter_config": {"vision_feature_layer": [-1, -2]}},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [16, 32]},
    "zamba": {
        "num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 2, "attention_hidden_size": 64,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2,
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
}  # fmt: skip
"""Fields by model type; with a plus, of its image-text model alone."""
