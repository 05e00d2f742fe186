"""Measure the value of a step for each token in klt: finer where an error has more effect on the model.

With s the sensitivity of a token (what it adds to the divergence per squared step), steps in proportion to s^(-1/2)
cost the fewest bits at one divergence, were all else alike. A token's step is one of 17, a quarter of an octave apart;
the entropy of these and a byte for each that occurs are counted, except where steps follow from the position. What an
encoder can know without gradients (`features`) tells s as the samples have it: the mean of s among the samples' tokens
with a like feature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.klt_variants import BASE, Bench, Coder
from benchmarks.rate_distortion import KV, Point, Test, levels_of
from hf_cachegen.codec.basis import Basis
from hf_cachegen.codec.chunk import Span
from hf_cachegen.profiles.learning import prefill
from hf_cachegen.profiles.learning.moments import gradients

PER_OCTAVE, REACH = 4, 8
FLOOR = 0.5
"""Added to sensitivities, in units of their mean: gradients are samples, so no token has a sensitivity of zero."""
DRAWS = 8
CONTINUATIONS, CONTINUATION_TOKENS = 4, 64
"""Continuations drawn from the model, where the sensitivity is that of its own continuation."""
BINS = 16
RECENT = 64
"""Tokens at the end whose attention is used."""


def sensitivity(bench: Bench, context: Tensor, continuations: Sequence[Tensor], draws: int) -> Tensor:
    """Return the effect of an error of one step in each coefficient, summed over them: float32 [tokens, groups]."""
    profile, found = bench.profiles[0], torch.zeros(context.shape[1], len(bench.profiles[0].groups))
    keys, values, _ = prefill(bench.model, context)
    generator = torch.Generator().manual_seed(0)
    for continuation in [one for one in continuations for _ in range(draws)]:
        g = {
            (kind, layer): gradient.flatten(1)
            for kind, layer, gradient in gradients(bench.model, keys, values, continuation, profile.rotary, generator)
        }
        for index, group in enumerate(profile.groups):
            layers = range(group.first, group.first + group.count)
            joint = torch.cat([g[group.kind, layer] for layer in layers], 1)
            found[:, index] += (joint @ group.synthesis.mT).square().sum(1)
    return found / (len(continuations) * draws)


def drawn(bench: Bench, context: Tensor) -> list[Tensor]:
    """Draw continuations [1, tokens] from the model itself."""
    torch.manual_seed(0)
    found = bench.model.generate(
        context, attention_mask=torch.ones_like(context), do_sample=True, top_k=0, num_return_sequences=CONTINUATIONS,
        max_new_tokens=CONTINUATION_TOKENS, min_new_tokens=CONTINUATION_TOKENS,
    )  # fmt: skip
    return list(found[:, context.shape[1] :].split(1))


@torch.no_grad()
def features(bench: Bench, context: Tensor) -> dict[str, Tensor]:
    """Return the features that an encoder knows, float32 [tokens] each: logarithms minus their mean, or positions."""
    bench.model.set_attn_implementation("eager")
    try:
        out = bench.model(input_ids=context, use_cache=True, output_attentions=True)
    finally:
        bench.model.set_attn_implementation("sdpa")
    tokens = context.shape[1]
    attention: Any = sum(layer[0].float().mean(0) for layer in out.attentions)
    keys, values, _ = prefill(bench.model, context)
    surprise = torch.zeros(tokens)
    surprise[1:] = -out.logits[0, :-1].float().log_softmax(-1).gather(1, context[0, 1:, None])[:, 0]
    later = torch.arange(tokens, 0, -1)
    found = {
        "attention": (attention.sum(0) / later).log(),
        "attention of the last": attention[-RECENT:].mean(0).log(),
        "norm of its keys": torch.stack([x[0].norm(dim=-1).log().mean(0) for x in keys]).mean(0),
        "norm of its values": torch.stack([x[0].norm(dim=-1).log().mean(0) for x in values]).mean(0),
        "surprise": surprise,
    }
    found = {name: x.clamp(-30, 30) - x.clamp(-30, 30).mean() for name, x in found.items()}
    return found | {"position": later.log(), "position from the start": torch.arange(1, tokens + 1).log()}


@dataclass
class Known:
    """Sensitivities as functions of features, learnt from the samples."""

    bench: Bench

    @cached_property
    def samples(self) -> list[tuple[dict[str, Tensor], Tensor]]:
        """For each sample, its features and the sensitivities of its tokens in units of their mean."""
        found = []
        for context, continuation in self.bench.mixed:
            s = sensitivity(self.bench, context, [continuation], DRAWS // 2).sum(1)
            found.append((features(self.bench, context), s / s.mean()))
        return found

    @cached_property
    def weights(self) -> Tensor:
        """Coefficients of all features together, for the logarithm of the sensitivity."""
        x = torch.cat([_matrix(known) for known, _ in self.samples])
        y = torch.cat([s for _, s in self.samples]).clamp_min(1e-3).log()
        return torch.linalg.lstsq(x, y[:, None]).solution[:, 0]

    def feature(self, name: str, known: dict[str, Tensor]) -> Tensor:
        return _matrix(known) @ self.weights if name == "all of these" else known[name]

    def guess(self, name: str, context: Tensor) -> Tensor:
        """Return the sensitivity of each token, float32 [tokens, 1], predicted from a feature."""
        x = torch.cat([self.feature(name, known) for known, _ in self.samples])
        s = torch.cat([s for _, s in self.samples])
        edges = x.quantile(torch.arange(1, BINS) / BINS)
        bins = torch.bucketize(x, edges)
        means = torch.zeros(BINS).index_add_(0, bins, s) / torch.bincount(bins, minlength=BINS).clamp_min(1)
        return means[torch.bucketize(self.feature(name, features(self.bench, context)), edges)][:, None]


def _matrix(known: dict[str, Tensor]) -> Tensor:
    return torch.stack([torch.ones(len(known["position"])), *known.values()], 1)


def codes_of(s: Tensor) -> Tensor:
    """Return how much finer each step is than the profile's, in parts of an octave; [tokens, 1 or groups]."""
    finer = PER_OCTAVE * 0.5 * (s / s.mean() + FLOOR).log2()
    return (finer - finer.mean()).round().clamp(-REACH, REACH)


