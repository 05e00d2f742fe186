"""Group: a joint basis of the K or V of adjacent layers, and the check of untrusted ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hf_cachegen.codec.matrices import read, written

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
        prediction: float32 [numbers that it reads, channels], where a prediction is taken off first; else None.
        summary: float32 [width, channels], where later layers are predicted from this one (`codec.chain`); else None.
    """

    kind: int
    first: int
    count: int
    sensitivity: Tensor
    synthesis: Tensor
    prediction: Tensor | None = None
    summary: Tensor | None = None

    @cached_property
    def analysis(self) -> Tensor:
        """The matrix W, float32 [channels, components]: F U^T, and in a chain F U^T (U F U^T)^-1.

        The rows of U are orthonormal in the metric F up to their rounding, which has 8 bits in a chain.
        """
        heads, dim, _ = self.sensitivity.shape
        by_head = self.synthesis.mT.reshape(heads, dim, -1)
        found = torch.bmm(self.sensitivity, by_head).reshape(heads * dim, -1).contiguous()
        if self.summary is None:
            return found
        solved, failed = torch.linalg.solve_ex((self.synthesis @ found).mT, found.mT)
        return found if bool(failed) or not bool(torch.isfinite(solved).all()) else solved.mT.contiguous()

    def tensors(self, prefix: str, index: int) -> dict[str, Tensor]:
        """Return the tensors of a profile's file, by name, without the sensitivity. index: of the group in its list."""
        found, chained = dict[str, Tensor](), self.summary is not None
        matrices = ("synthesis", self.synthesis), ("prediction", self.prediction), ("summary", self.summary)
        for name, matrix in matrices:
            if matrix is not None:
                found |= written(f"{prefix}{name}-{index}", matrix, chained=chained)
        return found

    @classmethod
    def read(
        cls, where: tuple[int, int, int], sensitivity: Tensor, tensors: dict[str, Tensor], prefix: str, index: int,
        chained: bool,
    ) -> Group:  # fmt: skip
        """Read what `tensors` gave. Raises LookupError, ValueError.

        Args:
            where: Kind, first layer and number of layers.
            sensitivity: float32 [heads of all its layers, dim, dim].
            tensors: Of the file.
            prefix: Of the names.
            index: Of the group in its list.
            chained: Whether it is part of a chain.
        """
        synthesis = read(tensors, f"{prefix}synthesis-{index}", chained=chained)
        prediction = summary = None
        if f"{prefix}prediction-{index}" in tensors:
            prediction = read(tensors, f"{prefix}prediction-{index}", chained=chained)
        if chained:
            summary = read(tensors, f"{prefix}summary-{index}", chained=True)
        return cls(*where, sensitivity, synthesis, prediction, summary)


def covered(
    groups: Sequence[Group], shapes: Sequence[tuple[int, int, int, int]], ranks: Sequence[int] = ()
) -> list[tuple[int, int]] | None:
    """Return the (kind, layer) pairs that the groups cover; None if a group contradicts itself or the layers.

    Args:
        groups: Read from a file.
        shapes: (heads, k_dim, v_heads, v_dim) of each layer.
        ranks: Rows of each group's prediction. 0, and none at all: there is no prediction.
    """
    found = []
    for group, rank in zip(groups, ranks or [0] * len(groups), strict=True):
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
        elif sound:
            sound = group.prediction is None
        if not sound:
            return None
        found += [(group.kind, layer) for layer in layers]
    return found


def moderate(x: Tensor) -> bool:
    """Return whether all numbers are finite and at most LARGEST_NUMBER."""
    return bool((x.abs() <= LARGEST_NUMBER).all())
