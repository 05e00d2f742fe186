"""Keys and values of contexts, and the exact distributions that follow, kept for the stages that read them again.

A prefill takes most of the time of every stage, and the search for the step needs the same few contexts many times. So
results are kept while they fit a limit of memory, and computed again beyond it: the profile does not depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from hf_cachegen.codec.geometry import LayerGeometry
from hf_cachegen.codec.predictor import Known, Predictor
from hf_cachegen.models.continuation import continuation_logits
from hf_cachegen.models.first_layers import entering, first_layers
from hf_cachegen.models.recurrent import Checkpoint
from hf_cachegen.profiles.learning.running import Sample, prefill, states_after

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST_KEPT_BYTES = 4 << 30
"""Limit of the kept tensors: 20 contexts of 1,024 tokens of an 8B model in bfloat16 take 2.7 GB."""
Shapes = list[list[tuple[int, int]]]


class Computed(NamedTuple):
    """What one prefill gives.

    Attributes:
        keys: Of each layer, [1, heads, tokens, dim].
        values: The same.
        layers: The geometry.
        hidden: The states [tokens, features] that enter the layers of the predictors, by layer.
    """

    keys: list[Tensor]
    values: list[Tensor]
    layers: tuple[LayerGeometry, ...]
    hidden: dict[int, Tensor]


class Exact:
    """What a model computes for contexts and samples.

    Args:
        model: The model.
        again: Samples that will be read again: their tensors are kept, MOST_KEPT_BYTES in all.
        predict_layers: The layers of the predictors to learn.

    Raises:
        UnsupportedModelError: The model's layers cannot be run apart.

    Attributes:
        features: Number of features of each predictor, by its layer.
    """

    def __init__(self, model: PreTrainedModel, again: Sequence[Sample] = (), predict_layers: Sequence[int] = ()):
        self.model, self._left = model, MOST_KEPT_BYTES
        token = torch.zeros(1, 1, dtype=torch.int64)
        self.features = {layer: first_layers(model, token, layer).hidden.shape[1] for layer in predict_layers}
        self._again = {_key(context) for context, _ in again}
        self._contexts: dict[tuple[int, ...], Computed] = {}
        self._states: dict[tuple[int, ...], Checkpoint | None] = {}
        self._distributions: dict[tuple[tuple[int, ...], tuple[int, ...]], Tensor] = {}
        self._geometry: tuple[Shapes, tuple[LayerGeometry, ...]] | None = None

    def geometry(self, context: Tensor) -> tuple[Shapes, tuple[LayerGeometry, ...]]:
        """Return (heads, dim) of each layer's K and of its V, and the layers, which two tokens of any context show."""
        if self._geometry is None:
            found = self.prefill(context[:, :2])
            self._geometry = [[(x.shape[1], x.shape[3]) for x in side] for side in found[:2]], found.layers
        return self._geometry

    def prefill(self, context: Tensor) -> Computed:
        """Return what the model computes for a context [1, tokens]."""
        key = _key(context)
        if key in self._contexts:
            return self._contexts[key]
        with entering(self.model, self.features) as entered:
            keys, values, layers = prefill(self.model, context)
        found = Computed(keys, values, layers, {layer: states[-1][0] for layer, states in entered.items()})
        if key in self._again and self._fits(*keys, *values, *found.hidden.values()):
            self._contexts[key] = found
        return found

    def known(self, context: Tensor, predictor: Predictor) -> Known:
        """Return what a loader computes of a context for a predictor."""
        hidden = self.prefill(context).hidden.get(predictor.layer)
        if hidden is None:  # these are not of the learning run
            hidden = first_layers(self.model, context, predictor.layer).hidden
        return Known(predictor.layer, predictor.scores(hidden))

    def states(self, context: Tensor) -> Checkpoint | None:
        """Return the states of recurrent layers after a context; None for a model without them."""
        key = _key(context)
        if key not in self._states:
            found = states_after(self.model, context)
            if found is not None and (key not in self._again or not self._fits(*found.states.values())):
                return found
            self._states[key] = found
        return self._states[key]

    @torch.no_grad()
    def log_probabilities(self, sample: Sample) -> Tensor:
        """Return the exact log-probabilities, float32 [tokens of the continuation, vocabulary]."""
        context, continuation = sample
        key = _key(context), _key(continuation)
        if key in self._distributions:
            return self._distributions[key]
        keys, values = self.prefill(context)[:2]
        found = continuation_logits(self.model, keys, values, continuation, self.states(context)).log_softmax(-1)
        if key[0] in self._again and self._fits(found):
            self._distributions[key] = found
        return found

    def _fits(self, *tensors: Tensor) -> bool:
        """Take the bytes of these tensors off the limit, if they fit it."""
        size = sum(x.numel() * x.element_size() for x in tensors)
        if size > self._left:
            return False
        self._left -= size
        return True


def _key(ids: Tensor) -> tuple[int, ...]:
    return tuple(ids[0].tolist())
