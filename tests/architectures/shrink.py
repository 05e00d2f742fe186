"""Make the default configuration of any model family tiny: one set of rules for all families, by the names of fields.

Of the layers a few are kept, so that every kind of layer occurs. All lists with an entry for each layer are cut in the
same way, and lists of layers' indices are translated.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

VOCABULARY = 97
FIRST_SPECIAL = 70
"""Token ids from here on stand for pictures, sounds and other special tokens; texts use ids from 3 to here."""
HIDDEN, HEADS, HEAD_DIM, LAYERS, WINDOW = 32, 4, 8, 4, 16
MOST_LAYERS = 8

LIMITS = [
    (re.compile(pattern), limit)
    for pattern, limit in (
        (r"vocab_size(_per_layer_input)?$|^encoder_hash_byte_group_vocab$|^n_tokens$", VOCABULARY),
        (r"^(n_|num_|moe_)?(num_)?shared_experts?$|^(n|topk|moe_n|num_expert)_group$|expert_groups$|^zero_expert", 1),
        (r"experts_per_tok(en)?$|^(moe_)?top_?k(_experts)?$|^moe_k$|^num_selected_experts$|^experts_top_k$", 2),
        (r"experts$|^moe_num_experts$", 4),
        (r"^(dense_|first_k_dense_replace|num_dense_layers)", 1),
        (r"lora_rank$|laurel_rank$|_rank$|lowrank$", 16),
        (r"^mamba_d_state$|^state_size$|^ssm_state_size$", 8),
        (r"^(qk_head_dim)$", 2 * HEAD_DIM),
        (r"^global_head_dim$", 2 * HEAD_DIM),
        (r"head_dim$|^d_kv$|^d_head$|head_size$|^kv_channels$|^dim_head$|^mamba_d_head$|headdim$", HEAD_DIM),
        (r"^index_(n_heads)$", 2),
        (r"^index_topk$", 32),
        (r"heads(_per_layer)?$|^n_head$|^mamba_n_heads$|n_mamba_heads$|linear_num_heads$", HEADS),
        (r"^(num_hidden_layers|n_layers?|num_layers|(num_)?(en|de)coder_(num_)?layers|depth|layers)$", LAYERS),
        (r"^(num_conv_pos|resampler_depth|conf_num_hidden_layers|num_global_layers|num_layers_per_stack)", 2),
        (r"intermediate|ffn|(^|_)d_?ff$|ff_dim|mlp_dim|dim_ff$|feed_forward_size|share_expert_dim|moe_hidden_size", 48),
        (r"^(d_model|n_embd|emb_dim|dim|embedding_dim|embedding_size|hidden_size\w*|lru_width)$", HIDDEN),
        (r"(hidden_size|_hidden_dim|hidden_channels|embed_dim|embedding_size|proj_dim|projection_dim)$", HIDDEN),
        (r"^(projector|adapter)_\w+_(dim|size)$|_output_dim$|text_hidden_size$|^output_dim$", HIDDEN),
        (r"^(position_embedding_size|num_position_embeddings|seq_len|max_num_patches)$", 64),
        (r"(sliding_window|attention_chunk_size|sliding_window_size|attention_window_size)$", WINDOW),
        (r"^local_attention(_window_len)?$", 2 * WINDOW),
        (r"^(max_position_embeddings|n_positions|n_ctx|max_seq_len|max_target_positions|model_max_length)$", 512),
        (r"^(mamba_)?chunk_size$", 8),
        (r"^rotary_dim$", HEAD_DIM // 2),
        (r"^(num_embeddings|codebook_size)$", 64),
        (r"^codebook_dim$", HIDDEN),
    )
]
"""(name of a field, its largest value): the first that matches counts."""
UNSET = {
    "head_dim": HEAD_DIM, "num_key_value_heads": 2, "num_experts_per_tok": 2, "n_routed_experts": 4, "n_group": 1,
    "topk_group": 1, "n_shared_experts": 1,
}  # fmt: skip
"""Fields that some families leave unset by default, and a model needs."""
KEY_HEADS = re.compile(r"(key_value|kv)_heads$|^kv_n_heads$")
TOKEN_IDS = re.compile(r"(token|eoi|boi|im_\w+|image_patch|eod)_(id|index)$|(token|indicator_token)_ids$")
MEDIA = re.compile(
    r"vision|visual|audio|image|vq|speech|codec|mel|sound|sam_|vit|backbone|qformer|protein|expert_config"
)
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
DERIVED = ("transformers_version", "id2label", "label2id")
USUAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
INDICES = re.compile(r"idxs$|_layers$|layer_ids$|_indices$|_indexes$")


def shrink(values: dict[str, Any], settings: dict[str, Any], families: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the fields of a tiny configuration.

    Args:
        values: the fields of a default configuration, as its `to_dict` returns them.
        settings: fields of the family, which no rule touches; a dictionary sets fields of a nested configuration.
        families: such fields of nested configurations, by their model type.
    """
    return _Shrink(families).fields(values, settings, media=False)


