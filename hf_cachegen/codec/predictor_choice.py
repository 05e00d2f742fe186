"""Choose the predictor with the earliest first token over a link: a pure function.

The loader runs the first layers while the bytes arrive, and decodes afterwards, which takes about as long with every
predictor. So the time to the first token is that of decoding and of the question, which no choice changes, and

    max(bytes / bandwidth, seconds of the first layers)

Bytes are compared at one divergence: that of the finest level without a prediction. Between the levels that a profile
states, bits are linear in the logarithm of the divergence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hf_cachegen.codec.geometry import Geometry
from hf_cachegen.codec.profile import Profile
from hf_cachegen.config import AUTO_LAYERS, CacheGenConfig
from hf_cachegen.errors import ConfigError, ProfileError

LEAST_KL = 1e-9
"""Divergences in nats per token are at least this; measured ones may be 0."""
LEAST_BITS = 0.01
"""Bits per element are at least this, however far the levels are extended."""


@dataclass(frozen=True)
class Way:
    """What one choice of `predict_layers` costs.

    Attributes:
        layer: m; None without a prediction.
        nbytes: Of the chunks, at the common divergence.
        transfer_seconds: Over the link.
        first_seconds: Of the first m layers.
    """

    layer: int | None
    nbytes: float
    transfer_seconds: float
    first_seconds: float

    @property
    def seconds(self) -> float:
        """Seconds until the context can be decoded: the layers run while the bytes arrive."""
        return max(self.transfer_seconds, self.first_seconds)


def settled(
    config: CacheGenConfig | None, profile: Profile | None, geometry: Geometry, prefill_seconds: float | None
) -> CacheGenConfig | None:
    """Replace predict_layers="auto" by the choice for one context; other configurations are returned as they are.

    Args:
        config: Options of the encoder.
        profile: The profile that encodes the context; None for none.
        geometry: Of the context.
        prefill_seconds: Measured for the whole context; None: not measured.

    Raises:
        ConfigError: Neither the configuration nor a measurement tells the model's speed.
        ProfileError: The profile does not state what its predictors cost.
    """
    if config is None or config.predict_layers != AUTO_LAYERS or config.bandwidth_gbps is None:
        return config
    layer = None
    if profile is not None and profile.predictors and not config.lossless and config.transform in ("auto", "klt"):
        speed = config.prefill_tokens_per_second
        prefill_seconds = prefill_seconds if speed is None else geometry.tokens / speed
        if prefill_seconds is None:
            raise ConfigError(
                "predict_layers='auto' needs prefill_tokens_per_second for a cache that was not computed here"
            )
        found = ways(profile, config, geometry, config.bandwidth_gbps * 1e9 / 8, prefill_seconds)
        layer = min(found, key=lambda way: (way.seconds, way.first_seconds, way.nbytes)).layer
    return config.predicting(layer)


def ways(
    profile: Profile, config: CacheGenConfig, geometry: Geometry, bytes_per_second: float, prefill_seconds: float
) -> list[Way]:
    """Return the cost of each choice that a profile offers, without a prediction first.

    Args:
        profile: The profile.
        config: Options of the encoder: its number of levels and its step count.
        geometry: Of the context.
        bytes_per_second: Of the link.
        prefill_seconds: Of the whole context.

    Raises:
        ProfileError: The profile does not state the bits and the divergence of each level.
    """
    plain = measured_at(profile, None)[: config.levels]
    # A quarter octave of the step is half an octave of its square, which the divergence follows.
    kl = config.target_kl or plain[-1][0] * 2 ** (config.step_offset / 2)
    elements = geometry.tokens * sum(
        layer.heads * layer.k_dim + layer.v_heads * layer.v_dim for layer in geometry.layers
    )
    found = []
    for layer in (None, *(one.layer for one in profile.predictors)):
        nbytes = elements / 8 * bits_at(measured_at(profile, layer)[: config.levels], kl)
        first = prefill_seconds * (layer or 0) / len(geometry.layers)
        found.append(Way(layer, nbytes, nbytes / bytes_per_second, first))
    return found


def measured_at(profile: Profile, layer: int | None) -> list[tuple[float, float]]:
    """Return (divergence, bits per element) of each level, the coarsest first, as the profile states them.

    Raises:
        ProfileError: The profile does not state them.
    """
    rows: Any = profile.at(layer).about.get("measured")
    kl = profile.divergences_at(layer)
    bits = [row.get("bits_per_element") for row in rows] if kl is not None else []
    if kl is None or not all(isinstance(one, float) and 0 < one < math.inf for one in bits):
        raise ProfileError(
            f"profile {profile.digest} does not state the bits and the divergence for predict_layers={layer}: learn it "
            "again, or give a number of layers instead of 'auto'"
        )
    return list(zip(kl, bits, strict=True))


def bits_at(levels: Sequence[tuple[float, float]], kl: float) -> float:
    """Return the bits per element at a divergence, between two levels or beyond them on the line of the nearest two.

    Args:
        levels: (divergence, bits per element), one or more.
        kl: The divergence, above 0.
    """
    points = sorted((math.log(max(one, LEAST_KL)), bits) for one, bits in levels)
    at = math.log(max(kl, LEAST_KL))
    if len(points) == 1:
        return points[0][1]
    index = min(max(sum(x < at for x, _ in points) - 1, 0), len(points) - 2)
    (x0, y0), (x1, y1) = points[index : index + 2]
    found = y0 if x1 == x0 else y0 + (y1 - y0) * (at - x0) / (x1 - x0)
    return max(found, LEAST_BITS)
