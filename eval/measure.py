"""Measure one example under every codec: answers, divergence, sizes, seconds.

The exact cache comes first; the others are compared with it. The last token of the context is always fed again, so that
the first token after it has a prediction too. Divergence and agreement are teacher-forced: both caches see the same
tokens after the context (the question and a right completion, or, where the data set has none, the exact cache's own
greedy answer), so one wrong token does not make all later ones wrong. Answers are generated freely.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eval.answers import answers, first_line
from eval.codecs import EXACT, TEXT, Kept, Kit, keep, wait
from eval.divergence import kl, log_probabilities
from eval.examples import Dataset, Example
from eval.models import token_ids
from hf_cachegen import CacheGenCache

Record = dict[str, Any]


@dataclass(frozen=True)
class Encoded:
    """An example in token ids."""

    context: list[int]
    questions: list[list[int]]

    @property
    def longest(self) -> int:
        """Length of the longest prompt in tokens."""
        return len(self.context) + max(map(len, self.questions))

    @property
    def prompts(self) -> list[list[int]]:
        """Context and question of every question."""
        return [self.context + question for question in self.questions]


def encode(tokenizer: Any, example: Example, start: bool = True) -> Encoded:
    """Tokenize an example.

    Args:
        tokenizer: a Transformers tokenizer.
        example: the example.
        start: add the tokens that begin a prompt; False for a text that holds them already, as a chat template's does.
    """
    questions = [token_ids(tokenizer, question.text, start=False) for question in example.questions]
    return Encoded(token_ids(tokenizer, example.context, start=start), questions)


def measure(
    kit: Kit, dataset: Dataset, example: Example, encoded: Encoded, codecs: Sequence[str], batch: int
) -> Record:
    """Measure one example.

    Args:
        kit: model, tokenizer and the needs of codecs.
        dataset: how answers are generated.
        example: the example.
        encoded: its tokens.
        codecs: names in eval.codecs.NAMES, the exact cache first.
        batch: questions answered at once.

    Returns:
        One record of the predictions: plain values, lists in the order of the questions.
    """
    exact = CacheGenCache.from_context(kit.model, encoded.context, profile=kit.profile, tokenizer=kit.tokenizer)
    asks = any(question.answers for question in example.questions)
    record: Record = {
        "example": example.id,
        "context_tokens": len(encoded.context),
        "text_bytes": len(example.context.encode()),
        "elements": exact.kv.geometry.elements,
        "exact_bytes": exact.report.exact_bytes,
        "prefill_seconds": exact.report.prefill_seconds,
        "first_token_seconds": _first_token(kit, exact, encoded),
        "questions": [{"text": q.text, "answers": list(q.answers)} for q in example.questions],
        "variants": [],
    }
    reference: list[Tensor] = []
    completions: list[list[int]] = []
    for kept in _kept(kit, exact, example.context, codecs):
        outputs = _outputs(kit, kept, encoded, dataset, batch) if asks else []
        if kept.codec == EXACT:
            completions = [
                token_ids(kit.tokenizer, text if text is not None else outputs[index] if outputs else "", start=False)
                for index, text in enumerate(question.completion for question in example.questions)
            ]
            record["completion_tokens"] = [len(ids) for ids in completions]
        rows: list[tuple[float, float | None, float]] = []
        for index, (question, completion) in enumerate(zip(encoded.questions, completions, strict=True)):
            after = torch.tensor([encoded.context[-1:] + question + completion], device=kit.model.device)
            if after.shape[1] == 1:  # nothing follows: no question, and an empty answer
                rows.append((0.0, None, 0.0))
                reference.append(torch.empty(0))
                continue
            logs = continuation(kit.model, kept.cache, after)
            if kept.codec == EXACT:
                reference.append(logs)
            rows.append(compare(reference[index], logs, after[0, 1:], len(completion)))
        record["variants"].append(_variant(kept, outputs, rows))
    return record


def _kept(kit: Kit, exact: CacheGenCache, text: str, codecs: Sequence[str]) -> Iterator[Kept]:
    for codec in codecs:
        yield from keep(codec, kit, exact, text)


def _outputs(kit: Kit, kept: Kept, encoded: Encoded, dataset: Dataset, batch: int) -> list[str]:
    cache = None if kept.codec == TEXT else kept.cache
    texts = answers(kit.model, kit.tokenizer, cache, encoded.prompts, dataset.new_tokens, batch)
    return [first_line(text) for text in texts] if dataset.first_line else texts


def _variant(kept: Kept, outputs: list[str], rows: list[tuple[float, float | None, float]]) -> Record:
    return {
        "codec": kept.codec,
        "level": kept.level,
        "bytes": round(kept.nbytes),
        "encode_seconds": kept.encode,
        "decode_seconds": kept.decode,
        "prefill_seconds": kept.prefill,
        "outputs": outputs,
        "kl": [row[0] for row in rows],
        "agreement": [row[1] for row in rows],
        "nll": [row[2] for row in rows],
        "layers": list(kept.layers),
    }


def _first_token(kit: Kit, cache: CacheGenCache, encoded: Encoded) -> float:
    """Return the seconds from a cache in memory to the first token of an answer: the prefill of the question."""
    wait(kit.model)
    start = time.perf_counter()
    answers(kit.model, kit.tokenizer, cache, encoded.prompts[:1], 1)
    wait(kit.model)
    return time.perf_counter() - start


def continuation(model: Any, cache: CacheGenCache, after: Tensor) -> Tensor:
    """Return the log-probabilities of the tokens that follow a context.

    Args:
        model: the model.
        cache: the context's cache.
        after: int64 [1, n], the last token of the context and the tokens that follow it.

    Returns:
        float32 [n - 1, vocabulary].
    """
    tokens = cache.input_ids.shape[1] - 1
    keys, values = ([x[:, :, :tokens] for x in side] for side in (cache.kv.keys, cache.kv.values))
    return log_probabilities(model, keys, values, after)[:-1]


def compare(exact: Tensor, lossy: Tensor, tokens: Tensor, completion: int) -> tuple[float, float | None, float]:
    """Compare two predictions of the same tokens.

    Args:
        exact: log-probabilities float32 [n, vocabulary] from the exact cache.
        lossy: the same from a decoded cache.
        tokens: int64 [n], the tokens that followed.
        completion: the number of last tokens that are the answer.

    Returns:
        (mean KL in nats per token, share of the answer's tokens at which both choose the same, None without an answer;
        negative log-likelihood of the answer in nats).
    """
    divergence = kl(exact, lossy)
    if not completion:
        return divergence, None, 0.0
    same = (exact[-completion:].argmax(-1) == lossy[-completion:].argmax(-1)).float().mean().item()
    nll = -lossy[-completion:].gather(1, tokens[-completion:, None]).sum().item()
    return divergence, same, nll
