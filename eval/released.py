"""CacheGen as its authors' code was released, as a baseline: what it decodes to and how many bits it takes.

Not the paper's deltas: each token's K (or V) of a layer is divided by its largest magnitude over all heads and rounded
to a number of levels, K 32/16/16 in the thirds of the layers, V 32 in the first sixteenth of the layers and 16 after.
Symbols are coded by an arithmetic coder under each channel's own distribution, which travels with every chunk: bins +
1 numbers of 16 bits a channel. The length is the entropy under those distributions, as good as the coder can be, and
the side information.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK_TOKENS = 256
SCALE_BITS = 16
TABLE_ENTRY_BITS = 16


def bins_of(kind: int, layer: int, layers: int) -> int:
    """Number of quantisation levels of K (kind 0) or V (kind 1)."""
    if kind == 0:
        return 32 if layer < layers / 3 else 16
    return 32 if layer < max(1, layers / 16) else 16


def released(
    kv: tuple[Sequence[Tensor], Sequence[Tensor]], factor: float = 1.0
) -> tuple[float, tuple[list[Tensor], list[Tensor]]]:
    """(bits per element, decoded keys and values); `factor` multiplies the number of bins."""
    bits, elements, decoded = 0.0, 0, ([], [])  # type: tuple[float, int, tuple[list[Tensor], list[Tensor]]]
    for kind, side in enumerate(kv):
        for layer, x in enumerate(side):
            bins = round(bins_of(kind, layer, len(side)) * factor)
            peak = x.abs().amax((1, 3), keepdim=True).clamp_min(1e-9)
            symbols = (x / peak * (bins // 2 - 1)).round()
            decoded[kind].append(symbols / (bins // 2 - 1) * peak)
            rows = symbols.transpose(1, 2).flatten(2)[0]
            for chunk in rows.split(CHUNK_TOKENS):
                bits += entropy_bits(chunk.long() + bins // 2, bins)
                bits += len(chunk) * SCALE_BITS + chunk.shape[1] * (bins + 1) * TABLE_ENTRY_BITS
            elements += x.numel()
    return bits / elements, decoded


def entropy_bits(symbols: Tensor, bins: int) -> float:
    """Bits of symbols int64 [tokens, channels] under each channel's own distribution."""
    counts = torch.zeros(symbols.shape[1], bins + 1).scatter_add_(
        1, symbols.mT, torch.ones_like(symbols.mT, dtype=torch.float)
    )
    share = counts / len(symbols)
    return float(-(counts * share.clamp_min(1e-12).log2()).sum())
