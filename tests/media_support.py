"""Tiny random models that read pictures, video or audio, and prompts for them.

A `Family` makes a model and the model inputs of a text with media, as its processor would. The weights are large, so
that a picture changes the tokens that follow it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from tests.tiny_models import drawn

VOCABULARY = 90
PLACEHOLDER, VIDEO, BEGIN, END = 91, 92, 93, 94
TEXT: dict[str, Any] = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    initializer_range=0.3,
)  # fmt: skip
M_ROPE: dict[str, Any] = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
Part = int | str
"""A part of a prompt: tokens of text, or the name of a medium: its letter seeds its values, a digit after it its size.
"""


@dataclass(frozen=True)
class Family:
    """A kind of model with its media.

    Attributes:
        make: makes a model.
        medium: from (seed, size) to (inputs of one medium, its tokens).
        types: name of the token types that the processor gives, if any.
        tower: path of the module that computes the features of media.
    """

    make: Callable[[], Any]
    medium: Callable[[int, int], tuple[dict[str, Tensor], list[int]]]
    tower: str
    types: str | None = None


def text(count: int, seed: int) -> list[int]:
    """Return random ordinary tokens."""
    return torch.randint(3, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def inputs(family: Family, *parts: Part) -> dict[str, Tensor]:
    """Return the model inputs of one prompt, as a processor gives them."""
    return batch(family, parts)


def batch(family: Family, *rows: Sequence[Part]) -> dict[str, Tensor]:
    """Return the model inputs of left-padded prompts."""
    ids, media = [], []
    for parts in rows:
        row: list[int] = []
        for number, part in enumerate(parts):
            if isinstance(part, int):
                row += text(part, 100 * number + part)
            else:
                found, tokens = family.medium(ord(part[0]), int(part[1:] or 0))
                media.append(found)
                row += tokens
        ids.append(row)
    longest = max(map(len, ids))
    padded = torch.tensor([[0] * (longest - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
    given = {"input_ids": padded, "attention_mask": mask}
    for name in media[0] if media else ():
        given[name] = torch.cat([found[name] for found in media])
    if family.types is not None:
        given[family.types] = (padded == PLACEHOLDER).long() + 2 * (padded == VIDEO).long()
    return given


def noise(seed: int, *shape: int) -> Tensor:
    """Return random values."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _between(count: int) -> list[int]:
    return [BEGIN, *[PLACEHOLDER] * count, END]


def _grid_picture(patch: int) -> Callable[[int, int], tuple[dict[str, Tensor], list[int]]]:
    """Pictures of 4x4 patches, or of 4x(4 + 2 size), four patches a token."""

    def medium(seed: int, size: int) -> tuple[dict[str, Tensor], list[int]]:
        width = 4 + 2 * size
        grid = torch.tensor([[1, 4, width]])
        return {"pixel_values": noise(seed, 4 * width, patch), "image_grid_thw": grid}, _between(width)

    return medium


def _grid_video(seed: int, size: int) -> tuple[dict[str, Tensor], list[int]]:
    grid = torch.tensor([[2 + size, 4, 4]])
    values = {"pixel_values_videos": noise(seed, 16 * (2 + size), 3 * 2 * 4 * 4), "video_grid_thw": grid}
    return {**values, "second_per_grid_ts": torch.tensor([1.0])}, [BEGIN, *[VIDEO] * (4 * (2 + size)), END]


def _tokens() -> dict[str, Any]:
    return {
        "image_token_id": PLACEHOLDER, "video_token_id": VIDEO, "vision_start_token_id": BEGIN,
        "vision_end_token_id": END,
    }  # fmt: skip


def _qwen2_vl() -> Any:
    vision = dict(depth=2, embed_dim=32, hidden_size=32, num_heads=4, mlp_ratio=2, patch_size=4, spatial_merge_size=2,
                  temporal_patch_size=2, in_channels=3)  # fmt: skip
    config = hf.Qwen2VLConfig(text_config={**TEXT, "rope_parameters": M_ROPE}, vision_config=vision, **_tokens())
    return hf.Qwen2VLForConditionalGeneration(config)


def _qwen2_5_vl() -> Any:
    vision = dict(depth=2, hidden_size=32, out_hidden_size=32, intermediate_size=48, num_heads=4, patch_size=4,
                  spatial_merge_size=2, temporal_patch_size=2, window_size=16, fullatt_block_indexes=[1],
                  tokens_per_second=2)  # fmt: skip
    config = hf.Qwen2_5_VLConfig(text_config={**TEXT, "rope_parameters": M_ROPE}, vision_config=vision, **_tokens())
    return hf.Qwen2_5_VLForConditionalGeneration(config)


