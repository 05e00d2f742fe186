"""What a profile is learnt from: the caches of one prefill, sums of products, and what samples measure."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_cachegen.models.first_layers import first_layers
from hf_cachegen.profiles.learning import metric
from hf_cachegen.profiles.learning.exact import Exact
from hf_cachegen.profiles.learning.measuring import Measured
from hf_cachegen.profiles.learning.sums import FeatureSums, GroupSums, square
from tests.tiny_models import VOCABULARY, shared

ORDER = [(0, 0, 2), (1, 0, 2), (0, 2, 2)]
WIDTHS = [8, 4, 8]


@pytest.fixture(scope="module")
def model() -> Any:
    return shared("llama")


@pytest.fixture
def context() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (1, 40), generator=torch.Generator().manual_seed(0))


def rows(seed: int, tokens: int = 30) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, width, generator=generator) + 1 for width in WIDTHS]


def test_one_prefill_gives_the_states_of_every_predictor(model, context) -> None:
    found = Exact(model, [(context, context)], [0, 2]).prefill(context)
    assert sorted(found.hidden) == [0, 2]
    for layer, hidden in found.hidden.items():
        torch.testing.assert_close(hidden, first_layers(model, context, layer).hidden)


@pytest.mark.parametrize("width", [1, 3, 4, 10])
def test_symmetric_products(width: int) -> None:
    x = torch.randn(20, width, generator=torch.Generator().manual_seed(width))
    torch.testing.assert_close(square(x), x.mT @ x)


def test_products_are_less_the_given_means() -> None:
    sums, parts = GroupSums(ORDER, WIDTHS, 3), [rows(0), rows(1, tokens=10)]
    for part in parts:
        sums.add(part)
    whole = [torch.cat(x).double() for x in zip(*parts, strict=True)]
    means = [torch.full((width,), 0.3, dtype=torch.float64) for width in WIDTHS]
    summary = torch.randn(3, WIDTHS[2], dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for j, i in sums.products:
        expected = (whole[j] - means[j]).mT @ (whole[i] - means[i]) / 40
        torch.testing.assert_close(sums.product(j, i, means), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sums.product(i, j, means), expected.mT, rtol=1e-5, atol=1e-5)
    expected = summary @ sums.product(2, 0, means)
    torch.testing.assert_close(sums.read(summary, 2, 0, means), expected, rtol=1e-5, atol=1e-5)


def test_products_of_features() -> None:
    sums, part = FeatureSums(0, 6, WIDTHS), rows(0)
    hidden = torch.randn(30, 6, generator=torch.Generator().manual_seed(1))
    sums.add(hidden, part)
    unit = (hidden / hidden.square().mean(1, keepdim=True).sqrt()).double()
    mean, other = torch.full((6,), 0.1).double(), torch.full((4,), 0.2).double()
    expected = (unit - mean).mT @ (part[1].double() - other) / 30
    torch.testing.assert_close(sums.products(1, mean, other), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums.covariance(mean), (unit - mean).mT @ (unit - mean) / 30, rtol=1e-5, atol=1e-5)


def test_the_metric() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(2, 3, 3, generator=generator, dtype=torch.float64)
    sensitivity, x = a @ a.mT + torch.eye(3), torch.randn(6, 6, generator=generator, dtype=torch.float64)
    root, inverse = metric.roots(sensitivity)
    whole = torch.block_diag(*root)
    torch.testing.assert_close(whole @ whole, torch.block_diag(*sensitivity))
    torch.testing.assert_close(metric.by_head(x, inverse), x @ torch.linalg.inv(whole))
    symmetric = x + x.mT
    torch.testing.assert_close(metric.both_sides(symmetric, root), whole @ symmetric @ whole)
    found = metric.principal(symmetric)
    values = ((found @ symmetric) * found).sum(1)
    torch.testing.assert_close(values, torch.linalg.eigvalsh(symmetric).flip(0), rtol=1e-5, atol=1e-5)


def measured(kl: list[float], bits: list[float]) -> Measured:
    rows = torch.tensor([[[x], [y]] for x, y in zip(kl, bits, strict=True)], dtype=torch.float64)
    return Measured(rows, torch.full((len(kl),), 10.0, dtype=torch.float64))


def test_a_part_of_the_samples_is_measured_beside_all() -> None:
    """The profile itself is twice as bad on all samples as on the first two, so the predictor is taken to be, too."""
    beside = measured([0.1, 0.1, 0.3, 0.3], [20.0, 20.0, 20.0, 100.0])
    part = measured([0.05, 0.05], [10.0, 10.0])
    assert part.means() == [{"kl": 0.05, "bits_per_element": 1.0}]
    assert part.means(beside) == [{"kl": 0.1, "bits_per_element": 2.0}]
    assert beside.means(beside) == beside.means() == [{"kl": 0.2, "bits_per_element": 4.0}]
