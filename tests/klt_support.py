"""A profile of three small layers, and the configuration and geometry of contexts for it."""

from __future__ import annotations

from dataclasses import replace

import torch

from hf_cachegen import CacheGenConfig, Profile
from hf_cachegen.codec.geometry import Geometry, LayerGeometry
from hf_cachegen.codec.profile import Group, Rotary

CONFIG = CacheGenConfig(transform="klt", chunk_tokens=32, protect_first=2, protect_last=8)
LAYERS = (LayerGeometry("full", 2, 8, 2, 8),) * 3
TOKENS = 100
COMPONENTS = 2 * 48


def make_profile(entry: int = 60, **changes: object) -> Profile:
    """Return a profile of three layers with a group for K and one for V.

    Each basis is a random rotation, and all channels are equally sensitive.
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
    """Return the geometry of a context of TOKENS tokens."""
    return Geometry(LAYERS, tokens=TOKENS, batch=1, dtype=dtype)
