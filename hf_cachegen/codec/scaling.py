"""What lies between a basis and a coder: the finer steps of sinks, and what a chain reads."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_cachegen.codec import quantize, transfer
from hf_cachegen.codec.sinks import FINER

if TYPE_CHECKING:
    from hf_cachegen.codec.chunk import Span
    from hf_cachegen.codec.predictor import Predictor
    from hf_cachegen.codec.profile import Profile
    from hf_cachegen.config import CacheGenConfig


class Scaling:
    """The coefficients of one context, in the units of the coder and in those of the basis.

    Args:
        config: Its levels and protected tokens are used.
        learnt: The profile, or its predictor, of the basis.
        steps: float32 [components], the finest.
        sinks: int64 [n], ascending: the positions of tokens with finer steps.
    """

    def __init__(self, config: CacheGenConfig, learnt: Profile | Predictor, steps: Tensor, sinks: Tensor):
        self.config, self.learnt, self.steps, self.sinks = config, learnt, steps, sinks
        self._resident = transfer.Resident()

    def to_coder(self, y: Tensor, span: Span) -> Tensor:
        """Convert the coefficients [tokens, any number] of a chunk to the coder's units, in place."""
        return self._scaled(y, span, FINER)

    def to_basis(self, y: Tensor, span: Span) -> Tensor:
        """Convert decoded coefficients [tokens, components] to the basis's units, in place."""
        return self._scaled(y, span, 1 / FINER)

    def base(self, y: Tensor, span: Span) -> Tensor:
        """Return exact coefficients [tokens, any number] as the coarsest level decodes them, in the basis's units."""
        scaled, step = self.to_coder(y.clone(), span), self.steps[0].to(y.device)
        return self.to_basis(self._coarsest(quantize.fine_symbols(scaled, step) * step, span), span)

    def coarse(self, span: Span, level: int) -> Tensor | None:
        """Return how the base of a chunk's tokens follows from decoded coefficients of a level, for `sparse.coarsened`.

        None for level 1, and where nothing reads it.
        """
        if not self.learnt.reach or level == 1:
            return None
        found = torch.zeros(2, span.tokens)
        found[0, span.ordinary(self.config)] = self.steps[0] * quantize.step_factor(1, self.config.levels)
        self._scaled(found[1].fill_(1), span, 1 / FINER)
        return found

    @cached_property
    def coarsest_step(self) -> float:
        """The coarsest level's step."""
        return float(self.steps[0] * quantize.step_factor(1, self.config.levels))

    def factors(self, tokens: int, device: torch.device) -> Tensor | None:
        """Return the factor of each token of the context that `to_basis` multiplies by, float32 [tokens]; None: all are
        1. It is copied to a device once.
        """
        if not len(self.sinks):
            return None

        def make() -> Tensor:
            return transfer.keep(torch.ones(tokens).index_fill(0, self.sinks, 1 / FINER), device)

        found: Tensor = self._resident.get(device, "factors", make)
        return found

    def _coarsest(self, y: Tensor, span: Span) -> Tensor:
        """Return coefficients of the finest level as the coarsest level decodes them (`sparse.coarsened`)."""
        found, ordinary = y.clone(), span.ordinary(self.config)
        step = self.steps[0].to(y.device) * quantize.step_factor(1, self.config.levels)
        found[ordinary].div_(step).round_().mul_(step)
        return found

    def _scaled(self, y: Tensor, span: Span, factor: float) -> Tensor:
        """Multiply the coefficients of the chunk's sinks by `factor`, in place."""
        here = self.sinks[(self.sinks >= span.first) & (self.sinks < span.first + span.tokens)] - span.first
        if len(here):
            y[transfer.send(here, y.device)] *= factor
        return y
