"""Score one answer: pure functions of the model's output and the right answers.

There are two TriviaQA normalisers. LongBench (like SQuAD) deletes punctuation, so "rock'n'roll" is one word; the
official TriviaQA script replaces punctuation, typographic quotes and underscores by spaces. Both are here: `f1` and
`em`, `f1_triviaqa` and `em_triviaqa`. The score of an answer is the best over the right answers.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from eval import generation_scores

Scorer = Callable[[str, Sequence[str]], float]
"""(output, right answers) to a score from 0 to 1."""

_DELETED = str.maketrans("", "", string.punctuation)
_SPACED = str.maketrans(dict.fromkeys(string.punctuation + "\u2018\u2019\u00b4`", " "))


def last_integer(output: str) -> str | None:
    """Return the last run of digits in the output, as LongChat's line retrieval scores it, None where there is none."""
    found = re.findall(r"\d+", output)
    return found[-1] if found else None


def line_retrieval(output: str, expected: str) -> bool:
    """Report whether the last integer of the output is the register's content (LongChat lines, LongEval)."""
    return last_integer(output) == expected


def normalise(text: str) -> str:
    """Normalise as SQuAD and LongBench do: lower case, no punctuation, no articles, single spaces."""
    return _without_articles(text.lower().translate(_DELETED))


def normalise_triviaqa(text: str) -> str:
    """Normalise as the official TriviaQA script does: like `normalise`, with spaces for punctuation."""
    return _without_articles(text.lower().translate(_SPACED))


def words(text: str) -> list[str]:
    """Return the words of a text for the metrics of generated text: lower case, no punctuation, articles kept."""
    return text.lower().translate(_DELETED).split()


def _without_articles(text: str) -> str:
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def token_f1(output: str, answer: str, normal: Callable[[str], str] = normalise) -> float:
    """Return the F1 of the words that output and answer share."""
    found, expected = normal(output).split(), normal(answer).split()
    common = sum((Counter(found) & Counter(expected)).values())
    return 2 * common / (len(found) + len(expected)) if common else 0.0


def contains(output: str, answer: str) -> bool:
    """Report whether the normalised output contains the normalised topic, word by word (LongChat topics).

    LongEval itself had GPT-3.5 judge, which cannot be repeated here.
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
    "bleu_1": _best(lambda output, answer: generation_scores.bleu(words(output), words(answer), 1)),
    "bleu_4": _best(lambda output, answer: generation_scores.bleu(words(output), words(answer), 4)),
    "rouge_l": _best(lambda output, answer: generation_scores.rouge_l(words(output), words(answer))),
    "meteor": _best(lambda output, answer: generation_scores.meteor(words(output), words(answer))),
}
"""Every score that a data set may name."""
SCORE_TITLES = {
    "line": "exact match",
    "topic": "topic named",
    "f1": "F1",
    "em": "exact match",
    "f1_triviaqa": "F1, TriviaQA's",
    "em_triviaqa": "exact match, TriviaQA's",
    "bleu_1": "BLEU-1",
    "bleu_4": "BLEU-4",
    "rouge_l": "ROUGE-L",
    "meteor": "METEOR, exact words",
}
"""Score to its title in tables and plots."""
