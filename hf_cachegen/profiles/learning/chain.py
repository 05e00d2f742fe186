"""Learn a chained profile: maps from the summaries of the groups before to each group, and bases of what is left.

All in the space where an error of any coefficient costs the same divergence. a_i are the K or V of one group there,
S_ij their mean products, of groups at most `reach` layers apart: sums of the same pass over the samples as the
profile's.

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


class ChainSums:
    """Sums over samples of the products of groups at most `reach` layers apart.

    Args:
        order: (kind, first layer, layers) of each group, in the order of the chain.
        widths: Channels of each group.
        reach: Of the chain.
    """

    def __init__(self, order: Sequence[tuple[int, int, int]], widths: Sequence[int], reach: int):
        self.order, self.reach = order, reach
        self.count = torch.zeros(1, dtype=torch.int64)
        self.rows = [torch.zeros(width, dtype=torch.float64) for width in widths]
        ends = [(kind, first + count - 1, 1) for kind, first, count in order]  # where `after` may cut them
        self.products = {
            (j, i): torch.zeros(widths[j], widths[i])  # the largest sums of all, so float32
            for i, group in enumerate(order) for j in [*sources([*ends[:i], group], i, reach), i]
        }  # fmt: skip

    @property
    def sums(self) -> dict[str, Tensor]:
        """The sums by name, which `add` changes in place."""
        named = {"chain-count": self.count} | {f"chain-rows-{i}": x for i, x in enumerate(self.rows)}
        return named | {f"chain-{j}-{i}": x for (j, i), x in self.products.items()}

    def add(self, rows: Sequence[Tensor]) -> None:
        """Add a sample: float32 [tokens, channels] of each group, keys with the rotation undone."""
        self.count += len(rows[0])
        for total, part in zip(self.rows, rows, strict=True):
            total += part.sum(0, dtype=torch.float64).cpu()
        for (j, i), product in self.products.items():
            product += (rows[j].mT @ rows[i].to(rows[j].device)).cpu()

    def after(self, order: Sequence[tuple[int, int, int]], widths: Sequence[int]) -> ChainSums:
        """Return the sums of these groups, of which each is the last layers of one of this chain's.

        Args:
            order: (kind, first layer, layers) of each.
            widths: Channels of each.
        """
        ends = {(kind, first + count): index for index, (kind, first, count) in enumerate(self.order)}
        whole = [ends[kind, first + count] for kind, first, count in order]
        found = ChainSums(order, widths, self.reach)
        found.count = self.count
        parts = [slice(len(self.rows[index]) - width, None) for index, width in zip(whole, widths, strict=True)]
        found.rows = [self.rows[index][part] for index, part in zip(whole, parts, strict=True)]
        found.products = {(j, i): self.products[whole[j], whole[i]][parts[j], parts[i]] for j, i in found.products}
        return found

    def means(self) -> list[Tensor]:
        """Return the mean of each group, float64 [channels]."""
        return [total / self.count for total in self.rows]

    def product(self, j: int, i: int, means: Sequence[Tensor]) -> Tensor:
        """Return the mean product of groups j and i, less `means`: float64 [channels of j, channels of i]."""
        if (j, i) not in self.products:
            return self.product(i, j, means).mT
        a, b = self.rows[j] / self.count, self.rows[i] / self.count
        return self.products[j, i].double() / self.count - torch.outer(a, b) + torch.outer(a - means[j], b - means[i])


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
        roots: The square root of each group's sensitivity.
        summaries: Q of each group, float64 [width, channels].
    """

    def __init__(
        self, sums: ChainSums, means: Sequence[Tensor], roots: Sequence[Tensor], summaries: Sequence[Tensor]
    ):
        self.sums, self.means, self.roots, self.summaries = sums, means, roots, summaries
        self._half: dict[tuple[int, int], Tensor] = {}

    def own(self, i: int) -> Tensor:
        """Return S_ii."""
        return self.roots[i] @ self.sums.product(i, i, self.means) @ self.roots[i]

    def half(self, j: int, i: int) -> Tensor:
        """Return the mean products of the summary of j and the channels of i."""
        if (j, i) not in self._half:
            self._half[j, i] = self.summaries[j] @ self.sums.product(j, i, self.means)
        return self._half[j, i]

    def read(self, which: Sequence[int], i: int) -> tuple[Tensor, Tensor]:
        """Return E[r^T r] and E[r^T a_i] of the summaries of the groups `which`."""
        if not which:
            return self.roots[i].new_zeros(0, 0), self.roots[i].new_zeros(0, len(self.roots[i]))
        inner = [torch.cat([self.half(j, k) @ self.summaries[k].mT for k in which], 1) for j in which]
        return torch.cat(inner), torch.cat([self.half(j, i) @ self.roots[i] for j in which])


