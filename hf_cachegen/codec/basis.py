"""Rows of a cache <-> coefficients in a profile's basis: one matrix product per group of layers.

Twists:
1. The means ride in the product, so that it is rounded once.
2. Where rows are wanted in bfloat16 and the machine multiplies that (AMX, AVX512-BF16), the product is of bfloat16 with
   sums in float32, several times as fast as of float32. The leading components of a group, whose coefficients are
   large beside their step, take part with twice the digits (`Narrow`). Decoded rows therefore differ between machines
   by about a rounding of the cache's own dtype; symbols never do.
3. The last components, if they are all zero in a chunk at its level, are left out of the product.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from hf_cachegen.codec.chunk import Span
from hf_cachegen.codec.precision import full_precision
from hf_cachegen.geometry import Geometry
from hf_cachegen.profile import Group, Profile

MEAN_TERMS = 3
"""bfloat16 numbers whose sum is a float32 mean: 3 x 8 bits."""
LEADING = 64
"""Components with twice the digits. With none the finest level's divergence was a fifth higher (reference model)."""
WORTH_LEAVING_OUT = 0.25
"""Share of idle components from which it costs less to see that they are zero than to multiply them."""


class Narrow(NamedTuple):
    """A group's matrix U in bfloat16. Rows: the means; for the leading components what rounding left of U, and U again
    (for what rounding leaves of their coefficients); rounded U [components, channels].
    """

    matrix: Tensor
    components: int

    @classmethod
    def of(cls, synthesis: Tensor, mean: Tensor) -> Narrow:
        """synthesis float32 [components, channels], mean float32 [channels]."""
        means = []
        for _ in range(MEAN_TERMS):
            means.append(_rounded(mean)[None])
            mean = mean - means[-1][0]
        rounded = _rounded(synthesis)
        rows = [*means, synthesis[:LEADING] - rounded[:LEADING], rounded[:LEADING], rounded]
        return cls(torch.cat(rows).bfloat16(), len(synthesis))

    def product(self, part: Tensor) -> Tensor:
        """part float32 [tokens, components], all or the first of them, to bfloat16 [tokens, channels], means added."""
        extra = len(self.matrix) - self.components
        leading = (extra - MEAN_TERMS) // 2
        y = torch.ones(len(part), extra + part.shape[1], dtype=torch.bfloat16, device=part.device)
        y[:, extra:] = part
        rounded = y[:, extra : extra + leading]
        y[:, MEAN_TERMS : MEAN_TERMS + leading] = rounded
        y[:, MEAN_TERMS + leading : extra] = part[:, :leading] - rounded
        return y @ self.matrix[: y.shape[1]]


_ANALYSES: WeakKeyDictionary[Profile, dict[torch.device, list[tuple[Tensor, Tensor]]]] = WeakKeyDictionary()
"""The same for the way there, (mean, analysis)."""
_MATRICES: WeakKeyDictionary[Profile, dict[tuple[torch.device, bool], list[Any]]] = WeakKeyDictionary()
"""For a device, and whether in bfloat16: of each group of a profile a Narrow, or (synthesis, mean); made once."""


@lru_cache(maxsize=1)
def multiplies_bfloat16() -> bool:
    """Whether this machine has instructions for products of bfloat16; without, they are slower than float32's."""
    # Not every release of torch that is supported tells.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


