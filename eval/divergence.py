"""How far one cache's predictions are from another's, in nats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eval.models import continuation_logits


@torch.no_grad()
def log_probabilities(model: Any, keys: Sequence[Tensor], values: Sequence[Tensor], ids: Tensor) -> Tensor:
    """float32 [tokens, vocabulary] of the token after each of ids [1, tokens], which follow these keys and values."""
    return continuation_logits(model, keys, values, ids).log_softmax(-1)


def kl(exact: Tensor, lossy: Tensor) -> float:
    """Mean divergence per token of log-probabilities [tokens, vocabulary]."""
    return (exact.exp() * (exact - lossy)).sum(-1).mean().item()
