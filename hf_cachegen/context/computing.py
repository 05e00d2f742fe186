"""Compute the cache of a context with a model, or take one that the model has filled."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache

from hf_cachegen.artifact import ContextText
from hf_cachegen.codec.geometry import Geometry
from hf_cachegen.codec.predictor import Known
from hf_cachegen.codec.predictor_choice import settled
from hf_cachegen.config import CacheGenConfig, require_config
from hf_cachegen.context.cached import CachedContext, report_of
from hf_cachegen.errors import ConfigError, UnsupportedModelError
from hf_cachegen.models.adapters import require_inactive
from hf_cachegen.models.causality import require_causal
from hf_cachegen.models.compat import run, unwrapped
from hf_cachegen.models.encoder_decoder import (
    context_input,
    encode,
    require_encoder_decoder,
)
from hf_cachegen.models.fingerprint import Fingerprint
from hf_cachegen.models.first_layers import known_of
from hf_cachegen.models.identity import Verify, forget, identify
from hf_cachegen.models.inputs import ContextInputs, context_inputs
from hf_cachegen.models.kinds import empty_cache, holds_states, layer_contents
from hf_cachegen.models.layers import KVTensors, capture, dtype_name
from hf_cachegen.models.media_prompt import prefill_media
from hf_cachegen.models.opening import check_states, checked_kv
from hf_cachegen.models.prefill import StateOptions, prefill
from hf_cachegen.models.recurrent import Checkpoints, capture_states
from hf_cachegen.models.requirements import (
    positions_change,
    require_instance,
    require_length,
    require_model,
    require_vocabulary,
)
from hf_cachegen.models.running import evaluation_mode, layer_devices
from hf_cachegen.models.state import fresh_state
from hf_cachegen.models.state_divergence import state_divergence
from hf_cachegen.profiles.files import Profile
from hf_cachegen.profiles.finding import ProfileLike, for_encoding
from hf_cachegen.report import CacheReport

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def compute_context(
    model: PreTrainedModel,
    input_ids: ContextInputs,
    config: CacheGenConfig | None,
    profile: ProfileLike,
    tokenizer: PreTrainedTokenizerBase | None,
    prefill_chunk_tokens: int,
    progress: bool,
    text: ContextText | None = None,
    states: StateOptions | None = None,
) -> CachedContext:
    """Prefill a context. Arguments and errors are those of `CacheGenCache.from_context`."""
    if prefill_chunk_tokens < 1:
        raise ConfigError(f"prefill_chunk_tokens must be at least 1, got {prefill_chunk_tokens}")
    require_config(config)
    require_instance(model)
    if model.config.is_encoder_decoder:
        return _encoded_context(model, input_ids, config, profile, tokenizer, text)
    require_model(model)
    ids, media = context_inputs(model.config, input_ids)
    require_length(model, ids.shape[1])
    if media is None:
        require_vocabulary(model, ids)
    identify(model)
    require_inactive(model, ids[0].tolist())
    found = for_encoding(profile, model)
    states = states or StateOptions()
    start = time.perf_counter()
    if positions_change(model.config, 1, ids.shape[1]):
        # The rotation depends on the whole length, so the context must be computed in one forward pass.
        prefill_chunk_tokens = ids.shape[1]
    with evaluation_mode(model), fresh_state(model):
        if media is not None:
            require_causal(model)
            past, checkpoints = prefill_media(model, ids, media, prefill_chunk_tokens, states, progress)
        else:
            if not holds_states(model.config):
                _require_continuation(model, ids[:, :prefill_chunk_tokens])
            require_causal(model)
            past, checkpoints = prefill(model, ids, prefill_chunk_tokens, states, progress)
    _require_tokens(past, ids.shape[1], model)
    kv = checked_kv(_captured(past, model, ids), model, ids)
    found_media = () if media is None else media.media()
    fingerprint = Fingerprint.of(model, ids[0].tolist(), tokenizer, kv, own=True, media=found_media)
    seconds = time.perf_counter() - start
    budget = states.budget if checkpoints.all else None
    kl = None if checkpoints.bits is None else state_divergence(model, kv, ids, checkpoints)
    report = report_of(kv, checkpoints, prefill_seconds=seconds, state_budget=budget, state_kl=kl)
    config = settled(config, found if media is None else None, kv.geometry, seconds)
    known = None if media is not None else _to_encode(model, ids, config, found)
    return CachedContext(
        kv, ids, fingerprint, report, config=config, profile=found, text=text, checkpoints=checkpoints, known=known
    )


def _to_encode(
    model: PreTrainedModel, ids: Tensor, config: CacheGenConfig | None, profile: Profile | None
) -> Known | None:
    """Return the scores to encode a context with; None where its profile predicts nothing.

    They are computed together with the fingerprint, since the model may have changed when the context is saved.
    """
    config = config or CacheGenConfig()
    layer = None if profile is None or config.lossless else profile.usable(config.predicted)
    if profile is None or layer is None or config.transform not in ("auto", "klt"):
        return None
    return Known(layer, known_of(model, ids, profile, layer).scores)


def _encoded_context(
    model: PreTrainedModel, inputs: ContextInputs, config: CacheGenConfig | None, profile: ProfileLike,
    tokenizer: PreTrainedTokenizerBase | None, text: ContextText | None,
) -> CachedContext:  # fmt: skip
    """Encode a context of an encoder-decoder model. Arguments and errors are those of `compute_context`."""
    require_encoder_decoder(model)
    if profile not in ("auto", None):
        raise ConfigError("profiles are learnt for decoder-only models: leave out profile= for this model")
    given, decoder_ids = context_input(model, inputs)
    identify(model)
    start = time.perf_counter()
    kv, state = encode(model, given, decoder_ids)
    config = settled(config, None, kv.geometry, None)
    positions = kv.geometry.tokens
    # The positions of a sound have no tokens. Its digest identifies it.
    ids = given.value.cpu().long() if given.name == "input_ids" else torch.zeros(1, positions, dtype=torch.long)
    kv, media = checked_kv(kv, model, ids), given.media(positions)
    fingerprint = Fingerprint.of(model, ids[0].tolist(), tokenizer, kv, own=True, media=media)
    report = CacheReport(positions, kv.geometry.nbytes, prefill_seconds=time.perf_counter() - start)
    return CachedContext(kv, ids, fingerprint, report, config=config, text=text, encoder=state)


def _captured(cache: Cache, model: PreTrainedModel, ids: Tensor) -> KVTensors:
    """Return the keys and values of a filled cache, none of them for a model that has states alone."""
    empty = None
    if not any(content.kind for content in layer_contents(model.config)):
        empty = Geometry((), int(ids.shape[1]), 1, dtype_name(model.dtype))
    return capture(cache, model.config, empty)


_continues: set[type] = set()
"""Classes of models that were tried successfully with several tokens after a cache."""


def _require_continuation(model: PreTrainedModel, ids: Tensor) -> None:
    """Raise UnsupportedModelError unless a model reads several tokens after a cache; try each class once."""
    kind = type(unwrapped(model))
    if kind in _continues:
        return
    ids = ids.to(layer_devices(model, len(layer_contents(model.config)))[0])
    past = empty_cache(model.config)
    try:
        for tokens in (ids[:, :1], ids[:, :1].expand(-1, 2)):
            run(model, tokens, past, last_logits_only=True)
    except (AssertionError, NotImplementedError, ValueError) as error:
        message = f"{kind.__name__} cannot read a question after a cached context: {error}"
        raise UnsupportedModelError(message) from error
    _continues.add(kind)


def _require_tokens(past: DynamicCache, tokens: int, model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError unless every layer that has keys holds one for each token."""
    name = type(unwrapped(model)).__name__
    contents = layer_contents(model.config)
    for index, (layer, content) in enumerate(zip(past.layers, contents, strict=False)):
        if content.kind is None:
            continue
        held = int(layer.get_seq_length()) if layer.is_initialized else 0
        if held != tokens:
            why = "cross-attention, or keys of another layer" if held == 0 else "tokens of the model's own"
            raise UnsupportedModelError(
                f"layer {index} of {name} holds {held} tokens after a context of {tokens} ({why}), so its cache cannot "
                "be kept: use a model whose layers hold one key for each token"
            )


