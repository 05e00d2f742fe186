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
        try:
            first, second = _entries(model, ids), _entries(model, changed)
        except (ValueError, NotImplementedError) as error:
            raise UnsupportedModelError(f"{type(base).__name__} reads no text with a stock cache: {error}") from error
        _causal[base] = _same(model, first[..., :kept], second[..., :kept])
    if not _causal[base]:
        raise UnsupportedModelError(
            f"expected keys and values that depend on earlier tokens alone, those of {type(base).__name__} change with "
            "later tokens, so a context cannot be reused for another question: load an encoder with is_decoder=True, "
            "or use a causal model"
        )


def hides_pads(model: PreTrainedModel) -> bool:
    """Report whether pads before a row change nothing after them; try each model once.

    Sparse attention is not tried: its pads may take the turn of a token only in a text of thousands of tokens.
    """
    base = unwrapped(model)
    if base not in _hides_pads:
        sparse = any(content.indexed for content in layer_contents(model.config))
        try:
            _hides_pads[base] = not sparse and _reads_padded(model)
        except (RuntimeError, ValueError, TypeError, IndexError):  # the model reads no padded rows
            _hides_pads[base] = False
    return _hides_pads[base]


def _reads_padded(model: PreTrainedModel) -> bool:
    """Compare a text with the same text after pads: its keys and values, and what follows.

    The inputs are those that the stock `generate` makes of padded rows: some models leave the positions out. Of the
    pads the cache holds zeros, as in a cache that is built from a context.
    """
    ids = _tokens(model)
    padded = torch.cat([ids[:, :1].expand(-1, TRIED_PADS), ids], dim=1)
    caches = [empty_cache(model.config) for _ in range(2)]
    for cache, text, pads in zip(caches, (ids, padded), (0, TRIED_PADS), strict=True):
        _prepared(model, text[:, :-1], pads, cache, text.shape[1] - 1)
    if not _same(model, _held(caches[0]), _held(caches[1])[..., TRIED_PADS:]):
        return False
    for layer in kv_layers(caches[1]):
        layer.keys[:, :, :TRIED_PADS], layer.values[:, :, :TRIED_PADS] = 0, 0
    plain, after = (
        _prepared(model, text, pads, cache, 1)
        for cache, text, pads in zip(caches, (ids, padded), (0, TRIED_PADS), strict=True)
    )
    return _same(model, plain, after)


@torch.no_grad()
def _prepared(model: PreTrainedModel, text: Tensor, pads: int, cache: Cache, count: int) -> Tensor:
    """Run the last `count` tokens of a text as `generate` would; return the logits of the last, [vocabulary, 1]."""
    mask = (torch.arange(text.shape[1], device=text.device) >= pads).long()[None]
    given: dict[str, Any] = {"attention_mask": mask, cache_argument(model): cache, "use_cache": True}
    if takes(model, "position_ids"):
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        own = getattr(unwrapped(model), "_prepare_position_ids_for_generation", None)
        given["position_ids"] = positions if own is None else own(text, {"attention_mask": mask})
    with evaluation_mode(model), fresh_state(model):
        inputs = prepared_inputs(unwrapped(model).prepare_inputs_for_generation, text, count, given)
        logits: Tensor = model(**inputs, return_dict=True).logits[0, -1:]
    return logits.float().cpu().T


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
