"""Parts of the evaluation: scorers, baselines, the corpus, and the quality of the reference model."""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval import scorers, uniform
from eval.answers import answers
from eval.reference import MODEL_PATH, TASKS, corpus, document, held_out_lines
from hf_cachegen import CacheGenCache, Profile

DATA = os.environ.get("CACHEGEN_EVAL_DATA")


@pytest.mark.parametrize(
    ("output", "expected", "right"),
    [
        ("line brave-lamp: REGISTER_CONTENT is <48213>", "48213", True),
        ("The <REGISTER_CONTENT> in line 7 is <48213>.", "48213", True),
        ("48213, no, 48214", "48213", False),
        ("It is 148213", "48213", False),
        ("I do not know.", "48213", False),
        ("", "48213", False),
    ],
)
def test_line_retrieval_takes_the_last_integer(output: str, expected: str, right: bool) -> None:
    assert scorers.line_retrieval(output, expected) is right


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_uniform_quantisation_keeps_its_step(bits: int) -> None:
    x = torch.randn(2, 3, 50, 64)
    step = (x.amax(-1) - x.amin(-1)) / (2**bits - 1)
    assert bool(((uniform.quantise(x, bits) - x).abs().amax(-1) <= 0.51 * step + 0.01).all())
    assert uniform.bits_per_element(bits, 64) == bits + 0.5


@pytest.mark.parametrize("task", TASKS)
def test_the_corpus_is_seeded_and_answers_are_in_the_context(task: str) -> None:
    for seed in range(20):
        made = document(task, seed, 600)
        assert made == document(task, seed, 600)
        assert made.text != document(task, seed + 1, 600).text
        for question in made.questions:
            assert question.answer in made.text
            assert question.answer in question.completion


def test_names_of_lines_are_distinct() -> None:
    names = corpus.line_names(random.Random(0), 900)
    assert len(set(names)) == 900


@pytest.fixture(scope="module")
def reference():
    return AutoModelForCausalLM.from_pretrained(MODEL_PATH, dtype=torch.bfloat16), AutoTokenizer.from_pretrained(
        MODEL_PATH
    )


def test_any_text_round_trips(reference) -> None:
    tokenizer = reference[1]
    for text in (
        "line brave-lamp: REGISTER_CONTENT is <48213>\n",
        "\u00e9\u00df\u6f22\u5b57 \U0001f600\n\n\tx  = 1",
        held_out_lines(0, 9, 2).text,
    ):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_reference_model_retrieves(reference) -> None:
    """It finds at least 95 % of the numbers in records of more than 1,000 tokens."""
    model, tokenizer = reference
    right = asked = 0
    for index in range(100, 112):
        made = held_out_lines(index, 128, 8)
        ids = tokenizer(made.text).input_ids
        assert len(ids) > 1000
        cache = CacheGenCache.from_context(model, ids)
        prompts = [tokenizer(made.text + q.prompt).input_ids for q in made.questions]
        outputs = [text.split("\n")[0] for text in answers(model, tokenizer, cache, prompts, 24)]
        right += sum(scorers.line_retrieval(o, q.answer) for o, q in zip(outputs, made.questions, strict=True))
        asked += len(made.questions)
    assert right >= 0.95 * asked


def test_the_reference_model_is_small_and_records_its_origin() -> None:
    assert (MODEL_PATH / "model.safetensors").stat().st_size <= 12e6
    record = json.loads((MODEL_PATH / "training.json").read_text())
    assert record["steps"] > 0
    assert "Apache" in (MODEL_PATH / "README.md").read_text()
    profile = Profile.load(MODEL_PATH)
    assert profile.about["measured"][-1]["kl"] <= 0.001


@pytest.mark.skipif(DATA is None, reason="CACHEGEN_EVAL_DATA names no folder with the published cases")
def test_the_published_line_cases_score_as_published() -> None:
    """The line of a case is a right answer, and another line is a wrong one."""
    assert DATA is not None
    cases = [json.loads(line) for line in (Path(DATA) / "longeval_200_lines.jsonl").read_text().splitlines()]
    assert len(cases) == 50
    for case in cases:
        expected = str(case["expected_number"])
        assert scorers.line_retrieval(case["correct_line"], expected)
        others = re.findall(r"REGISTER_CONTENT is <\d+>", case["prompt"])
        wrong = next(line for line in others if f"<{expected}>" not in line)
        assert not scorers.line_retrieval(wrong, expected)
