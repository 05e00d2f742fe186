"""Convert the rows of a cache to coefficients in a profile's basis and back: one matrix product per group of layers.

Implementation notes:
1. The means are part of the product, so that it is rounded once.
2. Where rows are wanted in bfloat16 and the machine multiplies bfloat16 (AMX, AVX512-BF16), the product takes bfloat16
   and sums in float32. That is several times as fast as float32. The leading components of a group have coefficients
   that are large beside their step. They take part with twice the digits (`Narrow`). Decoded rows therefore differ
   between machines by about a rounding of the cache's own dtype. Symbols never differ.
3. The last components are left out of the product if they are all zero in a chunk at its level.
4. A predictor adds rows to the same product: its scores take part like coefficients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from hf_cachegen.codec.chunk import Span
from hf_cachegen.codec.geometry import Geometry
from hf_cachegen.codec.group import Group
from hf_cachegen.codec.precision import full_precision
from hf_cachegen.codec.predictor import Predictor
from hf_cachegen.codec.profile import Profile
from hf_cachegen.codec.transfer import Resident, send

MEAN_TERMS = 3
"""Number of bfloat16 terms whose sum is a float32 mean: 3 x 8 bits."""
LEADING = 64
"""Number of components with twice the digits. With 0 the finest level's divergence is a fifth higher (reference model).
"""
WORTH_LEAVING_OUT = 0.25
"""Share of idle components above which testing them for zero costs less than multiplying them."""


class Narrow(NamedTuple):
    """A group's matrix U in bfloat16.

    Its rows: the means; the prediction; for the leading components the rounding error of U, and U again (for the
    rounding error of their coefficients); rounded U [components, channels].
    """

    matrix: Tensor
    components: int
    rank: int

    @classmethod
    def of(cls, group: Group, mean: Tensor) -> Narrow:
        """Build the matrix of a group and its mean float32 [channels]."""
        synthesis, prediction = group.synthesis, _prediction(group)
        means = []
        for _ in range(MEAN_TERMS):
            means.append(_rounded(mean)[None])
            mean = mean - means[-1][0]
        rounded = _rounded(synthesis)
        rows = [*means, prediction, synthesis[:LEADING] - rounded[:LEADING], rounded[:LEADING], rounded]
        return cls(torch.cat(rows).bfloat16(), len(synthesis), len(prediction))

    def product(self, part: Tensor, scores: Tensor) -> Tensor:
        """Multiply part float32 [tokens, components], all or the leading ones, and add the prediction and the means.

        Args:
            part: The coefficients.
            scores: float32 [tokens, rank]; rank 0 without a prediction.

        Returns:
            bfloat16 [tokens, channels].
        """
        extra, first = len(self.matrix) - self.components, MEAN_TERMS + self.rank
        leading = (extra - first) // 2
        y = torch.ones(len(part), extra + part.shape[1], dtype=torch.bfloat16, device=part.device)
        y[:, MEAN_TERMS:first] = scores
        y[:, extra:] = part
        rounded = y[:, extra : extra + leading]
        y[:, first : first + leading] = rounded
        y[:, first + leading : extra] = part[:, :leading] - rounded
        return y @ self.matrix[: y.shape[1]]


_RESIDENT: WeakKeyDictionary[Profile | Predictor, Resident] = WeakKeyDictionary()
"""For each profile or predictor its matrices on every device, each made once: (mean, analysis, prediction) of each
group, and, by whether in bfloat16, for each group a Narrow, or (prediction above synthesis, mean, rank).
"""


@lru_cache(maxsize=1)
def multiplies_bfloat16() -> bool:
    """Return whether this CPU has instructions for bfloat16 products. Without them these are slower than float32's."""
    # Some supported releases of torch do not report them.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


