"""Attention sinks: the few tokens that a model attends to for any question, above all the first of a context.

An error in a sink affects every answer. On SmolLM2-135M the first token has three fifths of the sensitivity of a whole
context. The few per cent of tokens whose keys are much shorter than others' have more than four fifths. (Devoto et al.,
"A simple and effective L2 norm-based strategy for KV cache compression", 2024, show that short keys are attended to
most.) So

- klt codes sinks with steps 1/FINER times as large, at every level, and lists them in the side information;
- identity keeps the first token exactly, if it is a sink, because it is the one that matters there; for delta the first
  token is an anchor, which serves the same purpose.

The sinks are found from the cache alone. In models without sinks nothing is stored. Figures: docs/rate_distortion.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FINER = 4.0
"""The step of a sink is this many times smaller."""
LEAST_GAP, GAP_DEVIATIONS = 0.17, 3.5
"""A sink's log key norm is below the context's median by at least LEAST_GAP nats per layer, and by at least
GAP_DEVIATIONS
standard deviations of the other tokens.
"""
DEVIATION = 1.4826
"""Standard deviation of a normal distribution, in units of the median distance from the median."""
LEAST_TOKENS = 16
"""Contexts with fewer tokens are too short for the test."""


def find_sinks(keys: Sequence[Tensor]) -> Tensor:
    """Return the positions of the sinks, int64, ascending, on the CPU.

    Args:
        keys: Of each layer, [1, heads, tokens, dim].
    """
    tokens = keys[0].shape[2]
    if len(keys[0]) != 1 or tokens < LEAST_TOKENS:
        return torch.empty(0, dtype=torch.int64)
    total = torch.zeros(tokens)
    for x in keys:
        total += x[0].float().norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny).log().mean(0).cpu()
    below = total.median() - total
    gap = max(LEAST_GAP * len(keys), GAP_DEVIATIONS * DEVIATION * float(below.abs().median()))
    return (below > gap).nonzero().flatten()
