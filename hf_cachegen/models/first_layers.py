"""Run only the first layers of a model over a context: the hidden state that enters layer m, and K and V up to it.

The model runs its own code, whatever its architecture. The cache that it extends stops it: layer m hands its keys and
values to the cache before it attends, and `_Reached` ends the forward pass there. The hidden state is what enters the
module of that layer: for m = 0 the embeddings, after any scaling and with any learnt positions.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from hf_cachegen.codec.predictor import Known, Predictor
from hf_cachegen.codec.profile import Profile
from hf_cachegen.errors import ProfileError, UnsupportedModelError
from hf_cachegen.models.compat import run, unwrapped
from hf_cachegen.models.requirements import layer_kinds, positions_change
from hf_cachegen.models.running import evaluation_mode, layer_devices
from hf_cachegen.models.state import fresh_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RUN_TOKENS = 1024
"""Tokens of one forward pass, where the model allows a context to be split."""


class _Reached(Exception):
    """The last layer that is needed has given its keys and values."""


class _StoppingCache(DynamicCache):
    """A cache that ends the forward pass when layer `last` has filled it. All layers keep all tokens."""

    def __init__(self, last: int) -> None:
        super().__init__()
        self._last = last

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Append the tokens' keys and values. Raises _Reached for the last layer."""
        found = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx == self._last:
            raise _Reached
        return found


class FirstLayers(NamedTuple):
    """What the first layers give.

    Attributes:
        hidden: [tokens, features], the hidden state that enters layer m, in the model's dtype.
        keys: Of layers 0..m, each [1, heads, tokens, dim].
        values: The same.
    """

    hidden: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


@torch.no_grad()
def first_layers(model: PreTrainedModel, input_ids: Tensor, layer: int) -> FirstLayers:
    """Run the layers before `layer` over a context, in evaluation mode.

    Args:
        model: The model, or a wrapper of it.
        input_ids: The context, int64 [1, tokens].
        layer: m.

    Raises:
        UnsupportedModelError: The model has no such layer, or its layers do not use the cache one after the other.
    """
    return _parts(model, input_ids, layer)


@torch.no_grad()
def known_of(
    model: PreTrainedModel, input_ids: Tensor, profile: Profile, layer: int, go_on: Callable[[], None] | None = None
) -> Known:
    """Compute what a loader of a predicted cache knows of its context.

    Args:
        model: The model, or a wrapper of it.
        input_ids: The context, int64 [1, tokens].
        profile: Of the model.
        layer: `predict_layers` of the cache's configuration.
        go_on: Called before each forward pass, of RUN_TOKENS tokens where the model allows. May raise to end the run.

    Raises:
        UnsupportedModelError: The model's layers cannot be run apart.
        ProfileError: The profile has no such predictor, or is of a model with other features.
    """
    found = _parts(model, input_ids, layer, profile.predictor(layer), go_on)
    return Known(layer, found.hidden, found.keys, found.values)


def _parts(
    model: PreTrainedModel, input_ids: Tensor, layer: int, predictor: Predictor | None = None,
    go_on: Callable[[], None] | None = None,
) -> FirstLayers:  # fmt: skip
    """Return what the first layers give; with a predictor its scores instead of the hidden states, which are wider."""
    base = unwrapped(model)
    count = len(layer_kinds(base.config))
    device = layer_devices(model, count)[0]
    whole = positions_change(base.config, 1, input_ids.shape[1])  # then the context must be one forward pass
    cache, states = _StoppingCache(layer), list[Tensor]()
    with evaluation_mode(base), fresh_state(base), entering(base, [layer]) as watched:
        entered = watched[layer]
        for ids in input_ids.to(device).split(input_ids.shape[1] if whole else RUN_TOKENS, dim=1):
            entered.clear()
            if go_on is not None:
                go_on()
            with suppress(_Reached):
                run(base, ids, cache, last_logits_only=True)
            if not entered or len(cache.layers) != layer + 1:
                raise UnsupportedModelError(
                    f"{type(base).__name__} does not run its {count} layers one after the other with a cache, so its "
                    f"first {layer} cannot be run apart: encode with predict_layers=None"
                )
            hidden = entered[-1][0]
            if predictor is not None and hidden.shape[1] != len(predictor.mean):
                raise ProfileError(
                    f"the predictor is of a model with {len(predictor.mean)} features, this one has {hidden.shape[1]}"
                )
            states.append(hidden if predictor is None else predictor.scores(hidden))
    layers: list[Any] = cache.layers
    return FirstLayers(torch.cat(states), tuple(x.keys for x in layers), tuple(x.values for x in layers))


@contextmanager
def entering(model: nn.Module, layers: Iterable[int]) -> Iterator[dict[int, list[Tensor]]]:
    """Collect the hidden states [1, tokens, features] that enter decoder layers while the block runs, in this thread.

    Other threads may run the same model meanwhile, over other contexts.

    A model of several towers may have several lists of as many modules as it has layers. The one that the forward pass
    enters last is the decoder.
    """
    entered: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    base, mine = unwrapped(model), threading.get_ident()
    count = len(layer_kinds(base.config)) if entered else 0

    def enters(layer: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() != mine:
            return
        state = args[0] if args else kwargs.get("hidden_states")
        if isinstance(state, Tensor) and state.dim() == 3:
            entered[layer].append(state.detach())

    stacks = [module for module in base.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    handles = [
        stack[layer].register_forward_pre_hook(partial(enters, layer), with_kwargs=True)
        for stack in stacks for layer in entered if layer < count
    ]  # fmt: skip
    try:
        yield entered
    finally:
        for handle in handles:
            handle.remove()
