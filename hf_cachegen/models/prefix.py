"""Compare a batch of prompts with a cached context, and return how much of them the cache covers.

A cache is laid out in the positions of the padded prompts, and no token is moved. Row r begins with pads[r] masked
positions (the tokenizer's left-padding), and the context follows. A cache is rectangular, so the cached part of every
row ends at the same position; for a row with more pads, the last tokens of the context are computed again, in positions
that the batch computes anyway. So positions, masks, sliding windows, logits processors and the result are those of a
call without a cache. (Pads between context and question would be right for full attention only: a sliding window counts
positions, pads included.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from hf_cachegen.errors import TensorError


@dataclass(frozen=True)
class Reuse:
    """The part of a batch of prompts that a cached context covers.

    Attributes:
        pads: for each row, the number of masked positions before its first token.
        length: number of leading positions, pads included, that are cached in all rows.
        whole: True if every row begins with the whole context.
        common: number of leading tokens of the context that every row begins with.
    """

    pads: tuple[int, ...]
    length: int
    whole: bool
    common: int = field(default=0, compare=False)


def match(context: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Reuse:
    """Compare a context with a batch of prompts.

    The last position is never covered, because the next token comes from its logits.

    Args:
        context: int64 [tokens].
        input_ids: int64 [rows, length], the prompts.
        attention_mask: [rows, length], 0 on pads.

    Raises:
        TensorError: the shapes do not fit.
    """
    pads, shared = common_tokens(context, input_ids, attention_mask)
    return reuse_of(pads, shared, input_ids.shape[1], min(shared) == len(context))


def common_tokens(context: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[list[int], list[int]]:
    """Return for each row the number of pads, and of leading tokens that it shares with the context.

    Arguments and errors are those of `match`.
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
    return pads, shared


def reuse_of(pads: Sequence[int], shared: Sequence[int], length: int, whole: bool) -> Reuse:
    """Return the part of prompts of `length` positions that is covered, given the tokens that each row shares."""
    ends = [pad + common for pad, common in zip(pads, shared, strict=True)]
    return Reuse(tuple(pads), min(*ends, length - 1), whole, min(shared))


def require_prompts(input_ids: Tensor, attention_mask: Tensor) -> None:
    """Raise TensorError unless both are [rows, length], with at least one row and one token."""
    if input_ids.ndim != 2 or input_ids.shape[0] < 1 or input_ids.shape[1] < 1:
        raise TensorError(f"input_ids must be [rows, tokens], got {list(input_ids.shape)}")
    if attention_mask.shape != input_ids.shape:
        raise TensorError(
            f"expected an attention mask {list(input_ids.shape)} for the whole prompt, the cached context included, "
            f"got {list(attention_mask.shape)}"
        )


def tokens_of(input_ids: Tensor, attention_mask: Tensor) -> list[int]:
    """Return the first prompt of [rows, length] as a list of token ids, without the pads before it."""
    return input_ids[0, _leading(attention_mask[0] == 0) :].tolist()


def _leading(flags: Tensor) -> int:
    """Return the number of leading elements that are true."""
    return int(flags.int().cumprod(0).sum())
