"""The reference model's own tasks (eval/reference): records of lines, conversations over topics, stories.

The seeds are not used by any training document or by any sample of a profile.
"""

from __future__ import annotations

from eval.datasets.request import Request
from eval.examples import Dataset, Example, Question
from eval.reference import HELD_OUT_SEED, corpus, document, held_out_lines

DEFAULT_CONTEXTS = 16
ANSWER_TOKENS = 24
"""Most tokens of an answer: a whole line of the record, or a sentence."""


def lines(request: Request, lines: int = 128, questions: int = 8, any_numbers: int = 0) -> Dataset:
    """Generate line retrieval, 8 tokens for each line.

    With any_numbers=1 the numbers of a record may share their first token, which makes the task harder.
    """
    made = [
        held_out_lines(request.seed + index, lines, questions, distinct=not any_numbers)
        for index in range(request.count(DEFAULT_CONTEXTS))
    ]
    return _dataset("Reference lines, any numbers" if any_numbers else "Reference lines", made, ("line",))


def topics(request: Request, tokens: int = 1000) -> Dataset:
    """Generate questions about the first, second and third topic of a conversation of about `tokens` tokens."""
    return _dataset("Reference topics", _documents(request, "topics", tokens), ("topic",))


def stories(request: Request, tokens: int = 1000) -> Dataset:
    """Generate questions about facts in a text of about `tokens` tokens."""
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
