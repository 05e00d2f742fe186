"""Answer questions about one context greedily, from its cache, or from the text where there is none."""

from __future__ import annotations

from typing import Any

import hf_cachegen
from hf_cachegen import CacheGenCache


def answers(
    model: Any, tokenizer: Any, cache: CacheGenCache | None, prompts: list[list[int]], new_tokens: int, batch: int = 8
) -> list[str]:
    """Generate the answer to each prompt.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        cache: the cache of the context; None to prefill the whole prompt.
        prompts: token ids of context and question.
        new_tokens: most tokens of an answer.
        batch: prompts answered at once.

    Returns:
        The answers as text.
    """
    texts: list[str] = []
    for first in range(0, len(prompts), batch):
        rows = {"input_ids": prompts[first : first + batch]}
        padded = tokenizer.pad(rows, padding_side="left", return_tensors="pt").to(model.device)
        out = hf_cachegen.generate(
            model, **padded, cache=cache, max_new_tokens=new_tokens, do_sample=False, temperature=None, top_p=None,
            top_k=None, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        texts += tokenizer.batch_decode(out[:, padded["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def first_line(text: str) -> str:
    """Return the first line of an answer that is not empty."""
    return text.lstrip("\n").split("\n")[0]