def _qwen3_vl() -> Any:
    vision = dict(depth=2, hidden_size=32, out_hidden_size=32, intermediate_size=48, num_heads=4, patch_size=4,
                  spatial_merge_size=2, temporal_patch_size=2, num_position_embeddings=16,
                  deepstack_visual_indexes=[0])  # fmt: skip
    rope = {**M_ROPE, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    config = hf.Qwen3VLConfig(text_config={**TEXT, "rope_parameters": rope}, vision_config=vision, **_tokens())
    return hf.Qwen3VLForConditionalGeneration(config)


def _qwen3_5() -> Any:
    vision = dict(depth=2, hidden_size=32, out_hidden_size=32, intermediate_size=48, num_heads=4, patch_size=4,
                  spatial_merge_size=2, temporal_patch_size=2, num_position_embeddings=16)  # fmt: skip
    rope = {**M_ROPE, "mrope_section": [2, 1, 1], "mrope_interleaved": True, "partial_rotary_factor": 1.0}
    states = dict(linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)
    text_config = {**TEXT, **states, "num_hidden_layers": 4, "rope_parameters": rope}
    config = hf.Qwen3_5Config(text_config=text_config, vision_config=vision, **_tokens())
    return hf.Qwen3_5ForConditionalGeneration(config)


def _glm4v() -> Any:
    vision = dict(depth=2, hidden_size=32, out_hidden_size=32, intermediate_size=48, num_heads=4, patch_size=4,
                  spatial_merge_size=2, temporal_patch_size=2, image_size=16)  # fmt: skip
    config = hf.Glm4vConfig(
        text_config={**TEXT, "rope_parameters": {**M_ROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}},
        vision_config=vision, image_token_id=PLACEHOLDER, video_token_id=VIDEO, image_start_token_id=BEGIN,
        image_end_token_id=END, video_start_token_id=95, video_end_token_id=96,
    )  # fmt: skip
    return hf.Glm4vForConditionalGeneration(config)


def _clip(**more: Any) -> dict[str, Any]:
    return dict(
        model_type="clip_vision_model", hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, image_size=16, patch_size=8, initializer_range=0.3, projection_dim=32, **more,
    )  # fmt: skip


def _square(seed: int, size: int) -> tuple[dict[str, Tensor], list[int]]:
    return {"pixel_values": noise(seed, 1, 3, 16, 16)}, _between(4)


def _llava() -> Any:
    config = hf.LlavaConfig(
        text_config={**TEXT, "model_type": "llama"}, vision_config=_clip(), image_token_index=PLACEHOLDER,
        vision_feature_layer=-1,
    )  # fmt: skip
    return hf.LlavaForConditionalGeneration(config)


def _siglip(**more: Any) -> dict[str, Any]:
    return dict(
        model_type="siglip_vision_model", hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, image_size=16, patch_size=4, vision_use_head=False, **more,
    )  # fmt: skip


def _llava_onevision() -> Any:
    config = hf.LlavaOnevisionConfig(
        text_config={**TEXT, "model_type": "qwen2"}, vision_config=_siglip(), image_token_index=PLACEHOLDER,
        video_token_index=VIDEO, vision_feature_layer=-1, image_grid_pinpoints=[[16, 16], [16, 32]],
        vision_aspect_ratio="anyres_max_9",
    )  # fmt: skip
    return hf.LlavaOnevisionForConditionalGeneration(config)


def _tiled(seed: int, size: int) -> tuple[dict[str, Tensor], list[int]]:
    """A picture of 16x16, one patch and the whole: 4x4 tokens of both, and a line end for each row of the patch."""
    values = {"pixel_values": noise(seed, 1, 2, 3, 16, 16), "image_sizes": torch.tensor([[16, 16]])}
    return values, _between(16 + 4 * 5)


def _gemma3() -> Any:
    config = hf.Gemma3Config(
        text_config={
            **TEXT, "num_hidden_layers": 4, "sliding_window": 12, "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        vision_config=_siglip(), mm_tokens_per_image=4, image_token_index=PLACEHOLDER, boi_token_index=BEGIN,
        eoi_token_index=END,
    )  # fmt: skip
    model = hf.Gemma3ForConditionalGeneration(config)
    nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.3)
    return model


def _gemma4() -> Any:
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
                  num_key_value_heads=4, patch_size=4, pooling_kernel_size=2, position_embedding_size=16)  # fmt: skip
    config = hf.Gemma4Config(
        text_config={
            **TEXT, "num_hidden_layers": 4, "sliding_window": 12, "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 97, "global_head_dim": 8, "use_bidirectional_attention": "vision",
            "layer_types": ["sliding_attention", "full_attention"] * 2, "tie_word_embeddings": False,
        },
        vision_config=vision, audio_config=None, image_token_id=PLACEHOLDER, video_token_id=VIDEO, audio_token_id=95,
        boi_token_id=BEGIN, eoi_token_id=END, tie_word_embeddings=False,
    )  # fmt: skip
    return hf.Gemma4ForConditionalGeneration(config)


