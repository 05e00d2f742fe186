"""The observations of the paper, on tensors whose answer is known, and on the reference model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from eval import insights
from eval.reference import MODEL_PATH


def walk(correlation: float) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return a cache whose channels are autoregressive over the tokens."""
    torch.manual_seed(0)
    x = torch.randn(1, 2, 4096, 8)
    for token in range(1, x.shape[2]):
        x[:, :, token] = correlation * x[:, :, token - 1] + math.sqrt(1 - correlation**2) * x[:, :, token]
    return [x], [x]


@pytest.mark.parametrize("correlation", [0.0, 0.8])
def test_locality_is_that_of_the_correlation(correlation: float) -> None:
    expected = 1 / (2 * (1 - correlation))
    assert insights.locality(walk(correlation))["K"] == pytest.approx(expected, rel=0.05)


def test_an_entropy_is_that_of_the_distribution_of_each_group() -> None:
    torch.manual_seed(0)
    fair = torch.randint(0, 2, (20_000,))
    groups = torch.arange(2).repeat_interleave(10_000)
    assert insights.entropy(fair, torch.zeros_like(fair)) == pytest.approx(1, abs=1e-3)
    assert insights.entropy(groups, groups) == 0
    assert insights.entropy(groups, torch.zeros_like(groups)) == pytest.approx(1, abs=1e-3)


def test_grouping_by_channel_helps_where_channels_differ() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 2, 512, 8) + 10 * torch.randn(1, 2, 1, 8)
    found = insights.entropies(([x, x.roll(1, 3)], [x, x.roll(1, 3)]))
    assert found["by layer and channel"] < found["by layer"] - 1
    assert found["by token"] == pytest.approx(found["one distribution"], abs=1)


def test_the_command_writes_all_figures(tmp_path: Path) -> None:
    arguments = ["--model", str(MODEL_PATH), "--dataset", "reference-lines:lines=12,questions=2", "--limit", "2"]
    done = CliRunner().invoke(insights.main, [*arguments, "--out", str(tmp_path / "found")], catch_exceptions=False)
    assert done.exit_code == 0
    found = json.loads((tmp_path / "found.json").read_text())
    first = found["contexts"][0]
    assert first["locality/K"] > 0
    assert first["entropy/by layer and channel"] < first["entropy/one distribution"]
    assert first["ladder/entropy coding: bits"] < first["ladder/quantisation alone: bits"]
    assert sum(key.startswith("sensitivity/") for key in first) == insights.SIXTHS
    assert all(value > 0 for key, value in first.items() if key.startswith("sensitivity/"))
    assert "steps by layer" in (tmp_path / "found.md").read_text()
