"""The inputs of a context: token ids, or the whole output of a processor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_cachegen.errors import TensorError, UnsupportedModelError
from hf_cachegen.models.media import MEDIA_INPUTS, TOKEN_TYPES, MediaInputs, parse_media

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Tokens = Tensor | Sequence[int]
ContextInputs = Tokens | Mapping[str, Any]
"""Token ids, or the whole output of a processor."""


def one_row(input_ids: Tokens) -> Tensor:
    """Return a context's token ids as int64 [1, tokens], on the CPU.

    Args:
        input_ids: [tokens] or [1, tokens], a tensor or a sequence of integers.

    Raises:
        TensorError: they are not one row of token ids.
    """
    try:
        ids = torch.as_tensor(input_ids).detach().cpu()
    except (TypeError, ValueError, RuntimeError, KeyError, IndexError) as error:
        raise TensorError(
            f"expected one row of token ids, [tokens] or [1, tokens], got a {type(input_ids).__name__}: pass "
            'input_ids, such as tokenizer(text, return_tensors="pt").input_ids'
        ) from error
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] == 0 or ids.is_floating_point() or ids.dtype is torch.bool:
        raise TensorError(f"expected one row of token ids, [tokens] or [1, tokens], got {list(ids.shape)} {ids.dtype}")
    return ids.long()


def context_inputs(config: PreTrainedConfig, inputs: ContextInputs) -> tuple[Tensor, MediaInputs | None]:
    """Return the token ids and the media of a context.

    Args:
        config: the configuration of the model.
        inputs: its token ids, as for `one_row`; or model inputs by name, the whole output of a processor.

    Returns:
        Token ids int64 [1, tokens] on the CPU; and the media, None where there are none.

    Raises:
        TensorError: they are not one row without pads, or media do not fit the placeholders.
        UnsupportedModelError: an input is not known, so it may change keys and values.
    """
    if not isinstance(inputs, Mapping):
        return one_row(inputs), None
    named = {name: value for name, value in inputs.items() if value is not None}
    unknown = sorted(named.keys() - {"input_ids", "attention_mask", *TOKEN_TYPES, *MEDIA_INPUTS})
    if unknown or "input_ids" not in named:
        raise UnsupportedModelError(
            f"expected input_ids with or without {sorted(MEDIA_INPUTS)}, got {sorted(named)}: leave out {unknown}, or "
            "keep the context without them"
        )
    ids = one_row(named["input_ids"])
    mask = torch.as_tensor(named.get("attention_mask", 1))
    if bool((mask == 0).any()) or (mask.ndim and mask.numel() != ids.numel()):
        raise TensorError("expected a context without pads, got an attention_mask with zeros or of another length")
    media = parse_media(config, ids, named)
    if media is None and any(bool(torch.as_tensor(named[name]).any()) for name in TOKEN_TYPES if name in named):
        raise TensorError(f"got {TOKEN_TYPES} other than 0 without media: pass the whole output of the processor")
    return ids, media
