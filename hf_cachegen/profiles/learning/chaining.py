"""The chain of one learning run: whether there is one, its groups for a step, and those of its predictors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hf_cachegen.codec.chain import MAX_REACH
from hf_cachegen.codec.group import Group
from hf_cachegen.codec.profile import Profile as CodecProfile
from hf_cachegen.codec.quantize import step_factor, steps_of
from hf_cachegen.errors import ConfigError
from hf_cachegen.profiles.files import Profile
from hf_cachegen.profiles.learning.chain import DEFAULT_REACH, DEFAULT_WIDTH, JOINT_WIDTH, chained
from hf_cachegen.profiles.learning.exact import Exact
from hf_cachegen.profiles.learning.predictor import Target, chosen, scores_of, stated
from hf_cachegen.profiles.learning.running import Sample
from hf_cachegen.profiles.learning.sums import FeatureSums, GroupSums

AcrossLayers = Literal["auto", "joint", "chained"]
DEFAULT_GROUP_CHANNELS = 2048
"""Layers share a basis while they have at most this many channels together: the product and the profile grow with it.
"""
CHAINED_CHANNELS = 1024
"""Width of a layer's K or V from which each layer of a chain has a basis of its own: a joint basis would have two
layers at most.
"""


def require_across(across_layers: AcrossLayers) -> None:
    """Raise ConfigError for a choice that does not exist."""
    choices = get_args(AcrossLayers)
    if across_layers not in choices:
        raise ConfigError(f"across_layers must be one of {', '.join(choices)}, got {across_layers!r}")


def grouping(
    exact: Exact, sample: Sample, across_layers: AcrossLayers, group_layers: int | None
) -> tuple[int, int]:
    """Return the largest number of layers of a group, and the reach of the chain, 0 without one. sample: any."""
    _, layers = exact.geometry(sample[0])
    widest = max(max(layer.k_channels, layer.v_channels) for layer in layers)
    chained = group_layers is None if across_layers == "auto" else across_layers == "chained"
    alone = chained and widest >= CHAINED_CHANNELS
    count = group_layers or (1 if alone else max(1, DEFAULT_GROUP_CHANNELS // widest))
    return count, min(max(DEFAULT_REACH, count), MAX_REACH) if chained else 0


class Chaining:
    """Learn the groups of a chain from the sums of a run.

    Args:
        training: Sums of the training samples.
        held_out: Sums of the held-out samples.
        groups: Joint bases of the same groups, with the sensitivities.
    """

    def __init__(self, training: GroupSums, held_out: GroupSums, groups: Sequence[Group]):
        self.sums, self.held_out, self.groups = training, held_out, groups
        self.width = DEFAULT_WIDTH if all(group.count == 1 for group in groups) else JOINT_WIDTH

    def applied(self, profile: Profile, levels: int) -> Profile:
        """Return the profile with the chain for its step, and no table entries. levels: of its artifacts.

        The noise of the base follows from the step. The step itself depends little on the bases.
        """
        groups, about = chained(self.sums, self.held_out, self.groups, noise_of(profile, levels), self.width)
        nothing = torch.zeros(sum(len(group.synthesis) for group in groups), dtype=torch.uint8)
        return replace(
            profile, groups=groups, reach=self.sums.reach, about={**profile.about, "chain": about},
            base_entries=nothing, refine_entries=nothing.expand(levels - 1, -1),
        )  # fmt: skip

    def regressed(
        self, training: FeatureSums, held_out: FeatureSums, targets: Sequence[Target], rank: int, profile: CodecProfile
    ) -> tuple[Tensor, Tensor, tuple[Group, ...], dict[str, Any]]:
        """Learn a predictor whose layers are chained: what `predictor.regressed` returns for joint bases."""
        noise, sums = noise_of(profile, profile.levels), (self.sums, self.held_out)
        return chained_after(sums, (training, held_out), targets, rank, noise, self.width)


def chained_after(
    sums: tuple[GroupSums, GroupSums], features: tuple[FeatureSums, FeatureSums], targets: Sequence[Target], rank: int,
    noise: float, width: int,
) -> tuple[Tensor, Tensor, tuple[Group, ...], dict[str, Any]]:  # fmt: skip
    """Learn a predictor and the chain over the layers after it.

    Args:
        sums: Of the chain over all layers, of the training samples and of the held-out ones.
        features: Of the predictor's layer, of the same samples.
        targets: The layers after it, of the training samples.
        rank: Largest rank of the map.
        noise: As in `chained`.
        width: As in `chained`.

    Returns:
        (mean, directions, groups, about), as `predictor.regressed` does.
    """
    best = chosen(*features, targets, rank)
    order, widths = [(one.kind, one.first, one.count) for one in targets], [len(one.mean) for one in targets]
    training, held_out = (whole.after(order, widths) for whole in sums)
    groups = [one.own or Group(one.kind, one.first, one.count, one.sensitivity, torch.empty(0, 0)) for one in targets]
    found, about = chained(training, held_out, groups, noise, width, scores_of(*features, best, targets))
    mean = (features[0].total / features[0].count).float()
    return mean, best.directions.float(), found, {**stated(best, features[0]), "chain": about}


def noise_of(profile: CodecProfile, levels: int) -> float:
    """Return the variance of the base's error in each coefficient. levels: of the artifacts."""
    step = float(steps_of(torch.tensor(profile.step_code, dtype=torch.uint8))) * step_factor(1, levels)
    return step**2 / 12
