"""lm-evaluation-harness over decoded caches. It needs the package lm-eval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eval.reference import HELD_OUT_SEED, MODEL_PATH, document
from hf_cachegen.errors import ConfigError

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
from lm_eval.tasks import TaskManager  # noqa: E402

from eval.harness import CacheGenLM  # noqa: E402

GENERATE = """
task: record_lines
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{context}}}}{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 24}}
metric_list: [{{metric: exact_match, ignore_punctuation: false}}]
"""
CHOOSE = """
task: record_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}{{{{question}}}}"
target_delimiter: ""
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write two tasks about a record whose answers the reference model knows."""
    folder = tmp_path_factory.mktemp("tasks")
    made = document("lines", HELD_OUT_SEED, 400)
    rows = [
        {"context": made.text, "question": q.prompt, "answer": q.completion.strip(),
         "choices": [q.completion, *(other.completion for other in made.questions[:3] if other != q)]}
        for q in made.questions[:4]
    ]  # fmt: skip
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, text in (("generate", GENERATE), ("choose", CHOOSE)):
        (folder / f"{name}.yaml").write_text(text.format(path=folder / "rows.jsonl"))
    return folder


def results(tasks: Path, **options: Any) -> dict[str, dict[str, float]]:
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    model = CacheGenLM(pretrained=str(MODEL_PATH), dtype="bfloat16", device="cpu", **options)
    found = lm_eval.simple_evaluate(
        model, tasks=["record_lines", "record_choices"], task_manager=manager, bootstrap_iters=0
    )
    scores = found["results"].items()
    return {name: {key.partition(",")[0]: value for key, value in row.items()} for name, row in scores}


@pytest.mark.parametrize("options", [{"codec": "exact", "level": 0}, {"codec": "klt", "level": 3, "batch_size": 2}])
def test_scores_from_a_good_cache_are_those_of_the_model(tasks: Path, options: dict[str, Any]) -> None:
    found = results(tasks, **options)
    assert found["record_lines"]["exact_match"] == 1
    assert found["record_choices"]["acc"] == 1


def test_the_caches_are_those_of_the_codec(tasks: Path) -> None:
    """Level 1 of delta is too coarse for this model, and the score shows it."""
    model = CacheGenLM(pretrained=str(MODEL_PATH), dtype="bfloat16", device="cpu", codec="delta", level=1)
    ids = model.tok_encode(document("lines", HELD_OUT_SEED, 400).text)
    assert model.decoded(ids).report.level == 1
    assert model.decoded(ids) is model.decoded(ids)


def test_options_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="question_tokens"):
        CacheGenLM(pretrained=str(MODEL_PATH), question_tokens=0)
    with pytest.raises(ConfigError, match="profile"):
        CacheGenLM(pretrained=str(MODEL_PATH), codec="klt", profile="none", device="cpu")
