"""generate_text(): a text or a chat goes in, the text of the answer comes out.

The tokenizer sees the whole prompt, context and question as one text, so the tokens are those of a call without a
cache. The cache serves their longest common prefix with the context. The tokens of the context that are lost, at the
seam or by a chat template that changes earlier turns, are counted and reported.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor

from hf_cachegen.artifact import ContextText
from hf_cachegen.context import CachedContext, load_context
from hf_cachegen.errors import ConfigError
from hf_cachegen.generation.from_cache import generate, stream_for, stream_options
from hf_cachegen.models.media_prompt import cover
from hf_cachegen.models.requirements import positions_change, require_instance
from hf_cachegen.models.text import one_prompt, prompt_ids
from hf_cachegen.streaming import Refine

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_cachegen.generation.from_cache import OnMismatch


@dataclass(frozen=True)
class TextAnswer:
    """An answer, and how much of the context it reused.

    Attributes:
        text: the answer, without special tokens; of several returned sequences, the first.
        output: the result of the stock generate.
        prompt_tokens: number of tokens of the prompt, context included.
        context_tokens: number of tokens of the cached context; 0 without a cache.
        reused_tokens: number of tokens of the context that were reused.
    """

    text: str
    output: Any
    prompt_tokens: int
    context_tokens: int
    reused_tokens: int

    @property
    def lost_tokens(self) -> int:
        """Return the number of tokens of the context that the prompt does not share, and that were computed."""
        return self.context_tokens - self.reused_tokens


@overload
def generate_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str | None = ..., *,
    return_output: Literal[False] = ..., **options: Any,
) -> str: ...  # fmt: skip
@overload
def generate_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str | None = ..., *,
    return_output: Literal[True], **options: Any,
) -> TextAnswer: ...  # fmt: skip
def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | None = None,
    *,
    messages: Sequence[Mapping[str, Any]] | None = None,
    template: Mapping[str, Any] | None = None,
    cache: Any = None,
    return_output: bool = False,
    on_mismatch: OnMismatch = "recompute",
    slo: float | None = None,
    refine: Refine | None = None,
    stream: Mapping[str, Any] | None = None,
    **options: Any,
) -> str | TextAnswer:
    """Tokenize a whole prompt, and generate its answer from the longest prefix that `cache` holds of it.

    The number of tokens of the context that cannot be reused is logged at INFO. on_mismatch, slo, refine and stream are
    those of `generate`.

    Args:
        model: the model, or a wrapper of it.
        tokenizer: the tokenizer of the model.
        text: the whole prompt, context and question. It is tokenized as one text, with one BOS where the tokenizer adds
            one.
        messages: instead of `text`, a whole chat. Its template is rendered once for all messages, and its tokens are
            those of `tokenizer.apply_chat_template`, with the tokens that begin an answer.
        template: further variables of the chat template, such as `tools`.
        cache: a CacheGenCache, the location of an artifact, or None.
        return_output: return a TextAnswer instead of the text alone.
        **options: further arguments of the stock generate, such as `max_new_tokens`.

    Returns:
        The text of the answer, without special tokens; with `return_output`, a TextAnswer.

    Raises:
        ConfigError: the arguments contradict each other, or the chat template refuses the messages.
        MismatchError: the cache belongs to another model, dtype, adapter or tokenizer.
        UnsupportedModelError: this way of generating cannot start from a cache.
        PromptMismatchError: `on_mismatch` is "error", and the prompt does not begin with the whole context.
    """
    if taken := sorted({"input_ids", "inputs", "inputs_embeds", "attention_mask", "tokenizer"} & options.keys()):
        raise ConfigError(f"generate_text takes the prompt as text= or messages=, got {taken} too: leave them out")
    require_instance(model)
    prompt = ContextText(text, messages, dict(template or {}))
    inputs = one_prompt(tokenizer, prompt_ids(tokenizer, prompt, answer=True), model.device)
    ids = inputs["input_ids"]
    given, streamed = cache, stream_options(slo, refine, stream or {})
    if isinstance(cache, str | os.PathLike):
        if streamed:
            streamed["tokenizer"] = tokenizer
            given = stream_for(cache, model, (ids, inputs["attention_mask"]), on_mismatch, streamed)
        else:
            given = load_context(cache, model, {}, tokenizer=tokenizer)
    elif streamed:
        raise ConfigError(f"{sorted(streamed)} are for the location of an artifact: pass it as cache=")
    elif isinstance(cache, CachedContext):
        cache.check(model, tokenizer)
    try:
        output = generate(
            model, **inputs, cache=given, on_mismatch=on_mismatch, **{"tokenizer": tokenizer, **options}
        )  # fmt: skip
    finally:
        if given is not cache and given is not None and given.refinement is not None:
            given.refinement.close()
    sequences: Tensor = output if isinstance(output, Tensor) else output.sequences
    words = tokenizer.decode(sequences[0, ids.shape[1] :], skip_special_tokens=True)
    answer = TextAnswer(str(words), output, ids.shape[1], *_reused(model, given, inputs))
    return answer if return_output else answer.text


def _reused(model: PreTrainedModel, context: Any, inputs: Mapping[str, Tensor]) -> tuple[int, int]:
    """Return the number of tokens of the context, and of those that the prompt shares."""
    if not isinstance(context, CachedContext):
        return 0, 0
    ids, tokens = inputs["input_ids"], context.kv.geometry.tokens
    if positions_change(model.config, tokens, ids.shape[1]):
        return tokens, 0
    covered = cover(context.input_ids[0], context.fingerprint.media, ids, inputs["attention_mask"], None)
    return tokens, covered.reuse.common
