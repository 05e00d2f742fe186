"""A profile whose layers are chained, with random matrices, and its codec."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hf_cachegen import CacheGenConfig, Profile
from hf_cachegen.codec.chain import sources
from hf_cachegen.codec.geometry import Geometry, LayerGeometry
from hf_cachegen.codec.group import Group
from hf_cachegen.codec.predictor import Known, Predictor
from hf_cachegen.codec.profile import Rotary
from hf_cachegen.codec.transforms.klt import Klt

CONFIG = CacheGenConfig(transform="klt", protect_first=2, protect_last=3)
HEADS, LAYERS, REACH, RANK, TOKENS = 3, 7, 2, 5, 40


def chained(kind: str) -> Profile:
    """Return a profile with random matrices.

    Args:
        kind: "joint", without a chain; "chained"; "predicted", with a chain and a hidden state; "wide", with values of
            another width.
    """
    generator = torch.Generator().manual_seed(3)
    dims = (8, 12 if kind == "wide" else 8)
    shape = LayerGeometry("full", HEADS, dims[0], HEADS, dims[1])
    reach, rank, first = REACH if kind != "joint" else 0, RANK if kind == "predicted" else 0, int(kind == "predicted")

    def groups(first: int, rank: int) -> tuple[Group, ...]:
        order = [(half, layer, 1) for layer in range(first, LAYERS) for half in (0, 1)]
        widths = [0 if not reach or i + 1 == len(order) else 4 + i % 2 for i in range(len(order))]
        found = []
        for index, (half, layer, _) in enumerate(order):
            channels, read = HEADS * dims[half], sources(order, index, reach)
            numbers = rank + sum(widths[i] for i in read)
            drawn = torch.randn(channels + numbers + widths[index], channels, generator=generator) / channels**0.5
            synthesis, prediction, summary = drawn.split([channels, numbers, widths[index]])
            found.append(Group(
                half, layer, 1, torch.eye(dims[half]).expand(HEADS, -1, -1), synthesis[: channels - index % 3],
                prediction if numbers else None, summary if reach else None,
            ))  # fmt: skip
        return tuple(found)

    def entries(found: tuple[Group, ...]) -> Tensor:
        return torch.full((3, sum(len(g.synthesis) for g in found)), 60, dtype=torch.uint8)

    means = torch.randn(LAYERS * HEADS * sum(dims), generator=generator)
    rotary = Rotary("half", 10.0 ** -torch.arange(3, dtype=torch.float64), 1.25)
    own = groups(0, 0)
    all_ = entries(own)
    profile = Profile((shape,) * LAYERS, rotary, means, own, 150, all_[0], all_[1:], {}, reach=reach)
    if first:
        later = groups(first, rank)
        all_ = entries(later)
        predictor = Predictor(
            0, torch.zeros(4), torch.zeros(4, rank), later, 150, all_[0], all_[1:], reach=reach
        )
        profile = replace(profile, predictors=(predictor,))
    return profile


def codec_of(profile: Profile, dtype: torch.dtype) -> Klt:
    geometry = Geometry(profile.layers, TOKENS, 1, str(dtype).removeprefix("torch."))
    known = None
    config = replace(CONFIG, predict_layers=None)
    if profile.predictors:
        generator = torch.Generator().manual_seed(4)
        config = replace(CONFIG, predict_layers=0)
        known = Known(0, torch.randn(TOKENS, RANK, generator=generator), [], [])
    return Klt(geometry, config, profile, sinks=torch.tensor([0, 9, 30]), known=known)
