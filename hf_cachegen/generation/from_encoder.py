"""generate() from the context of an encoder-decoder model: the encoder is not run, and the decoder's prompt continues.

The stock generate of a second object over the same weights (`twin.py`) asks for the encoder's output where it would run
the encoder. If its input is that of the context, it gets what is kept, and a fresh cache with the keys and values of
cross-attention. Its first step is given what the cache does not hold of the decoder's prompt. So wrappers that call the
stock generate several times (Whisper's fallbacks and segments) work: each call is compared by itself.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import EncoderDecoderCache
from transformers.generation import GenerationMode

from hf_cachegen.context import CachedContext
from hf_cachegen.errors import PromptMismatchError, UnsupportedModelError
from hf_cachegen.generation.twin import twin_of
from hf_cachegen.models.call import HELPERS, POSITIONAL, STRATEGIES
from hf_cachegen.models.compat import CACHE_ARGUMENT, ENCODER_HOOK
from hf_cachegen.models.encoder_decoder import EncoderInput, EncoderState, build, fill_prefix, input_name, outputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOG = logging.getLogger("hf_cachegen.generation")


def generate_from_encoder(
    model: PreTrainedModel,
    context: CachedContext,
    state: EncoderState,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    required: bool,
    stock: Callable[..., Any],
) -> Any:
    """Call the stock generate so that it starts from a context, and return its result.

    Args:
        model: the model.
        context: the context.
        state: what it keeps of the encoder.
        args: positional arguments of the stock generate.
        kwargs: its keyword arguments.
        required: raise an error for an input other than that of the context.
        stock: the stock generate of the model.

    Raises:
        UnsupportedModelError: this way of generating cannot start from a cache.
        PromptMismatchError: the input is another one, and `required` is true.
    """
    named = {**dict(zip(POSITIONAL, args, strict=False)), **kwargs}
    _require_supported(model, named)
    name = input_name(model)
    value = named.get("inputs") if named.get("inputs") is not None else named.get(name)
    media = context.fingerprint.media
    if not isinstance(value, Tensor) or not EncoderInput(name, value, named.get("attention_mask")).same(
        context.input_ids, media
    ):
        if required:
            raise PromptMismatchError(
                f"expected {name} of the context in every row, without pads, got another input: the encoder reads in "
                "both directions, so nothing of the cache can be reused"
            )
        LOG.info("the encoder's input is not that of the context: all is computed")
        return stock(*args, **kwargs)
    twin = twin_of(model, functools.partial(_rest_of_decoder, state))
    encode = getattr(twin, ENCODER_HOOK)
    twin.__dict__[ENCODER_HOOK] = functools.partial(_encoded, context, state, encode)
    twin.__dict__.pop("generate", None)
    return twin.generate(*args, **kwargs)


def _require_supported(model: PreTrainedModel, named: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError, with the reason, for a call that cannot start from a cache."""
    options = {key: value for key, value in named.items() if key not in (*POSITIONAL, *HELPERS)}
    settings, _ = model._prepare_generation_config(named.get("generation_config"), **options)
    mode = settings.get_generation_mode(named.get("assistant_model"))
    refusals = {
        f"the strategy {mode.value}": mode not in STRATEGIES or mode is GenerationMode.ASSISTED_GENERATION,
        "use_cache=False": settings.use_cache is False,
        "inputs_embeds or encoder_outputs: pass the input of the encoder": any(
            named.get(key) is not None for key in ("inputs_embeds", "encoder_outputs")
        ),
        "custom_generate": named.get("custom_generate") is not None,
        "output_attentions or output_hidden_states, which a cache does not hold": bool(
            settings.output_attentions or settings.output_hidden_states
        ),
        f"cache_implementation={settings.cache_implementation!r} of an encoder-decoder model: use 'dynamic'": (
            settings.cache_implementation not in (None, "dynamic")
        ),
    }
    for refusal, found in refusals.items():
        if found:
            raise UnsupportedModelError(f"generating from a cache does not support {refusal}")


def _encoded(
    context: CachedContext, state: EncoderState, encode: Callable[..., Any], inputs_tensor: Tensor,
    model_kwargs: dict[str, Any], model_input_name: str | None, generation_config: Any,
) -> dict[str, Any]:  # fmt: skip
    """Give the stock generate the kept output of the encoder, and a fresh cache; run the encoder for another input."""
    given = EncoderInput(model_input_name or "input_ids", inputs_tensor, model_kwargs.get("attention_mask"))
    if not given.same(context.input_ids, context.fingerprint.media):
        found: dict[str, Any] = encode(
            inputs_tensor=inputs_tensor, model_kwargs=model_kwargs, model_input_name=model_input_name,
            generation_config=generation_config,
        )  # fmt: skip
        return found
    rows = len(inputs_tensor)
    repeats = max(generation_config.num_beams, generation_config.num_return_sequences)
    generation_config.cache_implementation = None  # refused beside a cache; it was "dynamic" or None
    encoded = outputs(state, rows, inputs_tensor.device)
    return {**model_kwargs, "encoder_outputs": encoded, CACHE_ARGUMENT: build(context.kv, rows * repeats)}


def _rest_of_decoder(
    state: EncoderState, prepare: Any, input_ids: Tensor, next_sequence_length: int | None = None, **inputs: Any
) -> Any:
    """Fill the first step's cache with the kept prefix of the decoder's prompt, and prepare the rest of it."""
    cache: Any = inputs.get(CACHE_ARGUMENT)
    # A cache whose cross-attention is filled before the first step is the one that `_encoded` has built.
    first = inputs.get("is_first_iteration") and isinstance(cache, EncoderDecoderCache) and cache.is_updated.get(0)
    if first and inputs.get("decoder_attention_mask") is None and (tokens := state.prefix(input_ids)):
        fill_prefix(cache, state, tokens, len(input_ids))
        next_sequence_length = input_ids.shape[1] - tokens
    if next_sequence_length is not None:
        inputs["next_sequence_length"] = next_sequence_length
    return prepare(input_ids, **inputs)