class Basis:
    """A profile's basis, for caches of its model's geometry.

    Args:
        geometry: Of the cache.
        profile: Of the model.
        learnt: The profile, or one of its predictors, whose bases are those of the residuals.
    """

    def __init__(self, geometry: Geometry, profile: Profile, learnt: Profile | Predictor | None = None):
        self.geometry, self.profile = geometry, profile
        self.learnt = profile if learnt is None else learnt
        self.slices = slices_of(geometry)

    def coefficients(self, rows: Tensor, span: Span, scores: Tensor | None = None) -> Tensor:
        """Convert rows [tokens, channels] of any float dtype to float32 [tokens, components], on the device of rows.

        Args:
            rows: Of a chunk.
            span: The position of the chunk.
            scores: float32 [tokens, rank], of a predictor.
        """
        rotary, found = self.profile.rotary, list[Tensor]()
        angles = rotary.angles(torch.arange(span.first, span.first + span.tokens, device=rows.device))
        for group, _ in self._groups():
            slices = self._slices(group)
            x = torch.cat([rows[:, part] for part in slices], 1).float()
            if group.kind == 0:
                x = rotary.turn(x.reshape(len(x), -1, group.sensitivity.shape[1]), angles, -1).flatten(1)
            mean, analysis, prediction = self._analyses(x.device)[len(found)]
            x -= mean
            with full_precision(x.device):
                if scores is not None:
                    x.addmm_(send(scores, x.device), prediction, alpha=-1)
                found.append(x @ analysis)
        return torch.cat(found, 1)

    def rows(
        self, y: Tensor, span: Span, dtype: torch.dtype = torch.float32, idle: Tensor | None = None,
        scores: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Convert coefficients float32 [tokens, components] to rows [tokens, channels] of `dtype`, on the device of y.

        Channels that no group covers are undefined.

        Args:
            y: The coefficients.
            span: The position of the chunk.
            dtype: Of the rows.
            idle: bool [components]: components that are likely to be zero in all tokens.
            scores: float32 [tokens, rank], of a predictor.
        """
        device = y.device
        scores = y[:, :0] if scores is None else send(scores, device)
        rows = torch.empty(len(y), len(self.profile.means), dtype=dtype, device=device)
        narrow = dtype == torch.bfloat16 and (device.type == "cuda" or multiplies_bfloat16())
        rotary = self.profile.rotary
        angles = rotary.angles(torch.arange(span.first, span.first + span.tokens, device=device))
        for (group, components), matrix in zip(self._groups(), self._matrices(device, narrow), strict=True):
            part = y[:, components]
            part = part if idle is None else _shortened(part, idle[components])
            with full_precision(device):
                if isinstance(matrix, Narrow):
                    back = matrix.product(part, scores)
                else:
                    stacked, mean, rank = matrix
                    part = torch.cat([scores, part], 1) if rank else part
                    back = torch.addmm(mean, part, stacked[: part.shape[1]])
            if group.kind == 0:
                heads = back.float().reshape(len(back), -1, group.sensitivity.shape[1])
                back = rotary.turn(heads, angles, 1).flatten(1)
            _put(rows, self._slices(group), back)
        return rows

    def _groups(self) -> Iterator[tuple[Group, slice]]:
        """Iterate over the groups, each with the range of its components."""
        at = 0
        for group in self.learnt.groups:
            yield group, slice(at, at + len(group.synthesis))
            at += len(group.synthesis)

    def _slices(self, group: Group) -> list[slice]:
        return [self.slices[2 * layer + group.kind] for layer in range(group.first, group.first + group.count)]

    def _mean(self, group: Group) -> Tensor:
        return torch.cat([self.profile.means[part] for part in self._slices(group)])

    def _analyses(self, device: torch.device) -> list[tuple[Tensor, ...]]:
        """Return (mean, analysis, prediction) of each group on a device. They are copied there once."""

        def make() -> list[tuple[Tensor, ...]]:
            parts = [(self._mean(g), g.analysis, _prediction(g)) for g in self.learnt.groups]
            return [tuple(x.to(device) for x in part) for part in parts]

        found: list[tuple[Tensor, ...]] = _RESIDENT.setdefault(self.learnt, Resident()).get(device, "analyses", make)
        return found

    def _matrices(self, device: torch.device, narrow: bool) -> list[Any]:
        def make() -> list[Any]:
            made: list[Any] = []
            for group in self.learnt.groups:
                mean, prediction = self._mean(group), _prediction(group)
                if narrow:
                    one = Narrow.of(group, mean)
                    made.append(one._replace(matrix=one.matrix.to(device)))
                else:
                    stacked = torch.cat([prediction, group.synthesis]) if len(prediction) else group.synthesis
                    made.append((stacked.to(device), mean.to(device), len(prediction)))
            return made

        found: list[Any] = _RESIDENT.setdefault(self.learnt, Resident()).get(device, narrow, make)
        return found


def _prediction(group: Group) -> Tensor:
    return group.synthesis[:0] if group.prediction is None else group.prediction


def _put(rows: Tensor, slices: Sequence[slice], back: Tensor) -> None:
    """Write adjacent channels to these slices of rows: with one operation where they are evenly spaced."""
    width = slices[0].stop - slices[0].start
    steps = {b.start - a.start for a, b in pairwise(slices)} or {width}
    if len(steps) == 1 and all(s.stop - s.start == width for s in slices):
        shape, start = (len(rows), len(slices), width), rows.storage_offset() + slices[0].start
        rows.as_strided(shape, (rows.stride(0), steps.pop(), 1), start).copy_(back.view(shape))
        return
    for where, channels in zip(slices, back.split([s.stop - s.start for s in slices], 1), strict=True):
        rows[:, where] = channels


def _rounded(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def _shortened(part: Tensor, idle: Tensor) -> Tensor:
    """Drop the trailing components if all of them are idle and zero.

    Return all components where there is little to drop, or where an idle one is not zero (an exception). Components are
    ordered by their spread, so the idle ones are mostly the last.
    """
    live = (~idle).nonzero().flatten()
    count = max(int(live[-1]) + 1 if len(live) else 1, LEADING)
    if count > (1 - WORTH_LEAVING_OUT) * len(idle):
        return part
    least, most = part[:, count:].aminmax()
    return part[:, :count] if float(least) == 0 == float(most) else part


def slices_of(geometry: Geometry) -> list[slice]:
    """Return the channel range of each vector: layer 0's K, layer 0's V, layer 1's K, ..."""
    found, at = [], 0
    for layer in geometry.layers:
        for width in (layer.k_channels, layer.v_channels):
            found.append(slice(at, at + width))
            at += width
    return found