def _placed(seed: int, size: int) -> tuple[dict[str, Tensor], list[int]]:
    """A picture of 4x4 patches, four patches a token, beside their positions."""
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    where = torch.stack([columns.flatten(), rows.flatten()], dim=1)[None]
    return {"pixel_values": noise(seed, 1, 16, 3 * 4 * 4).sigmoid(), "image_position_ids": where}, _between(4)


def _qwen2_audio() -> Any:
    audio = dict(
        model_type="qwen2_audio_encoder", d_model=32, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=48,
        num_mel_bins=8, max_source_positions=16,
    )  # fmt: skip
    config = hf.Qwen2AudioConfig(
        audio_config=audio, text_config={**TEXT, "model_type": "qwen2"}, audio_token_index=PLACEHOLDER
    )
    return hf.Qwen2AudioForConditionalGeneration(config)


def _voxtral() -> Any:
    audio = dict(
        model_type="voxtral_encoder", hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=128, num_mel_bins=8, max_source_positions=16,
    )  # fmt: skip
    config = hf.VoxtralConfig(
        audio_config=audio, text_config={**TEXT, "model_type": "llama"}, audio_token_id=PLACEHOLDER
    )
    return hf.VoxtralForConditionalGeneration(config)


def _seconds(seed: int, size: int) -> tuple[dict[str, Tensor], list[int]]:
    """Sound of one window of 32 frames, eight frames a token."""
    return {"input_features": noise(seed, 1, 8, 32)}, _between(4)


def _sound(seed: int, size: int) -> tuple[dict[str, Tensor], list[int]]:
    """Sound of 20 frames, or of 20 + 4 size; four frames a token."""
    frames = 20 + 4 * size
    mask = torch.arange(32)[None] < frames
    return {"input_features": noise(seed, 1, 8, 32), "feature_attention_mask": mask.long()}, _between(frames // 4)


FAMILIES = {
    "qwen2_vl": Family(_qwen2_vl, _grid_picture(3 * 2 * 4 * 4), "model.visual", "mm_token_type_ids"),
    "qwen2_5_vl": Family(_qwen2_5_vl, _grid_picture(3 * 2 * 4 * 4), "model.visual", "mm_token_type_ids"),
    "qwen2_5_vl video": Family(_qwen2_5_vl, _grid_video, "model.visual", "mm_token_type_ids"),
    "qwen3_vl": Family(_qwen3_vl, _grid_picture(3 * 2 * 4 * 4), "model.visual", "mm_token_type_ids"),
    "glm4v": Family(_glm4v, _grid_picture(3 * 2 * 4 * 4), "model.visual", "mm_token_type_ids"),
    "llava": Family(_llava, _square, "model.vision_tower"),
    "llava_onevision": Family(_llava_onevision, _tiled, "model.vision_tower"),
    "gemma3": Family(_gemma3, _square, "model.vision_tower", "token_type_ids"),
    "gemma4": Family(_gemma4, _placed, "model.vision_tower", "mm_token_type_ids"),
    "voxtral": Family(_voxtral, _seconds, "model.audio_tower"),
    "qwen2_audio": Family(_qwen2_audio, _sound, "model.audio_tower"),
}

WITH_STATES = {"qwen3_5": Family(_qwen3_5, _grid_picture(3 * 2 * 4 * 4), "model.visual", "mm_token_type_ids")}
"""Models whose cache has recurrent states, too."""


def make(name: str) -> Any:
    """Return a new model, in evaluation mode, fp32 on the CPU."""
    return drawn({**FAMILIES, **WITH_STATES}[name].make, nn.Linear)


@cache
def shared(name: str) -> Any:
    """Return the model that all tests share which do not change it."""
    return make(name)
