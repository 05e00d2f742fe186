"""TriviaQA as its authors published it (Joshi et al. 2017), the rc form: a question and documents that support it.

From the Hub (mandarjoshi/trivia_qa: the documents are in the rows) or from the original JSON (`path`), whose documents
are files of the folder `evidence`. As in the official evaluation, Wikipedia asks each question once, over all of its
documents, and web once for each document. Scored by the official script's normaliser, and by LongBench's as well. The
paper gives no prompt for a language model; this one is ours.
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
    split: str = "validation", documents: str = "wikipedia", path: str = "", evidence: str = "", verified: int = 0,
) -> Dataset:  # fmt: skip
    """Load questions with their documents.

    Args:
        request: limit.
        repo: repository on the Hub, or a folder of the same form.
        name: configuration.
        revision: branch, tag or commit.
        split: split.
        documents: "wikipedia" (entity pages) or "web" (search results).
        path: the original JSON, instead of a repository.
        evidence: folder of the documents of `path`.
        verified: 1 for the questions and documents of the verified subset alone; needs `path`.

    Returns:
        The data set. Questions without a document are left out, and their number is in its source.

    Raises:
        ConfigError: the data cannot be loaded, or an option is unknown.
    """
    if documents not in ("wikipedia", "web"):
        raise ConfigError(f"expected documents to be 'wikipedia' or 'web', got {documents!r}")
    if path:
        cases, source = _from_json(path, evidence, documents, bool(verified))
    elif verified:
        raise ConfigError("verified=1 needs path=: the rows on the Hub do not say which questions were verified")
    else:
        found, source = rows(repo, name, split, revision, streaming=True)
        cases = (_hub_case(row, documents, f"{repo}, row {number}") for number, row in enumerate(found))
    left_out = 0
    examples: list[Example] = []
    for case in cases:
        left_out += not case
        examples += case
        if request.limit is not None and len(examples) >= request.limit:
            break
    return Dataset(
        "TriviaQA", tuple(examples[: request.limit]), SCORES, 32, True, {**source, "without_document": left_out},
        chat_template=True, too_long="middle",
    )  # fmt: skip


def _examples(
    id_: str, question: str, answers: list[str], texts: list[tuple[str, str]], documents: str
) -> list[Example]:
    """Return one example over all documents for Wikipedia, one for each document for web; texts: (name, text)."""
    texts = [(name, text) for name, text in texts if text and text.strip()]
    asked = (Question(QUESTION.format(question=question), tuple(dict.fromkeys(answers))),)
    if documents == "web":
        return [Example(f"{id_}--{name}", HEADER + text, asked) for name, text in dict(texts).items()]
    return [Example(id_, HEADER + "\n\n".join(text for _, text in texts), asked)] if texts else []


def _hub_case(row: dict[str, Any], documents: str, where: str) -> list[Example]:
    answer = field(row, "answer", where)
    pages, key = ("entity_pages", "wiki_context") if documents == "wikipedia" else ("search_results", "search_context")
    page = field(row, pages, where)
    texts = list(zip(field(page, "filename", where), field(page, key, where), strict=True))
    return _examples(field(row, "question_id", where), field(row, "question", where),
                     [answer["value"], *answer["aliases"]], texts, documents)  # fmt: skip


def _from_json(
    path: str, evidence: str, documents: str, verified: bool
) -> tuple[Iterator[list[Example]], dict[str, Any]]:
    if not Path(evidence).is_dir() or not evidence:
        raise ConfigError(f"expected evidence= to name the folder of the documents of {path!r}, got {evidence!r}")
    text, source = read_text(path)
    try:
        data = field(json.loads(text), "Data", path)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    wanted = [(n, row) for n, row in enumerate(data) if not verified or row.get("QuestionPartOfVerifiedEval")]
    cases = (_json_case(row, Path(evidence), documents, f"{path}, record {n}", verified) for n, row in wanted)
    return cases, source


def _json_case(row: dict[str, Any], evidence: Path, documents: str, where: str, verified: bool) -> list[Example]:
    answer = field(row, "Answer", where)
    pages = row.get("EntityPages" if documents == "wikipedia" else "SearchResults", [])
    names = [
        field(page, "Filename", where) for page in pages if not verified or page.get("DocPartOfVerifiedEval")
    ]  # fmt: skip
    found = [(name, path) for name in names if (path := _inside(evidence, name)) is not None]
    texts = [(name, path.read_text(encoding="utf-8")) for name, path in found]
    return _examples(field(row, "QuestionId", where), field(row, "Question", where),
                     [answer["Value"], *answer.get("Aliases", [])], texts, documents)  # fmt: skip


def _inside(folder: Path, name: str) -> Path | None:
    """Return the path of a document, None where there is none or its name leads out of the folder."""
    path = (folder / name).resolve()
    return path if path.is_relative_to(folder.resolve()) and path.is_file() else None
