"""The rows of a prompt: their pads, their texts, and how far a batch of them can begin from what is stored.

A cache is rectangular: the filled positions of all rows end at the same position. Rows of different documents have
stored prefixes of different length, so the batch begins where the longest ends, and rows that are behind are advanced
to there first, each by itself. No token is computed that a stored block holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hf_cachegen.models.prefix import require_prompts


@dataclass(frozen=True)
class PromptRow:
    """One row of a prompt.

    Attributes:
        pad: masked tokens before the text.
        tokens: the text, up to its end or to the first token that is masked after it.
        whole: whether the text reaches to the end of the row.
    """

    pad: int
    tokens: tuple[int, ...]
    whole: bool


def prompt_rows(input_ids: Tensor, attention_mask: Tensor) -> list[PromptRow]:
    """Return the rows of a prompt.

    Args:
        input_ids: int64 [rows, tokens].
        attention_mask: [rows, tokens], 0 on pads.

    Raises:
        TensorError: the shapes do not fit.
    """
    require_prompts(input_ids, attention_mask)
    rows = []
    for ids, mask in zip(input_ids.tolist(), (attention_mask.cpu() != 0).tolist(), strict=True):
        pad = mask.index(True) if True in mask else len(mask)
        end = mask.index(False, pad) if False in mask[pad:] else len(mask)
        rows.append(PromptRow(pad, tuple(ids[pad:end]), end == len(mask)))
    return rows


def common_end(rows: Sequence[PromptRow], loaded: Sequence[int], length: int, chunk: int | None) -> int:
    """Return the position up to which all rows are to be filled before the stock call; 0 for none.

    Args:
        rows: the rows of the prompt.
        loaded: tokens of each row that are loaded.
        length: positions of the prompt.
        chunk: most positions that may be left to the stock call; None for any number.
    """
    # The last position is left to compute, because the next token comes from its logits.
    limits = [length - 1, *(row.pad + len(row.tokens) for row in rows if not row.whole)]
    ends = [row.pad + count for row, count in zip(rows, loaded, strict=True) if count]
    end = max(ends, default=0)
    if chunk is not None and length - end > chunk:
        end = length - chunk
    return max(0, min(end, *limits))
