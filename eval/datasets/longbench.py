"""TriviaQA and NarrativeQA in LongBench's form (Bai et al. 2023): `context`, `input`, `answers`, its prompts and F1.

The prompts are LongBench's word for word, its "asconcisely" included: scores are compared with other people's.
"""

from __future__ import annotations

from eval.datasets.hub_rows import rows
from eval.datasets.request import Request, field
from eval.examples import Dataset, Example, Question

REPO = "Xnhyacinth/LongBench"
"""A Parquet copy of THUDM's, whose own repository is a script."""
TRIVIAQA = (
    "Answer the question based on the given passage. Only give me the answer and do not output any other words. The "
    "following are some examples.\n\n",
    "\n\n{input}",
)
NARRATIVEQA = (
    "You are given a story, which can be either a novel or a movie script, and a question. Answer the question "
    "asconcisely as you can, using a single phrase if possible. Do not provide any explanation.\n\nStory: ",
    "\n\nNow, answer the question based on the story asconcisely as you can, using a single phrase if possible. Do not "
    "provide any explanation.\n\nQuestion: {input}\n\nAnswer:",
)
"""What stands before the context, and the question."""


def triviaqa(
    request: Request, repo: str = REPO, revision: str = "main", split: str = "test", files: str = ""
) -> Dataset:
    """Few-shot passages are the context, the passage asked about and its question the question. 32 new tokens."""
    return _load(request, "LongBench TriviaQA", "triviaqa", TRIVIAQA, 32, True, repo, revision, split, files)


def narrativeqa(
    request: Request, repo: str = REPO, revision: str = "main", split: str = "test", files: str = ""
) -> Dataset:
    """A story and a question. 128 new tokens."""
    return _load(request, "LongBench NarrativeQA", "narrativeqa", NARRATIVEQA, 128, False, repo, revision, split, files)


def _load(
    request: Request, title: str, name: str, form: tuple[str, str], new_tokens: int, first_line: bool, repo: str,
    revision: str, split: str, files: str,
) -> Dataset:  # fmt: skip
    found, source = rows(repo, name, split, revision, files=files, limit=request.limit)
    examples = []
    for number, row in enumerate(found):
        where = f"{repo}/{name}, row {number}"
        context, asked, answers = (field(row, key, where) for key in ("context", "input", "answers"))
        question = Question(form[1].format(input=asked), tuple(answers))
        examples.append(Example(str(row.get("_id") or number), form[0] + context, (question,)))
    return Dataset(title, tuple(examples), ("f1", "em"), new_tokens, first_line, source)
