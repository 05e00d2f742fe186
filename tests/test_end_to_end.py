"""The benchmark of the whole way of a context: it runs, and its figures are those of what it stores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import end_to_end
from eval.reference import MODEL_PATH
from hf_cachegen.errors import ConfigError


def test_every_way_is_timed_at_every_length(tmp_path: Path) -> None:
    options = ["--model", str(MODEL_PATH), "--profile", str(MODEL_PATH), "--repeats", "1", "--tokens", "128"]
    options += ["--tokens", "256", "--out", str(tmp_path / "found")]
    done = CliRunner().invoke(end_to_end.main, options, catch_exceptions=False)
    assert done.exit_code == 0
    rows = {(row["way"], row["tokens"]): row for row in json.loads((tmp_path / "found.json").read_text())["rows"]}
    for tokens in (128, 256):
        assert rows["safetensors", tokens]["bits"] == pytest.approx(16, rel=0.02)
        assert rows["lossless", tokens]["bits"] < 16
        assert rows["klt, level 1", tokens]["bits"] < rows["klt, level 3", tokens]["bits"]
        assert all(row["load"] > 0 for (way, at), row in rows.items() if at == tokens and way != "prefill")
    assert "| 256 | delta, level 1 |" in (tmp_path / "found.md").read_text()
    assert "## Growth with the length" in (tmp_path / "found.md").read_text()
    assert "<svg" in (tmp_path / "found.svg").read_text()


def test_a_text_that_is_too_short_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a few words")
    options = ["--model", str(MODEL_PATH), "--text", str(tmp_path / "short.txt"), "--out", str(tmp_path / "found")]
    done = CliRunner().invoke(end_to_end.main, options)
    assert isinstance(done.exception, ConfigError)


def test_growth_with_the_length() -> None:
    """Of 1 and 4 times the tokens: times 4, 2 and 16 times as long, and no time at all."""
    rows = [
        end_to_end.Measured("a", 4096, 1.0, save=4.0, load=0.2, first=16.0),
        end_to_end.Measured("a", 1024, 1.0, save=1.0, load=0.1, first=1.0),
        end_to_end.Measured("prefill", 1024, 1.0, save=0.0, load=0.0, first=1.0),
        end_to_end.Measured("prefill", 4096, 1.0, save=0.0, load=0.0, first=4.0),
        end_to_end.Measured("alone", 1024, 1.0, save=1.0, load=1.0, first=1.0),
    ]
    assert end_to_end.growth(rows).splitlines()[2:] == ["| a | 1.00 | 0.50 | 2.00 |", "| prefill |  |  | 1.00 |"]
