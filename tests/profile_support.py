"""Samples of contexts and continuations for learning a profile of a tiny model."""

from __future__ import annotations

import torch

from hf_cachegen.profiles.learning import Sample
from tests.tiny_models import VOCABULARY


def samples(count: int = 10, seed: int = 0) -> list[Sample]:
    """Draw (context, continuation) pairs, int64 [1, 60] and [1, 12]."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randint(3, VOCABULARY, (1, 60), generator=generator),
            torch.randint(3, VOCABULARY, (1, 12), generator=generator),
        )
        for _ in range(count)
    ]
