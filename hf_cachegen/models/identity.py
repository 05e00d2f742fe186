"""The identity of a model object: its weights, computed buffers and adapters; kept until the object changes.

A model object that has not changed since it was identified costs one `model_state`, well under a millisecond for a
model of some hundred tensors. The same state decides which probes have been compared already.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal
from weakref import WeakKeyDictionary

from torch import nn

from hf_cachegen.models.adapters import active_adapters, adapter_checksums, require_identifiable
from hf_cachegen.models.buffers import computed_buffers
from hf_cachegen.models.compat import unwrapped
from hf_cachegen.models.object_state import ModelState, model_state
from hf_cachegen.models.weights import weights_checksum

Verify = Literal["probe", "weights"]
"""What a cache is compared with before its reuse: also what the model computes for its first tokens, or settings and
checksums alone."""


@dataclass(frozen=True)
class ModelIdentity:
    """checksum: of all weights; buffers: summaries of the computed ones; adapters: a checksum for each that takes part;
    adapter_names: those that are active, for messages.

    probed: the probes that the model was compared with in this state.
    """

    checksum: str
    buffers: dict[str, str]
    adapters: tuple[str, ...]
    adapter_names: tuple[str, ...]
    state: ModelState
    probed: set[str] = field(default_factory=set)


_known: WeakKeyDictionary[nn.Module, ModelIdentity] = WeakKeyDictionary()


def identify(model: nn.Module) -> ModelIdentity:
    """Identify `model`, or return what is known of it if it has not changed.

    Raises:
        UnsupportedModelError: A weight or an adapter cannot be identified; the message names it.
    """
    model = unwrapped(model)
    state = model_state(model)
    known = _known.get(model)
    if known is None or not known.state.same(state):
        require_identifiable(model)
        known = ModelIdentity(
            weights_checksum(model), computed_buffers(model), adapter_checksums(model), active_adapters(model), state
        )
        _known[model] = known
    return known
