"""Rows that are behind in a batch, brought to the common end: forward passes over one row at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_cachegen.models.compat import run
from hf_cachegen.models.row_cache import dynamic_cache, row_of
from hf_cachegen.prefix_cache.rows import PromptRow

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK_TOKENS = 4096
"""Tokens per forward pass: bounds the memory of activations."""


@torch.no_grad()
def advance(
    model: PreTrainedModel, rows: Sequence[PromptRow], tensors: Sequence[Sequence[Tensor]], end: int,
    chunk: int | None, device: torch.device,
) -> list[Sequence[Tensor] | None]:  # fmt: skip
    """Return the keys and values of every row up to a common end.

    Args:
        model: the model, as the stock generate will find it.
        rows: the rows of the prompt.
        tensors: what is known of each row (layer 0's keys, its values, ...); empty for nothing.
        end: the position of the prompt that all rows are brought to.
        chunk: most tokens per forward pass; None for CHUNK_TOKENS.
        device: the device of the model's inputs.

    Returns:
        For each row tensors of at least end - pad tokens; None for a row of pads up to there.
    """
    found: list[Sequence[Tensor] | None] = []
    known: dict[tuple[int, ...], Sequence[Tensor]] = {}
    for row, given in zip(rows, tensors, strict=True):
        wanted, held = row.tokens[: max(0, end - row.pad)], int(given[0].shape[2]) if given else 0
        if not wanted:
            found.append(None)
            continue
        if held < len(wanted):
            if wanted not in known:
                known[wanted] = _advanced(model, wanted, given, held, chunk or CHUNK_TOKENS, device)
            given = known[wanted]
        found.append(given)
    return found


def _advanced(
    model: PreTrainedModel, tokens: Sequence[int], given: Sequence[Tensor], held: int, chunk: int,
    device: torch.device,
) -> list[Tensor]:  # fmt: skip
    cache = dynamic_cache(model.config, [given or None], [0], held, 1)
    for first in range(held, len(tokens), chunk):
        ids = torch.tensor([tokens[first : first + chunk]], device=device)
        run(model, ids, cache, last_logits_only=True)
    return row_of(cache, 0, 0, len(tokens))
