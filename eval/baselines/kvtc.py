"""KVTC (Staniszewski and Lancucki, ICLR 2026, arXiv 2511.01815), and joint PCA without sensitivities.

KVTC projects a token's keys of all layers (rotation undone) and its values onto principal components, quantises groups
of components with 0, 2, 4 or 8 bits, and compresses the result by DEFLATE. Groups and bits are chosen once, from
calibration tokens, by dynamic programming: the least squared error within a budget of bits for each token. A group
stores a 16-bit scale and a 16-bit offset for each token. The first 4 tokens (attention sinks) and the last 128 keep 16
bits. Levels are budgets before DEFLATE: 8, 16 and 32 times smaller than 16 bits.

`pca` is the plainer transform coder beside it: one step for all components, an ideal entropy coder with a distribution
for each component, and nothing charged for the distributions. It shows what a joint basis gives without sensitivities.

The basis itself is stored once for a model and not charged here, as klt's profile is not.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from eval.baselines.joint import Basis, Joint
from eval.baselines.stored import Stored, entropy_bits

SINK_TOKENS, RECENT_TOKENS = 4, 128
EXACT_BITS = 16
RATIOS = {3: 8, 2: 16, 1: 32}
"""Level to compression ratio, before DEFLATE."""
BITS = (0, 2, 4, 8)
"""Bits of a symbol that a group may have."""
GROUPS = (16, 64, 256, 1024)
"""Components of a group. The bit allocation considers group borders at multiples of the smallest."""
SIDE_BITS = 32
"""Scale and offset of a group, for each token."""
PCA_STEPS = {3: 0.3, 2: 0.9, 1: 2.7}
"""Level to step, in root mean square values of the coefficients."""
LEAST_SCALE = 1e-9


@dataclass(frozen=True)
class Group:
    """Components first to last - 1, and the bits of their symbols."""

    first: int
    last: int
    bits: int


def kvtc(keys: Sequence[Tensor], values: Sequence[Tensor], joint: Joint) -> Iterator[Stored]:
    """Yield the three levels of KVTC, the finest first.

    Args:
        keys: per layer [1, heads, tokens, head_dim].
        values: likewise.
        joint: the model's basis.

    Raises:
        ConfigError: the basis is another model's.
    """
    tokens = keys[0].shape[2]
    last = max(SINK_TOKENS, tokens - RECENT_TOKENS)
    for level, ratio in RATIOS.items():
        decoded: list[list[Tensor]] = []
        spent = 0.0
        for kind, (side, basis) in enumerate(zip((keys, values), (joint.keys, joint.values), strict=True)):
            groups = allocate(basis, EXACT_BITS * len(basis.mean) // ratio)
            coefficients = joint.coefficients(kind, side)[SINK_TOKENS:last]
            restored, data = _coded(coefficients, groups)
            full = torch.zeros(tokens, restored.shape[1])
            full[SINK_TOKENS:last] = restored
            lossy = joint.restored(kind, full, side)
            for x, y in zip(side, lossy, strict=True):
                y[:, :, :SINK_TOKENS], y[:, :, last:] = x[:, :, :SINK_TOKENS].float(), x[:, :, last:].float()
            decoded.append(lossy)
            spent += 8 * data + EXACT_BITS * len(basis.mean) * (tokens - len(coefficients))
        yield Stored(level, decoded[0], decoded[1], spent)


@lru_cache(maxsize=16)
def allocate(basis: Basis, budget: int) -> tuple[Group, ...]:
    """Choose groups and their bits by dynamic programming over (components so far, bits spent).

    Args:
        basis: its calibration coefficients are quantised to measure errors.
        budget: bits for each token, side information included.

    Returns:
        Groups that cover a prefix of the components; the others have no bits.
    """
    unit = GROUPS[0]
    count, slots = basis.sample.shape[1] // unit, budget // unit
    energy = (basis.sample**2).sum(0)
    kept = energy[: count * unit].view(-1, unit).sum(1).numpy()
    tail = float(energy.sum()) - np.concatenate([[0.0], np.cumsum(kept)])
    best = np.full((count + 1, slots + 1), np.inf)
    best[0] = 0.0
    choice: dict[tuple[int, int], tuple[int, int]] = {}
    for end in range(1, count + 1):
        for size in (group // unit for group in GROUPS if group // unit <= end):
            first = end - size
            for bits in BITS[1:]:
                cost = size * bits + -(-SIDE_BITS // unit)
                if cost > slots:
                    continue
                error = _error(basis, first * unit, end * unit, bits)
                found = best[first, : slots + 1 - cost] + error
                better = found < best[end, cost:]
                best[end, cost:][better] = found[better]
                for slot in np.flatnonzero(better) + cost:
                    choice[end, int(slot)] = (first, bits)
    total = best + tail[:, None]
    at, left = (int(index) for index in np.unravel_index(int(total.argmin()), total.shape))
    groups: list[Group] = []
    while at:
        first, bits = choice[at, left]
        groups.append(Group(first * unit, at * unit, bits))
        left -= (at - first) * bits + -(-SIDE_BITS // unit)
        at = first
    return tuple(groups[::-1])


@lru_cache(maxsize=1 << 14)
def _error(basis: Basis, first: int, last: int, bits: int) -> float:
    """Return the squared error of quantising components first to last - 1 of each calibration token."""
    x = basis.sample[:, first:last]
    symbols, scale, low = _quantised(x, bits)
    return float(((symbols * scale + low - x) ** 2).sum())


def _quantised(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (symbols, scale, offset) of the rows of [tokens, components]."""
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).half().float().clamp_min(LEAST_SCALE)
    low = low.half().float()
    return ((x - low) / scale).round().clamp(0, 2**bits - 1), scale, low


def _coded(x: Tensor, groups: Sequence[Group]) -> tuple[Tensor, int]:
    """Return (coefficients as decoded, bytes after DEFLATE) of [tokens, components]."""
    restored, packed = torch.zeros_like(x), []
    for group in groups:
        symbols, scale, low = _quantised(x[:, group.first : group.last], group.bits)
        restored[:, group.first : group.last] = symbols * scale + low
        planes = np.unpackbits(symbols.to(torch.uint8).numpy()[..., None], axis=-1)[..., 8 - group.bits :]
        packed += [np.packbits(planes).tobytes(), torch.cat([scale, low], 1).half().numpy().tobytes()]
    return restored, len(zlib.compress(b"".join(packed)))


def pca(keys: Sequence[Tensor], values: Sequence[Tensor], joint: Joint) -> Iterator[Stored]:
    """Yield three levels of joint PCA with one step for all components, the finest first.

    Args:
        keys: per layer [1, heads, tokens, head_dim].
        values: likewise.
        joint: the model's basis.

    Raises:
        ConfigError: the basis is another model's.
    """
    for level, step in PCA_STEPS.items():
        decoded: list[list[Tensor]] = []
        spent = 0.0
        for kind, (side, basis) in enumerate(zip((keys, values), (joint.keys, joint.values), strict=True)):
            found = joint.coefficients(kind, side)
            width = step * float(basis.sample.square().mean().sqrt())
            symbols = (found / width).round()
            decoded.append(joint.restored(kind, symbols * width, side))
            ids = (symbols - symbols.amin(0)).long()
            spent += entropy_bits(ids, int(ids.max()) + 1)
        yield Stored(level, decoded[0], decoded[1], spent)
