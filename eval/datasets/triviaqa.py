"""TriviaQA as its authors published it (Joshi et al. 2017), the rc form: a question and documents that support it.

From the Hub (mandarjoshi/trivia_qa: the documents are in the rows) or from the original JSON (`path`), whose documents
are files of the folder `evidence`. Scored by the official script's normaliser, and by LongBench's beside it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eval.datasets.hub_rows import rows
from eval.datasets.request import Request, field, read_text
from eval.examples import Dataset, Example, Question
from hf_cachegen.errors import ConfigError

HEADER = "Read the following documents; a question about them follows.\n\n"
QUESTION = "\n\nAnswer the question in a few words.\nQuestion: {question}\nAnswer:"
SCORES = ("f1_triviaqa", "em_triviaqa", "f1", "em")


def triviaqa(
    request: Request, repo: str = "mandarjoshi/trivia_qa", name: str = "rc", revision: str = "main",
    split: str = "validation", documents: str = "wikipedia", path: str = "", evidence: str = "",
) -> Dataset:  # fmt: skip
    """documents: "wikipedia" (entity pages) or "web" (search results). Questions without such a document are left out,
    and their number is in the source.
    """
    if documents not in ("wikipedia", "web"):
        raise ConfigError(f"documents is 'wikipedia' or 'web', got {documents!r}")
    if path:
        cases, source = _from_json(path, evidence, documents)
    else:
        found, source = rows(repo, name, split, revision, streaming=True)
        cases = (_hub_case(row, documents, f"{repo}, row {number}") for number, row in enumerate(found))
    left_out = 0
    examples: list[Example] = []
    for case in cases:
        if case is None:
            left_out += 1
            continue
        examples.append(case)
        if len(examples) == request.limit:
            break
    return Dataset("TriviaQA", tuple(examples), SCORES, 32, True, {**source, "without_document": left_out})


def _example(id_: str, question: str, answers: list[str], texts: list[str]) -> Example | None:
    texts = [text for text in texts if text and text.strip()]
    if not texts:
        return None
    asked = Question(QUESTION.format(question=question), tuple(dict.fromkeys(answers)))
    return Example(id_, HEADER + "\n\n".join(texts), (asked,))


def _hub_case(row: dict[str, Any], documents: str, where: str) -> Example | None:
    answer = field(row, "answer", where)
    pages, key = ("entity_pages", "wiki_context") if documents == "wikipedia" else ("search_results", "search_context")
    texts = field(field(row, pages, where), key, where)
    return _example(field(row, "question_id", where), field(row, "question", where),
                    [answer["value"], *answer["aliases"]], list(texts))  # fmt: skip


def _from_json(path: str, evidence: str, documents: str) -> tuple[Iterator[Example | None], dict[str, Any]]:
    if not Path(evidence).is_dir() or not evidence:
        raise ConfigError(f"evidence= must name the folder of documents that belongs to {path!r}, got {evidence!r}")
    text, source = read_text(path)
    try:
        data = field(json.loads(text), "Data", path)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    return (_json_case(row, Path(evidence), documents, f"{path}, record {n}") for n, row in enumerate(data)), source


def _json_case(row: dict[str, Any], evidence: Path, documents: str, where: str) -> Example | None:
    answer = field(row, "Answer", where)
    pages = row.get("EntityPages" if documents == "wikipedia" else "SearchResults", [])
    names = [field(page, "Filename", where) for page in pages]
    places = [place for name in names if (place := _inside(evidence, name)) is not None]
    texts = [place.read_text(encoding="utf-8") for place in places]
    return _example(field(row, "QuestionId", where), field(row, "Question", where),
                    [answer["Value"], *answer.get("Aliases", [])], texts)  # fmt: skip


def _inside(folder: Path, name: str) -> Path | None:
    """The document, None where it is not there. A name that leads out of the folder is not a document's."""
    place = (folder / name).resolve()
    return place if place.is_relative_to(folder.resolve()) and place.is_file() else None
