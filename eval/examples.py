"""The examples of an evaluation: a context and questions about it, from any data set.

The cache holds the context and nothing else, because a question comes later. If the question were cached too, as in the
paper's artifact, the prefill could attend from it to everything. `with_question` makes that form, for comparison.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Question:
    """One question about a context.

    Divergence and perplexity are measured over text and completion. Without a completion the exact cache's own answer
    is used instead. A question without answers is not generated for (perplexity only).

    Attributes:
        text: the text that follows the context.
        answers: the right answers.
        completion: a right continuation, word for word.
    """

    text: str
    answers: tuple[str, ...] = ()
    completion: str | None = None


@dataclass(frozen=True)
class Example:
    """One context and the questions about it; `id` is unique in its data set."""

    id: str
    context: str
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Dataset:
    """Examples, and how their authors ask and score them.

    Attributes:
        name: title in reports.
        examples: the contexts and their questions.
        scores: names in eval.scorers.SCORERS; plots show the first. Empty for perplexity.
        new_tokens: the most tokens of an answer.
        first_line: the answer ends with its first line that is not empty.
        source: where the data come from (repository and revision, file and digest, or seed), for the run's record.
        chat_template: the authors put the model's chat template around a prompt.
        too_long: their rule for prompts that exceed the model: "skip", "middle" or "error".
    """

    name: str
    examples: tuple[Example, ...]
    scores: tuple[str, ...]
    new_tokens: int = 32
    first_line: bool = False
    source: dict[str, Any] = field(default_factory=dict)
    chat_template: bool = False
    too_long: str = "skip"


def with_question(examples: Iterable[Example]) -> Iterator[Example]:
    """Yield the same examples with each question made part of its context, one example for each question."""
    for example in examples:
        for number, question in enumerate(example.questions):
            rest = Question("", question.answers, question.completion)
            yield Example(f"{example.id}/{number}", example.context + question.text, (rest,))


def split(prompt: str, marker: str) -> tuple[str, str] | None:
    """Cut a prompt before its last `marker`.

    Spaces before the marker belong to the question, since most tokenizers join a space to the word after it.

    Returns:
        (context, question), None where the marker does not occur.
    """
    at = prompt.rfind(marker)
    if at < 0:
        return None
    context = prompt[:at].rstrip(" ")
    return context, prompt[len(context) :]
