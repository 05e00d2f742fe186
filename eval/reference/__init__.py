"""The reference model: small enough to be committed, good enough to evaluate caches.

`train.py` trained it on the text of `corpus.py`.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from torch import Tensor

from eval.reference import corpus

MODEL_PATH = Path(__file__).with_name("model")
"""Weights (bf16 safetensors), tokenizer, training record and the model's profile."""
HELD_OUT_SEED = 1 << 40
"""First seed of test documents; training draws everything from one small seed."""
CALIBRATION_SEED = 1 << 41
"""First seed of documents for learning profiles."""
TASKS = ("lines", "topics", "stories")
LINE_TOKENS = 8
"""Tokens of a line of a record; its heading takes about 60."""


def held_out_lines(index: int, lines: int, questions: int, distinct: bool = True) -> corpus.Document:
    """Return the `index`-th test document of line retrieval; `corpus.lines` explains `distinct`."""
    return corpus.lines(random.Random(HELD_OUT_SEED + index), lines, questions, distinct)


def document(task: str, seed: int, tokens: int) -> corpus.Document:
    """Return a document whose context has about `tokens` tokens, with questions about it."""
    rng = random.Random(seed)
    if task == "lines":
        return corpus.lines(rng, max(2, (tokens - 60) // LINE_TOKENS), 8)
    if task == "topics":
        return corpus.topics(rng, max(1, min(24, tokens // 110)), turns=2)
    return corpus.stories(rng, max(2, min(70, tokens // 85)), 12)


def sample(tokenizer: Any, task: str, seed: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Return (context, its questions with their right answers) as token ids int64 [1, tokens]."""
    made = document(task, seed, tokens)
    after = "".join(question.prompt + question.completion for question in made.questions)
    context: Tensor = tokenizer(made.text, return_tensors="pt").input_ids
    return context, tokenizer(after, return_tensors="pt").input_ids
