"""One call of the stock generate: its arguments by name, and whether it can start from a cache."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import GenerationMixin
from transformers.generation import GenerationMode

from hf_cachegen.errors import TensorError, UnsupportedModelError
from hf_cachegen.models.compat import drafts_from_hidden_states, longest_cache
from hf_cachegen.models.media import MEDIA_INPUTS, TOKEN_TYPES, parse_media

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

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
MODEL_INPUTS = ("attention_mask", "position_ids", "logits_to_keep", "return_dict", "use_cache", *TOKEN_TYPES)
"""Inputs of the forward pass that may accompany a text prompt. Any other input, but for media, may change the keys and
values that the cache should hold.
"""
DEFAULT_NEW_TOKENS = 20
"""Number of tokens that the stock generate adds where no length is set."""


class GenerateCall:
    """One call of generate: its arguments by name, and the strategy and settings that they select.

    The prompt keeps the name under which it was given (positional, `inputs` or `input_ids`), since wrappers of the
    stock generate look for it there.

    Attributes:
        prompt: the prompt, if it was given as a positional argument; else empty.
        arguments: all other arguments, by name.
        ids: int64 [rows, tokens], the prompt.
        mask: [rows, tokens], 0 on pads.
        settings: the generation settings that the stock generate will use.
        mode: the strategy that they select.
        media: pictures, videos and audio of the prompt; None where there are none.

    Raises:
        TypeError: an argument is given twice.
        TensorError: the prompt is not a matrix of token ids.
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
        self.media = parse_media(model.config, self.ids, inputs)

    @property
    def longest(self) -> int:
        """Return the number of tokens of the longest possible result."""
        settings = self.settings
        most = int(self.ids.shape[1]) + (settings.max_new_tokens or DEFAULT_NEW_TOKENS)
        return max(most, settings.max_length or 0, longest_cache(settings))

    def _require_supported(self, model: PreTrainedModel, inputs: dict[str, Any]) -> None:
        """Raise UnsupportedModelError, with what to do, for a call that cannot start from a cache."""
        settings = self.settings
        given = {name: value for name, value in inputs.items() if value is not None}
        media = bool(MEDIA_INPUTS & given.keys())
        typed = [name for name in TOKEN_TYPES if name in given and not media and bool(given[name].any())]
        foreign = sorted(given.keys() - {*MODEL_INPUTS, *MEDIA_INPUTS})
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
            "output_attentions or output_hidden_states, which a cache does not hold": bool(
                settings.output_attentions or settings.output_hidden_states
            ),
            f"cache_implementation={settings.cache_implementation!r}: use 'dynamic' or 'static'": (
                settings.cache_implementation not in (None, "dynamic", "static")
            ),
            "assisted decoding with cache_implementation='static'": static and assisted,
            f"{' and '.join(typed)} other than 0": bool(typed),
            "position_ids beside media: leave them out, and the model computes them": media and "position_ids" in given,
            f"model inputs {foreign}, which may change the keys and values of the context": bool(foreign),
        }
        for refusal, found in refusals.items():
            if found:
                raise UnsupportedModelError(f"generating from a cache does not support {refusal}")

    def _asks_for_no_cache(self, model: PreTrainedModel) -> bool:
        """Report whether the caller asks for no cache; a default that the model was saved with does not count."""
        given = self.arguments.get("use_cache")
        if given is not None:
            return given is False
        config = self.arguments.get("generation_config")
        return getattr(config, "use_cache", None) is False and model.generation_config.use_cache is not False


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