def chained(
    training: ChainSums, held_out: ChainSums, groups: Sequence[Group], noise: float, width: int,
    scores: Scores | None = None,
) -> tuple[tuple[Group, ...], dict[str, Any]]:  # fmt: skip
    """Return the groups of a chain, with all components, and what to state about it.

    Args:
        training: Sums of the training samples.
        held_out: Sums of the held-out samples.
        groups: One for each group of the sums, with their sensitivities.
        noise: The variance of the base's error in each coefficient.
        width: Largest width of a summary.
        scores: Of a predictor.
    """
    means, pairs = training.means(), [_roots(group) for group in groups]
    roots = [root for root, _ in pairs]
    read = [sources(training.order, i, training.reach) for i in range(len(groups))]
    used = {j for which in read for j in which}
    stored = [torch.zeros(0, len(root)) for root in roots]
    seen = _Products(training, means, roots, stored)
    for i in used:
        _, vectors = torch.linalg.eigh(seen.own(i))
        stored[i] = rounded(vectors[:, -width:].flip(1).mT @ roots[i], chained=True)
    summaries = [x.double() for x in stored]
    noisy = [x @ inverse @ inverse @ x.mT for x, (_, inverse) in zip(summaries, pairs, strict=True)]
    seen, unseen = (_Products(sums, means, roots, summaries) for sums in (training, held_out))
    normal = [
        (_normal(seen, noisy, which, i, scores), _normal(unseen, noisy, which, i, scores, unseen=True))
        for i, which in enumerate(read)
    ]
    left = {}
    for ridge in RIDGES:
        left[ridge] = 0.0
        for own, other in normal:
            maps = _solved(own, noise * ridge, scores)
            energy = maps * ((other.inner + noise * other.noisy) @ maps) - 2 * maps * other.cross
            left[ridge] += float(energy.sum())
    best = min(RIDGES, key=left.__getitem__)
    found = []
    for i, ((root, inverse), (own, _)) in enumerate(zip(pairs, normal, strict=True)):
        prediction = rounded(_solved(own, noise * best, scores) @ inverse, chained=True)
        maps = prediction.double() @ root
        both, inner = maps.mT @ own.cross, own.inner + noise * own.noisy
        _, basis = torch.linalg.eigh(seen.own(i) - both - both.mT + maps.mT @ inner @ maps)
        synthesis = rounded(basis.flip(1).mT @ inverse, chained=True)
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
    cross = torch.cat([others[i] @ products.roots[i], cross])
    return _Normal(inner, cross, torch.block_diag(torch.zeros_like(own), carried))


def _solved(normal: _Normal, ridge: float, scores: Scores | None) -> Tensor:
    """Return the map W."""
    if not len(normal.inner):
        return normal.cross
    matrix = normal.inner + ridge * normal.noisy
    if scores is not None:
        rank = len(scores.inner)
        matrix[:rank, :rank] += scores.ridge
    return torch.linalg.solve(matrix, normal.cross)


def _roots(group: Group) -> tuple[Tensor, Tensor]:
    """Return the square root of a group's sensitivity and its inverse, float64 [channels, channels]."""
    values, vectors = torch.linalg.eigh(group.sensitivity.double())
    found = [(vectors * scale[:, None]) @ vectors.mT for scale in (values.sqrt(), values.rsqrt())]
    return torch.block_diag(*found[0]), torch.block_diag(*found[1])
