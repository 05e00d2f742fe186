"""CacheGen as its authors released it: the artifact of the paper, LMCache, and the quantisation baseline of both.

What the code does differs from the paper. There are no deltas between tokens: a token's K (or V) of one layer is
divided by its largest magnitude over all heads and rounded to `bins` levels. Symbols are coded by an arithmetic coder
under each channel's own distribution, which is stored: 33 entries of 16 bits for each layer and channel, whatever the
number of bins. The artifact (github.com/UChi-JCL/CacheGen) computes the distribution over the whole context, LMCache
for every 256 tokens. Both run three quantisation levels; at each the first 10 of 32 layers have the first number of
bins for K, the next 10 the second, the others the third, and V has a first number for 2 of 32 layers. Models of another
depth have the same shares. The kernel codes symbols below 33, so there are no 64 bins or more.

Bits are those of an ideal arithmetic coder under these distributions, in whole bytes: one stream for each channel and
256 tokens, with a 32-bit length as in the code. The distributions and one 16-bit scale for each token, layer, and K or
V come on top.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eval.baselines.stored import Stored, rows, unrows

LMCACHE_TOKENS = 256
"""Tokens that share a distribution in LMCache."""
STREAM_TOKENS = 256
"""Tokens of one stream, in both."""
LENGTH_BITS = 32
TERMINATION_BITS = 2
"""An arithmetic coder's last bits, which name a point of its interval."""
SCALE_BITS = 16
TABLE_ENTRY_BITS = 16
TABLE_ENTRIES = 33
"""Entries of one stored distribution."""
LAYERS, KEY_FIRST, KEY_SECOND, VALUE_FIRST = 32, 10, 20, 2
"""The model that the released settings are for, and where its groups of layers end."""
LEAST_SCALE = 1e-9


@dataclass(frozen=True)
class Bins:
    """Numbers of quantisation levels of one quality level: K in three groups of layers, V in two."""

    keys: tuple[int, int, int]
    values: tuple[int, int]


LEVELS = {1: Bins((16, 16, 12), (16, 12)), 2: Bins((32, 16, 16), (32, 16)), 3: Bins((32, 32, 32), (32, 32))}
"""Quality levels, 1 the coarsest. Level 2 is the default of the artifact and the setting of LMCache."""


def bins_of(level: int, kind: int, layer: int, layers: int) -> int:
    """Return the number of quantisation levels of one layer's K (kind 0) or V (kind 1).

    Args:
        level: 1 to 3.
        kind: 0 for K, 1 for V.
        layer: from 0.
        layers: number of layers of the model.
    """
    at = layer * LAYERS  # compared with the released boundaries, scaled to this model's depth
    if kind == 0:
        first, second, third = LEVELS[level].keys
        return first if at < KEY_FIRST * layers else second if at < KEY_SECOND * layers else third
    first, second = LEVELS[level].values
    return first if at < VALUE_FIRST * layers else second


def cachegen(keys: Sequence[Tensor], values: Sequence[Tensor], table_tokens: int | None) -> Iterator[Stored]:
    """Yield the three levels of the released codec, the finest first.

    Args:
        keys: per layer [1, heads, tokens, head_dim].
        values: likewise.
        table_tokens: tokens that share a distribution; None for the whole context.
    """
    for level in sorted(LEVELS, reverse=True):
        decoded: tuple[list[Tensor], list[Tensor]] = ([], [])
        bits = 0.0
        for kind, side in enumerate((keys, values)):
            for layer, x in enumerate(side):
                spent, restored = _coded(rows(x), bins_of(level, kind, layer, len(side)), table_tokens)
                decoded[kind].append(unrows(restored, x))
                bits += spent
        yield Stored(level, *decoded, bits)


def _coded(x: Tensor, bins: int, table_tokens: int | None) -> tuple[float, Tensor]:
    """Return (bits, decoded) of one layer's K or V, [tokens, channels]."""
    symbols, scale = quantise(x, bins)
    bits = float(len(x) * SCALE_BITS)
    for chunk in (symbols.long() + bins // 2).split(table_tokens or len(symbols)):
        bits += chunk.shape[1] * TABLE_ENTRIES * TABLE_ENTRY_BITS
        bits += sum(stream_bits(part, chunk) for part in chunk.split(STREAM_TOKENS))
    return bits, symbols * scale


def stream_bits(symbols: Tensor, learnt: Tensor) -> float:
    """Return the bits of one stream for each channel, with its length.

    Args:
        symbols: int64 [tokens, channels], from 0 to TABLE_ENTRIES - 1.
        learnt: int64 [more tokens, channels], the symbols that the distributions were computed from; they hold all of
            `symbols`.
    """
    counts = torch.zeros(symbols.shape[1], TABLE_ENTRIES)
    counts.scatter_add_(1, learnt.mT, torch.ones_like(learnt.mT, dtype=torch.float))
    cost = -(counts / len(learnt)).log2()
    spent = cost.gather(1, symbols.mT).sum(1) + TERMINATION_BITS
    return float((8 * (spent / 8).ceil() + LENGTH_BITS).sum())


def quantise(x: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Quantise symmetrically with one maximum for each token.

    Args:
        x: float32 [tokens, channels].
        bins: number of levels; symbols are from -(bins / 2 - 1) to bins / 2 - 1.

    Returns:
        (whole symbols float32 [tokens, channels], scale [tokens, 1]); their product is the decoded tensor.
    """
    most = bins // 2 - 1
    scale = x.abs().amax(1, keepdim=True).clamp_min(LEAST_SCALE) / most
    return (x / scale).round(), scale


def default_quantization(keys: Sequence[Tensor], values: Sequence[Tensor], bits: int) -> Iterator[Stored]:
    """Yield the quantisation baseline of the artifact: 2^bits bins for all layers, not coded any further.

    Args:
        keys: per layer [1, heads, tokens, head_dim].
        values: likewise.
        bits: bits of a symbol.
    """
    decoded: tuple[list[Tensor], list[Tensor]] = ([], [])
    spent = 0.0
    for kind, side in enumerate((keys, values)):
        for x in side:
            symbols, scale = quantise(rows(x), 2**bits)
            decoded[kind].append(unrows(symbols * scale, x))
            spent += bits * x.numel() + SCALE_BITS * len(symbols)
    yield Stored(None, *decoded, spent)
