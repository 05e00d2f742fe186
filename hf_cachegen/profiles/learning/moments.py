"""Sums over the training samples: means, second moments by group of layers, sensitivities by head; and the bases.

All sums are float64 on the CPU. Products are computed on the devices of the model's layers.
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
from hf_cachegen.profiles.learning.chain import ChainSums
from hf_cachegen.profiles.learning.exact import Exact
from hf_cachegen.profiles.learning.journal import Journal
from hf_cachegen.profiles.learning.predictor import FeatureSums, Target, targets_of
from hf_cachegen.profiles.learning.running import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEAST_SENSITIVITY = 0.02
"""Lower bound on sensitivity, in units of the model's mean: the samples may not depend on a layer at all."""
SUMS = 2
"""Version of what the sums mean. A journal of another version is not resumed."""


class Moments:
    """Moments of a model's keys (rotation undone) and values, and of the gradients with respect to them.

    The gradients of attention sinks do not count. They are 2 % of the tokens and have four fifths of the sensitivity.
    But klt codes them with steps of their own, so the bases are for the other tokens.
    """

    def __init__(
        self, exact: Exact, samples: Sequence[Sample], rotary: Rotary, group_layers: int, seed: int,
        journal: Journal, predict_layers: Sequence[int] = (), reach: int = 0,
    ):  # fmt: skip
        self.rotary = rotary
        self.shapes, self.layers = exact.geometry(samples[0][0])
        self.group_layers = group_layers
        self.ranges = [part for kind in (0, 1) for part in self._group(kind)]
        if reach:
            self.ranges.sort(key=lambda part: (part[1], part[0]))  # as a loader decodes them
        self.reach = reach
        self.chain = self.chain_sums() if reach else None
        self.count = torch.zeros(1, dtype=torch.int64)
        self.sums = [[_zeros(h * d) for h, d in side] for side in self.shapes]
        self.squares = [_zeros(self._width(part), self._width(part)) for part in self.ranges]
        self.fisher = [[_zeros(h, d, d) for h, d in side] for side in self.shapes]
        numbered = ((f"{kind}-{layer}", kind, layer) for kind in (0, 1) for layer in range(len(self.layers)))
        sums = {"count": self.count} | {f"square-{index}": x for index, x in enumerate(self.squares)}
        for name, kind, layer in numbered:
            sums |= {f"sum-{name}": self.sums[kind][layer], f"fisher-{name}": self.fisher[kind][layer]}
        self.features = [self.features_of(exact.model, layer) for layer in predict_layers]
        for features in self.features:
            sums |= features.sums
        sums |= {} if self.chain is None else self.chain.sums
        for index, (context, continuation) in journal.each("learn", list(enumerate(samples)), sums):
            # The draws of a sample do not depend on the samples before it.
            draws = torch.Generator().manual_seed((seed * 1_000_003 + index) % (1 << 63))
            self._add(exact, context, continuation, draws)

    def features_of(self, model: PreTrainedModel, layer: int) -> FeatureSums:
        """Return empty sums of a predictor's features, for the ranges of layers of this object."""
        return FeatureSums(model, layer, [self._width(part) for part in self.ranges])

    def chain_sums(self) -> ChainSums:
        """Return empty sums for a chain over the ranges of this object."""
        return ChainSums(self.ranges, [self._width(part) for part in self.ranges], self.reach)

    def rows_of(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
        """Return a context's rows, float32 [tokens, channels], of each range: keys with the rotation undone, values."""
        found = []
        for kind, first, count in self.ranges:
            layers = (keys, values)[kind][first : first + count]
            framed = [in_frame(x, kind, self.rotary).flatten(1) for x in layers]
            found.append(torch.cat([x.to(framed[0].device) for x in framed], 1))
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
        kind, first, count = part
        return sum(h * d for h, d in self.shapes[kind][first : first + count])

    def _add(self, exact: Exact, context: Tensor, continuation: Tensor, draws: torch.Generator) -> None:
        keys, values, _ = exact.prefill(context)
        rows = self.rows_of(keys, values)
        self.count += context.shape[1]
        for features in self.features:
            features.add(context, rows)
        if self.chain is not None:
            self.chain.add(rows)
        for square, part, (kind, first, count) in zip(self.squares, rows, self.ranges, strict=True):
            widths = [h * d for h, d in self.shapes[kind][first : first + count]]
            for layer, x in enumerate(part.split(widths, 1), first):
                self.sums[kind][layer] += x.cpu().sum(0, dtype=torch.float64)
            square += (part.mT @ part).cpu()
        del rows
        states, ordinary = exact.states(context), torch.ones(context.shape[1], dtype=torch.bool)
        ordinary[find_sinks(keys)] = False
        for kind, layer, gradient in gradients(exact.model, keys, values, continuation, self.rotary, draws, states):
            g = gradient[ordinary.to(gradient.device)]
            self.fisher[kind][layer] += g.permute(1, 2, 0).bmm(g.transpose(0, 1)).cpu().double() / (
                len(g) * continuation.shape[1]
            )

    @property
    def means(self) -> Tensor:
        """The means, float64 [channels], in the order of a chunk's channels."""
        pairs = (self.sums[kind][layer] for layer in range(len(self.layers)) for kind in (0, 1))
        return torch.cat(list(pairs)) / self.count

    def targets(self, groups: Sequence[Group], training: FeatureSums, held_out: FeatureSums) -> list[Target]:
        """Return what a predictor of these sums predicts. groups: the profile's, one for each range."""
        means = [torch.cat(self.sums[kind][first : first + count]) / self.count for kind, first, count in self.ranges]
        squares = [square / self.count for square in self.squares]
        return targets_of(groups, self.shapes, means, squares, training, held_out)

    def groups(self, floor: float) -> tuple[Group, ...]:
        """Compute the bases with all components.

        Args:
            floor: Lower bound on sensitivity, as a fraction of the mean of the layer's K or V. LEAST_SENSITIVITY times
                the mean of all is added to it.
        """
        means = [[float(f.diagonal(dim1=1, dim2=2).mean()) for f in side] for side in self.fisher]
        # In units of their mean, so that the basis is of order 1.
        unit = max(sum(map(sum, means)) / sum(map(len, means)), 1e-30)
        found = []
        for (kind, first, count), square in zip(self.ranges, self.squares, strict=True):
            layers = range(first, first + count)
            sensitivity = torch.cat([
                self.fisher[kind][layer] / unit
                + (floor * means[kind][layer] / unit + LEAST_SENSITIVITY) * torch.eye(self.shapes[kind][layer][1])
                for layer in layers
            ])  # fmt: skip
            values, vectors = torch.linalg.eigh(sensitivity)
            root = (vectors * values.sqrt()[:, None]) @ vectors.mT
            inverse = (vectors * values.rsqrt()[:, None]) @ vectors.mT
            mean = torch.cat([self.sums[kind][layer] for layer in layers]) / self.count
            covariance = square / self.count - torch.outer(mean, mean)
            _, basis = torch.linalg.eigh(_by_head(_by_head(covariance, root).mT, root))
            synthesis = _by_head(basis.flip(1).mT, inverse).half().float()  # rounded as in the file
            found.append(Group(kind, first, count, sensitivity.float(), synthesis))
        return tuple(found)


def _by_head(x: Tensor, heads: Tensor) -> Tensor:
    """Multiply x [n, heads * dim] by a block-diagonal matrix, given as its blocks [heads, dim, dim]."""
    return x.reshape(len(x), len(heads), -1).transpose(0, 1).bmm(heads).transpose(0, 1).reshape(x.shape)


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
