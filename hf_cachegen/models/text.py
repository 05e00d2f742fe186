"""From a text or a chat to the token ids of a prompt: one text, one call of the tokenizer, one BOS.

Token ids of two texts, joined, are not the token ids of the joined text. SentencePiece-style tokenizers put a space in
front of a text, merges cross the seam, and both a tokenizer and a rendered chat template bring a BOS.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from hf_cachegen.artifact import ContextText
from hf_cachegen.errors import ConfigError
from hf_cachegen.models.requirements import require_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: ContextText, *, answer: bool) -> list[int]:
    """Tokenize a text as a whole.

    Args:
        tokenizer: the tokenizer of the model.
        text: a plain text or a chat. The template of a chat is rendered once for all messages.
        answer: whether the model answers next: a chat then ends with the tokens that begin an answer.

    Returns:
        The token ids. A plain text has the tokens that the tokenizer puts before a text (BOS), once, and not those that
        it puts after a text (EOS). A chat has those of its template alone.

    Raises:
        ConfigError: it is no tokenizer, it has no chat template, or the template refuses the messages.
    """
    require_tokenizer(tokenizer)
    return plain_ids(tokenizer, text.text) if text.text is not None else _chat_ids(tokenizer, text, answer)


def plain_ids(tokenizer: Any, text: str, *, start: bool = True) -> list[int]:
    """Tokenize a plain text.

    Args:
        start: whether to add the tokens that the tokenizer puts before a text (BOS).

    Returns:
        The token ids, without those that the tokenizer puts after a text (EOS): more text follows.
    """
    ids = list(tokenizer(text, add_special_tokens=start)["input_ids"])
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if start and len(ids) > 1 and ids[-1] == eos and not text.endswith(tokenizer.eos_token or ""):
        ids = ids[:-1]
    # A rendered chat template begins with a BOS already.
    twice = start and bos is not None and ids[:2] == [bos, bos] and text.startswith(tokenizer.bos_token)
    return ids[1:] if twice and list(tokenizer("")["input_ids"][:1]) == [bos] else ids


def one_prompt(tokenizer: Any, ids: Sequence[int], device: torch.device | str) -> dict[str, Any]:
    """Return the arguments of generate for one prompt without padding.

    Returns:
        `input_ids` and `attention_mask`, int64 [1, tokens]; `pad_token_id` where the tokenizer has none.
    """
    input_ids = torch.tensor([list(ids)], dtype=torch.long, device=device)
    # Without a mask the stock generate would take a pad token within the text for padding.
    arguments: dict[str, Any] = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    return arguments if tokenizer.pad_token_id is not None else {**arguments, "pad_token_id": tokenizer.eos_token_id}


def _chat_ids(tokenizer: Any, chat: ContextText, answer: bool) -> list[int]:
    """Render the template of the tokenizer for all messages, and tokenize the result once."""
    arguments = {**chat.template, "add_generation_prompt": answer, "tokenize": True, "return_dict": True}
    messages = [dict(message) for message in chat.messages or ()]
    try:
        return list(tokenizer.apply_chat_template(messages, **arguments)["input_ids"])
    except Exception as error:  # a template is a program of its own, and raises what it likes
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(
            f"the chat template of the tokenizer cannot render these {len(messages)} messages: {reason}"
        ) from error
