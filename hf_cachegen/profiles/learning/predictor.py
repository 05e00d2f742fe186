"""Learn a profile's predictors: a ridge regression of low rank from hidden states to the K and V of later layers.

Let f be the normalised hidden states that enter layer m, less their mean, and x the K (rotation undone) and V of the
later layers in the metric of their sensitivity, less their mean. G = E[f f^T], C = E[f x^T]. The ridge solution is
W = (G + r)^-1 C. Its best approximation of rank k in the predicted energy is

    W = D P,   D = (G + r)^(-1/2) U,   P = U^T (G + r)^(-1/2) C,   U: the k leading left singular vectors of the latter

The ridge r is the one, among RIDGES, that leaves the least energy on held-out samples. The bases are those of the
residual's covariance E[x x^T] - W^T C - C^T W + W^T G W, so that the prediction reaches the bits. The step is the
profile's: an error costs the same divergence whatever was predicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from hf_cachegen.codec.group import Group
from hf_cachegen.codec.predictor import Predictor
from hf_cachegen.profiles.learning.chain import Scores
from hf_cachegen.profiles.learning.metric import both_sides, by_head, principal, roots
from hf_cachegen.profiles.learning.sums import FeatureSums

RIDGES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3)
"""Ridges to choose from, as fractions of the mean variance of a feature."""
DEFAULT_RANK = 256
"""Largest rank. The product that decodes a chunk has as many rows more."""


@dataclass(frozen=True)
class Target:
    """The layers that one residual basis spans.

    Attributes:
        kind: 0 for K, 1 for V.
        first: The first layer.
        count: Number of layers.
        sensitivity: float32 [heads of all its layers, dim, dim].
        mean: float64 [channels].
        covariance: float64 [channels, channels].
        cross: Mean product of features and channels, both less their means: float64 [features, channels].
        held_out: The same of the held-out samples, about the same means.
        own: The group itself, where all its layers are after that of the features; else None.
    """

    kind: int
    first: int
    count: int
    sensitivity: Tensor
    mean: Tensor
    covariance: Tensor
    cross: Tensor
    held_out: Tensor
    own: Group | None

    @cached_property
    def roots(self) -> tuple[Tensor, Tensor]:
        """The square root of the sensitivity and its inverse, float64 [heads, dim, dim]."""
        return roots(self.sensitivity)


@dataclass(frozen=True)
class Regression:
    """The map of one ridge and rank, in the metric of the sensitivity.

    Attributes:
        ridge: As a fraction of the mean variance of a feature.
        directions: D, float64 [features, rank].
        prediction: P, float64 [rank, channels of all targets].
    """

    ridge: float
    directions: Tensor
    prediction: Tensor

    def left(self, features: Tensor, cross: Tensor) -> float:
        """Return the energy that is left of the channels, less the energy of the channels themselves.

        Args:
            features: Covariance of the features, [features, features].
            cross: Mean product of features and channels, [features, channels].
        """
        inner = self.directions.mT @ features @ self.directions
        energy = (self.prediction * (inner @ self.prediction)).sum()
        return float(energy - 2 * (self.prediction * (self.directions.mT @ cross)).sum())


def regressions(features: Tensor, cross: Tensor, rank: int) -> list[Regression]:
    """Return a map for each of RIDGES.

    Args:
        features: Covariance of the features, float64 [features, features].
        cross: Mean product of features and channels, float64 [features, channels].
        rank: Of the maps.
    """
    values, vectors = torch.linalg.eigh(features)
    turned, found = vectors.mT @ cross, []
    product = turned @ turned.mT
    for ridge in RIDGES:
        scale = (values.clamp_min(0) + ridge * values.mean()).rsqrt()
        _, leading = torch.linalg.eigh(scale[:, None] * product * scale)
        leading = leading[:, -rank:].flip(1)
        directions = vectors @ (scale[:, None] * leading)
        found.append(Regression(ridge, directions, leading.mT @ (scale[:, None] * turned)))
    return found


def regressed(
    training: FeatureSums, held_out: FeatureSums, targets: Sequence[Target], rank: int
) -> tuple[Tensor, Tensor, tuple[Group, ...], dict[str, Any]]:
    """Learn one predictor's map and the bases of its residuals.

    Args:
        training: Sums of the training samples.
        held_out: Sums of the held-out samples.
        targets: The layers after the features' own.
        rank: Largest rank of the map.

    Returns:
        (mean, directions, groups, about).
    """
    mean = training.total / training.count
    features, best = training.covariance(mean), chosen(training, held_out, targets, rank)
    cross = torch.cat([by_head(target.cross, target.roots[0]) for target in targets], 1)
    # Rounded as in the file, so that the residuals are those that will be coded.
    directions, inner = best.directions.float(), best.directions.mT @ features @ best.directions
    widths, groups = [len(target.mean) for target in targets], []
    parts = best.prediction.split(widths, 1), (best.directions.mT @ cross).split(widths, 1)
    for target, predicted, seen in zip(targets, *parts, strict=True):
        root, inverse = target.roots
        half = predicted.mT @ (inner @ predicted / 2 - seen)
        left = both_sides(target.covariance, root) + half + half.mT
        synthesis = by_head(principal(left), inverse).half().float()
        rounded = by_head(predicted, inverse).half().float()
        groups.append(Group(target.kind, target.first, target.count, target.sensitivity, synthesis, rounded))
    return mean.float(), directions, tuple(groups), stated(best, training)


def chosen(training: FeatureSums, held_out: FeatureSums, targets: Sequence[Target], rank: int) -> Regression:
    """Return the map, of those of `regressions`, that leaves the least energy of the held-out samples."""
    mean = training.total / training.count
    features, other = training.covariance(mean), held_out.covariance(mean)
    cross = torch.cat([by_head(target.cross, target.roots[0]) for target in targets], 1)
    unseen = torch.cat([by_head(target.held_out, target.roots[0]) for target in targets], 1)
    return min(regressions(features, cross, rank), key=lambda one: one.left(other, unseen))


def stated(best: Regression, training: FeatureSums) -> dict[str, Any]:
    """Return what a profile states about a predictor with this map."""
    return {"ridge": best.ridge, "rank": best.directions.shape[1], "samples": int(training.count)}


def scores_of(training: FeatureSums, held_out: FeatureSums, best: Regression, targets: Sequence[Target]) -> Scores:
    """Return what the scores of a map contribute to a chain over these targets."""
    shift, directions = training.total / training.count, best.directions.float().double()
    features = training.covariance(shift)
    ridge = best.ridge * features.diagonal().mean() * (directions.mT @ directions)
    inner, other = (directions.mT @ sums.covariance(shift) @ directions for sums in (training, held_out))
    cross = [directions.mT @ target.cross for target in targets]
    return Scores(inner, ridge, cross, (other, [directions.mT @ target.held_out for target in targets]))


def targets_of(
    groups: Sequence[Group], shapes: Sequence[Sequence[tuple[int, int]]], means: Sequence[Tensor],
    covariances: Sequence[Tensor], training: FeatureSums, held_out: FeatureSums,
) -> list[Target]:  # fmt: skip
    """Cut the sums of a profile's groups to the layers after that of the features.

    Args:
        groups: The profile's.
        shapes: (heads, dim) of each layer's K, and of its V.
        means: float64 [channels] of each group.
        covariances: Of each group's channels, float64 [channels, channels].
        training: Sums of the training samples.
        held_out: Sums of the held-out samples.
    """
    found = []
    for index, group in enumerate(groups):
        heads = [shapes[group.kind][one][0] for one in range(group.first, group.first + group.count)]
        skipped = min(max(training.layer + 1 - group.first, 0), group.count)
        if skipped == group.count:
            continue
        starts = [0, *accumulate(heads)]
        part = slice(starts[skipped] * group.sensitivity.shape[1], None)
        mean, shift = means[index], training.total / training.count
        centred = [sums.products(index, shift, mean)[:, part] for sums in (training, held_out)]
        found.append(Target(
            group.kind, group.first + skipped, group.count - skipped, group.sensitivity[starts[skipped] :], mean[part],
            covariances[index][part, part], centred[0], centred[1], None if skipped else group,
        ))  # fmt: skip
    return found


def blank(
    layer: int, found: tuple[Tensor, Tensor, tuple[Group, ...], dict[str, Any]], step_code: int, levels: int,
    reach: int = 0,
) -> Predictor:  # fmt: skip
    """Return a predictor without table entries from the result of `regressed`. reach: of its chain."""
    mean, directions, groups, about = found
    nothing = torch.zeros(sum(len(group.synthesis) for group in groups), dtype=torch.uint8)
    finer = nothing.expand(levels - 1, -1)
    return Predictor(layer, mean, directions, groups, step_code, nothing, finer, about, reach=reach)
