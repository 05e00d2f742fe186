"""Compute a chunk's keys and values from its tokens, straight into the context's tensors.

The stock layers grow by concatenation, which would copy all tokens before the chunk for each layer. Here a layer is a
view of the context's tensors up to where the model has read, and new tokens are written behind it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from hf_cachegen.codec.chunk import Span
from hf_cachegen.models.compat import run
from hf_cachegen.models.running import evaluation_mode
from hf_cachegen.models.state import fresh_state

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel


class _InPlaceLayer(DynamicLayer):
    """keys, values: [1, heads, tokens, dim], whose first `held` tokens are in place."""

    def __init__(self, keys: Tensor, values: Tensor, held: int) -> None:
        super().__init__()
        self._whole = keys, values
        super().lazy_initialization(keys, values)
        self._show(held)

    def _show(self, held: int) -> None:
        self.keys, self.values = (whole[:, :, :held] for whole in self._whole)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append tokens without a copy of those before them."""
        held = self.keys.shape[2]
        stop = held + key_states.shape[2]
        for whole, states in zip(self._whole, (key_states, value_states), strict=True):
            whole[:, :, held:stop] = states
        self._show(stop)
        return self.keys, self.values


@torch.no_grad()
def recompute(
    model: PreTrainedModel, input_ids: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], span: Span
) -> None:
    """Compute the keys and values of a chunk.

    Args:
        model: The model, which is run in evaluation mode.
        input_ids: The context, int64 [1, tokens].
        keys: [1, heads, tokens, dim] for each layer. Written in place.
        values: The same.
        span: The chunk. All tokens before it must be in place; those behind it are not read.
    """
    # Every layer keeps all tokens, sliding ones too: the mask limits what they attend to, as in a prefill.
    cache = DynamicCache()
    cache.layer_class_to_replicate = None
    cache.layers = [_InPlaceLayer(*pair, span.first) for pair in zip(keys, values, strict=True)]
    ids = input_ids[:, span.first : span.first + span.tokens].to(keys[0].device)
    with evaluation_mode(model), fresh_state(model):
        run(model, ids, cache, last_logits_only=True)
