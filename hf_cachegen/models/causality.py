"""What an entry of a cache depends on, found by trying it once for each model.

A cache can be reused only if the keys and values of a token depend on that token and those before it. Some models do
not fulfil this: encoders without `is_decoder=True`, or models whose mask does not hide later tokens. And rows of a
batch that begin with pads can be reused only if pads change nothing; a model that counts positions from the first pad
moves its tokens. Nothing in the interface of a model says either, so a few tokens are run with a change that must not
matter, and the keys and values are compared.

Of the differences of all tokens the median counts: in a mixture of experts a rounding difference may send a few tokens
to another expert, but a model that is not causal changes all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from hf_cachegen.errors import UnsupportedModelError
from hf_cachegen.models.compat import cache_argument, prepared_inputs, run, takes, unwrapped
from hf_cachegen.models.kinds import empty_cache, kv_layers, layer_contents
from hf_cachegen.models.running import evaluation_mode, layer_devices
from hf_cachegen.models.state import fresh_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache

TRIED_TOKENS = 12
TRIED_PADS = 3
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Largest relative differences that are rounding: the same values in a batch of another length."""

_causal: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
_hides_pads: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def require_causal(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError if a token changes the keys and values of tokens before it; try each model once."""
    base = unwrapped(model)
    if base not in _causal:
        ids = _tokens(model)
        changed = ids.clone()
        changed[:, -3:] = changed[:, :3]
        kept = ids.shape[1] - 3
        _causal[base] = _same(model, _entries(model, ids)[..., :kept], _entries(model, changed)[..., :kept])
    if not _causal[base]:
        raise UnsupportedModelError(
            f"expected keys and values that depend on earlier tokens alone, those of {type(base).__name__} change with "
            "later tokens, so a context cannot be reused for another question: load an encoder with is_decoder=True, "
            "or use a causal model"
        )


@torch.no_grad()
def hides_pads(model: PreTrainedModel) -> bool:
    """Report whether pads before a row leave its keys and values as they are; try each model once.

    The inputs are those that the stock `generate` makes of padded rows: some models leave the positions out.
    """
    base = unwrapped(model)
    if base not in _hides_pads:
        ids = _tokens(model)
        pads = torch.zeros_like(ids[:, :TRIED_PADS])
        mask, cache = torch.cat([pads, torch.ones_like(ids)], dim=1), empty_cache(model.config)
        given: dict[str, Any] = {"attention_mask": mask, cache_argument(model): cache, "use_cache": True}
        if takes(model, "position_ids"):
            given["position_ids"] = base._prepare_position_ids_for_generation(mask, given)
        padded = torch.cat([ids[:, :1].expand_as(pads), ids], dim=1)
        try:
            with evaluation_mode(model), fresh_state(model):
                inputs = prepared_inputs(base.prepare_inputs_for_generation, padded, padded.shape[1], given)
                model(**inputs, return_dict=True)
            _hides_pads[base] = _same(model, _entries(model, ids), _held(cache)[..., TRIED_PADS:])
        except (RuntimeError, ValueError, TypeError, IndexError):  # the model reads no padded rows
            _hides_pads[base] = False
    return _hides_pads[base]


def _tokens(model: PreTrainedModel) -> Tensor:
    """Return different ordinary tokens, int64 [1, TRIED_TOKENS]."""
    device = layer_devices(model, len(layer_contents(model.config)))[0]
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids: Tensor = torch.arange(TRIED_TOKENS, device=device)[None] * 7919 % max(1, vocabulary - 3) + 3
    return ids % vocabulary


@torch.no_grad()
def _entries(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return the keys and values of all layers: float32 [channels, tokens], on the CPU."""
    cache = empty_cache(model.config)
    with evaluation_mode(model), fresh_state(model):
        run(model, ids, cache, last_logits_only=True)
    return _held(cache)


def _held(cache: Cache) -> Tensor:
    sides = [side for layer in kv_layers(cache) for side in (layer.keys, layer.values)]
    if not sides:  # recurrent layers alone, which read from first to last
        return torch.zeros(1, TRIED_TOKENS)
    return torch.cat([side[0].transpose(1, 2).flatten(0, 1).float().cpu() for side in sides])


def _same(model: PreTrainedModel, first: Tensor, second: Tensor) -> bool:
    if first.shape != second.shape:
        return False
    apart = (second - first).norm(dim=0) / first.norm(dim=0).clamp_min(torch.finfo(torch.float32).tiny)
    return bool(apart.median() <= TOLERANCES.get(model.dtype, max(TOLERANCES.values())))
