"""The contestants of the adaptation experiment: ways to code a context, and policies that choose among its levels.

A context is a record of the reference model. The bytes of its chunks are real, multiplied until the 8-bit cache has a
given size. The divergence of a mixture of levels is measured with the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval import uniform
from eval.divergence import kl, log_probabilities
from eval.reference import HELD_OUT_SEED, MODEL_PATH, document
from eval.simulation import Chunk
from hf_cachegen import CacheGenCache, CacheGenConfig, EncodedContext, decode_kv, encode_kv
from hf_cachegen.streaming import Adaptive, Fixed, Paper, Policy

UNIFORM, TEXT = "uniform 8-bit", "text"
KV = tuple[list[Tensor], list[Tensor]]


@dataclass(frozen=True)
class Contestant:
    """A policy and the chunks of one coding of one context.

    Attributes:
        name: its name.
        policy: the policy.
        chunks: the chunks as the simulation takes them.
        kl: the divergence in nats per token of the levels at the end of a run.
    """

    name: str
    policy: Policy
    chunks: tuple[Chunk, ...]
    kl: Callable[[tuple[int | None, ...]], float]


@dataclass(frozen=True)
class Setting:
    """What bytes and times of a context are scaled to.

    Attributes:
        tokens: approximate length of a context.
        chunk_tokens: tokens per chunk.
        uniform_bytes: bytes of the 8-bit cache, scales included.
        prefill_seconds: prefill of the whole context.
        decode_seconds: decoding of the whole context.
    """

    tokens: int
    chunk_tokens: int
    uniform_bytes: float
    prefill_seconds: float
    decode_seconds: float


class Judge:
    """Measures the divergence of a mixture of levels.

    Args:
        model: the model of the cache.
        encoded: the encoded context.
        cache: its exact cache.
        after: int64 [1, tokens], questions and right answers.
    """

    def __init__(self, model: Any, encoded: EncodedContext, cache: CacheGenCache, after: Tensor) -> None:
        self._spans = spans_of(encoded)
        exact = (list(cache.kv.keys), list(cache.kv.values))
        self._decoded: dict[int | None, KV] = {None: exact}
        for level in range(1, encoded.levels + 1):
            self._decoded[level] = decode_kv(encoded, level, model.device)
        self._ask: Callable[[KV], Tensor] = lambda kv: log_probabilities(model, *kv, after)
        self._exact = self._ask(exact)
        self._known: dict[tuple[int | None, ...], float] = {}
        coarse = ([uniform.quantise(x, 8) for x in exact[0]], [uniform.quantise(x, 8) for x in exact[1]])
        self.uniform = kl(self._exact, self._ask(coarse))

    def __call__(self, choices: tuple[int | None, ...]) -> float:
        """Return the divergence of a mixture in nats per token.

        Args:
            choices: a level for each chunk; None for one that was recomputed at the context's front, which is exact.
        """
        if choices not in self._known:
            mixed: KV = ([], [])
            for side in (0, 1):
                for layer in range(len(self._decoded[None][side])):
                    parts = [
                        self._decoded[choice][side][layer][:, :, first : first + tokens]
                        for choice, (first, tokens) in zip(choices, self._spans, strict=True)
                    ]
                    mixed[side].append(torch.cat(parts, 2))
            self._known[choices] = kl(self._exact, self._ask(mixed))
        return self._known[choices]


def spans_of(encoded: EncodedContext) -> list[tuple[int, int]]:
    """Return (first token, number of tokens) of every chunk of an encoded context."""
    tokens, step = encoded.geometry.tokens, encoded.config.chunk_tokens
    return [(first, min(step, tokens - first)) for first in range(0, tokens, step)]


def chunks_of(
    encoded: EncodedContext, scale: float, prefill_tokens_per_second: float, decode_tokens_per_second: float
) -> tuple[Chunk, ...]:
    """Return the chunks of an encoded context as the simulation takes them, their bytes multiplied by `scale`."""
    found = []
    for index, (_, tokens) in enumerate(spans_of(encoded)):
        parts = tuple(scale * len(part[index]) for part in encoded.parts)
        found.append(Chunk(parts, tokens / decode_tokens_per_second, tokens / prefill_tokens_per_second))
    return tuple(found)


def contestants(
    own: tuple[Chunk, ...], delta: tuple[Chunk, ...], judges: tuple[Judge, Judge], uniform_bytes: float
) -> list[Contestant]:
    """Return all contestants of a context.

    Args:
        own: its chunks as the package codes them for this model.
        delta: its chunks as the transform of the paper codes them.
        judges: the judge of each.
        uniform_bytes: bytes of the whole context in 8 bits.
    """
    judge, judge_delta = judges
    share = uniform_bytes / len(own)
    plain = tuple(Chunk((share,), chunk.decode_seconds, chunk.recompute_seconds) for chunk in own)
    return [
        Contestant("adaptive", Adaptive(), own, judge),
        Contestant("paper", Paper(), own, judge),
        *(Contestant(f"level {level}", Fixed(level), own, judge) for level in range(1, len(own[0].parts) + 1)),
        Contestant("adaptive, delta", Adaptive(), delta, judge_delta),
        Contestant("paper, delta", Paper(), delta, judge_delta),
        Contestant(UNIFORM, Fixed(1), plain, lambda _: judge.uniform),
        Contestant(TEXT, Fixed("text"), own, judge),
    ]


def contestants_of(seed: int, setting: Setting) -> tuple[list[Contestant], dict[str, Any]]:
    """Encode a record of the reference model; return the contestants, and its tokens, chunks and bytes."""
    model = AutoModelForCausalLM.from_pretrained(MODEL_PATH, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    made = document("lines", HELD_OUT_SEED + seed, setting.tokens)
    ids = tokenizer(made.text, return_tensors="pt").input_ids
    cache = CacheGenCache.from_context(model, ids, tokenizer=tokenizer)
    after = "".join(question.prompt + question.completion for question in made.questions)
    asked = tokenizer(after, return_tensors="pt").input_ids
    scale = setting.uniform_bytes / (
        cache.kv.geometry.elements * uniform.bits_per_element(8, cache.kv.keys[0].shape[-1]) / 8
    )
    total = ids.shape[1]
    coded, judges = [], []
    for transform in ("auto", "delta"):
        config = CacheGenConfig(transform=transform, chunk_tokens=setting.chunk_tokens)
        encoded = encode_kv(cache.kv.keys, cache.kv.values, config, cache.profile if transform == "auto" else None)
        judges.append(Judge(model, encoded, cache, asked))
        coded.append(chunks_of(encoded, scale, total / setting.prefill_seconds, total / setting.decode_seconds))
    who = contestants(coded[0], coded[1], (judges[0], judges[1]), setting.uniform_bytes)
    sizes = {one.name: sum(sum(chunk.parts) for chunk in one.chunks) for one in who if one.name in ("level 3", UNIFORM)}
    return who, {"context_tokens": total, "chunks": len(coded[0]), "bytes": sizes}
