"""Measure a profile on samples: the divergence of each level, and the bits of its chunks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_cachegen.codec.chunk import Span
from hf_cachegen.codec.geometry import Geometry
from hf_cachegen.codec.rows import empty_kv, gather, scatter
from hf_cachegen.codec.sinks import find_sinks
from hf_cachegen.codec.transforms.klt import Klt
from hf_cachegen.config import CacheGenConfig
from hf_cachegen.models.continuation import continuation_logits
from hf_cachegen.profiles.files import Profile
from hf_cachegen.profiles.learning.exact import Exact
from hf_cachegen.profiles.learning.running import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Coded:
    """A context under a profile.

    Args:
        exact: What the model computes.
        profile: Of the model.
        context: int64 [1, tokens].
        config: Of the encoder.
        coefficients: Those of the same context under a profile with the same bases, where they are at hand.
    """

    def __init__(
        self, exact: Exact, profile: Profile, context: Tensor, config: CacheGenConfig,
        coefficients: Tensor | None = None,
    ):  # fmt: skip
        self.exact, self.context, tokens = exact, context, context.shape[1]
        keys, values, *_ = exact.prefill(context)
        layer, dtype = profile.usable(config.predicted), str(keys[0].dtype).removeprefix("torch.")
        geometry = Geometry(profile.layers, tokens=tokens, batch=1, dtype=dtype)
        known = None if layer is None else exact.known(context, profile.predictor(layer))
        self.codec = Klt(geometry, config, profile, sinks=find_sinks(keys), known=known)
        self.span = Span(0, tokens, tokens)
        self.rows = gather(keys, values, self.span).float().cpu()
        found = coefficients
        self.coefficients = self.codec.coefficients(self.rows, self.span) if found is None else found

    def sizes(self) -> list[int]:
        """Return the bytes of each part of its chunk."""
        return [len(part) for part in self.codec.inner.encode(self.coefficients, self.span)]

    @torch.no_grad()
    def divergences(self, continuation: Tensor) -> list[float]:
        """Return the KL of each level, nats per token of a continuation, of the decoded against the exact cache."""
        keys, values, *_ = self.exact.prefill(self.context)
        states = self.exact.states(self.context)
        expected, found = self.exact.log_probabilities((self.context, continuation)), []
        for rows in self.codec.approximated(self.rows, self.coefficients, self.span):
            decoded = empty_kv(self.codec.geometry, [None] * len(self.codec.geometry.layers))
            scatter(rows, decoded, self.span)
            k = [x.to(exact.device) for x, exact in zip(decoded[::2], keys, strict=True)]
            v = [x.to(exact.device) for x, exact in zip(decoded[1::2], values, strict=True)]
            lossy = continuation_logits(self.exact.model, k, v, continuation, states).log_softmax(-1)
            found.append(float((expected.exp() * (expected - lossy)).sum(-1).mean()))
        return found


@dataclass(frozen=True)
class Measured:
    """What samples measure.

    Attributes:
        rows: Of each sample, float64 [samples, 2, levels]: the KL of each level, in nats per token; and the bits of its
            chunk up to each level, without headers.
        elements: Number of elements of each sample, float64 [samples].
    """

    rows: Tensor
    elements: Tensor

    @classmethod
    def of(cls, exact: Exact, profile: Profile, samples: Iterable[Sample], config: CacheGenConfig) -> Measured:
        """Measure a profile, or the predictor of `config`, on samples."""
        rows, elements = list[Tensor](), list[int]()
        for context, continuation in samples:
            coded = Coded(exact, profile, context, config)
            bits = 8 * torch.tensor(coded.sizes(), dtype=torch.float64).cumsum(0)
            rows.append(torch.stack([torch.tensor(coded.divergences(continuation), dtype=torch.float64), bits]))
            elements.append(coded.rows.numel())
        return cls(torch.stack(rows), torch.tensor(elements, dtype=torch.float64))

    def means(self, beside: Measured | None = None) -> list[dict[str, float]]:
        """Return the divergence and the bits per element of each level.

        Args:
            beside: The same profile without prediction, on these samples and further ones. The result is then an
                estimate for all of them: its own means, times the ratio of all samples to these in the other's.
        """
        found = self._means(len(self.rows))
        if beside is not None:
            found *= beside._means(len(beside.rows)) / beside._means(len(self.rows)).clamp_min(1e-30)
        return [{"kl": round(kl, 6), "bits_per_element": round(bits, 4)} for kl, bits in found.mT.tolist()]

    def _means(self, count: int) -> Tensor:
        """Return the means of the first samples, float64 [2, levels]."""
        kl, bits = self.rows[:count].sum(0)
        return torch.stack([kl / count, bits / self.elements[:count].sum()])


def divergence(
    model: PreTrainedModel, profile: Profile, samples: Sequence[Sample], config: CacheGenConfig
) -> list[float]:
    """Return the mean KL of each level, nats per token of the continuations, of the decoded against the exact cache."""
    exact = Exact(model, samples)
    rows = [Coded(exact, profile, context, config).divergences(continuation) for context, continuation in samples]
    return torch.tensor(rows, dtype=torch.float64).mean(0).tolist()
