"""The reference model: small enough to be committed, good enough to measure caches by. `train.py` made it, `corpus.py`
its text.
"""

from __future__ import annotations

import random
from pathlib import Path

from eval.reference import corpus

MODEL_PATH = Path(__file__).with_name("model")
"""Weights (bf16 safetensors), tokenizer and training record."""
HELD_OUT_SEED = 1 << 40
"""Seeds from here on are for tests: training draws everything from one small seed."""


def held_out_lines(index: int, lines: int, questions: int) -> corpus.Document:
    """The `index`-th test document of the line retrieval task."""
    rng = random.Random(HELD_OUT_SEED + index)
    return corpus.lines(rng, lines, questions)
