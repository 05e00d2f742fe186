"""transform="auto": choose the transform that a context is encoded with."""

from __future__ import annotations

from dataclasses import replace

from hf_cachegen.codec.profile import Profile
from hf_cachegen.codec.rows import ContextRows
from hf_cachegen.codec.transforms.delta import Delta
from hf_cachegen.codec.transforms.identity import Identity
from hf_cachegen.codec.transforms.klt import Klt
from hf_cachegen.config import CacheGenConfig
from hf_cachegen.errors import ConfigError

AUTO = "auto"
SAMPLED_LAYERS = 6
"""Of more layers, only so many are tried: evenly spread, so that each third of the layers has its share."""
TRIED = (Delta, Identity)
"""Without a profile, the one of these that codes smaller is chosen; the first where they are equal."""


def resolved(context: ContextRows, config: CacheGenConfig, profile: Profile | None) -> CacheGenConfig:
    """Return the configuration with "auto" replaced by the name of a transform.

    With a profile this is klt. Else it is the transform that codes a sample smaller at equal steps: some layers, in two
    chunks of the context. A step half as large costs one more bit per value, so bits + log2(step) compares two
    transforms at their own steps.

    Raises:
        TensorError: A value in these chunks is not finite, or too large.
        ConfigError: `predict_layers` asks for more than there is.
    """
    if config.lossless:
        config = replace(config, transform=Identity.name)
    elif config.transform == AUTO and profile is not None:
        config = replace(config, transform=Klt.name)
    if config.transform != AUTO:
        return replace(config, predict_layers=_predicted(context, config, profile))
    count = len(context.geometry.layers)
    layers = sorted({index * (count - 1) // (SAMPLED_LAYERS - 1) for index in range(SAMPLED_LAYERS)})
    tried = context if count <= SAMPLED_LAYERS else context.of_layers(layers)
    sample = tried.only(sorted({0, len(context.spans) // 2}))
    tokens = sum(span.tokens for span in sample.spans)
    costs: dict[str, float] = {}
    for transform in TRIED:
        inner, bits = transform.fitted(sample, replace(config, transform=transform.name))
        costs[transform.name] = float(bits.sum() + tokens * inner.steps.log2().sum())
    config = replace(config, transform=min(costs, key=costs.__getitem__))
    return replace(config, predict_layers=_predicted(context, config, profile))


def _predicted(context: ContextRows, config: CacheGenConfig, profile: Profile | None) -> int | None:
    """Return `predict_layers` as it is used: 0 becomes None where the transform, the profile or the caller lacks it."""
    wanted = config.predicted
    able = not config.lossless and config.transform == Klt.name and profile is not None
    known = None if context.known is None else context.known.layer
    if wanted is None or (able and known == wanted):
        return wanted
    if wanted == 0:
        return None
    raise ConfigError(
        f"predict_layers={wanted} needs transform='klt', a profile with that predictor, and what the model computes "
        "for the context: make the cache by CacheGenCache.from_context with this config, or pass predict_layers=None"
    )
