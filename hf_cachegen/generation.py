"""generate(): model.generate() that starts from a cached context, right in every decoding mode.

The stock generate is called with the whole prompt, its whole mask and a fresh stock cache of the part that is known.
Given all three it feeds just the rest, so positions, logits processors, stopping criteria, streamers and the result
are those of a call without a cache. Assisted decoding alone feeds everything again. It runs on a twin of the model
that leaves out what the cache holds. What cannot start from a cache is refused by name; a prompt that differs from the
context is computed.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import GenerationMixin, LogitsProcessorList
from transformers.generation import GenerationMode

from hf_cachegen.context import CachedContext, load_context, stream_to_context
from hf_cachegen.errors import (
    ConfigError,
    OfflineError,
    PromptMismatchError,
    StoreAccessError,
    StoreError,
    TensorError,
    UnsupportedModelError,
)
from hf_cachegen.layout import build_dynamic, build_static, layer_devices, positions_change
from hf_cachegen.models.compat import (
    CACHE_ARGUMENT,
    CACHE_NAMES,
    drafts_from_hidden_states,
    longest_cache,
    prepared_inputs,
    unwrapped,
)
from hf_cachegen.models.state import fresh_state
from hf_cachegen.prefix import Reuse, match
from hf_cachegen.streaming import Refine, SwapIn

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

    OnMismatch = Literal["recompute", "error"]

LOG = logging.getLogger("hf_cachegen.generation")
POSITIONAL = tuple(inspect.signature(GenerationMixin.generate).parameters)[1:-1]
"""Names of the stock generate's own parameters, in order, without `self` and `**kwargs`."""
HELPERS = ("tokenizer", "assistant_tokenizer", "trust_remote_code")
"""Keywords that the stock generate takes out of its kwargs before it reads the generation settings."""
STRATEGIES = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
    GenerationMode.ASSISTED_GENERATION,
)
MODEL_INPUTS = ("attention_mask", "position_ids", "token_type_ids", "logits_to_keep", "return_dict", "use_cache")
"""Inputs of the model's forward pass that a text prompt may come with; any other may change what the cache should
hold."""
DEFAULT_NEW_TOKENS = 20
"""What the stock generate adds where no length is set."""


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    *args: Any,
    cache: Any = None,
    on_mismatch: OnMismatch = "recompute",
    slo: float | None = None,
    refine: Refine | None = None,
    stream: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """Call `model.generate(*args, **kwargs)` so that it starts from `cache`, and return what that returns.

    Args:
        model: the model; wrappers of torch.compile, PEFT and accelerate are looked through.
        *args: positional arguments of the stock generate. The prompt is the whole one, int64 [rows, tokens], the
            context included, as for a call without a cache; rows of different length are left-padded as usual, with
            their attention_mask.
        **kwargs: keyword arguments of the stock generate.
        cache: a CacheGenCache, or the location of an artifact. Any other cache, and None, goes to the stock generate
            with all other arguments as they were given.
        on_mismatch: where a prompt does not begin with the whole context, "recompute" reuses the longest common prefix
            and computes the rest; "error" raises PromptMismatchError.
        slo: for a location: seconds from this call to the first token.
        refine: for a location: what is done with finer levels (see `CacheGenCache.stream`).
        stream: for a location: further arguments of `CacheGenCache.stream`, which loads it where one of slo, refine
            and stream is given.

    Returns:
        What the stock generate returns.

    Raises:
        ConfigError: the arguments contradict each other.
        MismatchError: the cache belongs to another model, dtype, adapter or tokenizer.
        UnsupportedModelError: this way of generating cannot start from a cache.
        PromptMismatchError: see on_mismatch.
    """
    if on_mismatch not in ("recompute", "error"):
        raise ConfigError(f"on_mismatch must be 'recompute' or 'error', got {on_mismatch!r}")
    streamed = _streamed(slo, refine, stream or {})
    given, foreign = _cache_given(cache, kwargs)
    stock = _stock(model)
    if given is None:
        if streamed:
            raise ConfigError(f"{sorted(streamed)} are for an artifact's location: pass it as cache=")
        return stock(*args, **kwargs, **foreign)
    if isinstance(given, CachedContext):
        if streamed:
            raise ConfigError(f"{sorted(streamed)} are for an artifact's location; this cache is loaded already")
        given.check(model)
    elif not streamed:
        given = load_context(given, model, {})
    call = _Call(model, args, kwargs)

    if not isinstance(given, CachedContext):
        try:
            given = stream_to_context(given, model, prompt=(call.ids, call.mask), **streamed)
        except (StoreAccessError, OfflineError):
            raise
        except (StoreError, PromptMismatchError) as error:
            if on_mismatch == "error" and isinstance(error, PromptMismatchError):
                raise
            LOG.warning("the prompt is computed without its cache: %s", error)
            return stock(*args, **kwargs)
        try:
            return _continue(model, given, call, on_mismatch)
        finally:
            if given.refinement is not None:
                given.refinement.close()
    return _continue(model, given, call, on_mismatch)


