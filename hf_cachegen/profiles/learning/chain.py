"""Learn a chained profile: maps from the summaries of the groups before to each group, and bases of what is left.

All in the space where an error of any coefficient costs the same divergence. a_i are the K or V of one group there,
S_ij their mean products, of groups at most `reach` layers apart (`sums.py`).

1. The summary of i is a_i V_i, with V_i the leading eigenvectors of S_ii. A summary that nothing reads is empty.
   (Directions chosen by what they explain of the layers after, a regression of low rank, took 3 % more bits.)
2. What i reads is r + e: the summaries r of the exact groups, and the error e of the base, of variance
   n = step^2 / 12 in every direction. So the map with the least error is a ridge regression whose ridge is n at
   least: W = (E[r^T r] + ridge)^-1 E[r^T a_i]. The ridge is the multiple of n that leaves the least energy on held-out
   samples. So the maps know of the noise without a second pass over the samples.
3. The basis of i has the eigenvectors of S_ii - C^T W - W^T C + W^T (E[r^T r] + n) W, with C = E[r^T a_i].

The scores of a predictor are read first. They have no noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_cachegen.codec.chain import sources
from hf_cachegen.codec.group import Group
from hf_cachegen.codec.matrices import rounded
from hf_cachegen.profiles.learning.metric import both_sides, by_head, principal, roots
from hf_cachegen.profiles.learning.sums import GroupSums

DEFAULT_REACH = 3
"""Number of layers before a layer that its prediction reads, where groups have fewer."""
DEFAULT_WIDTH = 128
"""Largest number of leading coefficients that summarise a layer's K, or V. At 1,024 channels decoding then takes no
more multiply-adds than joint bases of two layers.
"""
JOINT_WIDTH = 256
"""The same of a group of several layers."""
RIDGES = (1.0, 3.0, 10.0, 30.0)
"""Ridges to choose from, in units of the noise of the base."""
RIDGE_CHANNELS = 240
"""Number of a group's channels, evenly spaced, whose held-out energy chooses the ridge."""


@dataclass(frozen=True)
class Scores:
    """What a predictor's scores contribute.

    Attributes:
        inner: Mean product of the scores, float64 [rank, rank].
        ridge: What the ridge of the predictor adds to it, float64 [rank, rank].
        cross: Mean product of the scores and each group's channels, float64 [rank, channels].
        held_out: `inner` and `cross` of the held-out samples.
    """

    inner: Tensor
    ridge: Tensor
    cross: list[Tensor]
    held_out: tuple[Tensor, list[Tensor]]


class _Products:
    """Mean products of the summaries, and of a summary and a group in the metric of its sensitivity.

    Args:
        sums: Of the layers.
        means: float64 [channels] of each group.
        roots: The square root of each group's sensitivity, float64 [heads, dim, dim].
        summaries: Q of each group, float64 [width, channels].
    """

    def __init__(
        self, sums: GroupSums, means: Sequence[Tensor], roots: Sequence[Tensor], summaries: Sequence[Tensor]
    ):
        self.sums, self.means, self.roots, self.summaries = sums, means, roots, summaries
        self._half: dict[tuple[int, int], Tensor] = {}

    def half(self, j: int, i: int) -> Tensor:
        """Return the mean products of the summary of j and the channels of i."""
        if (j, i) not in self._half:
            self._half[j, i] = self.sums.read(self.summaries[j], j, i, self.means)
        return self._half[j, i]

    def read(self, which: Sequence[int], i: int) -> tuple[Tensor, Tensor]:
        """Return E[r^T r] and E[r^T a_i] of the summaries of the groups `which`."""
        if not which:
            return self.roots[i].new_zeros(0, 0), self.roots[i].new_zeros(0, len(self.means[i]))
        inner = [torch.cat([self.half(j, k) @ self.summaries[k].mT for k in which], 1) for j in which]
        return torch.cat(inner), by_head(torch.cat([self.half(j, i) for j in which]), self.roots[i])


