"""The differences between the supported releases of Transformers, 5.17 to 5.24, and nothing else.

From 5.24 on the argument, the outputs' field and `generate`'s keyword for a cache are all called `cache`. Before, they
were `past_key_values` (`cache_params` for recurrent models). Everything else in the package asks this file.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import GenerationMixin, cache_utils
from transformers.cache_utils import Cache

if TYPE_CHECKING:
    from transformers import GenerationConfig

RELEASE = Version(transformers.__version__)
"""The installed release of Transformers."""
CACHE_ARGUMENT = "cache" if Version("5.24.dev0") <= RELEASE else "past_key_values"
"""Name of the cache among the arguments of `forward` and `generate`, and among the fields of their outputs."""
CACHE_NAMES = ("cache", "past_key_values")
"""Names under which a caller of `generate` may pass a cache, whatever the release."""
ENCODER_HOOK = (
    "_prepare_text_encoder_decoder_kwargs_for_generation"
    if hasattr(GenerationMixin, "_prepare_text_encoder_decoder_kwargs_for_generation")
    else "_prepare_encoder_decoder_kwargs_for_generation"
)
"""Name of the method with which `generate` runs the encoder of an encoder-decoder model."""
EMPTY_LAYERS: tuple[type, ...] = (cache_utils.DummyLayer,) if hasattr(cache_utils, "DummyLayer") else ()
"""The classes of cache layers that hold nothing."""
CONTINUES_STATIC_STATES = Version("5.23") <= RELEASE
"""Whether a static cache that holds recurrent states continues rightly. In 5.17 that of Falcon-H1 does not, with other
tokens and no error; releases between are not known.
"""
HIDDEN_STATE_DRAFTS = ("use_mtp", "speculation_type")
"""Generation settings, not known to every release, that draft tokens from hidden states of the whole prompt."""


def run(
    model: Any, input_ids: Tensor, cache: Cache | None, *, last_logits_only: bool = False, **inputs: Any
) -> Any:
    """Run a forward pass that extends `cache`, with the positions that the stock `generate` would give.

    Some models count positions otherwise when none are given (RoBERTa begins after its pad token's id), so a cache
    filled without them could not be continued.

    Args:
        model: the model, or a wrapper of it.
        input_ids: int64 [rows, tokens], the tokens that follow those of the cache.
        cache: the cache to extend; None to compute the tokens without one.
        last_logits_only: compute the logits of the last token alone where the model can.
        inputs: further inputs of the forward pass.

    Returns:
        The output object of the model.
    """
    options: dict[str, Any] = inputs if cache is None else {**inputs, cache_argument(model): cache}
    if cache is not None and "position_ids" not in options and _counts_positions(model):
        held = _tokens_held(cache)
        if held is not None:
            positions = torch.arange(held, held + input_ids.shape[1], device=input_ids.device)
            options["position_ids"] = positions.expand(len(input_ids), -1)
    if last_logits_only and takes(model, "logits_to_keep"):
        options["logits_to_keep"] = 1
    return model(input_ids=input_ids, use_cache=cache is not None, return_dict=True, **options)


def _counts_positions(model: Any) -> bool:
    """Report whether the stock `generate` numbers a model's tokens from 0; some models have a method of their own."""
    own = getattr(type(unwrapped(model)), "_prepare_position_ids_for_generation", None)
    stock = GenerationMixin._prepare_position_ids_for_generation
    return own is stock and takes(model, "position_ids")


def _tokens_held(cache: Cache) -> int | None:
    """Return the number of tokens in a cache; None where no layer counts them."""
    try:
        return int(cache.get_seq_length())
    except ValueError:  # recurrent layers alone
        return None


def takes(model: Any, name: str) -> bool:
    """Report whether the forward pass of `model` has an argument of this name.

    The class is asked: wrappers and hooks replace `forward` on the instance by functions that take anything.
    """
    return name in inspect.signature(type(unwrapped(model)).forward).parameters


def takes_cache(model: Any) -> bool:
    """Report whether the forward pass of `model` takes a key-value cache."""
    return takes(model, cache_argument(model))


def cache_argument(model: Any) -> str:
    """Return the name of the cache among the arguments of a model: recurrent ones had an own name before 5.24."""
    own = "cache_params"
    return own if CACHE_ARGUMENT != "cache" and takes(model, own) else CACHE_ARGUMENT


def unwrapped(model: Any) -> Any:
    """Return the Transformers model inside `torch.compile`, PEFT and data-parallel wrappers, or the model itself."""
    while True:
        if "_orig_mod" in (parts := getattr(model, "_modules", {})):  # torch.compile
            model = parts["_orig_mod"]
        elif hasattr(model, "get_base_model"):  # PEFT
            model = model.get_base_model()
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def text_decoder(model: Any) -> nn.Module:
    """Return the part of `model` that reads tokens, without towers for pictures and audio; else the model itself."""
    base = unwrapped(model)
    towers = (getattr(base.config, name, None) for name in ("vision_config", "audio_config"))
    if not base.config.is_encoder_decoder and all(tower is None for tower in towers):
        return base
    found = base.get_decoder()
    return found if isinstance(found, nn.Module) else base


def cache_of(outputs: Any) -> Cache:
    """Return the cache in the output of a forward pass or of `generate`."""
    return outputs[CACHE_ARGUMENT]


def drafts_from_hidden_states(settings: GenerationConfig) -> str | None:
    """Return the name of the first setting that drafts from hidden states of the prompt, None where there is none."""
    return next((name for name in HIDDEN_STATE_DRAFTS if getattr(settings, name, None)), None)


def longest_cache(settings: GenerationConfig) -> int:
    """Return the length in tokens that the settings ask of a static cache, 0 where they set none."""
    return getattr(settings, "max_cache_len", None) or 0


def layers_of_loops(config: Any, layers: Sequence[Any]) -> list[Any]:
    """Return the layers that a model adds to its cache, since it runs some of its layers several times (Dory).

    Args:
        config: the configuration of the text model.
        layers: the layers of a stock cache made from it.
    """
    if getattr(config, "recurrent_kv_cache_mode", None) != "per_loop":
        return []
    looped = layers[config.n_input_layers : config.num_hidden_layers - config.n_output_layers]
    return list(looped) * (config.n_recurrent_loops - 1)


def tokens_seen(layer: Any) -> int:
    """Return the number of tokens that have passed through a sliding layer; static ones count it in a tensor."""
    seen = getattr(layer, "cumulative_length_int", None)
    return int(layer.cumulative_length if seen is None else seen)


def prepared_inputs(
    prepare: Any,
    input_ids: Tensor,
    length: int | None,
    inputs: Mapping[str, Any],
    media: Mapping[str, Tensor] | None = None,
) -> Any:
    """Call a model's `prepare_inputs_for_generation` for the last tokens of `input_ids` alone.

    Where `length` is None the tokens are those that the cache among `inputs` does not hold. The first step of a
    generation also gets `media`, the model inputs for the placeholders among these tokens.
    """
    cache = inputs.get(CACHE_ARGUMENT)
    if length is None and cache is not None and (held := cache.get_seq_length()):
        length = input_ids.shape[1] - held
    if not media or not inputs.get("is_first_iteration"):
        return prepare(input_ids, next_sequence_length=length, **inputs)
    # From 5.24 on generate encodes media before the first step. Here it was given none, and encodes nothing.
    given = {name: value for name, value in inputs.items() if name != "mm_encoder_outputs" or value}
    prepared = prepare(input_ids, next_sequence_length=length, **given, **media)
    # Masks read token types by position. Up to 5.22 they were those of the new tokens alone, and shifted the mask.
    whole = {name: inputs[name] for name in ("token_type_ids", "mm_token_type_ids") if prepared.get(name) is not None}
    return {**prepared, **whole}


def masks_by_token_types(model: Any) -> bool:
    """Report whether the attention mask of a model depends on token types: in both directions within a picture."""
    create = getattr(type(unwrapped(model)), "create_masks_for_generate", None)
    names = () if create is None else inspect.signature(create).parameters
    return "token_type_ids" in names or "mm_token_type_ids" in names


def prompt_positions(model: Any, input_ids: Tensor, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the positions that the stock generate computes for a whole prompt with media.

    Models with positions of several axes (M-RoPE) also keep their offset, `rope_deltas`, on the model.

    Args:
        model: the model.
        input_ids: int64 [rows, tokens].
        inputs: the other model inputs, with the attention mask.

    Returns:
        The argument `position_ids` of generate; empty for a model that takes none.
    """
    if not takes(model, "position_ids"):
        return {}
    return {"position_ids": unwrapped(model)._prepare_position_ids_for_generation(input_ids, dict(inputs))}
