"""What a profile is learnt from: texts cut into contexts and what follows them, and rows of a task's own.

A sample is (context, continuation), both token ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from random import Random
from typing import Any

import click

from hf_cachegen.cli_models import token_ids

TokenSample = tuple[list[int], list[int]]


def from_text(tokenizer: Any, text: str, context_tokens: int, continuation_tokens: int) -> list[TokenSample]:
    """A text's samples, one behind the other, none overlapping; each context begins as the tokenizer begins a text.

    The last one may have a shorter context, but no shorter than its continuation (or context_tokens).
    """
    ids, started = (token_ids(tokenizer, text, start=start) for start in (False, True))
    start = started[: len(started) - len(ids)]
    whole = max(1, context_tokens - len(start)) + continuation_tokens
    pieces = [ids[at : at + whole] for at in range(0, len(ids), whole)]
    least = min(whole, 2 * continuation_tokens)
    return [(start + p[:-continuation_tokens], p[-continuation_tokens:]) for p in pieces if len(p) >= least]


def from_rows(tokenizer: Any, lines: Iterable[str], name: str) -> list[TokenSample]:
    """The samples of a file with {"context": text, "continuation": text} in each line, taken whole."""
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        context, continuation = _texts(line, f"{name}, line {number}")
        sample = token_ids(tokenizer, context, start=True), token_ids(tokenizer, continuation, start=False)
        if not all(sample):
            raise _wrong(f"{name}, line {number}: the tokenizer makes no tokens of one of the texts")
        found.append(sample)
    return found


def _texts(line: str, where: str) -> tuple[str, str]:
    expected = 'expected a JSON object with two texts, "context" and "continuation"'
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _wrong(f"{where}: {expected}; {error}") from error
    if isinstance(row, dict):
        context, continuation = row.get("context"), row.get("continuation")
        if isinstance(context, str) and isinstance(continuation, str):
            return context, continuation
    raise _wrong(f"{where}: {expected}, got {line.strip()[:80]!r}")


def _wrong(message: str) -> click.BadParameter:
    return click.BadParameter(message, param_hint="'--samples-jsonl'")


def draw(sources: Sequence[Sequence[TokenSample]], most: int, seed: int) -> list[TokenSample]:
    """At most `most` samples, as many from each source as there are, so that a long text does not outweigh the others.

    In random order, since every so many are held out of the learning.
    """
    random = Random(seed)
    shuffled = [random.sample(source, len(source)) for source in sources]
    drawn = [sample for turn in zip_longest(*shuffled) for sample in turn if sample is not None][:most]
    random.shuffle(drawn)
    return drawn
