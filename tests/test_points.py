"""Reconstruction points: learning them, reading them at a level, and decoding to them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hf_cachegen import CacheGenConfig, decode_kv, encode_kv
from hf_cachegen.codec import points
from hf_cachegen.codec.chunk import Span
from hf_cachegen.codec.predictor import Predictor
from hf_cachegen.codec.rows import gather
from hf_cachegen.codec.transforms.klt import Klt
from hf_cachegen.errors import ProfileError
from hf_cachegen.profiles.files import Profile
from tests.golden_cache import golden_known, golden_kv, golden_points, golden_predicting, golden_profile

CONFIG = CacheGenConfig(transform="klt", chunk_tokens=32, protect_last=8)


def test_the_learnt_points_leave_less_error_at_every_level() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(20_000, 3, generator=generator) * torch.tensor([2.0, 5.0, 0.0])
    sums = points.PointSums(2, 3)
    sums.add(y, torch.tensor(3.0))
    found = sums.points()
    assert int(found[0, 2]) == int(points.USUAL * points.UNITS)  # no symbols: the usual point
    for level, step in ((1, 9.0), (2, 3.0)):
        symbols = (y / step).round() * step
        moved = points.moved(symbols.clone(), step * points.shifts(found, level, 0), [])
        before, after = ((x - y).square().mean(0) for x in (symbols, moved))
        assert bool((after <= before).all())
        assert float(after[1]) < (0.95 if level == 1 else 0.995) * float(before[1])
        # A symbol stands for the mean of what it was made from.
        ones = symbols[:, 1].abs() == step
        assert float(moved[ones, 1].abs().mean()) == pytest.approx(float(y[ones, 1].abs().mean()), rel=0.03)


def test_points_are_interpolated_between_levels() -> None:
    stored = torch.tensor([[200], [100], [0]], dtype=torch.uint8)
    at = {(level, offset): float(points.shifts(stored, level, offset)) * points.UNITS
          for level in (1, 2, 3) for offset in (-64, 0, 3, 64)}  # fmt: skip
    assert [at[level, 0] for level in (1, 2, 3)] == [200, 100, 0]
    assert at[1, 3] == at[2, 64] == at[3, 64] == 200
    assert at[3, -64] == at[1, -64] == 0
    assert at[2, 3] == pytest.approx(100 + 100 * 3 / points.CODES_PER_LEVEL)


def test_zeros_and_kept_tokens_stay() -> None:
    y = torch.tensor([[0.0, 2.0, -4.0], [2.0, -2.0, 0.0]])
    moved = points.moved(y.clone(), torch.tensor([0.5, 0.5, 0.25]), [1])
    assert moved.tolist() == [[0.0, 1.5, -3.75], [2.0, -2.0, 0.0]]


@pytest.mark.parametrize("name", ["klt", "klt-sinks"])
def test_decoding_moves_coefficients_to_their_points(name: str) -> None:
    """Protected tokens have the points of the finest level. Sinks stay."""
    keys, values = golden_kv(name)
    profile = golden_points()
    encoded = encode_kv(keys, values, CONFIG, profile)
    plain = encode_kv(keys, values, CONFIG, golden_profile())
    assert encoded.parts == plain.parts  # the symbols do not depend on the points
    for level in (1, 2, 3):
        found, usual = (gather(*decode_kv(one, level), Span(0, 50, 50)).float() for one in (encoded, plain))
        assert not torch.equal(found, usual)
        if name == "klt-sinks":
            assert torch.equal(found[[0, 40]], usual[[0, 40]])


@pytest.mark.parametrize("predicted", [False, True], ids=["klt", "predict"])
def test_approximations_are_what_is_decoded(predicted: bool) -> None:
    keys, values = golden_kv()
    profile = golden_predicting() if predicted else golden_points()
    known = golden_known() if predicted else None
    if predicted:
        learnt = profile.predictors[0]
        assert isinstance(learnt, Predictor)
        spots = torch.arange(120, dtype=torch.uint8).reshape(3, 40) * 2
        profile = replace(profile, predictors=(replace(learnt, points=spots),))
    config = replace(CONFIG, chunk_tokens=64, predict_layers=0 if predicted else None)
    encoded = encode_kv(keys, values, config, profile, known=known)
    codec = Klt.from_side(encoded.side, encoded.geometry, encoded.config, profile).knowing(known)
    span = Span(0, 50, 50)
    rows = gather(keys, values, span)
    for level, expected in enumerate(codec.approximations(rows, span), 1):
        found = codec.decode([part[0] for part in encoded.parts[:level]], span)
        assert torch.allclose(found, expected, atol=1e-5)


def test_profiles_keep_their_points_and_refuse_others() -> None:
    profile = golden_points()
    read = Profile.from_bytes(profile.to_bytes())
    assert read.points is not None
    assert profile.points is not None
    assert torch.equal(read.points, profile.points)
    for wrong in (profile.points[:2], profile.points[:, :-1], profile.points.float()):
        with pytest.raises(ProfileError, match="contradicts itself"):
            Profile.from_bytes(replace(profile, points=wrong.contiguous()).to_bytes())
    predicting = golden_predicting()
    damaged = replace(predicting.predictors[0], points=torch.zeros(3, 41, dtype=torch.uint8))
    with pytest.raises(ProfileError, match="predictor does not fit"):
        Profile.from_bytes(replace(predicting, predictors=(damaged,)).to_bytes())
