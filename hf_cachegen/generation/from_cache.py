"""generate(): model.generate() that starts from a cached context, in every decoding mode.

The stock generate is called with the whole prompt, its whole mask and a fresh stock cache of the known part. It then
feeds the rest alone, so positions, logits processors, stopping criteria, streamers and the result are those of a call
without a cache. Assisted decoding is the exception: its first step feeds the whole prompt. It runs on a twin of the
model that leaves out the cached tokens. A call that cannot start from a cache is refused with the reason; a prompt that
differs from the context is computed.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.cache_utils import Cache
from transformers.generation import GenerationMode

from hf_cachegen.context import CachedContext, load_context, stream_to_context
from hf_cachegen.errors import (
    ConfigError,
    OfflineError,
    PromptMismatchError,
    StoreAccessError,
    StoreError,
    UnsupportedModelError,
)
from hf_cachegen.generation.attached import Attached, Prefixes, detach, stock_generate
from hf_cachegen.generation.from_encoder import generate_from_encoder
from hf_cachegen.generation.twin import rest_by_cache, rest_of_first, twin_of
from hf_cachegen.models.call import GenerateCall
from hf_cachegen.models.causality import hides_pads
from hf_cachegen.models.compat import (
    CACHE_ARGUMENT,
    CACHE_NAMES,
    CONTINUES_STATIC_STATES,
    cache_argument,
    masks_by_token_types,
    unwrapped,
)  # fmt: skip
from hf_cachegen.models.continuation import continuation_of, read_singly
from hf_cachegen.models.kinds import holds_states, is_plain, kv_layers, layer_contents
from hf_cachegen.models.layers import build_by_config, build_dynamic, build_static
from hf_cachegen.models.media import MEDIA_INPUTS
from hf_cachegen.models.media_prompt import cover, positions
from hf_cachegen.models.prefix import Reuse
from hf_cachegen.models.recurrent import shorten
from hf_cachegen.models.requirements import masks_windows, positions_change, require_instance
from hf_cachegen.models.running import kv_devices, layer_devices
from hf_cachegen.models.state import fresh_state
from hf_cachegen.streaming import Refine, SwapIn

if TYPE_CHECKING:
    from transformers import LogitsProcessor, PreTrainedModel

    OnMismatch = Literal["recompute", "error"]

LOG = logging.getLogger("hf_cachegen.generation")
MAX_STEPS = 256
"""Largest number of tokens that a model which reads them one by one after its states reads so; the stock prefill is
faster for more."""


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    *args: Any,
    cache: Any = None,
    on_mismatch: OnMismatch = "recompute",
    slo: float | None = None,
    refine: Refine | None = None,
    stream: Mapping[str, Any] | None = None,
    prefix_cache: Prefixes | None = None,
    **kwargs: Any,
) -> Any:
    """Call `model.generate(*args, **kwargs)` so that it starts from `cache`, and return its result.

    Args:
        model: the model, or a wrapper of it (torch.compile, PEFT, accelerate).
        *args: positional arguments of the stock generate. The prompt is the whole one, int64 [rows, tokens], the
            context included, as for a call without a cache; rows of different length are left-padded as usual, with
            their attention_mask.
        **kwargs: keyword arguments of the stock generate.
        cache: a CacheGenCache, or the location of an artifact. Any other cache, and None, goes to the stock generate
            with all other arguments as they were given.
        on_mismatch: where a prompt does not begin with the whole context, "recompute" reuses the longest common prefix
            and computes the rest; "error" raises PromptMismatchError.
        slo: for a location: seconds from this call to the first token.
        refine: for a location: when finer levels are loaded (see `CacheGenCache.stream`).
        stream: for a location: further arguments of `CacheGenCache.stream`, which loads it where one of slo, refine
            and stream is given.
        prefix_cache: where no cache is given, what finds the longest stored prefix of the prompt and stores the rest.
            `slo` then bounds how long locations on the network are waited for.

    Returns:
        The result of the stock generate.

    Raises:
        ConfigError: the arguments contradict each other.
        MismatchError: the cache belongs to another model, dtype, adapter or tokenizer.
        UnsupportedModelError: this way of generating cannot start from a cache.
        PromptMismatchError: `on_mismatch` is "error", and a prompt does not begin with the whole context.
    """
    if on_mismatch not in ("recompute", "error"):
        raise ConfigError(f"on_mismatch must be 'recompute' or 'error', got {on_mismatch!r}")
    require_instance(model)
    streamed = stream_options(slo, refine, stream or {})
    given, foreign = _cache_given(cache, kwargs)
    stock = stock_generate(model)
    if given is None:
        if prefix_cache is not None and not foreign and not streamed.keys() - {"slo"}:
            return prefix_cache.generate(model, args, kwargs, stock, start_from, slo)
        if streamed:
            raise ConfigError(f"{sorted(streamed)} are for an artifact's location: pass it as cache=")
        return stock(*args, **kwargs, **foreign)
    if isinstance(given, CachedContext):
        if streamed:
            raise ConfigError(f"{sorted(streamed)} are for an artifact's location; this cache is loaded already")
        given.check(model)
    elif not streamed:
        given = load_context(given, model, {})
    if isinstance(given, CachedContext) and given.encoder is not None:
        return generate_from_encoder(model, given, given.encoder, args, kwargs, on_mismatch == "error", stock)
    call = GenerateCall(model, args, kwargs)

    if not isinstance(given, CachedContext):
        given = stream_for(given, model, (call.ids, call.mask), on_mismatch, streamed)
        if given is None:
            return stock(*args, **kwargs)
        try:
            return _continue(model, given, call, on_mismatch)
        finally:
            if given.refinement is not None:
                given.refinement.close()
    return _continue(model, given, call, on_mismatch)


def stream_for(
    location: str | os.PathLike[str],
    model: PreTrainedModel,
    prompt: tuple[Tensor, Tensor],
    on_mismatch: OnMismatch,
    options: Mapping[str, Any],
) -> CachedContext | None:
    """Stream a context for a prompt.

    Args:
        location: the location of the artifact.
        model: the model.
        prompt: its token ids and its mask, [rows, tokens] each.
        on_mismatch: as for `generate`.
        options: further arguments of `CacheGenCache.stream`.

    Returns:
        The context; None, with a warning, where the prompt has to be computed without it.
    """
    try:
        return stream_to_context(location, model, prompt=prompt, **options)
    except (StoreAccessError, OfflineError):
        raise
    except (StoreError, PromptMismatchError) as error:
        if on_mismatch == "error" and isinstance(error, PromptMismatchError):
            raise
        LOG.warning("the prompt is computed without its cache: %s", error)
        return None


def _continue(model: PreTrainedModel, context: CachedContext, call: GenerateCall, on_mismatch: OnMismatch) -> Any:
    """Call the stock generate with a stock cache of the known part of the prompt."""
    stock, ids, mask, settings = stock_generate(model), call.ids, call.mask, call.settings
    covered = cover(context.input_ids[0], context.fingerprint.media, ids, mask, call.media)
    reuse = covered.reuse
    states, checkpoint = holds_states(model.config), None
    if states:
        if call.mode is GenerationMode.ASSISTED_GENERATION:
            raise UnsupportedModelError(
                "generating from a cache does not support assisted decoding of a model with recurrent states, which "
                "cannot be rolled back"
            )
        reuse, checkpoint = shorten(reuse, context.checkpoints, ids.shape[1], continuation_of(model).least)
    tokens, longest = context.kv.geometry.tokens, int(mask.sum(-1).max())
    moved = positions_change(model.config, tokens, longest)
    if on_mismatch == "error" and (moved or not reuse.whole):
        why = "its length changes the rotary frequencies" if moved else "it does not begin with the whole context"
        raise PromptMismatchError(f"a prompt of {longest} tokens cannot continue a cache of {tokens}: {why}")
    chunk = settings.prefill_chunk_size
    usable = not moved and reuse.length > 0 and (chunk is None or ids.shape[1] - reuse.length <= chunk)
    usable = usable and (not any(reuse.pads) or hides_pads(model))
    steps = states and not continuation_of(model).several
    usable = usable and not (steps and ids.shape[1] - reuse.length > MAX_STEPS)
    usable = usable and not (states and settings.cache_implementation == "static" and not CONTINUES_STATIC_STATES)
    repeats = max(settings.num_beams, settings.num_return_sequences)
    rest = replace(covered, reuse=reuse).rest(repeats) if usable else {}
    if rest and settings.cache_implementation == "static" and masks_by_token_types(model):
        # For a static cache generate makes the mask of the first step from the token types of the new tokens alone.
        usable = False
    _log_reuse(reuse, tokens, longest, moved, usable)
    if not usable:
        return stock(*call.prompt, **call.arguments)

    masked = masks_windows(model)
    if not masked and (call.mode is GenerationMode.ASSISTED_GENERATION or settings.cache_implementation == "static"):
        raise UnsupportedModelError(
            f"generating from a cache does not support assisted decoding or a static cache of "
            f"{type(unwrapped(model)).__name__}, whose attention reads tokens outside its window: use a dynamic cache"
        )
    kv, seen = (context.kv, 0) if context.refinement is None else context.refinement.snapshot()
    room = call.longest if settings.cache_implementation == "static" else None
    if not is_plain(model.config):
        devices = layer_devices(model, len(layer_contents(model.config)))
        cache: Any = build_by_config(kv, checkpoint, reuse, repeats, devices, model.config, room)
    elif room is not None:
        cache = build_static(kv, reuse, repeats, kv_devices(model), model.config, room)
    else:
        cache = build_dynamic(kv, reuse, repeats, kv_devices(model), masked=masked)
    del kv
    watched = context.refinement if kv_layers(cache) else None
    processors = [] if watched is None else [SwapIn(watched, cache, reuse, seen)]
    held = reuse.length
    if steps:
        held = read_singly(model, ids.repeat_interleave(repeats, 0), cache, held)
    return start_from(model, call, cache, processors, held, rest)


def start_from(
    model: PreTrainedModel,
    call: GenerateCall,
    cache: Cache,
    processors: Sequence[LogitsProcessor] = (),
    held: int = 0,
    media: Mapping[str, Tensor] | None = None,
) -> Any:
    """Call the stock generate with a stock cache of the beginning of the prompt, and return its result.

    Args:
        model: the model.
        call: the call, which can start from a cache.
        cache: holds the first positions of every row, none of them or all but one; it grows as the model generates.
        processors: come before the caller's own.
        held: number of positions that the cache holds, needed for one without keys, which does not count them.
        media: model inputs for the media of the prompt that the cache does not hold.
    """
    settings = call.settings
    arguments = {name: value for name, value in call.arguments.items() if name not in MEDIA_INPUTS}
    if settings.use_cache is False:  # a default that the model was saved with
        arguments["use_cache"] = True
    if processors:
        arguments["logits_processor"] = LogitsProcessorList([*processors, *(arguments.get("logits_processor") or [])])
    # The stock generate refuses these settings beside a cache; they have taken effect already.
    arguments |= {
        name: None for name in ("cache_implementation", "prefill_chunk_size") if getattr(settings, name) is not None
    }
    arguments |= {"attention_mask": call.mask, cache_argument(model): cache}
    stock = stock_generate(model)
    if media or call.mode is GenerationMode.ASSISTED_GENERATION:
        stock = detach(twin_of(model, functools.partial(rest_by_cache, media))).generate
    elif all(cache.is_linear):
        stock = detach(twin_of(model, functools.partial(rest_of_first, int(call.ids.shape[1]) - held))).generate
    with fresh_state(model, leave_offsets=call.media is not None):
        if call.media is not None:
            arguments |= positions(model, call.ids, call.mask, call.media)
        return stock(*call.prompt, **arguments)


def _log_reuse(reuse: Reuse, context: int, prompt: int, moved: bool, usable: bool) -> None:
    """Log at INFO how much of the context is reused, and where a prompt departs from it."""
    if moved:
        LOG.info("a prompt of %d tokens has other rotary frequencies than the context: all is computed", prompt)
    elif not reuse.whole:
        reused = reuse.length - max(reuse.pads) if usable else 0
        LOG.info(
            "the prompt leaves the context after %d of %d tokens; %d are reused, and %d tokens of the context are lost",
            reuse.common, context, reused, context - reused,
        )  # fmt: skip


def attach(model: PreTrainedModel, *, prefix_cache: Prefixes | None = None) -> PreTrainedModel:
    """Prepare a model: `model.generate` takes `cache=` and its options as `generate` does.

    Without a cache of this package the call is the stock one. Creating a CacheGenCache for a model attaches by default.

    Args:
        model: the model; of a wrapper, the wrapper and the model inside are prepared.
        prefix_cache: used by every call that gives no cache (docs/prefix_cache.md); None leaves what is attached.

    Returns:
        The same model.

    Raises:
        ConfigError: it is no model.
        UnsupportedModelError: prefixes of this model cannot be reused.
    """
    require_instance(model)
    if prefix_cache is not None:
        prefix_cache.check(model)
    for part in {id(part): part for part in (unwrapped(model), model)}.values():
        attached = part.__dict__.get("generate")
        if not isinstance(attached, Attached):
            attached = part.__dict__["generate"] = Attached(part, generate)
        if prefix_cache is not None:
            attached.prefix_cache = prefix_cache
    return model


def _cache_given(cache: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Take a cached context, or the location of one, out of the arguments.

    Returns:
        The context, its location or None; and the arguments of the stock generate for any other cache.

    Raises:
        ConfigError: a cached context is given beside another cache, or something else as a cache.
    """
    given = {name: kwargs.pop(name) for name in CACHE_NAMES if kwargs.get(name) is not None}
    if cache is not None:
        given["cache"] = cache
    ours = {name: value for name, value in given.items() if isinstance(value, CachedContext | str | os.PathLike)}
    if not ours:
        for value in given.values():
            if not isinstance(value, Cache | tuple) and not hasattr(value, "get_seq_length"):
                raise ConfigError(
                    f"expected a cache, or the path, URL or repository of an artifact as cache=, got "
                    f"{type(value).__name__}"
                )
        return None, {CACHE_ARGUMENT if name == "cache" else name: value for name, value in given.items()}
    if len(given) > 1:
        raise ConfigError(f"the cache is given twice, as {sorted(given)}: pass cache= alone")
    return next(iter(ours.values())), {}


def stream_options(slo: float | None, refine: Refine | None, stream: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of CacheGenCache.stream.

    Raises:
        ConfigError: `stream` holds a name that is an argument of generate.
    """
    given = {name: value for name, value in {"slo": slo, "refine": refine}.items() if value is not None}
    further = {name: value for name, value in stream.items() if value is not None}
    if twice := sorted(further.keys() & {*given, "prompt", "prompt_tokens"}):
        raise ConfigError(f"stream= must not hold {twice}: pass them as arguments of generate")
    return {**given, **further}
