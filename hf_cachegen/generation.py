"""generate(): model.generate() that starts from a cached context, right in every decoding mode.

The stock generate is called with the whole prompt, its whole mask and a fresh stock cache of the part that is known.
Given all three it feeds just the rest, so positions, logits processors, stopping criteria, streamers and the result
are those of a call without a cache. Assisted decoding alone feeds everything again, and does so on a twin of the
model that leaves out what the cache holds. What cannot start from a cache is refused by name; a prompt that differs
from the context is computed.
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

from hf_cachegen.cache import CacheGenCache
from hf_cachegen.errors import (
    ConfigError,
    OfflineError,
    PromptMismatchError,
    StoreAccessError,
    StoreError,
    TensorError,
    UnsupportedModelError,
)
from hf_cachegen.layout import base_model, build_dynamic, build_static, layer_devices, positions_change
from hf_cachegen.prefix import match
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
    input_ids: Tensor | None = None,
    *args: Any,
    cache: CacheGenCache | str | os.PathLike[str] | None = None,
    on_mismatch: OnMismatch = "recompute",
    slo: float | None = None,
    refine: Refine | None = None,
    stream: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """What `model.generate(input_ids, *args, **kwargs)` returns, computed from `cache`: a cache, or an artifact's path.

    input_ids [rows, tokens]: whole prompts, the context included, as for a call without a cache; rows of different
    length are left-padded as usual, with their attention_mask. on_mismatch: where a prompt does not begin with the
    whole context, "recompute" reuses the longest common prefix and computes the rest, "error" raises
    PromptMismatchError.
    slo, refine: for an artifact's path: seconds from this call to the first token, and what is done with finer levels;
    stream: further arguments of CacheGenCache.stream, which loads it where one of the three is given.

    Raises ConfigError for arguments that contradict each other, MismatchError where the cache is another model's,
    UnsupportedModelError for a way of generating that cannot start from a cache, and whatever the stock generate
    raises.
    """
    if on_mismatch not in ("recompute", "error"):
        raise ConfigError(f"on_mismatch must be 'recompute' or 'error', got {on_mismatch!r}")
    stock, call = _stock(model), _arguments(input_ids, args, kwargs)
    if cache is None and isinstance(call.get("past_key_values"), CacheGenCache):
        cache = call.pop("past_key_values")
    streamed = _streamed(slo, refine, stream or {})
    if cache is None:
        if streamed:
            raise ConfigError(f"{sorted(streamed)} are for an artifact's path: pass it as cache=")
        return stock(**call)
    if isinstance(cache, CacheGenCache):
        if streamed:
            raise ConfigError(f"{sorted(streamed)} are for an artifact's path; this cache is loaded already")
        cache.check(model)
    elif not streamed:
        cache = CacheGenCache.from_pretrained(cache, model)
    options = {name: value for name, value in call.items() if name not in (*POSITIONAL, *HELPERS)}
    settings, inputs = model._prepare_generation_config(call.get("generation_config"), **options)
    mode = settings.get_generation_mode(call.get("assistant_model"))
    _require_supported(settings, mode, call, inputs)
    ids = call["inputs"]
    mask = _mask(model, ids, settings, inputs)

    if not isinstance(cache, CacheGenCache):
        try:
            cache = CacheGenCache.stream(cache, model, prompt=(ids, mask), **streamed)
        except (StoreAccessError, OfflineError):
            raise
        except (StoreError, PromptMismatchError) as error:
            if on_mismatch == "error" and isinstance(error, PromptMismatchError):
                raise
            LOG.warning("the prompt is computed without its cache: %s", error)
            return stock(**call)
        try:
            return _continue(model, cache, call, settings, mode, mask, on_mismatch)
        finally:
            if cache.refinement is not None:
                cache.refinement.close()
    return _continue(model, cache, call, settings, mode, mask, on_mismatch)


def _continue(
    model: PreTrainedModel,
    cache: CacheGenCache,
    call: dict[str, Any],
    settings: GenerationConfig,
    mode: GenerationMode,
    mask: Tensor,
    on_mismatch: OnMismatch,
) -> Any:
    """The stock generate, with a stock cache of what is known of the prompt."""
    stock, ids = _stock(model), call["inputs"]
    reuse = match(cache.input_ids[0], ids, mask)
    context, longest = cache.kv.geometry.tokens, int(mask.sum(-1).max())
    moved = positions_change(model.config, context, longest)
    if on_mismatch == "error" and (moved or not reuse.whole):
        why = "its length changes the rotary frequencies" if moved else "it does not begin with the whole context"
        raise PromptMismatchError(f"a prompt of {longest} tokens cannot continue a cache of {context}: {why}")
    chunk = settings.prefill_chunk_size
    if moved or reuse.columns <= 0 or (chunk is not None and ids.shape[1] - reuse.columns > chunk):
        return stock(**call)

    repeats = max(settings.num_beams, settings.num_return_sequences)
    kv, seen = (cache.kv, 0) if cache.refinement is None else cache.refinement.snapshot()
    devices = layer_devices(model, len(kv.keys))
    if settings.cache_implementation == "static":
        length = _longest(settings, ids.shape[1])
        call["past_key_values"] = build_static(kv, reuse, repeats, devices, model.config, length)
    else:
        call["past_key_values"] = build_dynamic(kv, reuse, repeats, devices)
    del kv
    if cache.refinement is not None:
        swap = SwapIn(cache.refinement, call["past_key_values"], reuse, seen)
        call["logits_processor"] = LogitsProcessorList([swap, *(call.get("logits_processor") or [])])
    # The stock generate refuses these settings beside a cache; they have been obeyed.
    call |= {
        name: None for name in ("cache_implementation", "prefill_chunk_size") if getattr(settings, name) is not None
    }
    call["attention_mask"] = mask
    return (_twin(model).generate if mode is GenerationMode.ASSISTED_GENERATION else stock)(**call)


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


def _streamed(slo: float | None, refine: Refine | None, stream: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of CacheGenCache.stream. Raises ConfigError for what is said twice."""
    given = {name: value for name, value in {"slo": slo, "refine": refine}.items() if value is not None}
    further = {name: value for name, value in stream.items() if value is not None}
    if twice := sorted(further.keys() & {*given, "prompt", "prompt_tokens"}):
        raise ConfigError(f"{twice} in stream= are told by other arguments of generate")
    return {**given, **further}


