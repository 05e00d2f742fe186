"""Samples to learn profiles from, and a profile made without learning, for the tests of the klt transform."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from hf_cachegen import CacheGenConfig, Profile
from hf_cachegen.codec.geometry import Geometry, LayerGeometry
from hf_cachegen.codec.group import Group
from hf_cachegen.codec.profile import Rotary
from hf_cachegen.profiles.learning import Sample
from tests.tiny_models import VOCABULARY

CONFIG = CacheGenConfig(transform="klt", chunk_tokens=32, protect_first=2, protect_last=8, predict_layers=None)
LAYERS = (LayerGeometry("full", 2, 8, 2, 8),) * 3
TOKENS = 100
COMPONENTS = 2 * 48


def samples(count: int = 10, seed: int = 0) -> list[Sample]:
    """Return random samples: contexts of 60 tokens with continuations of 12."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randint(3, VOCABULARY, (1, 60), generator=generator),
            torch.randint(3, VOCABULARY, (1, 12), generator=generator),
        )
        for _ in range(count)
    ]


def make_profile(entry: int = 60, **changes: object) -> Profile:
    """Return a profile of three layers, one group for K and one for V, with random orthogonal bases.

    All sensitivities are equal. Every table entry is `entry`.
    """
    generator = torch.Generator().manual_seed(1)
    turned = [torch.linalg.qr(torch.randn(48, 48, generator=generator)).Q for _ in range(2)]
    eye = torch.eye(8).expand(6, 8, 8)
    groups = tuple(Group(kind, 0, 3, eye, q.half().float()) for kind, q in enumerate(turned))
    entries = torch.full((3, COMPONENTS), entry, dtype=torch.uint8)
    angles = 10.0 ** -torch.arange(3, dtype=torch.float64)
    whole = Profile(
        LAYERS, Rotary("half", angles), torch.linspace(-2, 2, 96), groups, 148, entries[0], entries[1:], {"model": "m"}
    )
    return replace(whole, **changes)  # type: ignore[arg-type]


def geometry(dtype: str = "float32") -> Geometry:
    """Return the geometry of a cache for `make_profile`."""
    return Geometry(LAYERS, tokens=TOKENS, batch=1, dtype=dtype)


LEVELS = {None: [(0.1, 1.0), (0.01, 2.0), (0.001, 4.0)], 0: [(0.1, 0.9), (0.01, 1.8), (0.001, 3.6)],
          2: [(0.1, 0.5), (0.01, 1.0), (0.001, 2.0)]}  # fmt: skip
"""(KL, bits per element) of each level of a profile."""


def stating(profile: Profile, levels: dict[Any, list[tuple[float, float]]]) -> Profile:
    """The same profile with other measurements."""
    rows = {m: [{"kl": kl, "bits_per_element": bits} for kl, bits in found] for m, found in levels.items()}
    predictors = [replace(one, about={**one.about, "measured": rows[one.layer]}) for one in profile.predictors]
    return replace(profile, about={**profile.about, "measured": rows[None]}, predictors=tuple(predictors))