class _Call:
    """One call of generate: its arguments by name, and what they ask for.

    The prompt keeps the name under which it was given (positional, `inputs` or `input_ids`), since wrappers of the
    stock generate look for it there.

    Raises:
        TypeError: an argument is given twice.
        TensorError: the prompt is no matrix of token ids.
        UnsupportedModelError: the call cannot start from a cache.
    """

    def __init__(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: Mapping[str, Any]):
        if len(args) > len(POSITIONAL):
            raise TypeError(f"generate takes at most {len(POSITIONAL)} positional arguments after the model")
        self.prompt, options = args[:1], dict(zip(POSITIONAL[1:], args[1:], strict=False))
        if twice := sorted(options.keys() & kwargs.keys()):
            raise TypeError(f"arguments given twice: {twice}")
        self.arguments = {**options, **kwargs}
        given = [*self.prompt, *(kwargs.get(name) for name in ("inputs", "input_ids"))]
        prompts = [ids for ids in given if ids is not None]
        if len(prompts) > 1:
            raise TypeError("the prompt is given twice: pass either inputs or input_ids")
        self.ids: Tensor = prompts[0] if prompts else None  # type: ignore[assignment]
        stock = (*POSITIONAL, *HELPERS, "input_ids")
        named = {name: value for name, value in self.arguments.items() if name not in stock}
        self.settings, inputs = model._prepare_generation_config(self.arguments.get("generation_config"), **named)
        self.mode = self.settings.get_generation_mode(self.arguments.get("assistant_model"))
        self._require_supported(model, inputs)
        self.mask = _mask(model, self.ids, self.settings, inputs)

    def _require_supported(self, model: PreTrainedModel, inputs: dict[str, Any]) -> None:
        """Raise UnsupportedModelError, with what to do, for a call that cannot start from a cache."""
        settings = self.settings
        token_types = inputs.get("token_type_ids")
        foreign = sorted(name for name, value in inputs.items() if value is not None and name not in MODEL_INPUTS)
        static = settings.cache_implementation == "static"
        assisted = self.mode is GenerationMode.ASSISTED_GENERATION
        drafts = drafts_from_hidden_states(settings)
        refusals = {
            "inputs_embeds: pass input_ids, which can be compared with the context": inputs.get("inputs_embeds")
            is not None,
            "no input_ids: pass the whole prompt, the context included": self.ids is None,
            "use_cache=False": self._asks_for_no_cache(model),
            "custom_generate": self.arguments.get("custom_generate") is not None,
            f"the strategy {self.mode.value}": self.mode not in STRATEGIES,
            "token_healing, which rewrites the prompt": bool(settings.token_healing),
            f"{drafts}, which drafts from hidden states of the context": drafts is not None,
            "output_attentions or output_hidden_states: a cache has none of its context": bool(
                settings.output_attentions or settings.output_hidden_states
            ),
            f"cache_implementation={settings.cache_implementation!r}: use 'dynamic' or 'static'": (
                settings.cache_implementation not in (None, "dynamic", "static")
            ),
            "assisted decoding with cache_implementation='static'": static and assisted,
            "token_type_ids other than 0": token_types is not None and bool(token_types.any()),
            f"model inputs {foreign}, which may change what the cache should hold": bool(foreign),
        }
        for refusal, found in refusals.items():
            if found:
                raise UnsupportedModelError(f"generating from a cache does not support {refusal}")

    def _asks_for_no_cache(self, model: PreTrainedModel) -> bool:
        """Report whether the caller, and not a default that the model was saved with, asks for no cache."""
        given = self.arguments.get("use_cache")
        if given is not None:
            return given is False
        config = self.arguments.get("generation_config")
        return getattr(config, "use_cache", None) is False and model.generation_config.use_cache is not False