def _stock(model: PreTrainedModel) -> Callable[..., Any]:
    attached = model.__dict__.get("generate")
    return attached.stock if isinstance(attached, _Attached) else model.generate


def _arguments(input_ids: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments by name, the prompt as "inputs"."""
    if len(args) > len(POSITIONAL) - 1:
        raise TypeError(f"generate takes at most {len(POSITIONAL)} positional arguments after the model")
    call = {**dict(zip(POSITIONAL[1:], args, strict=False)), **kwargs}
    if len(call) < len(args) + len(kwargs):
        raise TypeError(f"arguments given twice: {sorted(set(POSITIONAL[1 : len(args) + 1]) & set(kwargs))}")
    given = [ids for ids in (input_ids, call.pop("inputs", None)) if ids is not None]
    if len(given) > 1:
        raise TypeError("the prompt is given twice: pass either inputs or input_ids")
    return {"inputs": given[0] if given else None, **call}


def _require_supported(
    settings: GenerationConfig, mode: GenerationMode, call: dict[str, Any], inputs: dict[str, Any]
) -> None:
    """Raises UnsupportedModelError, with what to do, for a call that cannot start from a cache."""
    token_types = inputs.get("token_type_ids")
    foreign = sorted(name for name, value in inputs.items() if value is not None and name not in MODEL_INPUTS)
    static = settings.cache_implementation == "static"
    assisted = mode is GenerationMode.ASSISTED_GENERATION
    refusals = {
        "past_key_values beside cache=: pass one of them": inputs.get("past_key_values") is not None,
        "inputs_embeds: pass input_ids, which can be compared with the context": inputs.get("inputs_embeds")
        is not None,
        "no input_ids: pass the whole prompt, the context included": call["inputs"] is None,
        "use_cache=False": settings.use_cache is False,
        "custom_generate": call.get("custom_generate") is not None,
        f"the strategy {mode.value}": mode not in STRATEGIES,
        "token_healing, which rewrites the prompt": bool(settings.token_healing),
        "use_mtp, which drafts from hidden states of the context": bool(getattr(settings, "use_mtp", None)),
        "speculation_type, which drafts from hidden states of the context": (
            getattr(settings, "speculation_type", None) is not None
        ),
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


def _mask(model: PreTrainedModel, ids: Tensor, settings: GenerationConfig, inputs: dict[str, Any]) -> Tensor:
    """The attention mask given, else the one that the stock generate infers from pad tokens."""
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
    """Tokens that the longest possible result has."""
    most = prompt + (settings.max_new_tokens or DEFAULT_NEW_TOKENS)
    return max(most, settings.max_length or 0, getattr(settings, "max_cache_len", None) or 0)


def _twin(model: PreTrainedModel) -> PreTrainedModel:
    """A second object over the same weights, whose inputs leave out what the cache holds.

    The first step of assisted decoding feeds the whole prompt whatever the cache holds, and nothing but the whole
    prompt will do for its candidates. The model itself is not touched, so other threads may use it.
    """
    model = base_model(model)
    prepare = model.prepare_inputs_for_generation

    @functools.wraps(prepare)
    def prepare_rest(
        input_ids: Tensor, next_sequence_length: int | None = None, past_key_values: Any = None, **kwargs: Any
    ) -> Any:
        if next_sequence_length is None and past_key_values is not None and (held := past_key_values.get_seq_length()):
            next_sequence_length = input_ids.shape[1] - held
        return prepare(input_ids, next_sequence_length=next_sequence_length, past_key_values=past_key_values, **kwargs)

    twin = object.__new__(type(model))
    twin.__dict__.update(model.__dict__)
    detach(twin)
    twin.__dict__["prepare_inputs_for_generation"] = prepare_rest
    return twin
