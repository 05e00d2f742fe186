"""TriviaQA and NarrativeQA as LongBench asks them (Bai et al. 2023): its prompts, token limits, truncation and F1.

The prompts are LongBench's word for word, its "asconcisely" included, so that scores can be compared. Prompts that are
too long lose tokens in the middle. NarrativeQA has the model's chat template around it, TriviaQA has not, because its
prompt is few-shot.
"""

from __future__ import annotations

from eval.datasets.hub_rows import rows
from eval.datasets.request import Request, field
from eval.examples import Dataset, Example, Question, split
from hf_cachegen.errors import ConfigError

REPO = "Xnhyacinth/LongBench"
"""A Parquet copy of THUDM/LongBench, whose own repository is a script."""
TRIVIAQA = (
    "Answer the question based on the given passage. Only give me the answer and do not output any other words. The "
    "following are some examples.\n\n",
    "\n\n{input}",
)
"""The prompt before and after the few-shot examples."""
TRIVIAQA_QUESTION = "Question:"
"""Separates the passage asked about, which is evidence and is cached, from its question."""
NARRATIVEQA = (
    "You are given a story, which can be either a novel or a movie script, and a question. Answer the question "
    "asconcisely as you can, using a single phrase if possible. Do not provide any explanation.\n\nStory: ",
    "\n\nNow, answer the question based on the story asconcisely as you can, using a single phrase if possible. Do not "
    "provide any explanation.\n\nQuestion: {input}\n\nAnswer:",
)
"""The prompt before and after the story."""
SCORES = ("f1", "em")


def triviaqa(
    request: Request, repo: str = REPO, revision: str = "main", split: str = "test", files: str = ""
) -> Dataset:
    """Load TriviaQA: the context is the few-shot examples and the passage asked about, 32 new tokens."""
    found, source = rows(repo, "triviaqa", split, revision, files=files, limit=request.limit)
    examples = []
    for number, row in enumerate(found):
        where = f"{repo}/triviaqa, row {number}"
        shots, asked, answers = (field(row, key, where) for key in ("context", "input", "answers"))
        context, question = _evidence(TRIVIAQA[0] + shots + TRIVIAQA[1].format(input=asked), asked, where)
        examples.append(Example(str(row.get("_id") or number), context, (Question(question, tuple(answers)),)))
    return Dataset("LongBench TriviaQA", tuple(examples), SCORES, 32, True, source, too_long="middle")


def _evidence(prompt: str, asked: str, where: str) -> tuple[str, str]:
    """Return (context, question) of a prompt that ends with `asked`, the passage inside the context."""
    parts = split(prompt, TRIVIAQA_QUESTION)
    if TRIVIAQA_QUESTION not in asked or parts is None:
        raise ConfigError(f"{where}: expected {TRIVIAQA_QUESTION!r} between passage and question in 'input'")
    return parts


def narrativeqa(
    request: Request, repo: str = REPO, revision: str = "main", split: str = "test", files: str = ""
) -> Dataset:
    """Load NarrativeQA: the context is the story, 128 new tokens."""
    found, source = rows(repo, "narrativeqa", split, revision, files=files, limit=request.limit)
    examples = []
    for number, row in enumerate(found):
        where = f"{repo}/narrativeqa, row {number}"
        story, asked, answers = (field(row, key, where) for key in ("context", "input", "answers"))
        question = Question(NARRATIVEQA[1].format(input=asked), tuple(answers))
        examples.append(Example(str(row.get("_id") or number), NARRATIVEQA[0] + story, (question,)))
    return Dataset(
        "LongBench NarrativeQA", tuple(examples), SCORES, 128, False, source, chat_template=True, too_long="middle"
    )
