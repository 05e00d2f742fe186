"""predict_layers="auto": which predictor gives the earliest first token over a link."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hf_cachegen import CacheGenConfig, Profile
from hf_cachegen.codec.geometry import Geometry
from hf_cachegen.codec.predictor_choice import LEAST_BITS, bits_at, settled, ways
from hf_cachegen.errors import ConfigError, ProfileError
from tests.golden_cache import golden_predicting
from tests.klt_support import LEVELS, stating


@pytest.fixture(scope="module", name="profile")
def _profile() -> Profile:
    found = golden_predicting()
    first, second = found.predictors[0], golden_predicting().predictors[0]
    return replace(found, predictors=(first, replace(second, layer=2)))


@pytest.mark.parametrize(
    ("kl", "bits"), [(0.01, 2.0), (0.1, 1.0), (10**-1.5, 1.5), (10**-2.5, 3.0), (1e-4, 6.0), (10.0, LEAST_BITS)]
)
def test_bits_between_and_beyond_the_measured_levels(kl: float, bits: float) -> None:
    assert bits_at(LEVELS[None], kl) == pytest.approx(bits)
    assert bits_at([(0.02, 1.5)], kl) == 1.5


@pytest.mark.parametrize(
    ("gbps", "prefill", "layer"),
    [
        (1e-6, 0.01, 2),  # a slow link: the fewest bits
        (1e3, 10.0, 0),  # a fast one: m = 2 would take 2 / 4 of the prefill
        (1e-6, 1e9, 0),  # a model slower than the link
    ],
)
def test_auto_is_the_earliest_first_token(profile: Profile, gbps: float, prefill: float, layer: int) -> None:
    geometry = Geometry(profile.layers, 512, 1, "float32")
    config = CacheGenConfig(predict_layers="auto", bandwidth_gbps=gbps)
    found = settled(config, stating(profile, LEVELS), geometry, prefill)
    assert found == CacheGenConfig(predict_layers=layer)
    costs = ways(stating(profile, LEVELS), config, geometry, gbps * 1e9 / 8, prefill)
    assert [way.layer for way in costs] == [None, 0, 2]
    assert min(way.seconds for way in costs) == next(way.seconds for way in costs if way.layer == layer)
    assert costs[2].first_seconds == pytest.approx(prefill * 2 / len(profile.layers))
    speed = replace(config, prefill_tokens_per_second=512 / prefill)
    assert settled(speed, stating(profile, LEVELS), geometry, None) == found


def test_auto_compares_at_one_divergence(profile: Profile) -> None:
    """Fewer bits at a larger divergence are no gain."""
    geometry = Geometry(profile.layers, 512, 1, "float32")
    config = CacheGenConfig(predict_layers="auto", bandwidth_gbps=1e-3)
    worse = {None: LEVELS[None], 0: [(kl * 100, bits * 0.9) for kl, bits in LEVELS[None]], 2: LEVELS[None]}
    found = settled(config, stating(profile, worse), geometry, 1.0)
    assert found == CacheGenConfig(predict_layers=None)


def test_auto_without_a_choice(profile: Profile) -> None:
    geometry = Geometry(profile.layers, 512, 1, "float32")
    config = CacheGenConfig(predict_layers="auto", bandwidth_gbps=1.0)
    for options, given in (({}, None), ({}, replace(profile, predictors=())), ({"transform": "delta"}, profile)):
        expected = CacheGenConfig(predict_layers=None, **options)
        assert settled(replace(config, **options), given, geometry, None) == expected
    with pytest.raises(ConfigError, match="needs prefill_tokens_per_second"):
        settled(config, profile, geometry, None)
    with pytest.raises(ProfileError, match="does not state the bits"):
        settled(config, replace(profile, about={}), geometry, 1.0)


@pytest.mark.parametrize(
    "options", [{"predict_layers": "auto"}, {"bandwidth_gbps": 1.0}, {"prefill_tokens_per_second": 5.0},
                {"predict_layers": "auto", "bandwidth_gbps": 0.0}, {"predict_layers": "auto", "bandwidth_gbps": "1"},
                {"predict_layers": "auto", "bandwidth_gbps": float("inf")}], ids=str,
)  # fmt: skip
def test_options_of_auto_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"bandwidth_gbps|prefill_tokens_per_second"):
        CacheGenConfig(**options)
    with pytest.raises(ConfigError, match="in an artifact"):
        CacheGenConfig.from_dict({"predict_layers": "auto", "bandwidth_gbps": 1.0})
