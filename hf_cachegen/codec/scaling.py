"""What lies between a basis and a coder: the finer steps of sinks, reconstruction points, and what a chain reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_cachegen.codec import points, quantize, transfer
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
        self._shifts: dict[tuple[int, torch.device], Tensor] = {}

    def to_coder(self, y: Tensor, span: Span) -> Tensor:
        """Convert the coefficients [tokens, any number] of a chunk to the coder's units, in place."""
        return self._scaled(y, span, FINER)

    def to_basis(self, y: Tensor, span: Span, level: int) -> Tensor:
        """Convert decoded coefficients [tokens, components] of a level to values of the basis, in place.

        They are moved to their reconstruction points, if there are any. Sinks are not moved.
        """
        if self.learnt.points is not None:
            sinks, ordinary = self._sinks_of(span).tolist(), span.ordinary(self.config)
            a, b = ordinary.start, ordinary.stop
            for first, last, at in ((0, a, self.config.levels), (a, b, level), (b, len(y), self.config.levels)):
                if last > first:
                    kept = [row - first for row in sinks if first <= row < last]
                    points.moved(y[first:last], self._shift(at, y.device), kept)
        return self._scaled(y, span, 1 / FINER)

    def shifts(self) -> Tensor | None:
        """Return how far the coefficients of each level are moved, float32 [levels, components]; None: not at all."""
        if self.learnt.points is None:
            return None
        return torch.stack([self._shift(level, torch.device("cpu")) for level in range(1, self.config.levels + 1)])

    def base(self, y: Tensor, span: Span) -> Tensor:
        """Return exact coefficients [tokens, any number] as the coarsest level decodes them, in the basis's units."""
        scaled, step = self.to_coder(y.clone(), span), self.steps[0].to(y.device)
        return self._scaled(self._coarsest(quantize.fine_symbols(scaled, step) * step, span, self.config.levels), span)

    def read(self, y: Tensor, span: Span, level: int) -> Tensor | None:
        """Return what the predictions of a chain read from decoded coefficients of a level; None without a chain."""
        return self._scaled(self._coarsest(y, span, level), span) if self.learnt.reach else None

    def _coarsest(self, y: Tensor, span: Span, level: int) -> Tensor:
        """Return decoded coefficients of a level as the coarsest level decodes them."""
        levels, found, ordinary = self.config.levels, y.clone(), span.ordinary(self.config)
        step = self.steps[0].to(y.device)
        symbols = quantize.fine_symbols(y[ordinary], step * quantize.step_factor(level, levels))
        found[ordinary] = quantize.split(symbols, level)[0] * (step * quantize.step_factor(1, levels))
        return found

    def _shift(self, level: int, device: torch.device) -> Tensor:
        """Return how far coefficients of a level are moved, float32 [components] on a device, made once."""
        if self.learnt.points is not None and (level, device) not in self._shifts:
            step = self.steps * quantize.step_factor(level, self.config.levels)
            found = step * points.shifts(self.learnt.points, level, self.config.step_offset)
            self._shifts[level, device] = transfer.send(found, device)
        return self._shifts[level, device]

    def _sinks_of(self, span: Span) -> Tensor:
        """Return the chunk's rows that are sinks, int64."""
        return self.sinks[(self.sinks >= span.first) & (self.sinks < span.first + span.tokens)] - span.first

    def _scaled(self, y: Tensor, span: Span, factor: float = 1 / FINER) -> Tensor:
        """Multiply the coefficients of the chunk's sinks by `factor`, in place."""
        here = self._sinks_of(span)
        if len(here):
            y[transfer.send(here, y.device)] *= factor
        return y
