"""Exact keys and values of contexts, and the exact distributions that follow, kept for the stages that read them again.

A prefill takes most of the time of every stage, and the search for the step needs the same few contexts many times. So
results are kept while they fit a limit of memory, and computed again beyond it: the profile does not depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_cachegen.codec.geometry import LayerGeometry
from hf_cachegen.models.continuation import continuation_logits
from hf_cachegen.models.recurrent import Checkpoint
from hf_cachegen.profiles.learning.running import Sample, prefill, states_after

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST_KEPT_BYTES = 4 << 30
"""Limit of the kept tensors: 20 contexts of 1,024 tokens of an 8B model in bfloat16 take 2.7 GB."""
KV = tuple[list[Tensor], list[Tensor], tuple[LayerGeometry, ...]]
Shapes = list[list[tuple[int, int]]]


class Exact:
    """What a model computes for contexts and samples.

    Args:
        model: The model.
        again: Samples that will be read again. Their tensors are kept, MOST_KEPT_BYTES in all.
    """

    def __init__(self, model: PreTrainedModel, again: Sequence[Sample] = ()):
        self.model, self._left = model, MOST_KEPT_BYTES
        self._again = {_key(context) for context, _ in again}
        self._contexts: dict[tuple[int, ...], KV] = {}
        self._states: dict[tuple[int, ...], Checkpoint | None] = {}
        self._distributions: dict[tuple[tuple[int, ...], tuple[int, ...]], Tensor] = {}
        self._geometry: tuple[Shapes, tuple[LayerGeometry, ...]] | None = None

    def geometry(self, context: Tensor) -> tuple[Shapes, tuple[LayerGeometry, ...]]:
        """Return (heads, dim) of each layer's K and of its V, and the layers, which two tokens of any context show."""
        if self._geometry is None:
            keys, values, layers = self.prefill(context[:, :2])
            self._geometry = [[(x.shape[1], x.shape[3]) for x in side] for side in (keys, values)], layers
        return self._geometry

    def prefill(self, context: Tensor) -> KV:
        """Return the exact (keys, values, layers) of a context [1, tokens]."""
        key = _key(context)
        if key in self._contexts:
            return self._contexts[key]
        found = prefill(self.model, context)
        if key in self._again and self._fits(*found[0], *found[1]):
            self._contexts[key] = found
        return found

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
        keys, values, _ = self.prefill(context)
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
