"""KIVI (Liu et al., ICML 2024, arXiv 2402.02750): asymmetric quantisation, keys per channel and values per token.

Parameters are the paper's: groups of 32 values, a residual of 128 tokens in 16 bits. Keys are quantised in whole
blocks of 128 tokens, so up to 127 of the newest tokens keep exact keys; the newest 128 tokens keep exact values. Each
group stores a 16-bit scale and a 16-bit zero point.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from eval.baselines.stored import Stored

GROUP = 32
RESIDUAL_TOKENS = 128
SIDE_BITS = 32
"""Scale and zero point of a group."""
EXACT_BITS = 16
LEAST_SCALE = 1e-9


def kivi(keys: Sequence[Tensor], values: Sequence[Tensor], bits: int) -> Iterator[Stored]:
    """Yield what KIVI stores of a context after its prefill.

    Args:
        keys: per layer [1, heads, tokens, head_dim].
        values: likewise.
        bits: 2 or 4.
    """
    decoded: tuple[list[Tensor], list[Tensor]] = ([], [])
    spent = 0.0
    for k, v in zip(keys, values, strict=True):
        tokens = k.shape[2]
        whole = tokens - tokens % RESIDUAL_TOKENS
        packed = _grouped(k[:, :, :whole].float().mT, bits).mT  # groups of tokens within a channel
        decoded[0].append(torch.cat([packed, k[:, :, whole:].float()], 2))
        old = max(0, tokens - RESIDUAL_TOKENS)
        decoded[1].append(torch.cat([_grouped(v[:, :, :old].float(), bits), v[:, :, old:].float()], 2))
        spent += _bits(k.shape[1] * k.shape[3], whole, bits, GROUP) + EXACT_BITS * k[:, :, whole:].numel()
        spent += _bits(v.shape[1] * old, v.shape[3], bits, GROUP) + EXACT_BITS * v[:, :, old:].numel()
    yield Stored(None, *decoded, spent)


def _bits(lines: int, length: int, bits: int, group: int) -> float:
    """Return the bits of `lines` lines of `length` values, each line in groups."""
    return float(lines * (length * bits + -(-length // group) * SIDE_BITS))


def _grouped(x: Tensor, bits: int) -> Tensor:
    """Quantise and dequantise [..., length] in groups along the last dimension; the last group may be shorter."""
    parts = [_quantised(part, bits) for part in x.split(GROUP, -1)] if x.numel() else [x]
    return torch.cat(parts, -1)


def _quantised(x: Tensor, bits: int) -> Tensor:
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).half().float().clamp_min(LEAST_SCALE)
    low = low.half().float()
    return ((x - low) / scale).round().clamp(0, 2**bits - 1) * scale + low
