"""One example under every codec: answers, divergence, sizes, seconds. The exact cache comes first, and is what the
others are held against.

Twists: the last token of the context is always fed again, so that the first token after it has a prediction too.
Divergence and agreement are teacher-forced: both caches see the same tokens after the context (the question and a right
completion, or, where the data set has none, the exact cache's own greedy answer), so one wrong token does not make all
later ones count as wrong. Answers are generated freely.
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
        """Tokens of the longest prompt."""
        return len(self.context) + max(map(len, self.questions))

    @property
    def prompts(self) -> list[list[int]]:
        return [self.context + question for question in self.questions]


def encode(tokenizer: Any, example: Example, start: bool = True) -> Encoded:
    """start=False: the text already holds what begins a prompt, as a chat template's does."""
    questions = [token_ids(tokenizer, question.text, start=False) for question in example.questions]
    return Encoded(token_ids(tokenizer, example.context, start=start), questions)


def measure(
    kit: Kit, dataset: Dataset, example: Example, encoded: Encoded, codecs: Sequence[str], batch: int
) -> Record:
    """The example's line of the predictions: plain values, in the order of the questions."""
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
    """Seconds from a cache in memory to the first token of an answer: the prefill of the question."""
    wait(kit.model)
    start = time.perf_counter()
    answers(kit.model, kit.tokenizer, cache, encoded.prompts[:1], 1)
    wait(kit.model)
    return time.perf_counter() - start


def continuation(model: Any, cache: CacheGenCache, after: Tensor) -> Tensor:
    """Log-probabilities float32 [n - 1, vocabulary] of what follows the context; after: int64 [1, n], its first token
    the last one of the context.
    """
    tokens = cache.input_ids.shape[1] - 1
    keys, values = ([x[:, :, :tokens] for x in side] for side in (cache.kv.keys, cache.kv.values))
    return log_probabilities(model, keys, values, after)[:-1]


def compare(exact: Tensor, lossy: Tensor, tokens: Tensor, completion: int) -> tuple[float, float | None, float]:
    """(mean KL of exact against lossy in nats per token, share of the completion's tokens where both would choose the
    same, negative log-likelihood of the completion in nats).

    exact, lossy: log-probabilities [n, vocabulary]; tokens: int64 [n], what followed, the last `completion` the answer.
    """
    divergence = kl(exact, lossy)
    if not completion:
        return divergence, None, 0.0
    same = (exact[-completion:].argmax(-1) == lossy[-completion:].argmax(-1)).float().mean().item()
    nll = -lossy[-completion:].gather(1, tokens[-completion:, None]).sum().item()
    return divergence, same, nll
