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
from hf_cachegen.codec.geometry import Geometry
from hf_cachegen.errors import UnsupportedLayerError
from hf_cachegen.models.compat import run
from hf_cachegen.models.indexed import sides_of
from hf_cachegen.models.kinds import with_dummies
from hf_cachegen.models.running import evaluation_mode
from hf_cachegen.models.state import fresh_state

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel


class _InPlaceLayer(DynamicLayer):
    """keys, values: [1, heads, tokens, dim], whose first `held` tokens are in place; index keys, if any, too."""

    def __init__(self, keys: Tensor, values: Tensor, indices: Tensor | None, held: int) -> None:
        super().__init__()
        self._whole, self._indices, self._held = (keys, values), indices, held
        self.indexer_position_ids = None  # a model may look for them
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

    def update_index(self, states: Tensor) -> Tensor:
        """Append index keys, [1, 1, tokens, dim]."""
        if self._indices is None:
            raise UnsupportedLayerError("a layer without index keys was given some: the artifact is of another model")
        start, self._held = self._held, self._held + states.shape[2]
        self._indices[:, :, start : self._held] = states
        return self._indices[:, :, : self._held]

    def update_indexer(self, states: Tensor) -> Tensor:
        """Append index keys, [1, tokens, dim]."""
        return self.update_index(states[:, None])[:, 0]


@torch.no_grad()
def recompute(
    model: PreTrainedModel, input_ids: Tensor, geometry: Geometry, keys: Sequence[Tensor], values: Sequence[Tensor],
    span: Span,
) -> None:  # fmt: skip
    """Compute the keys and values of a chunk.

    Args:
        model: The model, which is run in evaluation mode.
        input_ids: The context, int64 [1, tokens].
        geometry: Of the context.
        keys: [1, heads, tokens, dim] for each layer. Written in place.
        values: The same.
        span: The chunk. All tokens before it must be in place; those behind it are not read.
    """
    # Every layer keeps all tokens, sliding ones too: the mask limits what they attend to, as in a prefill.
    cache = DynamicCache()
    cache.layer_class_to_replicate = None
    layers = [
        _InPlaceLayer(side, *sides_of(layer, value), span.first)
        for layer, side, value in zip(geometry.layers, keys, values, strict=True)
    ]
    cache.layers = with_dummies(model.config, layers)
    ids = input_ids[:, span.first : span.first + span.tokens].to(keys[0].device)
    with evaluation_mode(model), fresh_state(model):
        run(model, ids, cache, last_logits_only=True)
