"""Choose the step with which the cache of one context meets a target of divergence, by probing the model.

A profile's step keeps its divergence on the samples that it was learnt from, and delta and identity promise none. So
the model draws continuations of the context at hand from its exact cache. Steps a quarter octave apart are compared by
the divergence of these continuations, and of those that the caller gives, after the decoded cache (`stepping.py`).

Every forward pass counts, those of the drawing too, and the search ends where the budget does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from hf_cachegen.codec.predictor import Known
from hf_cachegen.codec.profile import Profile
from hf_cachegen.codec.rows import ContextRows, empty_kv, scatter, spans_of
from hf_cachegen.codec.transforms import transform_of
from hf_cachegen.codec.transforms.choosing import resolved
from hf_cachegen.config import MAX_STEP_OFFSET, CacheGenConfig
from hf_cachegen.errors import ConfigError
from hf_cachegen.models.compat import run
from hf_cachegen.models.continuation import continuation_logits
from hf_cachegen.models.layers import KVTensors
from hf_cachegen.models.running import evaluation_mode
from hf_cachegen.models.state import fresh_state
from hf_cachegen.models.stepping import StepSearch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DRAWN = 8
"""Number of drawn continuations: as clusters, they give an interval of 2.4 standard errors."""
MOST_TOKENS = 32
"""Largest length of a drawn continuation, in tokens."""
STUDENT = (
    12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""Two-sided 95 % quantiles of Student's t with 1, 2, ... degrees of freedom."""
NORMAL, TAIL = 1.96, 2.5
"""Beyond them the quantile is NORMAL + TAIL / degrees of freedom, to within 0.002."""
CENTRE = MAX_STEP_OFFSET + 1
"""The code of the given step. Code 0 stands for no step."""


class Chosen(NamedTuple):
    """The configuration whose finest level meets the target.

    Attributes:
        config: Without a target; with the transform and the step that were chosen.
        measured: For the report: target, kl, low and high (of each level; 95 % intervals over the continuations),
            continuations, tokens, passes.
    """

    config: CacheGenConfig
    measured: dict[str, Any]


class _SpentError(Exception):
    """The budget is spent."""


@torch.no_grad()
def meet_target(
    model: PreTrainedModel,
    kv: KVTensors,
    last_token: int,
    config: CacheGenConfig,
    profile: Profile | None,
    continuations: Sequence[Tensor] = (),
    known: Known | None = None,
) -> Chosen:
    """Find the largest step whose finest level is within `config.target_kl` for this context.

    Args:
        model: The model that computed the cache.
        kv: The exact cache.
        last_token: The last token of the context.
        config: Has a target.
        profile: Of the model, for klt.
        continuations: int64 [1, tokens]: continuations to probe with, besides those that the model draws.
        known: What a loader computes from the tokens, for a profile that predicts.

    Raises:
        ConfigError: No step meets the target, or the budget is too small to find one.
        TensorError: A value cannot be expressed.
        ProfileError: The profile is of another model.
    """
    with evaluation_mode(model), fresh_state(model):
        probe = _Probe(model, kv, config, profile, known)
        probe.prepare(last_token, continuations)
        return probe.chosen()


