"""The figures that documents quote are those of committed runs; the parts that measure them, on known answers."""

from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch

from eval import calibration, codecs, headline, positions, surroundings, sweeps
from eval.command import run_command
from eval.dropping import WINDOW, kept
from eval.positions import Measured, summary, table
from eval.run_folder import RunFolder
from hf_cachegen.errors import ConfigError

ROOT = Path(__file__).parents[1]


def test_a_suite_names_codecs_that_exist() -> None:
    found = headline.retrieval_cases("a.txt", (500, 2000), (10,))
    assert [case.name for case in found] == ["needle-500", "needle-2000", "key-values-10"]
    cases = (*headline.reference_cases(), *headline.real_cases("a.txt", "b.jsonl", "c/*.py"), *found)
    assert {name for case in cases for name in case.codecs} <= set(codecs.NAMES)
    assert {name for name, _ in headline.QUOTED} <= set(codecs.NAMES)
    assert [case.name for case in headline.real_cases("a.txt", "", "")] == ["text"]
    longer = headline.real_cases("a.txt", "b.jsonl", "c/*.py", 4096)
    assert [case.name for case in longer] == ["text-4096", "conversations-4096", "code-4096"]
    assert all("prefix=4096," in case.dataset for case in longer)


def test_committed_runs_hold_their_predictions() -> None:
    for path in sorted((ROOT / "docs" / "results").glob("*/runs/*")):
        folder = RunFolder(path)
        assert folder.finished()
        assert len(folder.done()) == folder.metrics()["examples"] == folder.config()["asked"]["dataset"]["examples"]


def test_readme_quotes_committed_results() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert headline.table(ROOT / "docs" / "results" / "headline" / "runs" / "any-numbers").markdown() in text


def test_an_error_of_a_command_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["headline", "table", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        run_command(headline.main, "eval.headline")
    assert capsys.readouterr().err == f"error: {tmp_path} has no metrics.json: it is not a finished run\n"


@pytest.mark.parametrize(
    ("running", "expected"),
    [("eval.headline", "eval.headline"), ("eval.__main__", "eval"), ("pytest.__main__", "eval"), (None, "eval")],
)
def test_a_record_names_the_command_of_its_process(
    running: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = None if running is None else ModuleSpec(running, None)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    assert surroundings.module() == expected


def test_a_divergence_is_split_by_position() -> None:
    row = Measured("klt", 1, 0.5, [0.1] * 18 + [1.0, 1.0], [0.01, 0.03], [0.2, 0.0], [0.5, 3.0], [1, 0])
    found = summary([row])
    assert found["question"] == pytest.approx(0.19)
    assert found["answer"] == pytest.approx(0.02)
    assert found["kl"] == pytest.approx((18 * 0.1 + 2 + 0.04) / 22)
    assert found["worst"] == pytest.approx(1 / (18 * 0.1 + 2 + 0.04))
    assert found["undecided"] == 0.5
    assert found["undecided kl"] == pytest.approx(0.2)
    assert table([row] * 10).count("50% [") == 1


def test_dropping_keeps_what_was_attended_to() -> None:
    weights = torch.zeros(200, 200)
    weights[:, [3, 40]] = 0.5
    assert kept(weights, "h2o", 0.02).tolist() == [3, 40, 198, 199]
    found = kept(weights, "snapkv", 0.24).tolist()
    assert found[-WINDOW:] == list(range(200 - WINDOW, 200))
    assert {3, 40} <= set(found)
    assert len(found) == 48  # the window, and 7 neighbours of each of the two
    assert kept(weights, "h2o", 1.0).tolist() == list(range(200))


def test_positions_are_measured_with_the_model(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from eval.reference import MODEL_PATH

    done = CliRunner().invoke(positions.main, [
        "measure", "--model", str(MODEL_PATH), "--dataset", "reference-lines:lines=10,questions=2",
        "--codec", "artifact", "--codec", "klt", "--level", "1", "--limit", "1", "--device", "cpu",
        "--out", str(tmp_path / "found"),
    ])  # fmt: skip
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert [(row["codec"], row["level"]) for row in rows] == [("artifact", 1), ("klt", 1)]
    assert all(len(row["same"]) == 2 and len(row["own"]) == len(row["gap"]) for row in rows)
    first = (tmp_path / "found.md").read_text().split("\n\n", 2)
    found = [str(tmp_path / "found.json")] * 2
    assert CliRunner().invoke(positions.main, ["pool", *found, "--out", str(tmp_path / "pooled")]).exit_code == 0
    pooled = (tmp_path / "pooled.md").read_text().split("\n\n", 2)
    assert pooled[1].startswith("found.json, found.json: 2 contexts")
    assert pooled[2].splitlines()[:2] == first[2].splitlines()[:2]


def test_sweeps_add_up_measured_parts(tmp_path: Path) -> None:
    rows = [{"way": "safetensors", "tokens": 1000, "bits": 16.0, "load": 0.25, "first": 0.5},
            {"way": "prefill", "tokens": 1000, "bits": 0.0, "load": 0.0, "first": 2.0}]  # fmt: skip
    (tmp_path / "measured.json").write_text(json.dumps({"rows": rows}))
    found = sweeps.read(tmp_path / "measured.json", 1000)
    exact = found[1000]["safetensors"]
    assert sweeps.seconds(exact, 0.016) == pytest.approx(1.75)
    assert sweeps.seconds(exact, 0.016, 4) == pytest.approx(7.0)
    assert "| safetensors | 2.35 | " in sweeps.tables(found, 0.1)
    assert "| prefill | **2** | " in sweeps.tables(found, 0.1)
    (tmp_path / "measured.json").write_text("{}")
    with pytest.raises(ConfigError, match="not a result"):
        sweeps.read(tmp_path / "measured.json", 1000)


def test_bits_are_interpolated_between_levels() -> None:
    points = [(0.5, 0.1), (1.0, 0.01), (2.0, 0.0001)]
    assert calibration.at_target(points) == pytest.approx(1.0)
    assert calibration.at_target([(0.5, 0.1), (1.0, 0.05), (2.0, 0.02)]) > 2.0
    assert calibration.at_target([(0.5, 0.001), (1.0, 0.0001)]) < 0.5
