"""NarrativeQA as published (Kocisky et al. 2018; deepmind/narrativeqa): all questions about a story in one example."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, islice
from typing import Any

from eval.datasets.hub_rows import rows
from eval.datasets.request import Request, field
from eval.examples import Dataset, Example, Question
from hf_cachegen.errors import ConfigError

HEADER = "Read the following story; questions about it follow.\n\n"
QUESTION = "\n\nAnswer in a single phrase.\nQuestion: {question}\nAnswer:"


def narrativeqa(
    request: Request, repo: str = "deepmind/narrativeqa", name: str = "default", revision: str = "main",
    split: str = "test", of: str = "text", questions: int = 0,
) -> Dataset:  # fmt: skip
    """of: "text" (the whole story) or "summary"; questions: at most so many about a story, 0 for all."""
    if of not in ("text", "summary"):
        raise ConfigError(f"of is 'text' or 'summary', got {of!r}")
    found, source = rows(repo, name, split, revision, streaming=True)
    groups = groupby(_numbered(found, repo), lambda item: item[1]["id"])
    examples = tuple(_example(list(group), of, questions or None) for _, group in islice(groups, request.limit))
    return Dataset("NarrativeQA", examples, ("f1", "em"), 32, True, source)


def _numbered(found: Iterator[dict[str, Any]], repo: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    for number, row in enumerate(found):
        yield row, field(row, "document", f"{repo}, row {number}")


def _example(group: list[tuple[dict[str, Any], dict[str, Any]]], of: str, most: int | None) -> Example:
    document = group[0][1]
    text = document["text"] if of == "text" else document["summary"]["text"]
    asked = tuple(
        Question(QUESTION.format(question=row["question"]["text"]), tuple(a["text"] for a in row["answers"]))
        for row, _ in group[:most]
    )
    return Example(str(document["id"]), HEADER + text, asked)
