"""The identity of a model object: its weights, computed buffers and adapters; kept until the object changes.

A model object that has not changed since it was identified costs one `model_state`, well under a millisecond for a
model of some hundred tensors. The same state decides which probes have been compared already.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from hf_cachegen.models.adapters import active_adapters, adapter_checksums, require_identifiable
from hf_cachegen.models.buffers import computed_buffers
from hf_cachegen.models.compat import unwrapped
from hf_cachegen.models.object_state import KNOWN, ModelState, model_state
from hf_cachegen.models.weights import forget_checksums, weights_checksum

Verify = Literal["probe", "weights", "all"]
"""What a cache is compared with before its reuse: also what the model computes for its first tokens, or settings and
checksums alone. "all" is "probe" and reads every byte of the weights again when a cache is loaded."""


@dataclass(frozen=True)
class ModelIdentity:
    """checksum: of all weights; buffers: summaries of the computed ones; adapters: a checksum for each that takes part;
    adapter_names: those that are active, for messages.

    probed: the probes that the model was compared with in this state.
    taken: its own probe of fixed tokens, once it was taken.
    """

    checksum: str
    buffers: dict[str, str]
    adapters: tuple[str, ...]
    adapter_names: tuple[str, ...]
    state: ModelState
    probed: set[str] = field(default_factory=set)
    taken: list[str] = field(default_factory=list)


class _Known:
    """What is known of a model; a copy or a pickle of the model starts with nothing."""

    identity: ModelIdentity | None = None

    def __deepcopy__(self, memo: object) -> _Known:
        return _Known()

    def __reduce__(self) -> tuple[type[_Known], tuple[()]]:
        return _Known, ()


def forget(model: nn.Module) -> None:
    """Forget what is known of `model` and its weights, so that every byte is read again."""
    model = unwrapped(model)
    model.__dict__.pop(KNOWN, None)
    forget_checksums(model)


def identify(model: nn.Module) -> ModelIdentity:
    """Identify `model`, or return what is known of it if it has not changed.

    Raises:
        UnsupportedModelError: A weight or an adapter cannot be identified; the message names it.
    """
    model = unwrapped(model)
    # On the model itself: a weak dictionary would keep a model alive whose own attributes refer to it, as the hooks of
    # accelerate do.
    known: _Known = model.__dict__.setdefault(KNOWN, _Known())
    last = known.identity
    state = model_state(model, None if last is None else last.state)
    if last is None or not last.state.same(state):
        require_identifiable(model)
        last = known.identity = ModelIdentity(
            weights_checksum(model), computed_buffers(model), adapter_checksums(model), active_adapters(model), state
        )
    return last
