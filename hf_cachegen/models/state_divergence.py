"""Measure how much quantised states change what a model computes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_cachegen.models.compat import run
from hf_cachegen.models.continuation import continuation_of, positions
from hf_cachegen.models.kinds import layer_contents
from hf_cachegen.models.layers import KVTensors, build_by_config
from hf_cachegen.models.prefix import Reuse
from hf_cachegen.models.recurrent import Checkpoint, Checkpoints
from hf_cachegen.models.running import evaluation_mode, layer_devices
from hf_cachegen.models.state import fresh_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MEASURED_TOKENS = 64
"""Largest number of tokens after a checkpoint over which the divergence is averaged."""


@torch.no_grad()
def state_divergence(model: PreTrainedModel, kv: KVTensors, ids: Tensor, checkpoints: Checkpoints) -> float:
    """Return the mean KL in nats per token that the states cause as they are stored, against the exact ones.

    The context's own tokens after a checkpoint are read from both, with exact keys and values before them. Of the
    checkpoints, the last one counts that has MEASURED_TOKENS tokens after it, else the first.

    Args:
        model: the model.
        kv: the exact keys and values of the context.
        ids: the context, int64 [1, tokens].
        checkpoints: the exact states, and how they are stored.
    """
    last = checkpoints.last(ids.shape[1] - MEASURED_TOKENS)
    exact = checkpoints.all[0] if last is None else last
    stored = Checkpoints.from_named(Checkpoints((exact,), checkpoints.bits).named(), exact.tokens).all[0]
    with evaluation_mode(model), fresh_state(model):
        right, wrong = (_log_probabilities(model, kv, ids, found) for found in (exact, stored))
    return float((right.exp() * (right - wrong)).sum(-1).mean())


def _log_probabilities(model: PreTrainedModel, kv: KVTensors, ids: Tensor, checkpoint: Checkpoint) -> Tensor:
    devices = layer_devices(model, len(layer_contents(model.config)))
    reuse = Reuse((0,), checkpoint.tokens, whole=False)
    cache = build_by_config(kv, checkpoint, reuse, 1, devices, model.config)
    rest = ids[:, checkpoint.tokens : checkpoint.tokens + MEASURED_TOKENS].to(devices[0])
    found, held = [], checkpoint.tokens
    for part in rest.split(rest.shape[1] if continuation_of(model).several else 1, 1):
        found.append(run(model, part, cache, **positions(model, part, held))[0][0].float())
        held += part.shape[1]
    return torch.cat(found).log_softmax(-1)