class _Shrink:
    """Shrinks one configuration with all that are nested in it, which share the ids of special tokens."""

    def __init__(self, families: Mapping[str, dict[str, Any]]) -> None:
        self._families, self._special = families, FIRST_SPECIAL

    def fields(self, values: dict[str, Any], settings: dict[str, Any], media: bool) -> dict[str, Any]:
        """Return the fields of one configuration; `media` if it reads pictures or sounds."""
        layers = next((name for name in LAYER_COUNTS if name in values), None)
        total = values.get(layers) if layers is not None else None
        kept = _kept(values, total, 2 if media else LAYERS)
        small: dict[str, Any] = {}
        for name, value in values.items():
            if not isinstance(name, str) or name in DERIVED:
                continue
            if name == "per_layer_config":
                if value and kept is not None:
                    small[name] = _by_layer(value, values, kept)
            elif isinstance(value, dict) and (name.endswith("config") or "model_type" in value):
                given = {**self._families.get(value.get("model_type", ""), {}), **settings.get(name, {})}
                small[name] = self.fields(value, given, media or bool(MEDIA.search(name)))
            elif isinstance(value, dict) and name.startswith("rope"):
                small[name] = _rope(value)
            elif isinstance(value, list) and kept is not None and len(value) == total > 2:
                small[name] = [_number(name, value[index], values) for index in kept]
            elif isinstance(value, list) and kept is not None and INDICES.search(name) and _are_indices(value):
                small[name] = [kept.index(index) for index in value if index in kept]
            elif TOKEN_IDS.search(name):
                small[name] = self._token(name, value)
            elif name == layers and kept is not None:
                small[name] = len(kept)
            elif value is None and not media:
                small[name] = UNSET.get(name)
            else:
                small[name] = _number(name, value, values)
        nested = {name for name, value in small.items() if isinstance(value, dict) and "model_type" in value}
        return {**small, **{name: value for name, value in settings.items() if name not in nested}}

    def _token(self, name: str, value: Any) -> Any:
        """Return a token id within the vocabulary; each special token gets one of its own."""
        if name in USUAL_TOKENS:
            return USUAL_TOKENS[name]
        if isinstance(value, list):
            return [self._token(f"{name} of several", each) for each in value]
        if not isinstance(value, int) or value < 0:
            return value
        self._special = min(self._special + 1, VOCABULARY - 1)
        return self._special


def _by_layer(table: dict[Any, dict[str, Any]], values: dict[str, Any], kept: list[int]) -> dict[str, Any]:
    """Return the fields of the layers that differ, for the layers that are kept."""
    return {
        str(kept.index(int(index))): {
            name: _number(name, value, {**values, **fields}) for name, value in fields.items()
        }
        for index, fields in table.items()
        if int(index) in kept
    }


def _rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return rotary parameters, also nested ones, with sections for a small head."""
    return {
        name: _rope(value) if isinstance(value, dict) else [2, 1, 1] if name == "mrope_section" else value
        for name, value in parameters.items()
    }


def _kept(values: dict[str, Any], total: Any, count: int) -> list[int] | None:
    """Return the layers to keep: the first of each kind, and the next ones up to `count`."""
    if not isinstance(total, int) or isinstance(total, bool):
        return None
    lists = [
        value
        for value in values.values()
        if isinstance(value, list) and len(value) == total and all(isinstance(each, str) for each in value)
    ]
    kinds = [tuple(value[index] for value in lists) for index in range(total)]
    chosen = [index for index, kind in enumerate(kinds) if kind not in kinds[:index]][:MOST_LAYERS]
    for index in range(total):
        if len(chosen) >= count:
            break
        if index not in chosen:
            chosen.append(index)
    return sorted(chosen)


def _are_indices(value: list[Any]) -> bool:
    return bool(value) and all(isinstance(each, int) and not isinstance(each, bool) for each in value)


def _number(name: str, value: Any, values: dict[str, Any]) -> Any:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        return value
    if KEY_HEADS.search(name):
        heads = next((values[each] for each in ("num_attention_heads", "n_head", "n_heads") if values.get(each)), None)
        return HEADS if value == heads else min(value, 2)
    limit = next((limit for pattern, limit in LIMITS if pattern.search(name)), value)
    return min(value, limit)