def _continue(model: PreTrainedModel, context: CachedContext, call: _Call, on_mismatch: OnMismatch) -> Any:
    """Call the stock generate with a stock cache of what is known of the prompt."""
    stock, ids, mask, settings = _stock(model), call.ids, call.mask, call.settings
    reuse = match(context.input_ids[0], ids, mask)
    tokens, longest = context.kv.geometry.tokens, int(mask.sum(-1).max())
    moved = positions_change(model.config, tokens, longest)
    if on_mismatch == "error" and (moved or not reuse.whole):
        why = "its length changes the rotary frequencies" if moved else "it does not begin with the whole context"
        raise PromptMismatchError(f"a prompt of {longest} tokens cannot continue a cache of {tokens}: {why}")
    chunk = settings.prefill_chunk_size
    usable = not moved and reuse.columns > 0 and (chunk is None or ids.shape[1] - reuse.columns <= chunk)
    _log_reuse(reuse, tokens, longest, moved, usable)
    if not usable:
        return stock(*call.prompt, **call.arguments)

    arguments = dict(call.arguments)
    if settings.use_cache is False:  # a default that the model was saved with
        arguments["use_cache"] = True
    repeats = max(settings.num_beams, settings.num_return_sequences)
    kv, seen = (context.kv, 0) if context.refinement is None else context.refinement.snapshot()
    devices = layer_devices(model, len(kv.keys))
    if settings.cache_implementation == "static":
        cache: Any = build_static(kv, reuse, repeats, devices, model.config, _longest(settings, ids.shape[1]))
    else:
        cache = build_dynamic(kv, reuse, repeats, devices)
    del kv
    if context.refinement is not None:
        swap = SwapIn(context.refinement, cache, reuse, seen)
        arguments["logits_processor"] = LogitsProcessorList([swap, *(arguments.get("logits_processor") or [])])
    # The stock generate refuses these settings beside a cache; they have been obeyed.
    arguments |= {
        name: None for name in ("cache_implementation", "prefill_chunk_size") if getattr(settings, name) is not None
    }
    arguments |= {"attention_mask": mask, CACHE_ARGUMENT: cache}
    assisted = call.mode is GenerationMode.ASSISTED_GENERATION
    with fresh_state(model):
        return (_twin(model).generate if assisted else stock)(*call.prompt, **arguments)


def _log_reuse(reuse: Reuse, context: int, prompt: int, moved: bool, usable: bool) -> None:
    """Say at INFO how much of the context is reused, and where a prompt leaves it."""
    if moved:
        LOG.info("a prompt of %d tokens has other rotary frequencies than the context: all is computed", prompt)
    elif not reuse.whole:
        reused = reuse.columns - max(reuse.pads) if usable else 0
        LOG.info("the prompt leaves the context after %d of %d tokens; %d are reused", reuse.common, context, reused)


