"""Sums over the training samples: means, second moments by group of layers, sensitivities by head; and the bases.

Sums are on the CPU. Products are computed on the devices of the model's layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_cachegen.codec.group import Group
from hf_cachegen.codec.profile import Rotary
from hf_cachegen.codec.sinks import find_sinks
from hf_cachegen.models.continuation import continuation_logits
from hf_cachegen.models.recurrent import Checkpoint
from hf_cachegen.profiles.learning.exact import Computed, Exact
from hf_cachegen.profiles.learning.journal import Journal
from hf_cachegen.profiles.learning.metric import both_sides, by_head, principal, roots
from hf_cachegen.profiles.learning.predictor import Target, targets_of
from hf_cachegen.profiles.learning.running import Sample
from hf_cachegen.profiles.learning.sums import FeatureSums, GroupSums

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEAST_SENSITIVITY = 0.02
"""Lower bound on sensitivity, in units of the model's mean: the samples may not depend on a layer at all."""
MAX_SENSITIVITY_SAMPLES = 32
"""Samples that the sensitivity is measured on, evenly drawn. It has far fewer numbers than the products, and a gradient
takes two thirds of a prefill.
"""
SUMS = 3
"""Version of what the sums mean. A journal of another version is not resumed."""


class Sums:
    """Sums of the products of some samples' rows, for the groups of layers and for each predictor.

    Args:
        exact: What the model computes. Its features are those of the predictors.
        ranges: (kind, first layer, layers) of each group.
        widths: Channels of each group.
        reach: Of the chain; 0 without one.
    """

    def __init__(self, exact: Exact, ranges: Sequence[tuple[int, int, int]], widths: Sequence[int], reach: int):
        self.groups = GroupSums(ranges, widths, reach)
        self.features = [FeatureSums(layer, count, widths) for layer, count in exact.features.items()]

    @property
    def sums(self) -> dict[str, Tensor]:
        """All sums by name, which `add` changes in place."""
        found = dict(self.groups.sums)
        for features in self.features:
            found |= features.sums
        return found

    def add(self, computed: Computed, rows: Sequence[Tensor]) -> None:
        """Add a sample: what the model computed for its context, and `Moments.rows_of` it."""
        self.groups.add(rows)
        for features in self.features:
            features.add(computed.hidden[features.layer], rows)


