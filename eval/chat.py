"""Put a chat model's template around an example, cut where the context ends: the cache holds the part before the
question.

The template is the tokenizer's own, with context and question as one user message and a prompt for the answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from eval.examples import Example, Question
from hf_cachegen.errors import ConfigError


def with_template(tokenizer: Any, examples: Iterable[Example]) -> Iterator[Example]:
    """Yield the same examples inside the template.

    Args:
        tokenizer: a Transformers tokenizer.
        examples: the examples.

    Raises:
        ConfigError: the tokenizer has no template, or it changes the text so that the end of the context is not found.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError("the tokenizer has no chat template: leave out --chat-template")
    for example in examples:
        contexts, questions = set(), []
        for question in example.questions:
            message = [{"role": "user", "content": example.context + question.text}]
            whole: str = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
            text = example.context.strip()
            at = whole.find(text)
            if at < 0 or not text:
                raise ConfigError(f"example {example.id!r}: the chat template does not keep the context as it is")
            contexts.add(whole[: at + len(text)])
            questions.append(Question(whole[at + len(text) :], question.answers, question.completion))
        if len(contexts) != 1:
            raise ConfigError(f"example {example.id!r}: the chat template begins differently for its questions")
        yield replace(example, context=contexts.pop(), questions=tuple(questions))
