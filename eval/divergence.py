"""Measure the divergence between the predictions of two caches, in nats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eval.models import continuation_logits


@torch.no_grad()
def log_probabilities(model: Any, keys: Sequence[Tensor], values: Sequence[Tensor], ids: Tensor) -> Tensor:
    """Return the log-probabilities of the token after each of `ids`, float32 [tokens, vocabulary].

    Args:
        model: the model of the cache.
        keys: per layer [1, heads, context tokens, head_dim].
        values: likewise.
        ids: int64 [1, tokens], the tokens that follow the context.
    """
    return continuation_logits(model, keys, values, ids).log_softmax(-1)


def kl(exact: Tensor, lossy: Tensor) -> float:
    """Return the mean KL divergence in nats per token of log-probabilities [tokens, vocabulary]."""
    return (exact.exp() * (exact - lossy)).sum(-1).mean().item()
