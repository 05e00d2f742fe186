"""Group: a joint basis of the K or V of adjacent layers, and the check of untrusted ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

LARGEST_NUMBER = 1e15
"""Limit of means, sensitivities and frequencies. Those of a real profile are of order 1, or of its model's keys and
values.
"""


@dataclass(frozen=True)
class Group:
    """A joint basis: layers [first, first + count) of K (kind 0) or V (kind 1).

    Attributes:
        sensitivity: float32 [heads of all its layers, dim, dim].
        synthesis: float32 [components, channels].
        prediction: float32 [rank, channels], where a predictor's scores are taken off first; else None.
    """

    kind: int
    first: int
    count: int
    sensitivity: Tensor
    synthesis: Tensor
    prediction: Tensor | None = None

    @cached_property
    def analysis(self) -> Tensor:
        """The matrix W = F U^T, float32 [channels, components]."""
        heads, dim, _ = self.sensitivity.shape
        by_head = self.synthesis.mT.reshape(heads, dim, -1)
        return torch.bmm(self.sensitivity, by_head).reshape(heads * dim, -1).contiguous()


def covered(
    groups: Sequence[Group], shapes: Sequence[tuple[int, int, int, int]], rank: int = 0
) -> list[tuple[int, int]] | None:
    """Return the (kind, layer) pairs that the groups cover; None if a group contradicts itself or the layers.

    Args:
        groups: Read from a file.
        shapes: (heads, k_dim, v_heads, v_dim) of each layer.
        rank: Rows of each group's prediction. 0: there is no prediction.
    """
    found = []
    for group in groups:
        if group.kind not in (0, 1) or not 0 <= group.first < group.first + group.count <= len(shapes):
            return None  # stop here: the work stays in proportion to the bytes of the file
        layers = range(group.first, group.first + group.count)
        mine = [shapes[layer][2 * group.kind :][:2] for layer in layers]
        heads, dims = sum(h for h, _ in mine), {d for _, d in mine}
        sound = len(dims) == 1 and tuple(group.sensitivity.shape) == (heads, *dims, *dims)
        sound = sound and group.synthesis.dim() == 2 and group.synthesis.shape[1] == heads * next(iter(dims))
        sound = sound and group.sensitivity.dtype == torch.float32 and moderate(group.sensitivity)
        sound = sound and bool(torch.isfinite(group.synthesis).all())
        if sound and rank:
            prediction = group.prediction
            sound = prediction is not None and tuple(prediction.shape) == (rank, group.synthesis.shape[1])
            sound = sound and prediction is not None and bool(torch.isfinite(prediction).all())
        if not sound:
            return None
        found += [(group.kind, layer) for layer in layers]
    return found


def moderate(x: Tensor) -> bool:
    """Return whether all numbers are finite and at most LARGEST_NUMBER."""
    return bool((x.abs() <= LARGEST_NUMBER).all())
