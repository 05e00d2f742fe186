"""The command line with models that have recurrent states."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_cachegen.cli import errors as cli_errors
from tests.cli_support import run, run_json, save_model, text


@pytest.mark.parametrize("name", ["qwen3_next", "mamba"])
def test_a_context_is_encoded_inspected_and_asked(name: str, tmp_path: Path) -> None:
    model, artifact = save_model(tmp_path / "model", name), tmp_path / "artifact"
    found = run_json("encode", "-", "--model", model, "--out", artifact, "--state-every", 15, stdin=text(40))
    assert found["states"]["checkpoints"] == [15, 30, 39]
    assert found["states"]["exact_bytes"] > 0
    assert found["exact_bytes"] > 0
    assert (found["levels"][0]["bits_per_element"] > 0) == (name != "mamba")
    assert "after 15, 30, 39 tokens" in run("inspect", artifact).stdout
    assert run_json("verify", artifact, "--model", model)["sound"]
    asked = ("generate", artifact, "--model", model, "--prompt", text(3, 1), "--max-new-tokens", 4)
    assert run_json(*asked)["context_tokens"] == 40


def test_the_budget_leaves_out_checkpoints(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "qwen3_next")
    found = run_json(
        "encode", "-", "--model", model, "--out", tmp_path / "a", "--state-every", 5, "--state-budget", 1,
        stdin=text(40),
    )  # fmt: skip
    assert found["states"]["checkpoints"] == [39]


def test_an_option_out_of_range(tmp_path: Path) -> None:
    options = ("--model", tmp_path, "--out", tmp_path / "a", "--state-every", 0)
    assert run("encode", "-", *options, stdin="x").exit_code == cli_errors.USAGE
