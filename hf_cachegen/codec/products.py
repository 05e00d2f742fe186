"""The matrix products of klt on a device: of many groups of layers at once, so that the host launches little.

A part of the products (`codec.plan`) is three launches: a compiled call gathers the left operands (`codec.operands`), a
batched product follows, and a compiled call writes the keys and values of its layers (`codec.heads`). The values are
those of `codec.basis` within a rounding.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from hf_cachegen.codec import transfer
from hf_cachegen.codec.chunk import Span
from hf_cachegen.codec.geometry import Geometry
from hf_cachegen.codec.heads import Writer
from hf_cachegen.codec.into import Target
from hf_cachegen.codec.operands import Coefficients, gather
from hf_cachegen.codec.plan import Plan, plan_of
from hf_cachegen.codec.precision import full_precision, without_autocast
from hf_cachegen.codec.predictor import Predictor
from hf_cachegen.codec.profile import Profile, angles_of
from hf_cachegen.codec.scaling import Scaling
from hf_cachegen.codec.transfer import Resident

_PLANS: WeakKeyDictionary[Profile | Predictor, Resident] = WeakKeyDictionary()
"""For each profile or predictor its matrices on every device, each made once: a Plan by whether in bfloat16."""


class Products:
    """Convert the coefficients of one context to keys and values, on a device.

    Args:
        geometry: Of the cache.
        profile: Of the model.
        learnt: The profile, or its predictor.
        scaling: Of the context.
    """

    def __init__(self, geometry: Geometry, profile: Profile, learnt: Profile | Predictor, scaling: Scaling):
        self._geometry, self._profile, self._learnt, self._scaling = geometry, profile, learnt, scaling
        self._resident, self._plans = Resident(), _PLANS.setdefault(learnt, Resident())
        self._writers: tuple[ref[Target], Plan, list[Writer]] | None = None

    @torch.inference_mode()  # views take half the time, and there are many
    @without_autocast()
    def restore(self, y: Tensor, span: Span, level: int, target: Target, row: int, scores: Tensor | None) -> None:
        """Write the keys and values of a chunk. Nothing waits for the device.

        Args:
            y: float32 [tokens, components], as decoded.
            span: The position of the chunk.
            level: Of the coefficients.
            target: Receives the values in rows [row, row + tokens). Those of layers without a group stay.
            row: The first of these rows.
            scores: float32 [tokens, rank], of a predictor.
        """
        device, scaling = y.device, self._scaling
        plan = self._plan(device, narrow=target.dtype == torch.bfloat16)
        finer = slice(0, 0) if level == 1 else span.ordinary(scaling.config)
        factors = scaling.factors(self._geometry.tokens, device)
        if factors is not None:
            factors = factors[span.first : span.first + span.tokens]
        found = Coefficients(y, factors, scaling.coarsest_step, finer)
        angles = None
        if self._profile.rotary.style != "none":
            angles = self._angles(plan.frequencies, span)
        with full_precision(device):
            numbers = _numbers(plan, found, scores)
            for part, writer in zip(plan.parts, self._written(plan, target), strict=True):
                products, width = part.listed.shape
                operands = part.matrices.new_empty(products, span.tokens, width)
                gather(found, numbers, part.listed, operands)
                writer.write(torch.bmm(operands, part.matrices), target, row, angles)

    def _angles(self, frequencies: Tensor, span: Span) -> Tensor:
        """Return the rotation's `angles` of a chunk, times its scaling. Those of all the context are computed once."""

        def make() -> Tensor:
            positions = torch.arange(span.total, dtype=torch.float64, device=frequencies.device)
            return angles_of(frequencies, positions).mul_(self._profile.rotary.scaling)

        found: Tensor = self._resident.get(frequencies.device, ("angles", span.total), make)
        return found.narrow(1, span.first, span.tokens)

    def _plan(self, device: torch.device, *, narrow: bool) -> Plan:
        found: Plan = self._plans.get(
            device, narrow, lambda: plan_of(self._geometry, self._profile, self._learnt, device, narrow=narrow)
        )
        return found

    def _written(self, plan: Plan, target: Target) -> list[Writer]:
        """Return what writes the parts' rows to a target, made once for each target."""
        kept = self._writers
        if kept is None or kept[0]() is not target or kept[1] is not plan:
            groups, writers = self._learnt.groups, list[Writer]()
            for part in plan.parts:
                mine = groups[part.first : part.first + len(part.listed)]
                vectors = [[2 * layer + g.kind for layer in range(g.first, g.first + g.count)] for g in mine]
                writers.append(Writer(self._geometry, target, vectors, part.means, self._profile.rotary))
            kept = self._writers = ref(target), plan, writers
        return kept[2]


def _numbers(plan: Plan, found: Coefficients, scores: Tensor | None) -> Tensor:
    """Return what predictions read, float32 [tokens, rank + numbers]: the scores and the summaries of all groups."""
    y = found.values
    if plan.within is None:
        return y[:, :0].contiguous() if scores is None else transfer.send(scores, y.device).contiguous()
    tokens, size = y.shape[0], plan.within.shape[1]
    numbers, own = y.new_empty(tokens, plan.rank + plan.numbers), y.new_empty(tokens, plan.numbers)
    for part in plan.chained:
        count, width, columns = part.matrices.shape
        operands = y.new_empty(count, tokens, width)
        gather(found, numbers, part.listed, operands)
        to = own.narrow(1, part.first * columns, count * columns)
        torch.bmm(operands, part.matrices, out=_by_group(to, columns))
    if plan.scores is not None and scores is not None:
        numbers[:, : plan.rank] = transfer.send(scores, y.device)
        own.addmm_(numbers[:, : plan.rank], plan.scores)
    summaries = numbers.narrow(1, plan.rank, plan.numbers)
    torch.bmm(_by_group(own, size), plan.within, out=_by_group(summaries, size))
    for first, last, begin, matrix in plan.before:
        summaries.narrow(1, first, last - first).addmm_(summaries.narrow(1, begin, first - begin), matrix)
    return numbers


def _by_group(numbers: Tensor, columns: int) -> Tensor:
    """Return a view [groups, tokens, columns] of numbers [tokens, groups x columns]."""
    return numbers.unflatten(1, (-1, columns)).transpose(0, 1)
