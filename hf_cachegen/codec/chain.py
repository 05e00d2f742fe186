"""Chain: predict each group of layers from the groups before it.

The groups of a chained profile are in the order in which they are decoded: K of the first layers, their V, K of the
next layers, ... A group is one layer, where layers are wide, or adjacent layers with a joint basis. What a basis codes
is the difference to a linear prediction from the *summaries* of the groups before it: of those that begin at most
`reach` layers before, and of its own layers' K where it is V. With c the coefficients of a group as the coarsest level
decodes them, r all that its prediction reads, U its basis, P its prediction and Q its summary matrix:

    x' = mean + y U + r P           y: the coefficients as any level decodes them
    summary = (c U + r P) Q^T       the leading coefficients of what the coarsest level decodes

So a summary is the same at every level. Levels stay nested, and what a finer level adds is added. Where the profile
predicts from a hidden state too (`codec.predictor`), r begins with its scores.

Symbols do not depend on the summaries. A loader whose products are rounded in another way has values that differ by a
rounding, which the layers after it read; `tests/test_chain.py` bounds how far that reaches.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from hf_cachegen.codec import sparse
from hf_cachegen.codec.group import Group
from hf_cachegen.codec.transfer import send

MAX_REACH = 16
"""Largest number of layers between the beginning of a group and of one that its prediction reads."""


def sources(groups: Sequence[tuple[int, int, int]], index: int, reach: int) -> list[int]:
    """Return the groups that the prediction of group `index` reads, of (kind, first layer, layers) in their order."""
    layer = groups[index][1]
    return [i for i in range(index) if groups[i][1] >= layer - reach] if reach else []


def widths_read(groups: Sequence[Group], reach: int) -> list[int]:
    """Return how many numbers of summaries each group's prediction reads."""
    order = [(group.kind, group.first, group.count) for group in groups]
    widths = [0 if group.summary is None else len(group.summary) for group in groups]
    return [sum(widths[i] for i in sources(order, index, reach)) for index in range(len(groups))]


def is_sound(groups: Sequence[Group], reach: int) -> bool:
    """Return whether groups and a reach fit each other, of a file; `covered` checks the layers."""
    if not reach:
        return all(group.summary is None for group in groups)
    widths = [0 if one.summary is None else one.summary.shape[1] for one in groups]
    fits = all(width == one.synthesis.shape[1] for width, one in zip(widths, groups, strict=True))
    return 0 < reach <= MAX_REACH and fits and in_order(groups)


def in_order(groups: Sequence[Group]) -> bool:
    """Return whether the groups are in the order of a chain, each with a summary."""
    order = [(group.first, group.kind) for group in groups]
    ascending = all(a < b for a, b in pairwise(order))
    return ascending and all(group.summary is not None for group in groups)


class Chain:
    """What the predictions of a profile's groups read, on one device.

    Args:
        groups: Of a profile or predictor.
        reach: Its reach. 0: predictions read the scores alone.
        device: Of the products.
    """

    def __init__(self, groups: Sequence[Group], reach: int, device: torch.device):
        self.reach = reach
        order = [(group.kind, group.first, group.count) for group in groups]
        self._sources = [sources(order, index, reach) for index in range(len(groups))]
        self.maps: list[tuple[Tensor, Tensor | None]] = []
        for group in groups if reach else ():
            if group.summary is not None:
                known = None if group.prediction is None else (group.prediction @ group.summary.mT).to(device)
                self.maps.append(((group.synthesis @ group.summary.mT).contiguous().to(device), known))

    def read(self, index: int, scores: Tensor | None, summaries: Sequence[Tensor]) -> Tensor | None:
        """Return what the prediction of group `index` reads, float32 [tokens, numbers]; None if that is nothing.

        Args:
            index: Of the group.
            scores: float32 [tokens, rank], of a predictor.
            summaries: Of the groups before it.
        """
        found = [*([] if scores is None else [scores]), *(summaries[i] for i in self._sources[index])]
        return torch.cat(found, 1) if found else None

    def summary(self, index: int, y: Tensor, read: Tensor | None, coarse: Tensor | None = None) -> Tensor:
        """Return the summary of group `index`.

        Args:
            index: Of the group.
            y: Its coefficients, float32 [tokens, components].
            read: The result of `read`.
            coarse: float32 [2, tokens]: how the coarsest level follows from y (`sparse.coarsened`). None: it is y.
        """
        own, known = self.maps[index]
        if sparse.offered(y.device):
            found = sparse.multiply(y, own, None, coarse)
        else:
            found = (y if coarse is None else sparse.coarsened(y, send(coarse, y.device))) @ own
        return found if read is None or known is None else found.addmm_(read, known)
