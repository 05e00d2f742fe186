"""The command `demo`: its files in the checkout, its table and JSON, and its error without a checkout.

After a change of the reference texts: UPDATE_DOCS=1 pytest tests/test_cli_demo.py
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from eval.reference import held_out_lines
from hf_cachegen.cli import demo, demo_steps
from hf_cachegen.cli import errors as cli_errors
from tests.cli_support import documented, run, run_json

ROOT = Path(__file__).resolve().parent.parent
EXACT = {"contexts": 2, "tokens": 200, "exact_bytes": 8000, "seconds": 0.5, "right": 4, "outputs": list("abcd")}


def row(transform: str, level: int, outputs: str) -> dict[str, Any]:
    return {
        "transform": transform, "level": level, "bytes": 800, "seconds": 0.1, "right": 3, "outputs": list(outputs),
    }  # fmt: skip


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Results of the two processes, which are not started."""
    results: dict[str, Any] = {"encode": EXACT, "answer": [row("klt", 3, "abcd"), row("klt", 1, "abcx")]}
    fresh = {name: lambda name=name: json.loads(json.dumps(results[name])) for name in results}
    monkeypatch.setattr(demo, "_in_fresh_process", lambda step, root, folder: fresh[step]())
    return results


def test_the_contexts_are_the_held_out_lines() -> None:
    lines = []
    for index in range(4):
        document = held_out_lines(index, 128, 8)
        questions = [{"prompt": question.prompt, "answer": question.answer} for question in document.questions]
        lines.append(json.dumps({"context": document.text, "questions": questions}) + "\n")
    path = ROOT / demo.CONTEXTS
    if os.environ.get("UPDATE_DOCS"):
        path.write_text("".join(lines), encoding="utf-8")
    assert path.read_text(encoding="utf-8") == "".join(lines)


def test_the_demo_without_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_cachegen.__file__", str(tmp_path / "hf_cachegen" / "__init__.py"))
    monkeypatch.chdir(tmp_path)
    done = run("demo")
    assert done.exit_code == cli_errors.UNSUPPORTED
    for part in ("expected eval/reference/model", str(tmp_path), "clone the repository"):
        assert part in done.stderr
    assert run_json("demo", code=cli_errors.UNSUPPORTED)["error"]["type"] == "MissingExtraError"
    monkeypatch.chdir(ROOT)
    assert demo.find_checkout() == ROOT


def test_the_table_has_the_means_of_each_level(steps: dict[str, Any]) -> None:
    done = run("demo")
    assert done.exit_code == 0, done.output
    for part in (
        "model.generate(**inputs, cache=cache)", "2 contexts of 100 tokens, 4 questions", "exact match", "ready in",
        "exact (prefill)", "4,000", "250 ms", "klt, level 1", "10.0", "50 ms", "75.0%",
    ):  # fmt: skip
        assert part in done.stdout


def test_a_different_answer_at_the_finest_level_is_a_failure(steps: dict[str, Any]) -> None:
    found = run_json("demo")
    assert documented("demo", found)
    assert [level["same"] for level in found["levels"]] == [4, 3]
    steps["answer"][0] = row("klt", 3, "abcx")
    assert run("demo").exit_code == 1


def test_the_right_answers_are_counted_by_the_last_number() -> None:
    document = demo_steps.Document("", [{"prompt": "", "answer": "12"}] * 3)
    assert document.count_right(["line 7: <12>", "12 34", "none"]) == 1


@pytest.mark.slow
def test_the_two_processes(tmp_path: Path) -> None:
    found = run_json("demo")
    assert (found["contexts"], found["questions"]) == (4, 32)
    assert found["exact"]["right"] == found["levels"][0]["right"] == found["levels"][0]["same"] == 32
    assert [(level["transform"], level["level"]) for level in found["levels"]] == [
        (transform, level) for transform in ("klt", "delta") for level in (3, 2, 1)
    ]
