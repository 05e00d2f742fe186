"""Predict K and V of later layers from the hidden state that enters an early one: a linear map of low rank.

A loader holds the tokens and the weights. So it can compute the hidden state h that enters layer m: for m = 0 the
embedding of a token, for m > 0 the result of the first m layers. The K and V of layers 0..m follow from the same
computation and need no bytes. Of all later layers the codec stores the difference to a prediction:

    scores = (h / rms(h) - mean) D                 D [features, rank]
    x' = mean of the channels + scores P           P [rank, channels], for each group of layers; keys before rotation

The symbols never depend on the prediction: a decoder reads the same symbols whatever its scores are. A rounding of
a score moves a value by a rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_cachegen.codec import chain
from hf_cachegen.codec.described import mapping, whole
from hf_cachegen.codec.group import Group, covered, moderate
from hf_cachegen.codec.precision import full_precision, without_autocast
from hf_cachegen.codec.transfer import send

MAX_PREDICTORS = 16
"""Largest number of predictors of a profile."""
LEAST_RMS = 1e-6
"""Lower bound on the root mean square that a hidden state is divided by."""


@dataclass(frozen=True)
class Known:
    """What a loader computes of a context from its tokens, before it decodes anything.

    Attributes:
        layer: m, the layer that the features enter.
        scores: float32 [tokens, rank], on any device.
        keys: Of layers 0..m, each [1, heads, tokens, dim]; empty where only the scores are needed, to encode.
        values: The same.
    """

    layer: int
    scores: Tensor
    keys: tuple[Tensor, ...] = ()
    values: tuple[Tensor, ...] = ()


@dataclass(eq=False)
class Predictor:
    """The part of a profile that predicts from the hidden state entering one layer. All tensors are on the CPU.

    Attributes:
        layer: m. Groups cover the layers after it.
        mean: float32 [features], of the normalised hidden states.
        directions: D, float32 [features, rank].
        groups: Bases of the residuals; their `prediction` is P.
        step_code: The finest step, in the code of `codec.quantize`.
        base_entries: uint8 [components]: entries of the shipped codebook.
        refine_entries: uint8 [levels - 1, components]: entries of the shipped codebook.
        about: The ridge, and the divergence measured at each level.
        reach: Of the profile's chain (`codec.chain`); 0 without one.
    """

    layer: int
    mean: Tensor
    directions: Tensor
    groups: tuple[Group, ...]
    step_code: int
    base_entries: Tensor
    refine_entries: Tensor
    about: dict[str, Any] = field(default_factory=dict)
    reach: int = 0

    @property
    def entries(self) -> Tensor:
        """The table entries of the base and of each refinement, uint8 [levels, components]."""
        return torch.cat([self.base_entries[None], self.refine_entries])

    @property
    def rank(self) -> int:
        """Number of scores of a token."""
        return self.directions.shape[1]

    @without_autocast()
    def scores(self, hidden: Tensor) -> Tensor:
        """Return the scores, float32 [tokens, rank], of hidden states [tokens, features] of any float dtype."""
        mean, directions = send(self.mean, hidden.device), send(self.directions, hidden.device)
        with full_precision(hidden.device):
            return (normalised(hidden) - mean) @ directions

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of a profile's file, by name. The sensitivities are those of the profile's own groups."""
        prefix = f"predict-{self.layer}"
        found = {
            f"{prefix}-mean": self.mean, f"{prefix}-directions": self.directions,
            f"{prefix}-base_entries": self.base_entries, f"{prefix}-refine_entries": self.refine_entries,
        }  # fmt: skip
        for index, group in enumerate(self.groups):
            found |= group.tensors(f"{prefix}-", index)
        return found

    def described(self) -> dict[str, Any]:
        """Return the JSON values of a profile's file."""
        groups = [[group.kind, group.first, group.count] for group in self.groups]
        return {"layer": self.layer, "groups": groups, "step_code": self.step_code, "about": self.about}

    @classmethod
    def read(
        cls, described: dict[str, Any], tensors: dict[str, Tensor], sensitivities: dict[tuple[int, int], Tensor],
        reach: int,
    ) -> Predictor:  # fmt: skip
        """Read a predictor of a profile's file. `is_sound` checks its values and shapes.

        Args:
            described: The result of `described`.
            tensors: All tensors of the file.
            sensitivities: Of the profile, float32 [heads, dim, dim] for each (kind, layer).
            reach: Of the profile's chain.

        Raises:
            LookupError, TypeError, ValueError: The file contradicts itself.
        """
        layer, found, claimed = whole(described["layer"]), list[Group](), 0
        prefix = f"predict-{layer}"
        for index, (kind, first, count) in enumerate(described["groups"]):
            claimed += abs(whole(count))
            if claimed > len(sensitivities):  # else a small file could claim all layers many times
                raise ValueError("a predictor's groups have more layers than the model")
            layers = range(whole(first), first + count)
            parts = [sensitivities[whole(kind), one] for one in layers]
            if len({part.shape[1:] for part in parts}) != 1:
                raise ValueError("a predictor's groups need layers of one head_dim")
            found.append(Group.read((kind, first, count), torch.cat(parts), tensors, f"{prefix}-", index, reach > 0))
        return cls(
            layer, tensors[f"{prefix}-mean"], tensors[f"{prefix}-directions"], tuple(found),
            whole(described["step_code"]), tensors[f"{prefix}-base_entries"], tensors[f"{prefix}-refine_entries"],
            mapping(described["about"]), reach,
        )  # fmt: skip

    def is_sound(self, shapes: Sequence[tuple[int, int, int, int]], levels: int) -> bool:
        """Return whether shapes, dtypes and numbers fit each other and the layers.

        Args:
            shapes: (heads, k_dim, v_heads, v_dim) of each layer.
            levels: Of the profile.
        """
        sound = 0 <= self.layer < len(shapes) - 1 and 0 <= self.step_code < 256
        sound = sound and self.mean.dtype == self.directions.dtype == torch.float32
        sound = sound and self.mean.dim() == 1 and self.directions.dim() == 2
        sound = sound and len(self.directions) == len(self.mean) > 0 and self.rank > 0
        sound = sound and moderate(self.mean) and moderate(self.directions)
        if not sound:
            return False
        if not chain.is_sound(self.groups, self.reach):
            return False
        read = chain.widths_read(self.groups, self.reach)
        found = covered(self.groups, shapes, [self.rank + width for width in read])
        later = range(self.layer + 1, len(shapes))
        if found is None or sorted(found) != [(kind, layer) for kind in (0, 1) for layer in later]:
            return False
        components = sum(len(group.synthesis) for group in self.groups)
        entries = self.base_entries, self.refine_entries
        return (
            all(part.dtype == torch.uint8 for part in entries)
            and tuple(self.base_entries.shape) == (components,)
            and tuple(self.refine_entries.shape) == (levels - 1, components)
        )


def normalised(hidden: Tensor) -> Tensor:
    """Divide hidden states [tokens, features] by their root mean square. Returns float32."""
    wide = hidden.float()
    return wide / wide.square().mean(-1, keepdim=True).sqrt().clamp_min(LEAST_RMS)
