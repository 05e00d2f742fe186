"""Prediction on the command line: learn a predictor, encode with it or without, and answer from the result."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_cachegen import Profile
from tests.cli_support import LEARN, ask, encode, run, run_json, save_model, text


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model with a profile that predicts."""
    folder = save_model(tmp_path_factory.mktemp("models") / "llama")
    words = tmp_path_factory.mktemp("texts") / "long.txt"
    words.write_text(text(1200), encoding="utf-8")
    done = run(
        "profile", "--model", folder, "--text", words, *LEARN, "--predict-layers", 1, "--predict-layers", 0,
        "--predict-rank", 8,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "predicted from 0 layers: bits per element" in done.stdout
    return folder


def test_a_profile_learns_predictors(model: Path) -> None:
    found = Profile.load(model).predictors
    assert [(one.layer, one.rank) for one in found] == [(0, 8), (1, 8)]


@pytest.mark.parametrize(("given", "layer"), [(None, 0), (1, 1), ("none", None)], ids=str)
def test_encode_and_generate(model: Path, tmp_path: Path, given: object, layer: int | None) -> None:
    option = () if given is None else ("--predict-layers", given)
    assert encode(model, tmp_path / "a", *option).exit_code == 0
    assert run_json("inspect", tmp_path / "a")["codec"]["config"].get("predict_layers") == layer
    assert run_json(*ask(tmp_path / "a", model))["new_tokens"] > 0


def test_other_values_are_refused(model: Path, tmp_path: Path) -> None:
    shown = encode(model, tmp_path / "a", "--predict-layers", "x").output
    assert "expected a whole number, auto or none, got 'x'" in shown
    assert encode(model, tmp_path / "a", "--predict-layers", 2).exit_code == 6
