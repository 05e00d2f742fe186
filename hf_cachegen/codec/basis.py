"""Rows of a cache <-> coefficients in a profile's basis: one matrix product per group of layers.

Twists:
1. The means ride in the product, so that it is rounded once.
2. Where rows are wanted in bfloat16 and the machine multiplies that (AMX, AVX512-BF16), the product is of bfloat16 with
   sums in float32, several times as fast as of float32. The leading components of a group, whose coefficients are
   large beside their step, take part with twice the digits (`Narrow`). Decoded rows therefore differ between machines
   by about a rounding of the cache's own dtype; symbols never do.
3. Components that are all zero in a chunk at its level are left out of the product where that is worth the gathering.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from hf_cachegen.codec.chunk import Span
from hf_cachegen.geometry import Geometry
from hf_cachegen.profile import Group, Profile

MEAN_TERMS = 3
"""bfloat16 numbers whose sum is a float32 mean: 3 x 8 bits."""
LEADING = 64
"""Components with twice the digits. With none the finest level's divergence was a fifth higher (reference model)."""
WORTH_LEAVING_OUT = 0.25
"""Share of idle components from which gathering the others costs less than multiplying all."""


class Narrow(NamedTuple):
    """A group's matrix U in bfloat16: rounded U [components, channels]; for the leading components what the rounding
    left of U, and rounded U again (for what rounding leaves of their coefficients); the means.
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
        leading, rounded = synthesis[:LEADING], _rounded(synthesis)
        rows = [rounded, leading - rounded[:LEADING], rounded[:LEADING], *means]
        return cls(torch.cat(rows).bfloat16(), len(synthesis))

    def product(self, part: Tensor, live: Tensor | None) -> Tensor:
        """part float32 [tokens, components], or those of them that `live` int64 names in order, to bfloat16 [tokens,
        channels], means added.
        """
        matrix, leading = self.matrix, min(LEADING, self.components)
        if live is not None:
            first = live[live < leading]
            means = torch.arange(len(matrix) - MEAN_TERMS, len(matrix))
            rows = torch.cat([live, self.components + first, self.components + leading + first, means])
            matrix, leading = matrix.index_select(0, rows), len(first)
        y = torch.ones(len(part), len(matrix), dtype=torch.bfloat16)
        at = part.shape[1]
        y[:, :at] = part
        y[:, at : at + leading] = y[:, :leading]
        y[:, at + leading : at + 2 * leading] = part[:, :leading] - y[:, :leading]
        return y @ matrix


_NARROW: WeakKeyDictionary[Profile, list[Narrow]] = WeakKeyDictionary()
"""The matrices in bfloat16, made once for a profile."""


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
        rotary, found = self.profile.rotary, []
        angles = rotary.angles(torch.arange(span.first, span.first + span.tokens, device=rows.device))
        for group, _ in self._groups():
            places = self._places(group)
            x = torch.cat([rows[:, place] for place in places], 1).float()
            if group.kind == 0:
                x = rotary.turn(x.reshape(len(x), -1, group.sensitivity.shape[1]), angles, -1).flatten(1)
            x -= torch.cat([self.profile.means[place] for place in places]).to(x.device)
            found.append(x @ group.analysis.to(x.device))
        return torch.cat(found, 1)

    def rows(self, y: Tensor, span: Span, dtype: torch.dtype = torch.float32, idle: Tensor | None = None) -> Tensor:
        """The inverse: y float32 [tokens, components] to rows [tokens, columns] of that dtype, on the CPU.

        idle: bool [components], those that are likely to be zero in all tokens.
        """
        rows = torch.empty(len(y), len(self.profile.means), dtype=dtype)
        narrow = dtype == torch.bfloat16 and multiplies_bfloat16()
        rotary = self.profile.rotary
        angles = rotary.angles(torch.arange(span.first, span.first + span.tokens))
        for index, (group, components) in enumerate(self._groups()):
            part, live = y[:, components], None
            if idle is not None and float(idle[components].float().mean()) >= WORTH_LEAVING_OUT:
                live = _live(part, idle[components])
            part = part if live is None else part.index_select(1, live)
            if narrow:
                back = self._narrow(index).product(part, live)
            else:
                matrix = group.synthesis if live is None else group.synthesis.index_select(0, live)
                back = torch.addmm(self._mean(group), part, matrix)
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

    def _narrow(self, index: int) -> Narrow:
        if self.profile not in _NARROW:
            _NARROW[self.profile] = [Narrow.of(group.synthesis, self._mean(group)) for group in self.profile.groups]
        return _NARROW[self.profile][index]


def _rounded(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def _live(part: Tensor, idle: Tensor) -> Tensor | None:
    """Components that are not idle, int64; None where an idle one is not zero after all (an exception)."""
    resting = part.index_select(1, idle.nonzero().flatten())
    return None if bool(resting.any()) else (~idle).nonzero().flatten()


def slices_of(geometry: Geometry) -> list[slice]:
    """Columns of layer 0's K, layer 0's V, layer 1's K, ..."""
    found, at = [], 0
    for layer in geometry.layers:
        for width in (layer.k_channels, layer.v_channels):
            found.append(slice(at, at + width))
            at += width
    return found