class _Probe:
    """One search: the continuations with their exact distributions, the decoded cache, and the passes that are left."""

    def __init__(
        self, model: PreTrainedModel, kv: KVTensors, config: CacheGenConfig, profile: Profile | None,
        known: Known | None,
    ):  # fmt: skip
        self.model, self.kv, self.profile = model, kv, profile
        self.target, self.budget, self.left = float(config.target_kl or 0), config.probe_passes, config.probe_passes
        spans = spans_of(kv.geometry.tokens, config.chunk_tokens)
        self.rows = ContextRows(kv.keys, kv.values, kv.geometry, spans, known=known)
        self.config = resolved(self.rows, replace(config, target_kl=None), profile)
        self.transform = transform_of(self.config)
        self.probes: list[tuple[Tensor, Tensor]] = []
        self._decoded: tuple[int, int, list[Tensor]] | None = None

    def prepare(self, last_token: int, given: Sequence[Tensor]) -> None:
        """Draw continuations, and compute the exact log-probabilities after each token of all of them."""
        tokens = min(MOST_TOKENS, (self.budget // 2 - 1) // DRAWN)
        coarser = self.transform.levels(self.config) - 1
        least = 1 + DRAWN * (tokens - 1) + (DRAWN + len(given)) * (2 + coarser)
        if least > self.budget:
            raise ConfigError(
                f"probe_passes must be at least {least} to try one step with {DRAWN + len(given)} continuations, got "
                f"{self.budget}: raise it, or give fewer continuations"
            )
        for ids in (*self._drawn(last_token, tokens), *given):
            exact = self._logits(self.kv.keys, self.kv.values, ids).log_softmax(-1)
            self.probes.append((ids, exact))
        self.left -= len(self.probes) * coarser  # set aside to measure the coarser levels

    def _drawn(self, last_token: int, tokens: int) -> list[Tensor]:
        """Draw DRAWN continuations of this length from the model, int64 [1, tokens] each."""
        draws = torch.Generator().manual_seed(0)
        before = [[x[:, :, :-1] for x in side] for side in (self.kv.keys, self.kv.values)]
        first = self._logits(before[0], before[1], torch.tensor([[last_token]]))[-1]
        found = []
        for _ in range(DRAWN):
            past = DynamicCache()
            for layer, (k, v) in enumerate(zip(self.kv.keys, self.kv.values, strict=True)):
                past.update(k, v, layer)
            ids = [_draw(first, draws)]
            while len(ids) < tokens:
                self._take()
                given = torch.tensor([ids[-1:]], device=self.model.device)
                ids.append(_draw(run(self.model, given, past).logits[0, -1].float(), draws))
            found.append(torch.tensor([ids]))
        return found

    def _take(self) -> None:
        """Count one pass."""
        if self.left <= 0:
            raise _SpentError
        self.left -= 1

    def _logits(self, keys: Sequence[Tensor], values: Sequence[Tensor], ids: Tensor) -> Tensor:
        self._take()
        return continuation_logits(self.model, keys, values, ids)

    def chosen(self) -> Chosen:
        """Search from the given step, then measure every level at the step that was found."""
        count = len(self.probes)
        known = torch.full((2 * MAX_STEP_OFFSET + 2, count, 1), float("nan"), dtype=torch.float64)
        search = StepSearch(
            known, [self.target], lambda code, sample, _: {0: self._divergence(code - CENTRE, sample)}, lambda: None
        )
        try:
            code = search.largest(CENTRE)
        except _SpentError:
            means = known[:, :, 0].mean(1)  # NaN where a continuation is missing
            code = int((means <= self.target).int().mul(torch.arange(len(means))).max())
        if code == 0:
            raise self._missed(known[:, :, 0])
        config = self._at(code - CENTRE)
        levels = self.transform.levels(self.config)
        self.left += count * (levels - 1)
        found = [[self._divergence(code - CENTRE, s, level) for s in range(count)] for level in range(levels - 1)]
        rows = [_interval(torch.tensor(row, dtype=torch.float64)) for row in (*found, known[code, :, 0].tolist())]
        kl, low, high = (list(row) for row in zip(*rows, strict=True))
        measured = {
            "target": self.target, "kl": kl, "low": low, "high": high, "continuations": count,
            "tokens": sum(ids.shape[1] for ids, _ in self.probes), "passes": self.budget - self.left,
        }  # fmt: skip
        return Chosen(config, measured)

    def _missed(self, known: Tensor) -> ConfigError:
        """Return the error for a target that no measured step meets. known: float64 [codes, continuations]."""
        tried = known[known.isfinite().any(1)]
        # Of most steps not all continuations were measured.
        best = float((tried.nansum(1) / known.shape[1]).min()) if len(tried) else math.inf
        reached = f"the best of {len(tried)} steps reaches {best:.2g} or more"
        return ConfigError(
            f"expected a divergence of at most {self.target} nats per token in this context, but {reached} with "
            f"transform {self.config.transform!r} within {self.budget} forward passes: pass a larger target_kl or "
            "probe_passes, smaller steps=, or lossless=True"
        )

    def _at(self, offset: int) -> CacheGenConfig:
        """Return the configuration at a step. Raises ConfigError where it cannot be expressed."""
        return self.transform.stepped(self.config, offset, self.profile)

    def _divergence(self, offset: int, sample: int, level: int = -1) -> float:
        """Return the divergence of one continuation, nats per token; infinite at a step that cannot be expressed."""
        try:
            config = self._at(offset)
        except ConfigError:
            return float("inf")
        ids, exact = self.probes[sample]
        decoded = self._decode(offset, level, config)
        lossy = self._logits(decoded[::2], decoded[1::2], ids).log_softmax(-1)
        return float((exact.exp() * (exact - lossy)).sum(-1).mean())

    def _decode(self, offset: int, level: int, config: CacheGenConfig) -> list[Tensor]:
        """Return the cache as decoded at a step and a level. The last one is kept."""
        if self._decoded is None or self._decoded[:2] != (offset, level):
            codec = self.transform.fit(self.rows, config, self.profile).transform
            found = empty_kv(self.kv.geometry, [x.device for x in self.kv.keys])
            for rows, span in self.rows.chunks():
                scatter(codec.approximations(rows, span)[level], found, span)
            self._decoded = offset, level, found
        return self._decoded[2]


def _draw(logits: Tensor, draws: torch.Generator) -> int:
    return int(torch.multinomial(logits.softmax(-1).cpu(), 1, generator=draws))


def _interval(values: Tensor) -> tuple[float, float, float]:
    """Return (mean, low, high) of independent clusters, float64 [n] with n of at least 2."""
    freedom = len(values) - 1
    quantile = STUDENT[freedom - 1] if freedom <= len(STUDENT) else NORMAL + TAIL / freedom
    mean, half = float(values.mean()), quantile * float(values.std()) / math.sqrt(len(values))
    return _short(mean), _short(max(mean - half, 0.0)), _short(mean + half)


def _short(x: float) -> float:
    return float(f"{x:.6g}")