def wrap_cache(
    cache: Cache,
    input_ids: ContextInputs,
    model: PreTrainedModel,
    config: CacheGenConfig | None,
    profile: ProfileLike,
    tokenizer: PreTrainedTokenizerBase | None,
    verify: Verify,
) -> CachedContext:
    """Copy a cache that a model filled. Arguments and errors are those of `CacheGenCache.from_cache`."""
    require_config(config)
    require_model(model)
    if verify == "all":
        forget(model)
    found = for_encoding(profile, model)
    ids, media = context_inputs(model.config, input_ids)
    if media is None:
        require_vocabulary(model, ids)
    require_causal(model)
    kv = checked_kv(_captured(cache, model, ids), model, ids).clone()
    checkpoints = Checkpoints()
    if holds_states(model.config):
        checkpoints = Checkpoints((capture_states(cache, layer_contents(model.config), ids.shape[1]),))
        check_states(checkpoints, model)
    config = settled(config, found if media is None else None, kv.geometry, None)
    probed, found_media = kv if verify != "weights" else None, () if media is None else media.media()
    fingerprint = Fingerprint.of(model, ids[0].tolist(), tokenizer, probed, media=found_media)
    return CachedContext(
        kv, ids, fingerprint, report_of(kv, checkpoints), config=config, profile=found, verify=verify,
        checkpoints=checkpoints, known=None if found_media else _to_encode(model, ids, config, found),
    )  # fmt: skip
