"""A chunk's keys and values from its tokens, by the model, straight into the context's tensors.

The stock layers grow by concatenation, which would copy everything before the chunk once more for each layer. Here a
layer is a view of the context's tensors up to where the model has read: what is new is written behind it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from hf_cachegen.models.compat import run
from hf_cachegen.models.running import evaluation_mode
from hf_cachegen.models.state import fresh_state

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel


class _InPlaceLayer(DynamicLayer):
    """keys, values: [1, heads, tokens, dim], of which the first `held` tokens are in place."""

    def __init__(self, keys: Tensor, values: Tensor, held: int) -> None:
        super().__init__()
        self._whole = keys, values
        super().lazy_initialization(keys, values)
        self._show(held)

    def _show(self, held: int) -> None:
        self.keys, self.values = (whole[:, :, :held] for whole in self._whole)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As the stock layer's, without a copy."""
        held = self.keys.shape[2]
        stop = held + key_states.shape[2]
        for whole, states in zip(self._whole, (key_states, value_states), strict=True):
            whole[:, :, held:stop] = states
        self._show(stop)
        return self.keys, self.values


@torch.no_grad()
def recompute(
    model: PreTrainedModel, input_ids: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], first: int, tokens: int
) -> None:
    """Writes tokens [first, first + tokens) into keys and values ([1, heads, all tokens, dim] for each layer).

    input_ids int64 [1, all tokens]. All tokens before `first` must be in place; those behind are not looked at.
    """
    # Every layer keeps all tokens, sliding ones too: the mask limits what they look at, as in a prefill.
    cache = DynamicCache()
    cache.layer_class_to_replicate = None
    cache.layers = [_InPlaceLayer(*pair, first) for pair in zip(keys, values, strict=True)]
    ids = input_ids[:, first : first + tokens].to(keys[0].device)
    with evaluation_mode(model), fresh_state(model):
        run(model, ids, cache, last_logits_only=True)
