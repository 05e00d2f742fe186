"""Models, samples and tests of the klt options, and replacements for steps of learning and encoding: a basis for each
head, other roundings, fewer components.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.rate_distortion import KV, Point, Test, learnt, levels_of
from hf_cachegen import CacheGenConfig, Profile, decode_kv, encode_kv
from hf_cachegen.codec.group import Group
from hf_cachegen.codec.transforms.klt import Klt
from hf_cachegen.profiles.learning import Sample, moments, prefill
from hf_cachegen.profiles.learning.exact import Exact
from hf_cachegen.profiles.learning.measuring import Coded

BASE = CacheGenConfig(transform="klt", measure=False)
DEAD_ZONES = (0.05, 0.1)
"""Fractions of the finest step by which a coefficient is moved towards zero before rounding."""
LAMBDAS = (0.05, 0.1)
"""Weights of rate-distortion optimised rounding: squared steps for each bit; 0.115 at a high rate."""
KEPT = {f"first {n} of 8 components": n / 8 for n in (1, 2, 4, 6)} | {
    f"{share:.1%} of the variance": share for share in (0.9, 0.99, 0.999)
}
"""Components of a group that are kept: a share of the full width, or those that have a share of the variance."""
TIMED_LEVEL, TIMES = 2, 7

Coder = Callable[[KV], list[Point]]


@dataclass
class Bench:
    """A model, samples to learn from, and test contexts by task."""

    model: Any
    mixed: list[Sample]
    tests: dict[str, list[Test]]

    @cached_property
    def profiles(self) -> list[Profile]:
        """Profiles learnt with the defaults, at several steps."""
        return learnt(self.model, self.mixed)

    @cached_property
    def shares(self) -> list[Tensor]:
        """For each group, the share of the samples' variance in its first components, in the metric of the basis."""
        profile, squares = self.profiles[0], torch.zeros(())
        for context, _ in self.mixed:
            squares = squares + Coded(Exact(self.model), profile, context, BASE).coefficients.square().sum(0)
        parts = squares.split([len(group.synthesis) for group in profile.groups])
        return [part.cumsum(0) / part.sum() for part in parts]

    def kept(self, name: str) -> list[Profile]:
        """Return the profiles with fewer components of each group, by the names in KEPT."""
        widths = [group.analysis.shape[0] for group in self.profiles[0].groups]
        part = KEPT[name]
        if name.endswith("variance"):
            counts = [1 + int((share < part).sum()) for share in self.shares]
        else:
            counts = [max(1, round(part * width)) for width in widths]
        return [kept(profile, counts) for profile in self.profiles]


def with_config(profiles: list[Profile], config: CacheGenConfig = BASE) -> Coder:
    """Return a codec of these profiles with these options of the encoder."""
    return lambda kv: [point for profile in profiles for point in levels_of(kv, config, profile)]


def within(context: Callable[[], Any], coder: Coder) -> Coder:
    """Return the codec with a part of it replaced."""

    def coded(kv: KV) -> list[Point]:
        with context():
            return coder(kv)

    return coded


def variants(bench: Bench) -> dict[str, Callable[[], Coder]]:
    """Return the makers of codecs by name."""
    found: dict[str, Callable[[], Coder]] = {}
    changes: dict[str, Callable[[Klt, Tensor], Tensor]] = {}
    changes |= {f"dead zone {width}": partial(dead_zone, width) for width in DEAD_ZONES}
    changes |= {f"optimised rounding {worth}": partial(optimised, worth) for worth in LAMBDAS}
    for name, change in changes.items():
        context = partial(coefficients_changed, change)
        found[name] = lambda context=context: within(context, with_config(bench.profiles))  # type: ignore[misc]

    def apart() -> Coder:
        with heads_apart():
            return with_config(learnt(bench.model, bench.mixed))

    return found | {"a basis for each head": apart}


