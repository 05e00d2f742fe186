"""Scores of one answer: pure functions of the model's output and the answers that are right.

Twists: two TriviaQA scorers are about and they differ. LongBench (like SQuAD) *deletes* punctuation, so "rock'n'roll"
is one word; the official TriviaQA script puts a *space* in its place, and for the typographic quotes and the underscore
too. Both are here, apart: `f1`, `em` and `f1_triviaqa`, `em_triviaqa`. An answer counts as its best match among the
right ones.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

Scorer = Callable[[str, Sequence[str]], float]
"""(output, right answers) to a score from 0 to 1."""

_DELETED = str.maketrans("", "", string.punctuation)
_SPACED = str.maketrans(dict.fromkeys(string.punctuation + "\u2018\u2019\u00b4`", " "))


def last_integer(output: str) -> str | None:
    """The last run of digits in the output, as LongChat's line retrieval scores it; None where there is none."""
    found = re.findall(r"\d+", output)
    return found[-1] if found else None


def line_retrieval(output: str, expected: str) -> bool:
    """LongChat lines (LongEval): right when the last integer of the output is the register's content."""
    return last_integer(output) == expected


def normalise(text: str) -> str:
    """SQuAD's and LongBench's: lower case, punctuation deleted, articles out, single spaces."""
    return _without_articles(text.lower().translate(_DELETED))


def normalise_triviaqa(text: str) -> str:
    """The official TriviaQA script's: as `normalise`, but punctuation, quotes and underscores become spaces."""
    return _without_articles(text.lower().translate(_SPACED))


def _without_articles(text: str) -> str:
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def token_f1(output: str, answer: str, normal: Callable[[str], str] = normalise) -> float:
    """F1 of the words that both have."""
    found, expected = normal(output).split(), normal(answer).split()
    common = sum((Counter(found) & Counter(expected)).values())
    return 2 * common / (len(found) + len(expected)) if common else 0.0


def contains(output: str, answer: str) -> bool:
    """LongChat topics: right when the normalised topic is in the normalised output, word by word.

    (LongEval itself had GPT-3.5 judge, which no run here can repeat.)
    """
    return f" {normalise(answer)} " in f" {normalise(output)} "


def _best(score: Callable[[str, str], float]) -> Scorer:
    return lambda output, answers: max((float(score(output, answer)) for answer in answers), default=0.0)


SCORERS: dict[str, Scorer] = {
    "line": _best(line_retrieval),
    "topic": _best(contains),
    "f1": _best(token_f1),
    "em": _best(lambda output, answer: normalise(output) == normalise(answer)),
    "f1_triviaqa": _best(lambda output, answer: token_f1(output, answer, normalise_triviaqa)),
    "em_triviaqa": _best(lambda output, answer: normalise_triviaqa(output) == normalise_triviaqa(answer)),
}
"""Every score that a dataset may name."""
SCORE_TITLES = {
    "line": "exact match",
    "topic": "topic named",
    "f1": "F1",
    "em": "exact match",
    "f1_triviaqa": "F1, TriviaQA's",
    "em_triviaqa": "exact match, TriviaQA's",
}
"""How tables and plots call them."""
