"""Scorers: right and wrong answers, and the two normalisers of TriviaQA."""

from __future__ import annotations

import math
import random

import pytest

from eval.answers import first_line
from eval.scorers import SCORE_TITLES, SCORERS, contains, normalise, normalise_triviaqa, token_f1


def test_the_two_normalisers_differ_only_in_punctuation() -> None:
    assert normalise("The rock'n'roll, of_an era!") == "rocknroll ofan era"
    assert normalise_triviaqa("The rock'n'roll, of_an era!") == "rock n roll of era"
    assert normalise_triviaqa("\u2018Sunset\u2019 Blvd.") == "sunset blvd"
    assert normalise("\u2018Sunset\u2019 Blvd.") == "\u2018sunset\u2019 blvd"
    assert normalise("A  man, an apple and the sea") == "man apple and sea"


@pytest.mark.parametrize(
    ("score", "output", "answers", "expected"),
    [
        ("line", "It is <12345>", ["12345"], 1.0),
        ("line", "12345 or 54321", ["12345"], 0.0),
        ("topic", "The topic is: the Role of Art in society.", ["The role of art in society"], 1.0),
        ("topic", "The roles of art in society", ["The role of art in society"], 0.0),
        ("f1", "Sunset Boulevard", ["Sunset Blvd", "Sunset Boulevard"], 1.0),
        ("f1", "the Sunset", ["Sunset Boulevard"], 2 / 3),
        ("f1", "nothing of it", ["Sunset Boulevard"], 0.0),
        ("f1", "", ["Sunset"], 0.0),
        ("f1", "Sunset", [], 0.0),
        ("em", "The Sunset!", ["sunset"], 1.0),
        ("em", "rock'n'roll", ["rock n roll"], 0.0),
        ("em_triviaqa", "rock'n'roll", ["rock n roll"], 1.0),
        ("f1_triviaqa", "rock'n'jazz", ["rock n roll"], 2 / 3),
        ("bleu_1", "The sea!", ["the sea"], 1.0),
        ("bleu_1", "sea", ["the sea"], math.exp(-1)),
        ("bleu_1", "", ["sea"], 0.0),
        ("bleu_4", "the cat sat on the mat", ["the cat sat on the mat"], 1.0),
        ("bleu_4", "cat dog", ["cat bird"], (1 / 2 * 1 / 2) ** 0.25),
        ("rouge_l", "the cat sat", ["the cat sat"], 1.0),
        ("rouge_l", "a b c d", ["a c"], 2.44 * 0.5 / (1 + 1.44 * 0.5)),
        ("rouge_l", "x", ["a"], 0.0),
        ("meteor", "the cat sat", ["the cat sat"], 1 - 0.5 / 27),
        ("meteor", "sat the cat", ["the cat sat"], 1 - 0.5 * (2 / 3) ** 3),
        ("meteor", "dog", ["cat"], 0.0),
    ],
)
def test_a_score_of_an_output(score: str, output: str, answers: list[str], expected: float) -> None:
    assert SCORERS[score](output, answers) == pytest.approx(expected)


def test_every_score_has_a_title() -> None:
    assert set(SCORE_TITLES) == set(SCORERS)


def test_f1_is_symmetric_and_contains_is_word_by_word() -> None:
    assert token_f1("one two three", "two three four") == token_f1("two three four", "one two three")
    assert contains("an art of war", "art")
    assert not contains("a part of war", "art")


def test_an_answer_of_one_line_ends_with_it() -> None:
    assert first_line("\n\nSunset\nQuestion: next") == "Sunset"
    assert first_line("") == ""


def test_f1_and_em_equal_those_of_evaluate() -> None:
    evaluate = pytest.importorskip("evaluate")
    try:
        squad = evaluate.load("squad")
    except Exception as error:  # its script comes from the Hub, and clients raise different errors offline
        pytest.skip(f"evaluate's squad metric cannot be loaded here: {type(error).__name__}")
    rng, words = random.Random(0), "the sun set over a wide, wide sea; an old man's boat".split()
    for number in range(50):
        output, answers = (
            " ".join(rng.choices(words, k=4)), [" ".join(rng.choices(words, k=rng.randint(1, 4))) for _ in range(2)]
        )  # fmt: skip
        found = squad.compute(
            predictions=[{"id": str(number), "prediction_text": output}],
            references=[{"id": str(number), "answers": {"text": answers, "answer_start": [0, 0]}}],
        )
        assert found["f1"] == pytest.approx(100 * SCORERS["f1"](output, answers))
        assert found["exact_match"] == pytest.approx(100 * SCORERS["em"](output, answers))