@contextmanager
def heads_apart() -> Iterator[None]:
    """Replace covariances so that heads are uncorrelated and each has its own basis."""
    groups = moments.Moments.groups

    def masked(self: moments.Moments, floor: float) -> Any:
        sums = self.training.groups
        kept, means = sums.products, sums.means()
        sums.products = {}
        for index, (kind, first, count) in enumerate(self.ranges):
            outer = torch.outer(means[index], means[index]) * sums.count
            shapes = self.shapes[kind][first : first + count]
            blocks = torch.block_diag(*(torch.ones(d, d) for h, d in shapes for _ in range(h)))
            sums.products[index, index] = ((kept[index, index] - outer) * blocks + outer).float()
        try:
            return groups(self, floor)
        finally:
            sums.products = kept

    with mock.patch.object(moments.Moments, "groups", masked):
        yield


@contextmanager
def coefficients_changed(change: Callable[[Klt, Tensor], Tensor]) -> Iterator[None]:
    """Change coefficients before they are rounded."""
    checked = Klt.checked
    with mock.patch.object(Klt, "checked", lambda self, rows, span: change(self, checked(self, rows, span))):
        yield


def dead_zone(width: float, codec: Klt, y: Tensor) -> Tensor:
    """Move coefficients towards zero by a fraction of a step."""
    return y.sign() * (y.abs() - width * codec.inner.steps).clamp_min(0)


def optimised(worth: float, codec: Klt, y: Tensor) -> Tensor:
    """The multiple of the step, nearest to y or next to that towards zero, of the least squared error and worth x bits
    (those of the base and its digits together, estimated from the base's table at the finest step).
    """
    x = y / codec.inner.steps
    near = x.round()
    less = near - near.sign()
    scale = 3.0 ** (codec.config.levels - 1)
    cost = codec.inner.values.cost.float()[codec.entries[0].long()] / 256

    def bits(symbols: Tensor) -> Tensor:  # between the base's symbols, straight
        coarse = (symbols / scale).clamp(-127, 126)
        low = coarse.floor()
        share, index = coarse - low, (low + 128).long().mT
        return torch.lerp(cost.gather(1, index), cost.gather(1, index + 1), share.mT).mT

    better = (x - less).square() + worth * bits(less) < (x - near).square() + worth * bits(near)
    return torch.where(better, less, near) * codec.inner.steps


def kept(profile: Profile, counts: list[int]) -> Profile:
    """Return the profile with `counts` leading components of each group."""
    groups: list[Group] = []
    chosen: list[int] = []
    at = 0
    for group, count in zip(profile.groups, counts, strict=True):
        groups.append(replace(group, synthesis=group.synthesis[:count]))
        chosen += range(at, at + min(count, len(group.synthesis)))
        at += len(group.synthesis)
    entries = profile.entries[:, chosen]
    return replace(profile, groups=tuple(groups), base_entries=entries[0], refine_entries=entries[1:])


def prices(bench: Bench, names: list[str]) -> dict[str, list[float]]:
    """By name [share of components, bytes of the profile, time to decode level 2 in units of the default's]: of the
    first test context, the least of some rounds in turns.
    """
    profiles = {name: bench.kept(name)[0] for name in names} | {"default": bench.profiles[0]}
    keys, values, _ = prefill(bench.model, next(iter(bench.tests.values()))[0].context)
    encoded = {name: encode_kv(keys, values, BASE, profile) for name, profile in profiles.items()}
    seconds = dict.fromkeys(profiles, math.inf)
    for _ in range(TIMES):
        for name, context in encoded.items():
            start = time.process_time()
            decode_kv(context, TIMED_LEVEL)
            seconds[name] = min(seconds[name], time.process_time() - start)
    return {
        name: [
            len(profile.base_entries) / len(profile.means), float(len(profile.to_bytes())),
            seconds[name] / seconds["default"],
        ]
        for name, profile in profiles.items()
    }  # fmt: skip
