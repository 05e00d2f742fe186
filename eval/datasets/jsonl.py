"""Read any file with {"context", "question", "answers"} in each line; "id" and "completion" are optional.

Consecutive rows with the same context become one example, so the context is prefilled and encoded once.
"""

from __future__ import annotations

from itertools import groupby, islice
from typing import Any

from eval.datasets.request import Request, field, read_rows
from eval.examples import Dataset, Example, Question
from eval.scorers import SCORERS
from hf_cachegen.errors import ConfigError


def jsonl(
    request: Request, path: str = "", scores: str = "f1+em", new_tokens: int = 32, first_line: int = 0
) -> Dataset:
    """Load examples from a JSONL file.

    Args:
        request: limit.
        path: the file.
        scores: names in eval.scorers.SCORERS, joined by "+"; empty for perplexity.
        new_tokens: most tokens of an answer.
        first_line: 1 to end an answer with its first line.

    Raises:
        ConfigError: a row has another form; the message names it.
    """
    if not path:
        raise ConfigError("jsonl needs path=FILE")
    named = tuple(filter(None, scores.split("+")))
    if unknown := [name for name in named if name not in SCORERS]:
        raise ConfigError(f"unknown scores {unknown}: expected some of {', '.join(SCORERS)}")
    rows, source = read_rows(path)
    numbered = list(enumerate(rows, 1))
    groups = groupby(numbered, lambda item: field(item[1], "context", f"{path}, row {item[0]}"))
    examples = tuple(_example(path, context, list(items)) for context, items in islice(groups, request.limit))
    return Dataset("jsonl", examples, named, new_tokens, bool(first_line), source)


def _example(path: str, context: Any, items: list[tuple[int, dict[str, Any]]]) -> Example:
    questions = []
    for number, row in items:
        where = f"{path}, row {number}"
        answers, text = field(row, "answers", where), field(row, "question", where)
        answers = [answers] if isinstance(answers, str) else answers
        completion = row.get("completion")
        sound = isinstance(answers, list) and all(isinstance(a, str) for a in answers)
        if not sound or not isinstance(context, str) or not isinstance(text, str):
            raise ConfigError(f"{where}: context and question must be texts, answers texts or a list of them")
        if completion is not None and not isinstance(completion, str):
            raise ConfigError(f"{where}: completion must be a text")
        questions.append(Question(text, tuple(answers), completion))
    first, row = items[0]
    return Example(str(row.get("id", first)), context, tuple(questions))