def chained(
    training: GroupSums, held_out: GroupSums, groups: Sequence[Group], noise: float, width: int,
    scores: Scores | None = None,
) -> tuple[tuple[Group, ...], dict[str, Any]]:  # fmt: skip
    """Return the groups of a chain, with all components, and what to state about it.

    Args:
        training: Sums of the training samples.
        held_out: Sums of the held-out samples.
        groups: One for each group of the sums, with their sensitivities. The `synthesis` is that of the group's own
            products, where it was computed before; else it is empty.
        noise: The variance of the base's error in each coefficient.
        width: Largest width of a summary.
        scores: Of a predictor.
    """
    means, pairs = training.means(), [roots(group.sensitivity) for group in groups]
    squares = [both_sides(training.product(i, i, means), root) for i, (root, _) in enumerate(pairs)]
    read = [sources(training.order, i, training.reach) for i in range(len(groups))]
    used = {j for which in read for j in which}
    stored = [torch.zeros(0, len(square)) for square in squares]
    for i in used:
        if len(groups[i].synthesis):  # V^T F^(-1/2)
            leading = by_head(groups[i].synthesis[:width].double(), groups[i].sensitivity.double())
        else:
            leading = by_head(principal(squares[i])[:width], pairs[i][0])
        stored[i] = rounded(leading, chained=True)
    summaries = [x.double() for x in stored]
    noisy = [_noisy(x, inverse) for x, (_, inverse) in zip(summaries, pairs, strict=True)]
    both = [_Products(sums, means, [root for root, _ in pairs], summaries) for sums in (training, held_out)]
    normal = [
        (_normal(both[0], noisy, which, i, scores), _normal(both[1], noisy, which, i, scores, unseen=True))
        for i, which in enumerate(read)
    ]
    best = min(RIDGES, key=lambda ridge: sum(_left(own, other, noise, ridge, scores) for own, other in normal))
    found = []
    for i, ((root, inverse), (own, _)) in enumerate(zip(pairs, normal, strict=True)):
        prediction = rounded(by_head(_solved(own, noise * best, scores), inverse), chained=True)
        maps = by_head(prediction.double(), root)
        # Half of what is added: its transpose is added too. In float32, as the eigenvectors.
        half = maps.float().mT @ ((own.inner + noise * own.noisy).float() @ maps.float() / 2 - own.cross.float())
        synthesis = rounded(by_head(principal(squares[i] + half + half.mT), inverse), chained=True)
        found.append(replace(
            groups[i], sensitivity=eight_bits(groups[i].sensitivity), synthesis=synthesis,
            prediction=prediction if len(prediction) else None, summary=stored[i],
        ))  # fmt: skip
    return tuple(found), {"reach": training.reach, "width": width, "ridge": best}


def eight_bits(sensitivity: Tensor) -> Tensor:
    """Round a sensitivity [heads, dim, dim] as in a chain's file."""
    return rounded(sensitivity.flatten(0, 1), chained=True).reshape(sensitivity.shape)


@dataclass(frozen=True)
class _Normal:
    """Of what one group reads: E[r^T r], E[r^T a], and the products of the directions that carry noise (else zero)."""

    inner: Tensor
    cross: Tensor
    noisy: Tensor


def _noisy(summary: Tensor, inverse: Tensor) -> Tensor:
    """Return the products of a summary's directions [width, channels] in the metric."""
    directions = by_head(summary, inverse)
    return directions @ directions.mT


def _normal(
    products: _Products, noisy: Sequence[Tensor], which: Sequence[int], i: int, scores: Scores | None,
    *, unseen: bool = False,
) -> _Normal:  # fmt: skip
    inner, cross = products.read(which, i)
    carried = torch.block_diag(*(noisy[j] for j in which)) if which else inner
    if scores is None:
        return _Normal(inner, cross, carried)
    own, others = scores.held_out if unseen else (scores.inner, scores.cross)
    beside = [others[j] @ products.summaries[j].mT for j in which]
    right = torch.cat(beside, 1) if which else own.new_zeros(len(own), 0)
    inner = torch.cat([torch.cat([own, right], 1), torch.cat([right.mT, inner], 1)])
    cross = torch.cat([by_head(others[i], products.roots[i]), cross])
    return _Normal(inner, cross, torch.block_diag(torch.zeros_like(own), carried))


def _left(own: _Normal, other: _Normal, noise: float, ridge: float, scores: Scores | None) -> float:
    """Return the energy that the map of a ridge leaves of the held-out samples, less the energy of the group.

    Of RIDGE_CHANNELS of the group's channels: they are enough to choose one number.
    """
    some = slice(None, None, max(1, own.cross.shape[1] // RIDGE_CHANNELS))
    maps, cross = _solved(replace(own, cross=own.cross[:, some]), noise * ridge, scores), other.cross[:, some]
    return float((maps * ((other.inner + noise * other.noisy) @ maps - 2 * cross)).sum())


def _solved(normal: _Normal, ridge: float, scores: Scores | None) -> Tensor:
    """Return the map W."""
    if not len(normal.inner):
        return normal.cross
    matrix = normal.inner + ridge * normal.noisy
    if scores is not None:
        rank = len(scores.inner)
        matrix[:rank, :rank] += scores.ridge
    return torch.linalg.solve(matrix, normal.cross)
