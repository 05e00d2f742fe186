"""Attention sinks: the few tokens that a model looks at whatever it is asked, the first of a context above all.

An error in a sink reaches every answer. On SmolLM2-135M the first token has three fifths of the sensitivity of a whole
context, and the few per cent of tokens whose keys are much shorter than others' have more than four fifths (that short
keys are looked at most is known from Devoto et al., "A simple and effective L2 norm-based strategy for KV cache
compression", 2024). So

- klt codes sinks with steps FINER times as fine, at every level, and lists them in the side information;
- identity, where the first token alone matters, keeps that one exactly, if it is a sink; for delta it is an anchor,
  which does as well.

Which tokens are sinks follows from the cache alone; in models without any, nothing is stored. Figures:
docs/rate_distortion.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FINER = 4.0
LEAST_GAP, GAP_DEVIATIONS = 0.17, 3.5
"""A sink's keys are shorter than the context's median by so much of a nat, and by so many deviations of the others."""
DEVIATION = 1.4826
"""Of a normal distribution, in units of the median distance from the median."""
LEAST_TOKENS = 16
"""Of shorter contexts one cannot tell."""


def find_sinks(keys: Sequence[Tensor]) -> Tensor:
    """Positions of the sinks, int64, rising, on the CPU. keys: of each layer, [1, heads, tokens, dim]."""
    tokens = keys[0].shape[2]
    if len(keys[0]) != 1 or tokens < LEAST_TOKENS:
        return torch.empty(0, dtype=torch.int64)
    total = torch.zeros(tokens)
    for x in keys:
        total += x[0].float().norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny).log().mean(0).cpu()
    below = total.median() - total
    gap = max(LEAST_GAP * len(keys), GAP_DEVIATIONS * DEVIATION * float(below.abs().median()))
    return (below > gap).nonzero().flatten()
