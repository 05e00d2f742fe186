"""What is evaluated: a context and questions about it, whatever data set they come from.

The cache holds the context and nothing else: a question comes later, and to put it into the cache (as the paper's
artifact did) would let the prefill attend from it to everything. `with_question` makes that form, for comparison.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Question:
    """`text` follows the context; `answers` are the right ones; `completion` is a right continuation word for word.

    Divergence and perplexity are taken over text and completion; without a completion the exact cache's own answer
    stands in its place. A question without answers is not generated for (perplexity alone).
    """

    text: str
    answers: tuple[str, ...] = ()
    completion: str | None = None


@dataclass(frozen=True)
class Example:
    """One context and what is asked about it; `id` is unique in its data set."""

    id: str
    context: str
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Dataset:
    """Examples and how they are scored.

    scores: names in `scorers.SCORERS`, the first is the one that plots show; empty for perplexity. new_tokens: at most
    that many are generated for an answer. first_line: the answer ends with its first line that is not empty. source:
    where it comes from (repository and revision, or file and digest, or seed), for the run's record.
    """

    name: str
    examples: tuple[Example, ...]
    scores: tuple[str, ...]
    new_tokens: int = 32
    first_line: bool = False
    source: dict[str, Any] = field(default_factory=dict)


def with_question(examples: Iterable[Example]) -> Iterator[Example]:
    """The same examples with each question made part of its context, one example a question."""
    for example in examples:
        for number, question in enumerate(example.questions):
            rest = Question("", question.answers, question.completion)
            yield Example(f"{example.id}/{number}", example.context + question.text, (rest,))


def split(prompt: str, marker: str) -> tuple[str, str] | None:
    """(context, question) of a whole prompt, cut before the last `marker`; None where there is none.

    The spaces before the marker go with the question: most tokenizers join a space to the word behind it.
    """
    at = prompt.rfind(marker)
    if at < 0:
        return None
    context = prompt[:at].rstrip(" ")
    return context, prompt[len(context) :]
