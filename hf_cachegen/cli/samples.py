"""Samples to learn a profile from: texts that are cut into contexts and continuations, and rows of a JSONL file.

A sample is (context, continuation), both token ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from random import Random
from typing import Any

import click

from hf_cachegen.cli.models import token_ids

TokenSample = tuple[list[int], list[int]]


def from_text(tokenizer: Any, text: str, context_tokens: int, continuation_tokens: int) -> list[TokenSample]:
    """Cut a text into samples that do not overlap. Each context begins with the tokens that begin a text (BOS).

    The last context may be shorter, but not shorter than its continuation (or context_tokens).
    """
    ids, started = (token_ids(tokenizer, text, start=start) for start in (False, True))
    start = started[: len(started) - len(ids)]
    whole = max(1, context_tokens - len(start)) + continuation_tokens
    pieces = [ids[at : at + whole] for at in range(0, len(ids), whole)]
    least = min(whole, 2 * continuation_tokens)
    return [(start + p[:-continuation_tokens], p[-continuation_tokens:]) for p in pieces if len(p) >= least]


def from_rows(tokenizer: Any, lines: Iterable[str], name: str) -> list[TokenSample]:
    """Tokenize the samples of a file with {"context": text, "continuation": text} in each line; they are not cut."""
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        context, continuation = _texts(line, f"{name}, line {number}")
        sample = token_ids(tokenizer, context, start=True), token_ids(tokenizer, continuation, start=False)
        if not all(sample):
            raise _wrong(f"{name}, line {number}: expected two texts of at least one token each")
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
    """Draw at most `most` samples, evenly from the sources, so that a long text does not outweigh the others.

    The order is random, because learning holds out samples at fixed positions.
    """
    random = Random(seed)
    shuffled = [random.sample(source, len(source)) for source in sources]
    drawn = [sample for turn in zip_longest(*shuffled) for sample in turn if sample is not None][:most]
    random.shuffle(drawn)
    return drawn
