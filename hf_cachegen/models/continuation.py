"""How a model reads tokens after states that it has: several together, one by one, or not at all.

Some models pass over the recurrent state when they read several tokens after a cache (Mamba's scan starts from zero),
and in some the step for one token rounds otherwise than the scan. Nothing in their interface says so. So it is tried
once for each model: a short text is read in one pass and in two, and the states between the two are disturbed, to see
whether the second pass reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from hf_cachegen.errors import UnsupportedModelError
from hf_cachegen.models.compat import run, takes, unwrapped
from hf_cachegen.models.kinds import LayerContent, empty_cache, layer_contents
from hf_cachegen.models.recurrent import Checkpoint, StateKey, capture_states
from hf_cachegen.models.running import evaluation_mode, layer_devices
from hf_cachegen.models.state import fresh_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache

TRIED_TOKENS = 12
"""Tokens read before and after the states: more than a convolution reaches back."""
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Relative differences of the logits between one pass and two that are rounding."""


@dataclass(frozen=True)
class Continuation:
    """How a model continues from states.

    Attributes:
        several: it reads several tokens together.
        single: it reads one token alone as it reads it among others.
        shapes: shape and dtype of each of its states, for one row.
    """

    several: bool
    single: bool
    shapes: dict[StateKey, tuple[tuple[int, ...], torch.dtype]]

    @property
    def least(self) -> int:
        """Number of tokens that a prompt must have after the states."""
        return 1 if self.single else 2

    @property
    def state_bytes(self) -> int:
        """Bytes of one checkpoint."""
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.shapes.values())


_known: WeakKeyDictionary[Any, tuple[torch.dtype, Continuation]] = WeakKeyDictionary()


@torch.no_grad()
def continuation_of(model: PreTrainedModel) -> Continuation:
    """Try how a model continues from its states, once for each model.

    Raises:
        UnsupportedModelError: it does not continue from them.
    """
    base = unwrapped(model)
    dtype, found = _known.get(base, (None, None))
    if found is None or dtype != model.dtype:
        with evaluation_mode(model), fresh_state(model):
            found = _tried(model)
        _known[base] = (model.dtype, found)
    return found


def read(model: PreTrainedModel, ids: Tensor, cache: Cache, held: int) -> Any:
    """Run a forward pass over tokens that follow `held` others, with their positions; return the logits of the last.

    Some models count positions from 0 in every pass unless they are given.
    """
    return run(model, ids, cache, last_logits_only=True, **positions(model, ids, held))[0][:, -1]


def positions(model: PreTrainedModel, ids: Tensor, held: int) -> dict[str, Any]:
    """Return the argument with the positions of tokens that follow `held` others; none for a model without positions.
    """
    if not takes(model, "position_ids"):
        return {}
    return {"position_ids": torch.arange(held, held + ids.shape[1], device=ids.device).expand(len(ids), -1)}


def read_singly(model: PreTrainedModel, ids: Tensor, cache: Cache, held: int) -> int:
    """Read the tokens after the first `held` one by one, all but the last; return the number that the cache holds.

    Args:
        model: the model.
        ids: the prompts, int64 [rows of the cache, tokens], without pads.
        cache: the cache to extend.
        held: number of tokens that it holds.
    """
    ids = ids.to(layer_devices(model, len(layer_contents(model.config)))[0])
    with evaluation_mode(model), fresh_state(model):
        for at in range(held, ids.shape[1] - 1):
            read(model, ids[:, at : at + 1], cache, at)
    return ids.shape[1] - 1


def _tried(model: PreTrainedModel) -> Continuation:
    contents, name = layer_contents(model.config), type(unwrapped(model)).__name__
    device = layer_devices(model, len(contents))[0]
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(2 * TRIED_TOKENS, device=device) * 7919 % max(1, vocabulary - 3) + 3)[None] % vocabulary
    try:
        expected = read(model, ids, empty_cache(model.config), 0)
        cache, first = _after(model, ids, TRIED_TOKENS, contents)
        several = _agrees(model, ids, cache, TRIED_TOKENS, expected) and _reads(model, ids, contents, TRIED_TOKENS)
        cache, _ = _after(model, ids, ids.shape[1] - 1, contents)
        single = _agrees(model, ids, cache, ids.shape[1] - 1, expected)
        single = single and _reads(model, ids, contents, ids.shape[1] - 1)
    except (AssertionError, NotImplementedError, ValueError) as error:
        raise UnsupportedModelError(f"{name} cannot continue from the states of a context ({error})") from error
    if not several and not single:
        raise UnsupportedModelError(
            f"{name} computes other logits after the states of a context than in one pass over all tokens, so its "
            "cache cannot be reused"
        )
    shapes = {key: (tuple(state.shape), state.dtype) for key, state in first.states.items()}
    return Continuation(several, single, shapes)


def _after(
    model: PreTrainedModel, ids: Tensor, tokens: int, contents: list[LayerContent]
) -> tuple[Cache, Checkpoint]:
    cache = empty_cache(model.config)
    read(model, ids[:, :tokens], cache, 0)
    return cache, capture_states(cache, contents, tokens)


def _agrees(model: PreTrainedModel, ids: Tensor, cache: Cache, tokens: int, expected: Tensor) -> bool:
    got, expected = read(model, ids[:, tokens:], cache, tokens).float(), expected.float()
    tolerance = TOLERANCES.get(model.dtype, max(TOLERANCES.values()))
    return bool((got - expected).norm() <= tolerance * expected.norm())


def _reads(model: PreTrainedModel, ids: Tensor, contents: list[LayerContent], tokens: int) -> bool:
    """Report whether the states affect what follows them, each kind of state by itself."""
    _, before = _after(model, ids, tokens, contents)
    for kind in {tensor for _, tensor, _ in before.states}:
        results = []
        for disturbance in (0.0, 1.0):
            cache, _ = _after(model, ids, tokens, contents)
            for index, tensor, number in before.states:
                if tensor == kind:
                    getattr(cache.layers[index], tensor)[number].add_(disturbance)
            results.append(read(model, ids[:, tokens:], cache, tokens))
        if torch.equal(*results):
            return False
    return True