def attach(model: PreTrainedModel) -> PreTrainedModel:
    """Make `model.generate` take `cache=` and what goes with it as `generate` does; without a cache it is unchanged."""
    if not isinstance(model.__dict__.get("generate"), _Attached):
        model.__dict__["generate"] = _Attached(model)
    return model


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `attach`; nothing happens to a model that is not attached."""
    attached = model.__dict__.get("generate")
    if isinstance(attached, _Attached):
        attached.undo(model)
    return model


class _Attached:
    """The `generate` of an attached model: an object rather than a closure, so that models can be copied and
    pickled.
    """

    def __init__(self, model: PreTrainedModel):
        self.model, self.own, self.stock = model, model.__dict__.get("generate"), model.generate

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return generate(self.model, *args, **kwargs)

    def undo(self, model: PreTrainedModel) -> None:
        if self.own is None:
            del model.__dict__["generate"]
        else:
            model.__dict__["generate"] = self.own


def _cache_given(cache: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Take what this package handles out of the arguments: a cached context, or the location of one.

    Returns:
        That, or None; and the arguments of the stock generate for any other cache that was given.

    Raises:
        ConfigError: a cached context is given beside another cache.
    """
    given = {name: kwargs.pop(name) for name in CACHE_NAMES if kwargs.get(name) is not None}
    if cache is not None:
        given["cache"] = cache
    ours = {name: value for name, value in given.items() if isinstance(value, CachedContext | str | os.PathLike)}
    if not ours:
        return None, {CACHE_ARGUMENT if name == "cache" else name: value for name, value in given.items()}
    if len(given) > 1:
        raise ConfigError(f"the cache is given twice, as {sorted(given)}: pass cache= alone")
    return next(iter(ours.values())), {}


def _streamed(slo: float | None, refine: Refine | None, stream: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of CacheGenCache.stream.

    Raises:
        ConfigError: `stream` holds what other arguments of generate are for.
    """
    given = {name: value for name, value in {"slo": slo, "refine": refine}.items() if value is not None}
    further = {name: value for name, value in stream.items() if value is not None}
    if twice := sorted(further.keys() & {*given, "prompt", "prompt_tokens"}):
        raise ConfigError(f"{twice} in stream= belong to other arguments of generate")
    return {**given, **further}


def _stock(model: PreTrainedModel) -> Callable[..., Any]:
    attached = model.__dict__.get("generate")
    return attached.stock if isinstance(attached, _Attached) else model.generate


def _mask(model: PreTrainedModel, ids: Tensor, settings: GenerationConfig, inputs: dict[str, Any]) -> Tensor:
    """Return the attention mask given, else the one that the stock generate infers from pad tokens."""
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise TensorError(f"input_ids must be a tensor [rows, tokens], got {getattr(ids, 'shape', type(ids).__name__)}")
    mask = inputs.get("attention_mask")
    if mask is None:
        model._prepare_special_tokens(settings, True, device=ids.device, batch_size=ids.shape[0])
        mask = model._prepare_attention_mask_for_generation(ids, settings, {})
    positions = inputs.get("position_ids")
    if positions is not None:
        usual = (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)
        if positions.shape[-1] != usual.shape[-1] or bool(((positions != usual) & (mask != 0)).any()):
            raise UnsupportedModelError(
                "position_ids other than those of the attention mask do not fit a cached context"
            )
    return mask


def _longest(settings: GenerationConfig, prompt: int) -> int:
    """Return the number of tokens of the longest possible result."""
    most = prompt + (settings.max_new_tokens or DEFAULT_NEW_TOKENS)
    return max(most, settings.max_length or 0, longest_cache(settings))


def _twin(model: PreTrainedModel) -> PreTrainedModel:
    """Return a second object over the same weights, whose inputs leave out what the cache holds.

    The first step of assisted decoding feeds the whole prompt whatever the cache holds, and its candidates need the
    whole prompt. The model itself is not touched, so other threads may use it.
    """
    model = unwrapped(model)
    prepare = model.prepare_inputs_for_generation

    @functools.wraps(prepare)
    def prepare_rest(input_ids: Tensor, next_sequence_length: int | None = None, **inputs: Any) -> Any:
        return prepared_inputs(prepare, input_ids, next_sequence_length, inputs)

    twin = object.__new__(type(model))
    twin.__dict__.update(model.__dict__)
    detach(twin)
    twin.__dict__["prepare_inputs_for_generation"] = prepare_rest
    return twin
