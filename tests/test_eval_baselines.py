"""Baselines: their bits equal a count by hand, and their errors are those that the bits allow."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eval.baselines import NAMES, kivi, kvtc, released, turboquant
from eval.baselines.joint import Basis, Joint, joined, rotated
from eval.baselines.stored import entropy_bits
from hf_cachegen.errors import ConfigError

LAYERS, HEADS, TOKENS, DIM = 6, 2, 300, 32
ELEMENTS = 2 * LAYERS * HEADS * TOKENS * DIM


@pytest.fixture(scope="module")
def kv() -> tuple[list[Tensor], list[Tensor]]:
    """Return keys and values whose channels depend on each other, float32."""
    made = torch.Generator().manual_seed(0)
    mix = torch.randn(16, LAYERS * HEADS * DIM, generator=made)
    sides = []
    for _ in range(2):
        x = torch.randn(TOKENS, 16, generator=made) @ mix
        x += 0.1 * torch.randn(x.shape, generator=made)
        sides.append(list(x.view(TOKENS, LAYERS, HEADS, DIM).permute(1, 2, 0, 3)[:, None]))
    return sides[0], sides[1]


def error(exact: list[Tensor], decoded: list[Tensor]) -> float:
    """Return the relative error of all layers together."""
    found = torch.stack([(a - b).norm() for a, b in zip(exact, decoded, strict=True)]).norm()
    return float(found / torch.stack([a.norm() for a in exact]).norm())


@pytest.mark.parametrize("name", NAMES)
def test_every_baseline_decodes_to_its_shapes(name: str, kv: tuple[list[Tensor], list[Tensor]]) -> None:
    levels = list(NAMES[name].run(*kv))
    for stored in levels:
        assert [x.shape for x in (*stored.keys, *stored.values)] == [x.shape for x in (*kv[0], *kv[1])]
        assert 1 < stored.bits / ELEMENTS < 16
        assert error([*kv[0], *kv[1]], [*stored.keys, *stored.values]) < 0.75
    if len(levels) > 1:
        assert [stored.level for stored in levels] == [3, 2, 1]
        assert sorted((stored.bits for stored in levels), reverse=True) == [stored.bits for stored in levels]


def test_layers_have_the_bins_of_the_released_code() -> None:
    assert [released.bins_of(2, 0, layer, 32) for layer in range(32)] == [32] * 10 + [16] * 22
    assert [released.bins_of(2, 1, layer, 32) for layer in range(32)] == [32] * 2 + [16] * 30
    assert [released.bins_of(1, 0, layer, 32) for layer in range(32)] == [16] * 20 + [12] * 12
    assert [released.bins_of(1, 1, layer, 6) for layer in range(6)] == [16] + [12] * 5
    assert max(max(*bins.keys, *bins.values) for bins in released.LEVELS.values()) < released.TABLE_ENTRIES


def test_tables_count_once_for_the_artifact_and_every_256_tokens_for_lmcache(
    kv: tuple[list[Tensor], list[Tensor]],
) -> None:
    artifact, lmcache = (next(released.cachegen(*kv, table_tokens=n)) for n in (None, 256))
    channels = 2 * LAYERS * HEADS * DIM
    table = released.TABLE_ENTRIES * 16 * channels
    scales = 16 * 2 * LAYERS * TOKENS
    streams = 2 * channels  # of 256 and 44 tokens
    entropies = {None: 0.0, 256: 0.0}
    for x in (*kv[0], *kv[1]):
        symbols = released.quantise(x[0].transpose(0, 1).flatten(1), 32)[0].long() + 16
        for n in entropies:
            entropies[n] += sum(entropy_bits(part, 33) for part in symbols.split(n or TOKENS))
    for stored, tables, n in ((artifact, 1, None), (lmcache, 2, 256)):
        streams_bits = stored.bits - tables * table - scales - 32 * streams
        assert entropies[n] + 2 * streams <= streams_bits <= entropies[n] + 10 * streams
    assert all(torch.equal(a, b) for a, b in zip(artifact.keys, lmcache.keys, strict=True))


def test_default_quantization_is_symmetric_with_one_maximum_for_each_token(
    kv: tuple[list[Tensor], list[Tensor]],
) -> None:
    (stored,) = released.default_quantization(*kv, bits=8)
    assert stored.bits == 8 * ELEMENTS + 16 * 2 * LAYERS * TOKENS
    step = kv[0][0].abs().amax((1, 3), keepdim=True) / 127
    assert bool(((stored.keys[0] - kv[0][0]).abs() <= 0.5 * step * 1.001).all())


def test_kivi_keeps_its_residual_exact(kv: tuple[list[Tensor], list[Tensor]]) -> None:
    (stored,) = kivi.kivi(*kv, bits=2)
    whole, old = 256, TOKENS - 128
    assert torch.equal(stored.keys[0][:, :, whole:], kv[0][0][:, :, whole:])
    assert torch.equal(stored.values[0][:, :, old:], kv[1][0][:, :, old:])
    channels = LAYERS * HEADS * DIM
    key_bits = channels * (whole * (2 + 1) + 16 * (TOKENS - whole))
    value_bits = channels * (old * (2 + 1) + 16 * 128)
    assert stored.bits == key_bits + value_bits
    key, decoded = kv[0][0][0, 0, :32, 5], stored.keys[0][0, 0, :32, 5]  # one group: 32 tokens of one channel
    assert len(decoded.unique()) <= 4
    assert float((key - decoded).abs().max()) <= 0.51 * float(key.max() - key.min()) / 3 + 0.01
    (short,) = kivi.kivi([x[:, :, :100] for x in kv[0]], [x[:, :, :100] for x in kv[1]], bits=2)
    assert short.bits == 16 * 2 * channels * 100
    assert torch.equal(short.values[0], kv[1][0][:, :, :100])


@pytest.mark.parametrize(("bits", "distortion"), [(1, 0.363), (2, 0.117), (3, 0.0345), (4, 0.0095)])
def test_the_codebook_of_turboquant_has_the_known_distortion(bits: int, distortion: float) -> None:
    """In a large dimension a coordinate is normal, and its Lloyd-Max distortions are known (Max 1960)."""
    dim = 1024
    levels = turboquant.codebook(dim, bits)
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(1)) / math.sqrt(dim)
    found = levels[torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)]
    assert float(((x - found) ** 2).mean() * dim) == pytest.approx(distortion, rel=0.03)
    assert torch.allclose(levels, -levels.flip(0), atol=1e-3)


def test_the_residual_stage_of_turboquant_makes_inner_products_unbiased() -> None:
    made = torch.Generator().manual_seed(2)
    x = torch.nn.functional.normalize(torch.randn(4000, 64, generator=made), dim=-1)
    query = torch.nn.functional.normalize(x + 0.5 * torch.randn(x.shape, generator=made), dim=-1)
    exact = (x * query).sum(-1)
    bias = {}
    for residual in (False, True):
        (stored,) = turboquant.turboquant([x.view(1, 1, 4000, 64)], [x.view(1, 1, 4000, 64)], 2, residual)
        bias[residual] = float(((stored.keys[0].view(4000, 64) * query).sum(-1) - exact).mean() / exact.mean())
        assert stored.bits == 2 * 4000 * (2 * 64 + (32 if residual else 16))
    assert abs(bias[True]) < 0.02 < abs(bias[False])
    rotation = turboquant.rotation(64)
    assert torch.allclose(rotation @ rotation.mT, torch.eye(64), atol=1e-5)


@pytest.fixture(scope="module")
def joint(kv: tuple[list[Tensor], list[Tensor]]) -> Joint:
    bases = []
    for side in kv:
        x = joined(side)
        vectors = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh.mT
        bases.append(Basis(x.mean(0), vectors, (x - x.mean(0)) @ vectors))
    return Joint(*bases, torch.empty(0, dtype=torch.float64))


def test_kvtc_exempts_sinks_and_recent_tokens(kv: tuple[list[Tensor], list[Tensor]], joint: Joint) -> None:
    levels = list(kvtc.kvtc(*kv, joint))
    assert [stored.level for stored in levels] == [3, 2, 1]
    exact = 16 * 2 * LAYERS * HEADS * DIM * (4 + 128)
    errors = []
    for stored in levels:
        budget = ELEMENTS * 16 / kvtc.RATIOS[stored.level]
        assert exact < stored.bits <= exact + 1.05 * budget
        for x, y in zip((*kv[0], *kv[1]), (*stored.keys, *stored.values), strict=True):
            assert torch.equal(x[:, :, :4], y[:, :, :4])
            assert torch.equal(x[:, :, -128:], y[:, :, -128:])
        errors.append(error(kv[0], stored.keys))
    assert errors[0] <= errors[1] <= errors[2] < 0.3


def test_kvtc_allocates_bits_where_the_variance_is(joint: Joint) -> None:
    channels = LAYERS * HEADS * DIM
    groups = kvtc.allocate(joint.keys, 16 * channels // 16)
    assert groups[0].first == 0
    assert all(a.last == b.first for a, b in pairwise(groups))
    assert sum((g.last - g.first) * g.bits + 32 for g in groups) <= 16 * channels // 16
    assert groups[0].bits == 8  # 16 components have nearly all of the variance
    assert kvtc.allocate(joint.keys, 0) == ()


def test_joint_pca_is_an_entropy_coded_grid(kv: tuple[list[Tensor], list[Tensor]], joint: Joint) -> None:
    levels = list(kvtc.pca(*kv, joint))
    errors = [error(kv[0], stored.keys) for stored in levels]
    assert errors == sorted(errors)
    assert [stored.bits for stored in levels] == sorted((stored.bits for stored in levels), reverse=True)


def test_a_rotation_is_undone_exactly(tmp_path: Path, joint: Joint, kv: tuple[list[Tensor], list[Tensor]]) -> None:
    inv_freq = torch.tensor([1.0, 0.1, 0.01, 0.001], dtype=torch.float64)
    keys = torch.randn(1, 2, 50, 10)
    assert torch.allclose(rotated(rotated(keys, inv_freq, 1), inv_freq, -1), keys, atol=1e-5)
    assert torch.equal(rotated(keys, inv_freq, 1)[..., 8:], keys[..., 8:])
    joint.save(tmp_path / "basis.safetensors")
    again = Joint.load(tmp_path / "basis.safetensors")
    assert torch.equal(again.coefficients(1, kv[1]), joint.coefficients(1, kv[1]))
    with pytest.raises(ConfigError, match="this cache has"):
        joint.coefficients(0, kv[0][:2])
    (tmp_path / "bad").write_bytes(b"no")
    with pytest.raises(ConfigError, match="not a basis"):
        Joint.load(tmp_path / "bad")
