"""NarrativeQA as published (Kocisky et al. 2018; deepmind/narrativeqa): all questions about a story in one example.

Scored by the paper's metrics (BLEU-1, BLEU-4, METEOR, ROUGE-L, each the best over the references) and by F1. The paper
gives no prompt for a language model; this one is ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, islice
from typing import Any

from eval.datasets.hub_rows import rows
from eval.datasets.request import Request, field
from eval.examples import Dataset, Example, Question
from hf_cachegen.errors import ConfigError

HEADER = "Read the following story; questions about it follow.\n\n"
SCORES = ("f1", "rouge_l", "bleu_1", "bleu_4", "meteor", "em")
QUESTION = "\n\nAnswer in a single phrase.\nQuestion: {question}\nAnswer:"


def narrativeqa(
    request: Request, repo: str = "deepmind/narrativeqa", name: str = "default", revision: str = "main",
    split: str = "test", of: str = "text", questions: int = 0,
) -> Dataset:  # fmt: skip
    """Load stories with their questions.

    Args:
        request: limit.
        repo: repository on the Hub, or a folder of the same form.
        name: configuration.
        revision: branch, tag or commit.
        split: split.
        of: "text" for the whole story, "summary" for its summary.
        questions: most questions about a story, 0 for all.

    Raises:
        ConfigError: the data cannot be loaded, or `of` is unknown.
    """
    if of not in ("text", "summary"):
        raise ConfigError(f"expected of to be 'text' or 'summary', got {of!r}")
    found, source = rows(repo, name, split, revision, streaming=True)
    groups = groupby(_numbered(found, repo), lambda item: item[1]["id"])
    examples = tuple(_example(list(group), of, questions or None) for _, group in islice(groups, request.limit))
    return Dataset("NarrativeQA", examples, SCORES, 32, True, source, chat_template=True, too_long="middle")


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
