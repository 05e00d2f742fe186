"""How much of a batch of prompts a cached context covers.

Nothing of a prompt is moved: a cache is laid out in the prompt's own columns. Row r begins with pads[r] masked
columns (what a tokenizer's left-padding put there), and the context follows; the cached part of every row ends at the
same column, since a cache is rectangular. A row with more pads has its last tokens of the context computed once more,
in columns that a batch computes anyway. So positions, masks, sliding windows, logits processors and the result are
those of a call without a cache. (Pads between context and question would do for full attention only: a sliding window
counts columns, pads included.)
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from hf_cachegen.errors import TensorError


@dataclass(frozen=True)
class Reuse:
    """pads: masked columns before each row's first token; columns: how many leading columns of all rows are cached;
    whole: whether every row begins with the whole context; common: tokens of the context that every row begins with.
    """

    pads: tuple[int, ...]
    columns: int
    whole: bool
    common: int = field(default=0, compare=False)


def match(context: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Reuse:
    """Compare a context [tokens] with prompts [rows, length]; the mask, of the same shape, is 0 on pads.

    At least the last column is left to compute, because the next token comes from its logits.
    Raises TensorError where the shapes do not fit.
    """
    require_prompts(input_ids, attention_mask)
    context = context.cpu()
    pads, shared = [], []
    for ids, mask in zip(input_ids.cpu(), attention_mask.cpu() != 0, strict=True):
        pad = _leading(~mask)
        tokens = ids[pad : pad + _leading(mask[pad:])]
        size = min(len(tokens), len(context))
        shared.append(_leading(tokens[:size] == context[:size]))
        pads.append(pad)
    ends = [pad + common for pad, common in zip(pads, shared, strict=True)]
    return Reuse(tuple(pads), min(*ends, input_ids.shape[1] - 1), min(shared) == len(context), min(shared))


def require_prompts(input_ids: Tensor, attention_mask: Tensor) -> None:
    """Raises TensorError unless both are [rows, length], with a row and a column."""
    if input_ids.ndim != 2 or input_ids.shape[0] < 1 or input_ids.shape[1] < 1:
        raise TensorError(f"input_ids must be [rows, tokens], got {list(input_ids.shape)}")
    if attention_mask.shape != input_ids.shape:
        raise TensorError(
            f"the attention mask {list(attention_mask.shape)} must cover the whole prompt {list(input_ids.shape)}, "
            "the cached context included"
        )


def tokens_of(input_ids: Tensor, attention_mask: Tensor) -> list[int]:
    """The first prompt of [rows, length], without the pads before it."""
    return input_ids[0, _leading(attention_mask[0] == 0) :].tolist()


def _leading(flags: Tensor) -> int:
    """How many leading elements are true."""
    return int(flags.int().cumprod(0).sum())
