"""Tiny random encoder-decoder models, and inputs for their encoders."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from tests.media_support import noise, text
from tests.tiny_models import drawn

SMALL: dict[str, Any] = dict(vocab_size=97, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3)
LAYERS: dict[str, Any] = dict(
    d_model=32, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=128,
)  # fmt: skip


def _bart() -> Any:
    return hf.BartForConditionalGeneration(hf.BartConfig(**SMALL, **LAYERS, forced_eos_token_id=None))


def _mbart() -> Any:
    return hf.MBartForConditionalGeneration(hf.MBartConfig(**SMALL, **LAYERS, forced_eos_token_id=None))


def _pegasus() -> Any:
    return hf.PegasusForConditionalGeneration(hf.PegasusConfig(**SMALL, **LAYERS, forced_eos_token_id=None))


def _marian() -> Any:
    return hf.MarianMTModel(hf.MarianConfig(**SMALL, **LAYERS, decoder_vocab_size=97, forced_eos_token_id=None))


def _t5() -> Any:
    config = hf.T5Config(**SMALL, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4)
    return hf.T5ForConditionalGeneration(config)


def _whisper() -> Any:
    config = hf.WhisperConfig(
        **SMALL, d_model=32, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=32, max_target_positions=64,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return hf.WhisperForConditionalGeneration(config)


MAKERS = {
    "bart": _bart, "t5": _t5, "whisper": _whisper, "mbart": _mbart, "pegasus": _pegasus, "marian": _marian,
}  # fmt: skip


def make(name: str) -> Any:
    """Return a new model, in evaluation mode, fp32 on the CPU."""
    return drawn(MAKERS[name], nn.Linear, nn.Embedding, nn.Conv1d)


@cache
def shared(name: str) -> Any:
    """Return the model that all tests share which do not change it."""
    return make(name)


def inputs(name: str, seed: int = 1, rows: int = 1) -> dict[str, Tensor]:
    """Return the input of the encoder."""
    if name == "whisper":
        return {"input_features": noise(seed, 1, 8, 64).expand(rows, -1, -1).contiguous()}
    ids = torch.tensor([text(20, seed)] * rows)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
