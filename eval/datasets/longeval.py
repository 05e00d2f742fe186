"""LongEval's two tasks (LongChat, Li et al. 2023): the published cases, and cases of the same wording of any length.

Lines: the number of one line of a record; the last integer of the answer is scored. Topics: the first topic of a
conversation; right when the answer contains it. Both have the model's chat template around the prompt, and the token
limits of LongEval's scripts. CacheGen's own LongChat cases (`prompt`, `label`) are topics too: their text holds a chat
template already, and the artifact generates 20 tokens.
"""

from __future__ import annotations

import random
from typing import Any

from eval.datasets.request import Request, field, read_rows
from eval.examples import Dataset, Example, Question, split
from eval.reference import corpus
from eval.reference.words import ADJECTIVES, NOUNS, TOPIC_FIELDS
from hf_cachegen.errors import ConfigError

LINES_HEADER = (
    "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and contains a "
    "'<REGISTER_CONTENT>' at the end of the line as a numerical value. For each line index, memorize its "
    "corresponding <REGISTER_CONTENT>. At the end of the record, I will ask you to retrieve the corresponding "
    "<REGISTER_CONTENT> of a certain line index. Now the record start:\n\n"
)
LINES_END = "Now the record is over."
LINES_QUESTION = LINES_END + " Tell me what is the <REGISTER_CONTENT> in line {name}? I need the number. "
TOPICS_HEADER = (
    "Below is a record of our previous conversation on {count} different topics. You are the ASSISTANT, and I am the "
    "USER. At the beginning of each topic, the USER will say 'I would like to discuss the topic of <TOPIC>'. Memorize "
    "each <TOPIC>. At the end of the record, I will ask you to retrieve the first topic. Now the record start."
)
TOPICS_END = "Now the record ends."
TOPICS_QUESTION = (
    " " + TOPICS_END + " What is the first topic we discussed? Only give me the topic name. Do not summarize yourself."
)
LARGEST_NUMBER = 50000
DEFAULT_CONTEXTS = 50
"""Number of cases in the published files."""
MAX_LINES = len(ADJECTIVES) * len(NOUNS) // 2
LINE_TOKENS, TOPIC_TOKENS, ARTIFACT_TOKENS = 100, 50, 20
"""Most tokens of an answer: LongEval's two scripts, and the artifact."""


def lines(request: Request, path: str = "", lines: int = 200, tokens: int = 0) -> Dataset:
    """Load or generate line retrieval.

    Args:
        request: limit and seed.
        path: the published JSONL; empty to generate.
        lines: lines of a generated record.
        tokens: length of a generated context in tokens, instead of `lines`.

    Raises:
        ConfigError: the file has another form, or the record would be too long.
    """
    if path:
        rows, source = read_rows(path)
        examples = [_line_case(row, f"{path}, row {n}") for n, row in enumerate(rows[: request.limit], 1)]
    else:
        examples, source = [], {}
        for index in range(request.count(DEFAULT_CONTEXTS)):
            rng = random.Random(f"longeval lines {request.seed} {index}")
            count = (
                _fit(request, tokens, lambda n, index=index: _record(request.seed, index, n)[0]) if tokens else lines
            )
            if not 1 <= count <= MAX_LINES:
                raise ConfigError(f"a record has from 1 to {MAX_LINES} lines, got {count}")
            context, numbers = _record(request.seed, index, count)
            name = rng.choice(list(numbers))
            question = Question(LINES_QUESTION.format(name=name), (numbers[name],))
            examples.append(Example(str(index), context, (question,)))
    return Dataset("LongEval lines", tuple(examples), ("line",), LINE_TOKENS, source=source, chat_template=True)


def topics(request: Request, path: str = "", topics: int = 5, tokens: int = 0, turns: int = 4) -> Dataset:
    """Load or generate topic retrieval.

    Args:
        request: limit and seed.
        path: the published JSONL, LongEval's or CacheGen's own; empty to generate.
        topics: topics of a generated conversation.
        tokens: length of a generated context in tokens, instead of `topics`.
        turns: exchanges about each generated topic.

    Raises:
        ConfigError: the file has another form.
    """
    artifact = False
    if path:
        rows, source = read_rows(path)
        artifact = any("label" in row for row in rows)
        examples = [_topic_case(row, f"{path}, row {n}") for n, row in enumerate(rows[: request.limit], 1)]
    else:
        examples, source = [], {}
        for index in range(request.count(DEFAULT_CONTEXTS)):
            seed = f"longeval topics {request.seed} {index}"
            count = _fit(request, tokens, lambda n, seed=seed: _talk(seed, n, turns)[0]) if tokens else topics
            context, first = _talk(seed, count, turns)
            examples.append(Example(str(index), context, (Question(TOPICS_QUESTION, (first,)),)))
    name, most = ("CacheGen LongChat", ARTIFACT_TOKENS) if artifact else ("LongEval topics", TOPIC_TOKENS)
    return Dataset(name, tuple(examples), ("topic",), most, source=source, chat_template=not artifact)


def _line_case(row: dict[str, Any], where: str) -> Example:
    parts = split(field(row, "prompt", where), LINES_END)
    if parts is None:
        raise ConfigError(f"{where}: the prompt does not contain {LINES_END!r}")
    return Example(
        where.rpartition(" ")[2], parts[0], (Question(parts[1], (str(field(row, "expected_number", where)),)),)
    )


def _topic_case(row: dict[str, Any], where: str) -> Example:
    parts = split(field(row, "prompt", where), TOPICS_END)
    if parts is None:
        raise ConfigError(f"{where}: the prompt does not contain {TOPICS_END!r}")
    named = field(row, "label" if "label" in row else "topics", where)
    return Example(where.rpartition(" ")[2], parts[0], (Question(parts[1], (str(named[0]),)),))


def _record(seed: int, index: int, count: int) -> tuple[str, dict[str, str]]:
    """Return (context, number of every line); a longer record of the same seed begins with other lines."""
    rng = random.Random(f"longeval record {seed} {index} {count}")
    numbers = {name: str(rng.randint(1, LARGEST_NUMBER)) for name in corpus.line_names(rng, count)}
    record = "".join(f"line {name}: REGISTER_CONTENT is <{number}>\n" for name, number in numbers.items())
    return f"{LINES_HEADER}{record}\n", numbers


def _talk(seed: str, count: int, turns: int) -> tuple[str, str]:
    """Return (context, its first topic)."""
    rng = random.Random(f"{seed} {count}")
    named: list[str] = []
    while len(named) < count:
        named.append(f"the {rng.choice(TOPIC_FIELDS)} of {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}s")
        named = list(dict.fromkeys(named))
    parts = [TOPICS_HEADER.format(count=count)]
    for topic in named:
        parts.append(f" USER: I would like to discuss the topic of {topic}. \n ASSISTANT: Sure, I'd be happy to talk "
                     "about that with you! What specifically would you like to know? \n")  # fmt: skip
        for _ in range(turns):
            parts.append(
                f" USER: {corpus.sentence(rng)} \n ASSISTANT: {corpus.sentence(rng)} {corpus.sentence(rng)} \n"
            )
        parts.append(f" USER: Great, this is the end of our discussion on {topic}. Let's talk about the next topic.")
    return "".join(parts), named[0]


def _fit(request: Request, tokens: int, make: Any) -> int:
    """Return the largest count whose text has at most `tokens` tokens, but at least 1."""
    low, high = 1, 2
    while high < MAX_LINES and request.tokens(make(high)) <= tokens:
        low, high = high, min(2 * high, MAX_LINES)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if request.tokens(make(middle)) <= tokens else (low, middle)
    return low