class Basis:
    """A profile's basis for caches of its model's geometry."""

    def __init__(self, geometry: Geometry, profile: Profile):
        self.geometry, self.profile = geometry, profile
        self.slices = slices_of(geometry)

    def coefficients(self, rows: Tensor, span: Span) -> Tensor:
        """rows [tokens, columns] of any float dtype to float32 [tokens, components], on the device of rows."""
        rotary, found = self.profile.rotary, list[Tensor]()
        angles = rotary.angles(torch.arange(span.first, span.first + span.tokens, device=rows.device))
        for group, _ in self._groups():
            places = self._places(group)
            x = torch.cat([rows[:, place] for place in places], 1).float()
            if group.kind == 0:
                x = rotary.turn(x.reshape(len(x), -1, group.sensitivity.shape[1]), angles, -1).flatten(1)
            mean, analysis = self._analyses(x.device)[len(found)]
            x -= mean
            with full_precision(x.device):
                found.append(x @ analysis)
        return torch.cat(found, 1)

    def rows(self, y: Tensor, span: Span, dtype: torch.dtype = torch.float32, idle: Tensor | None = None) -> Tensor:
        """The inverse: y float32 [tokens, components] to rows [tokens, columns] of that dtype, on the device of y.

        idle: bool [components], those that are likely to be zero in all tokens.
        """
        device = y.device
        rows = torch.empty(len(y), len(self.profile.means), dtype=dtype, device=device)
        narrow = dtype == torch.bfloat16 and (device.type == "cuda" or multiplies_bfloat16())
        rotary = self.profile.rotary
        angles = rotary.angles(torch.arange(span.first, span.first + span.tokens, device=device))
        for (group, components), matrix in zip(self._groups(), self._matrices(device, narrow), strict=True):
            part = y[:, components]
            part = part if idle is None else _shortened(part, idle[components])
            with full_precision(device):
                if isinstance(matrix, Narrow):
                    back = matrix.product(part)
                else:
                    synthesis, mean = matrix
                    back = torch.addmm(mean, part, synthesis[: part.shape[1]])
            if group.kind == 0:
                heads = back.float().reshape(len(back), -1, group.sensitivity.shape[1])
                back = rotary.turn(heads, angles, 1).flatten(1)
            places = self._places(group)
            for place, columns in zip(places, back.split([p.stop - p.start for p in places], 1), strict=True):
                rows[:, place] = columns
        return rows

    def _groups(self) -> Iterator[tuple[Group, slice]]:
        """Each group and its components."""
        at = 0
        for group in self.profile.groups:
            yield group, slice(at, at + len(group.synthesis))
            at += len(group.synthesis)

    def _places(self, group: Group) -> list[slice]:
        return [self.slices[2 * layer + group.kind] for layer in range(group.first, group.first + group.count)]

    def _mean(self, group: Group) -> Tensor:
        return torch.cat([self.profile.means[place] for place in self._places(group)])

    def _analyses(self, device: torch.device) -> list[tuple[Tensor, Tensor]]:
        """(mean, analysis) of each group on a device, copied there once."""
        known = _ANALYSES.setdefault(self.profile, {})
        if device not in known:
            known[device] = [(self._mean(g).to(device), g.analysis.to(device)) for g in self.profile.groups]
        return known[device]

    def _matrices(self, device: torch.device, narrow: bool) -> list[Any]:
        known = _MATRICES.setdefault(self.profile, {})
        if (device, narrow) not in known:
            made: list[Any] = []
            for group in self.profile.groups:
                mean = self._mean(group)
                if narrow:
                    one = Narrow.of(group.synthesis, mean)
                    made.append(one._replace(matrix=one.matrix.to(device)))
                else:
                    made.append((group.synthesis.to(device), mean.to(device)))
            known[device, narrow] = made
        return known[device, narrow]


def _rounded(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def _shortened(part: Tensor, idle: Tensor) -> Tensor:
    """The first components, behind which all are idle; all where they are many, or an idle one is not zero after all
    (an exception). Components are in the order of their spread, so what is idle is mostly the last.
    """
    live = (~idle).nonzero().flatten()
    count = max(int(live[-1]) + 1 if len(live) else 1, LEADING)
    if count > (1 - WORTH_LEAVING_OUT) * len(idle):
        return part
    least, most = part[:, count:].aminmax()
    return part[:, :count] if float(least) == 0 == float(most) else part


def slices_of(geometry: Geometry) -> list[slice]:
    """Columns of layer 0's K, layer 0's V, layer 1's K, ..."""
    found, at = [], 0
    for layer in geometry.layers:
        for width in (layer.k_channels, layer.v_channels):
            found.append(slice(at, at + width))
            at += width
    return found
