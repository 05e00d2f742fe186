"""Metrics of generated text, which NarrativeQA reports beside each other: BLEU, ROUGE-L and METEOR.

They are of one sentence each, so that contexts can be compared in pairs; papers often report BLEU over a whole corpus.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

ROUGE_BETA = 1.2
"""Weight of recall against precision in ROUGE-L, as in the caption evaluation that NarrativeQA used."""


def bleu(output: Sequence[str], answer: Sequence[str], order: int) -> float:
    """Return BLEU of one sentence with the brevity penalty (Papineni et al. 2002).

    Args:
        output: words of the output.
        answer: words of a right answer.
        order: longest n-gram. Counts of n-grams above 1 are smoothed by one (Lin and Och 2004).
    """
    if not output or not answer:
        return 0.0
    logs = 0.0
    for n in range(1, order + 1):
        found, expected = _ngrams(output, n), _ngrams(answer, n)
        extra = n > 1
        hits, total = sum((found & expected).values()) + extra, sum(found.values()) + extra
        if not hits:
            return 0.0
        logs += math.log(hits / total) / order
    return math.exp(logs + min(0.0, 1 - len(answer) / len(output)))


def _ngrams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[first : first + n]) for first in range(len(words) - n + 1))


def rouge_l(output: Sequence[str], answer: Sequence[str]) -> float:
    """Return the F-measure of the longest common subsequence of words (Lin 2004)."""
    lengths = [0] * (len(answer) + 1)
    for word in output:
        before = 0
        for index, other in enumerate(answer, 1):
            before, lengths[index] = (
                lengths[index], before + 1 if word == other else max(lengths[index], lengths[index - 1])
            )  # fmt: skip
    common = lengths[-1]
    if not common:
        return 0.0
    precision, recall = common / len(output), common / len(answer)
    return (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)


def meteor(output: Sequence[str], answer: Sequence[str]) -> float:
    """Return METEOR with exact matches alone (Banerjee and Lavie 2005): no stems and no synonyms.

    Words are matched from left to right, each to the first free equal word, preferring the one that continues a run.
    """
    free = dict(enumerate(answer))
    matched = chunks = 0
    following = next_output = -1  # where a run would continue, in the answer and in the output
    for at, word in enumerate(output):
        candidates = [index for index, other in free.items() if other == word]
        if not candidates:
            continue
        chosen = following if following in candidates else candidates[0]
        chunks += not (chosen == following and next_output == at)
        del free[chosen]
        matched += 1
        following, next_output = chosen + 1, at + 1
    if not matched:
        return 0.0
    precision, recall = matched / len(output), matched / len(answer)
    mean = 10 * precision * recall / (recall + 9 * precision)
    return mean * (1 - 0.5 * (chunks / matched) ** 3)
