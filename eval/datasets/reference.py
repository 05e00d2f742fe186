"""The reference model's own tasks (eval/reference): records of lines, conversations over topics, stories.

Seeds are those of no training document and of no profile's sample.
"""

from __future__ import annotations

from eval.datasets.request import Request
from eval.examples import Dataset, Example, Question
from eval.reference import HELD_OUT_SEED, corpus, document, held_out_lines

DEFAULT_CONTEXTS = 16
ANSWER_TOKENS = 24
"""Enough for a whole line of the record, or a sentence."""


def lines(request: Request, lines: int = 128, questions: int = 8, any_numbers: int = 0) -> Dataset:
    """Line retrieval, 8 tokens a line. any_numbers=1: numbers of a record may share their first token."""
    made = [
        held_out_lines(request.seed + index, lines, questions, distinct=not any_numbers)
        for index in range(request.count(DEFAULT_CONTEXTS))
    ]
    return _dataset("Reference lines", made, ("line",))


def topics(request: Request, tokens: int = 1000) -> Dataset:
    """The first, second and third topic of a conversation of about so many tokens."""
    return _dataset("Reference topics", _documents(request, "topics", tokens), ("topic",))


def stories(request: Request, tokens: int = 1000) -> Dataset:
    """Facts about people among other sentences."""
    return _dataset("Reference stories", _documents(request, "stories", tokens), ("topic",))


def _documents(request: Request, task: str, tokens: int) -> list[corpus.Document]:
    seeds = range(HELD_OUT_SEED + request.seed, HELD_OUT_SEED + request.seed + request.count(DEFAULT_CONTEXTS))
    return [document(task, seed, tokens) for seed in seeds]


def _dataset(name: str, made: list[corpus.Document], scores: tuple[str, ...]) -> Dataset:
    examples = tuple(
        Example(str(index), one.text, tuple(Question(q.prompt, (q.answer,), q.completion) for q in one.questions))
        for index, one in enumerate(made)
    )
    return Dataset(name, examples, scores, ANSWER_TOKENS, first_line=True)