def side_bits(codes: Tensor) -> float:
    """Return the entropy of codes [tokens, n] in bits, plus a byte for each code that occurs in a group."""
    total = 0.0
    for group in codes.T:
        counts = group.unique(return_counts=True)[1].double()
        total += float((counts * (counts.sum() / counts).log2()).sum()) + 8 * len(counts)
    return total


@contextmanager
def steps_by_token(codes: Tensor) -> Iterator[None]:
    """Code coefficients in units of their token's step; codes: [tokens, 1 or groups]."""
    forth, back = Basis.coefficients, Basis.rows

    def finer(basis: Basis, span: Span) -> Tensor:
        here = (codes[span.first : span.first + span.tokens] / PER_OCTAVE).exp2()
        counts = [len(group.synthesis) for group in basis.profile.groups]
        return torch.repeat_interleave(here, torch.tensor(counts), 1) if here.shape[1] > 1 else here

    def coefficients(self: Basis, rows: Tensor, span: Span) -> Tensor:
        return forth(self, rows, span) * finer(self, span)

    def rows(self: Basis, y: Tensor, span: Span, *rest: Any, **options: Any) -> Tensor:
        return back(self, y / finer(self, span), span, *rest, **options)

    with mock.patch.multiple(Basis, coefficients=coefficients, rows=rows):
        yield


def by_tokens(bench: Bench, sensitivities: Callable[[Test], Tensor], free: bool = False) -> Coder:
    """Return a codec of the default profiles with a step for each token; free: side information is not counted."""
    known = [
        (prefill(bench.model, test.context)[0][0], codes_of(sensitivities(test)))
        for tests in bench.tests.values()
        for test in tests
    ]

    def coded(kv: KV) -> list[Point]:
        codes = next(codes for keys, codes in known if torch.equal(keys, kv[0][0]))
        elements = sum(x.numel() for side in kv for x in side)
        more = 0.0 if free else side_bits(codes) / elements
        with steps_by_token(codes):
            points = [point for profile in bench.profiles for point in levels_of(kv, BASE, profile)]
        return [(bits + more, decoded) for bits, decoded in points]

    return coded


def variants(bench: Bench) -> dict[str, Callable[[], Coder]]:
    """Return the makers of codecs by name."""
    known = Known(bench)

    def own(test: Test) -> Tensor:
        return sensitivity(bench, test.context, [test.continuation], DRAWS)

    def by_group(test: Test) -> Tensor:
        return own(test) / torch.tensor([len(group.synthesis) for group in bench.profiles[0].groups])

    oracles: dict[str, Callable[[Test], Tensor]] = {
        "gradients of what follows": lambda test: own(test).sum(1, keepdim=True),
        "gradients of what follows, by group": by_group,
        "gradients of what the model says": lambda test: sensitivity(
            bench, test.context, drawn(bench, test.context), 1
        ).sum(1, keepdim=True),
    }
    names = ("attention", "attention of the last", "norm of its keys", "position", "all of these")
    guesses = {name: lambda test, name=name: known.guess(name, test.context) for name in names}
    return {
        f"step by token: {name}": partial(by_tokens, bench, found, name == "position")
        for name, found in (oracles | guesses).items()
    }
