"""Sums over samples: products of the rows of groups of layers, and of a predictor's features with them.

Rows are less a constant that is near their mean (`moments.py`). So products fit float32, and the sums that take most of
the memory have this dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from hf_cachegen.codec.chain import sources
from hf_cachegen.codec.predictor import normalised

SQUARE_PIECES = 4
"""Pieces of the channels of a symmetric product: 4 compute 5/8 of it, and more are slower products."""


class GroupSums:
    """Sums over samples of the products of groups at most `reach` layers apart, and of each group's own.

    Args:
        order: (kind, first layer, layers) of each group, in the order of the chain.
        widths: Channels of each group.
        reach: Of the chain. 0: there are the groups' own products alone.
    """

    def __init__(self, order: Sequence[tuple[int, int, int]], widths: Sequence[int], reach: int):
        self.order, self.reach = order, reach
        self.count = torch.zeros(1, dtype=torch.int64)
        self.rows = [torch.zeros(width, dtype=torch.float64) for width in widths]
        ends = [(kind, first + count - 1, 1) for kind, first, count in order]  # where `after` may cut them
        self.products = {
            (j, i): torch.zeros(widths[j], widths[i])
            for i, group in enumerate(order) for j in [*sources([*ends[:i], group], i, reach), i]
        }  # fmt: skip

    @property
    def sums(self) -> dict[str, Tensor]:
        """The sums by name, which `add` changes in place."""
        named = {"groups-count": self.count} | {f"groups-rows-{i}": x for i, x in enumerate(self.rows)}
        return named | {f"groups-{j}-{i}": x for (j, i), x in self.products.items()}

    def add(self, rows: Sequence[Tensor]) -> None:
        """Add a sample: float32 [tokens, channels] of each group, keys with the rotation undone."""
        self.count += len(rows[0])
        for total, part in zip(self.rows, rows, strict=True):
            total += part.sum(0, dtype=torch.float64).cpu()
        for (j, i), product in self.products.items():
            found = square(rows[i]) if i == j else rows[j].mT @ rows[i].to(rows[j].device)
            product += found.cpu()

    def after(self, order: Sequence[tuple[int, int, int]], widths: Sequence[int]) -> GroupSums:
        """Return the sums of these groups, of which each is the last layers of one of this object's.

        Args:
            order: (kind, first layer, layers) of each.
            widths: Channels of each.
        """
        ends = {(kind, first + count): index for index, (kind, first, count) in enumerate(self.order)}
        whole = [ends[kind, first + count] for kind, first, count in order]
        found = GroupSums(order, widths, self.reach)
        found.count = self.count
        parts = [slice(len(self.rows[index]) - width, None) for index, width in zip(whole, widths, strict=True)]
        found.rows = [self.rows[index][part] for index, part in zip(whole, parts, strict=True)]
        found.products = {(j, i): self.products[whole[j], whole[i]][parts[j], parts[i]] for j, i in found.products}
        return found

    def means(self) -> list[Tensor]:
        """Return the mean of each group, float64 [channels]."""
        return [total / self.count for total in self.rows]

    def product(self, j: int, i: int, means: Sequence[Tensor]) -> Tensor:
        """Return the mean product of groups j and i, less `means`: float64 [channels of j, channels of i]."""
        return self.read(None, j, i, means)

    def read(self, summary: Tensor | None, j: int, i: int, means: Sequence[Tensor]) -> Tensor:
        """Return `summary` times the mean product of groups j and i, less `means`.

        Args:
            summary: float64 [width, channels of j]; None for the product itself.
            j: A group.
            i: A group at most `reach` layers from it.
            means: float64 [channels] of each group.

        Returns:
            float64 [width, channels of i].
        """
        found = self.products[j, i] if (j, i) in self.products else self.products[i, j].mT
        a, b = self.rows[j] / self.count, self.rows[i] / self.count
        shift = a - means[j]
        if summary is None:
            found = found.double()
        else:
            found, a, shift = (summary.float() @ found).double(), summary @ a, summary @ shift
        return (found / self.count).addr_(a, b, alpha=-1).addr_(shift, b - means[i])


class FeatureSums:
    """Sums over samples of one layer's features, and of their products with keys and values.

    Args:
        layer: m.
        features: Number of features.
        widths: Channels of each group of layers that `add` gets the rows of.
    """

    def __init__(self, layer: int, features: int, widths: Sequence[int]):
        self.layer = layer
        self.count = torch.zeros(1, dtype=torch.int64)
        self.total = torch.zeros(features, dtype=torch.float64)
        self.square = torch.zeros(features, features, dtype=torch.float64)
        self.cross = [torch.zeros(features, width) for width in widths]
        self.rows = [torch.zeros(width, dtype=torch.float64) for width in widths]

    @property
    def sums(self) -> dict[str, Tensor]:
        """The sums by name, which `add` changes in place."""
        named = {"count": self.count, "total": self.total, "square": self.square}
        for name, parts in (("cross", self.cross), ("rows", self.rows)):
            named |= {f"{name}-{index}": part for index, part in enumerate(parts)}
        return {f"features-{self.layer}-{name}": part for name, part in named.items()}

    def add(self, hidden: Tensor, rows: Sequence[Tensor]) -> None:
        """Add a sample.

        Args:
            hidden: [tokens, features], the hidden states that enter the layer.
            rows: float32 [tokens, channels] of each group: keys with the rotation undone, or values.
        """
        hidden = normalised(hidden)
        self.count += len(hidden)
        self.total += hidden.sum(0, dtype=torch.float64).cpu()
        self.square += (hidden.mT @ hidden).cpu()
        for cross, total, part in zip(self.cross, self.rows, rows, strict=True):
            cross += (hidden.to(part.device).mT @ part).cpu()
            total += part.sum(0, dtype=torch.float64).cpu()

    def covariance(self, mean: Tensor) -> Tensor:
        """Return the mean product of features less `mean`, float64 [features, features]."""
        own = self.total / self.count
        return self.square / self.count - torch.outer(own, own) + torch.outer(own - mean, own - mean)

    def products(self, index: int, mean: Tensor, rows: Tensor) -> Tensor:
        """Return the mean product of features less `mean` and a group's channels less `rows`, float64."""
        own, other = self.total / self.count, self.rows[index] / self.count
        found = self.cross[index].double() / self.count
        return found.addr_(own, other, alpha=-1).addr_(own - mean, other - rows)


def square(x: Tensor) -> Tensor:
    """Return x^T x, of which the lower part is copied from the upper one. x: float32 [tokens, channels]."""
    found = x.new_empty(x.shape[1], x.shape[1])
    edges = [x.shape[1] * piece // SQUARE_PIECES for piece in range(SQUARE_PIECES + 1)]
    for first, last in pairwise(edges):
        torch.mm(x[:, first:last].mT, x[:, first:], out=found[first:last, first:])
        found[last:, first:last] = found[first:last, last:].mT
    return found