class Moments:
    """Moments of a model's keys (rotation undone) and values, and of the gradients with respect to them.

    All rows are less the means of the first sample, so that no product is much larger than a variance.

    The gradients of attention sinks do not count. They are 2 % of the tokens and have four fifths of the sensitivity.
    But klt codes them with steps of their own, so the bases are for the other tokens.
    """

    def __init__(
        self, exact: Exact, samples: Sequence[Sample], rotary: Rotary, group_layers: int, seed: int,
        journal: Journal, reach: int = 0,
    ):  # fmt: skip
        self.exact, self.rotary, self.reach = exact, rotary, reach
        self.shapes, self.layers = exact.geometry(samples[0][0])
        self.group_layers = group_layers
        self.ranges = [part for kind in (0, 1) for part in self._group(kind)]
        if reach:
            self.ranges.sort(key=lambda part: (part[1], part[0]))  # as a loader decodes them
        self.training = self.empty()
        self.shifts = [torch.zeros(self._width(part)) for part in self.ranges]
        self.fisher = [[_zeros(h, d, d) for h, d in side] for side in self.shapes]
        sums = self.training.sums | {f"shift-{index}": x for index, x in enumerate(self.shifts)}
        for kind, side in enumerate(self.fisher):
            sums |= {f"fisher-{kind}-{layer}": x for layer, x in enumerate(side)}
        weighed = set(torch.linspace(0, len(samples) - 1, MAX_SENSITIVITY_SAMPLES).round().int().tolist())
        for index, (context, continuation) in journal.each("learn", list(enumerate(samples)), sums):
            computed = exact.prefill(context)
            self._add(computed)
            if index in weighed:
                # The draws of a sample do not depend on the samples before it.
                draws = torch.Generator().manual_seed((seed * 1_000_003 + index) % (1 << 63))
                self._weigh(computed, context, continuation, draws)

    def empty(self) -> Sums:
        """Return empty sums for the groups of this object."""
        return Sums(self.exact, self.ranges, [self._width(part) for part in self.ranges], self.reach)

    def rows_of(self, computed: Computed) -> list[Tensor]:
        """Return a context's rows, float32 [tokens, channels], of each group: keys with the rotation undone, values;
        less `shifts`.
        """
        found = []
        for (kind, first, count), shift in zip(self.ranges, self.shifts, strict=True):
            layers = (computed.keys, computed.values)[kind][first : first + count]
            framed = [in_frame(x, kind, self.rotary).flatten(1) for x in layers]
            rows = torch.cat([x.to(framed[0].device) for x in framed], 1)
            found.append(rows.sub_(shift.to(rows.device)))
        return found

    def _group(self, kind: int) -> list[tuple[int, int, int]]:
        """Return (kind, first layer, layers) of each group: adjacent layers of equal head_dim."""
        found: list[tuple[int, int, int]] = []
        for layer, (_, dim) in enumerate(self.shapes[kind]):
            if found and found[-1][2] < self.group_layers and self.shapes[kind][layer - 1][1] == dim:
                found[-1] = (kind, found[-1][1], found[-1][2] + 1)
            else:
                found.append((kind, layer, 1))
        return found

    def _width(self, part: tuple[int, int, int]) -> int:
        return sum(self._widths(part))

    def _widths(self, part: tuple[int, int, int]) -> list[int]:
        """Return the channels of each layer of a group."""
        kind, first, count = part
        return [h * d for h, d in self.shapes[kind][first : first + count]]

    def _add(self, computed: Computed) -> None:
        """Add the products of a context."""
        rows = self.rows_of(computed)
        if not int(self.training.groups.count):
            for shift, part in zip(self.shifts, rows, strict=True):
                shift += part.mean(0).cpu()
                part -= shift.to(part.device)
        self.training.add(computed, rows)

    def _weigh(self, computed: Computed, context: Tensor, continuation: Tensor, draws: torch.Generator) -> None:
        """Add the gradients of a continuation."""
        states, ordinary = self.exact.states(context), torch.ones(context.shape[1], dtype=torch.bool)
        ordinary[find_sinks(computed.keys)] = False
        found = gradients(
            self.exact.model, computed.keys, computed.values, continuation, self.rotary, draws, states
        )  # fmt: skip
        for kind, layer, gradient in found:
            g = gradient[ordinary.to(gradient.device)]
            self.fisher[kind][layer] += g.permute(1, 2, 0).bmm(g.transpose(0, 1)).cpu().double() / (
                len(g) * continuation.shape[1]
            )

    @property
    def means(self) -> Tensor:
        """The means, float64 [channels], in the order of a chunk's channels."""
        found: dict[tuple[int, int], Tensor] = {}
        for part, shift, mean in zip(self.ranges, self.shifts, self.training.groups.means(), strict=True):
            layers = enumerate((shift + mean).split(self._widths(part)), part[1])
            found |= {(layer, part[0]): own for layer, own in layers}
        return torch.cat([found[key] for key in sorted(found)])

    def targets(self, groups: Sequence[Group], training: FeatureSums, held_out: FeatureSums) -> list[Target]:
        """Return what a predictor of these sums predicts. groups: the profile's, one for each range."""
        means = self.training.groups.means()
        covariances = [self.training.groups.product(i, i, means) for i in range(len(groups))]
        return targets_of(groups, self.shapes, means, covariances, training, held_out)

    def groups(self, floor: float) -> tuple[Group, ...]:
        """Compute the bases with all components.

        Args:
            floor: Lower bound on sensitivity, as a fraction of the mean of the layer's K or V. LEAST_SENSITIVITY times
                the mean of all is added to it.
        """
        means = [[float(f.diagonal(dim1=1, dim2=2).mean()) for f in side] for side in self.fisher]
        # In units of their mean, so that the basis is of order 1.
        unit = max(sum(map(sum, means)) / sum(map(len, means)), 1e-30)
        found, centres = [], self.training.groups.means()
        for index, (kind, first, count) in enumerate(self.ranges):
            sensitivity = torch.cat([
                self.fisher[kind][layer] / unit
                + (floor * means[kind][layer] / unit + LEAST_SENSITIVITY) * torch.eye(self.shapes[kind][layer][1])
                for layer in range(first, first + count)
            ])  # fmt: skip
            root, inverse = roots(sensitivity)
            covariance = self.training.groups.product(index, index, centres)
            synthesis = by_head(principal(both_sides(covariance, root)), inverse).half().float()  # as in the file
            found.append(Group(kind, first, count, sensitivity.float(), synthesis))
        return tuple(found)


def in_frame(x: Tensor, kind: int, rotary: Rotary) -> Tensor:
    """Return K (kind 0) or V (1) of a layer, [1, heads, tokens, dim], as float32 [tokens, heads, dim], rotation undone.
    """
    rows = x[0].detach().float().transpose(0, 1)
    return rotary.apply(rows, torch.arange(len(rows), device=rows.device), -1) if kind == 0 else rows


def gradients(
    model: PreTrainedModel, keys: Sequence[Tensor], values: Sequence[Tensor], continuation: Tensor, rotary: Rotary,
    draws: torch.Generator, states: Checkpoint | None = None,
) -> Iterator[tuple[int, int, Tensor]]:  # fmt: skip
    """Compute the gradients of the log-likelihood of labels drawn from the model's own distribution at each token.

    Yields:
        (kind, layer, gradient float32 [tokens, heads, dim] in the frame of the bases) of all layers' K, then V.
    """
    leaves = [x.detach().requires_grad_() for x in (*keys, *values)]
    # Stock layers write into their states, which the gradient of an earlier operation may need.
    unchanged = nullcontext() if states is None else torch.autograd.graph.allow_mutation_on_saved_tensors()
    with torch.enable_grad(), unchanged:
        logits = continuation_logits(model, leaves[: len(keys)], leaves[len(keys) :], continuation, states)
        drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=draws)[:, 0]
        loss = torch.nn.functional.cross_entropy(logits, drawn.to(logits.device), reduction="sum")
        found = torch.autograd.grad(loss, leaves)
    for index, gradient in enumerate(found):
        kind, layer = divmod(index, len(keys))
        yield kind, layer, in_frame(gradient, kind, rotary) * (rotary.scaling**2 if kind == 0 else 1.0)


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.float64)
