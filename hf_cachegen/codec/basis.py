"""Convert the rows of a cache to coefficients in a profile's basis and back: one matrix product per group of layers.

Implementation notes:
1. In bfloat16 the means are part of the product, so that it is rounded once. In float32 they are added layer by layer.
2. Where rows are wanted in bfloat16 and the machine multiplies bfloat16 (AMX, AVX512-BF16), the product takes bfloat16
   and sums in float32. That is several times as fast as float32. The leading components of a group have coefficients
   that are large beside their step. They take part with twice the digits (`Narrow`). Decoded rows therefore differ
   between machines by about a rounding of the cache's own dtype. Symbols never differ.
3. Tokens whose last components are all zero, as most are at a coarse level, are multiplied by fewer rows of the matrix
   (on the CPU). Components are ordered by their spread, so the last ones are zero most often.
4. A prediction adds rows to the same product: the numbers that it reads take part like coefficients.
5. In a chain (`codec.chain`) all summaries are computed first, from the coefficients of the base: small products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from hf_cachegen.codec import heads, transfer
from hf_cachegen.codec.chain import Chain
from hf_cachegen.codec.chunk import Span
from hf_cachegen.codec.geometry import Geometry
from hf_cachegen.codec.group import Group
from hf_cachegen.codec.precision import full_precision, without_autocast
from hf_cachegen.codec.predictor import Predictor
from hf_cachegen.codec.profile import Profile
from hf_cachegen.codec.transfer import Resident, send

MEAN_TERMS = 3
"""Number of bfloat16 terms whose sum is a float32 mean: 3 x 8 bits."""
LEADING = 64
"""Number of components with twice the digits. With 0 the finest level's divergence is a fifth higher (reference model).
"""
PIECES = (1, 2, 4, 8)
"""Numbers of pieces that the tokens of a product are cut into, of which the cheapest is taken."""
ARRANGING, ARRANGING_AMX = 64, 512
"""The time that a product takes before it begins, to arrange its matrix, in tokens that are multiplied by it. AMX
multiplies bfloat16 faster than it arranges.
"""


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
        y = torch.empty(len(part), extra + part.shape[1], dtype=torch.bfloat16, device=part.device)
        y[:, :MEAN_TERMS] = 1
        y[:, MEAN_TERMS:first] = scores
        y[:, extra:] = part
        rounded = y[:, extra : extra + leading]
        y[:, first : first + leading] = rounded
        y[:, first + leading : extra] = part[:, :leading] - rounded
        return y @ self.matrix[: y.shape[1]]


_OCTET = 8
"""Bytes that are tested together for zero."""
_RESIDENT: WeakKeyDictionary[Profile | Predictor, Resident] = WeakKeyDictionary()
"""For each profile or predictor its matrices on every device, each made once: its chain; (mean, analysis, prediction)
of each group; and, by whether in bfloat16, for each group a Narrow, or (prediction above synthesis, mean, rank).
"""
_ENERGIES: WeakKeyDictionary[Profile | Predictor, Tensor] = WeakKeyDictionary()
"""For each profile or predictor: `Basis.energies`."""


@lru_cache(maxsize=1)
def _capabilities() -> dict[str, Any]:
    """Return what this CPU can do; nothing from the supported releases of torch that do not report it."""
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return found


def multiplies_bfloat16() -> bool:
    """Return whether this CPU has instructions for bfloat16 products. Without them these are slower than float32's."""
    return bool(_capabilities().get("amx_bf16") or _capabilities().get("avx512_bf16"))


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
        self._components = sum(len(group.synthesis) for group in self.learnt.groups)

    @without_autocast()
    def coefficients(
        self, vectors: Sequence[Tensor], span: Span, scores: Tensor | None = None,
        base: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """Convert the values of a chunk to coefficients float32 [tokens, components], on the device of layer 0's keys.

        Args:
            vectors: K and V of each layer in turn, [tokens, heads, dim] of any float dtype.
            span: The position of the chunk.
            scores: float32 [tokens, rank], of a predictor.
            base: Returns coefficients as the coarsest level decodes them; needed in a chain.
        """
        rotary, device = self.profile.rotary, vectors[0].device
        angles = rotary.angles(torch.arange(span.first, span.first + span.tokens, device=device))
        found, summaries = torch.empty(span.tokens, self._components, device=device), list[Tensor]()
        chain, scores = self._chain(device), None if scores is None else send(scores, device)
        for index, (group, components) in enumerate(self._groups()):
            x = torch.empty(span.tokens, *group.sensitivity.shape[:2], device=device)
            mine = [vectors[2 * layer + group.kind] for layer in range(group.first, group.first + group.count)]
            for own, part in zip(mine, x.split([own.shape[1] for own in mine], 1), strict=True):
                # By layers, which stay in a core's cache.
                part.copy_(rotary.turn(own.to(device).float(), angles, -1) if group.kind == 0 else own)
            x = x.flatten(1)
            mean, analysis, prediction = self._analyses(device)[index]
            x -= mean
            with full_precision(device):
                read = chain.read(index, scores, summaries)
                if read is not None:
                    x.addmm_(read, prediction, alpha=-1)
                torch.mm(x, analysis, out=found[:, components])
                if chain.reach and base is not None:
                    summaries.append(chain.summary(index, base(found[:, components]), read))
        return found

    def split(self, rows: Tensor) -> list[Tensor]:
        """Return the vectors of rows [tokens, channels], as `coefficients` takes them."""
        return heads.split(rows, self.geometry)

    def energies(self) -> Tensor:
        """Return the energy of each component in each vector, float64 [components, vectors], at coefficient 1."""
        if self.learnt not in _ENERGIES:
            found = torch.zeros(self._components, len(self.slices), dtype=torch.float64)
            for group, components in self._groups():
                scaling = self.profile.rotary.scaling if group.kind == 0 else 1.0
                widths = [part.stop - part.start for part in self._slices(group)]
                own = [part.square().sum(1) * scaling**2 for part in group.synthesis.split(widths, 1)]
                first = 2 * group.first + group.kind
                found[components, first : first + 2 * group.count : 2] = torch.stack(own, 1).double()
            _ENERGIES[self.learnt] = found
        return _ENERGIES[self.learnt]

    @without_autocast()
    def restore(
        self, y: Tensor, span: Span, vectors: Sequence[Tensor], scores: Tensor | None = None,
        base: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Convert coefficients float32 [tokens, components] to values, on the CPU (`codec.products` does on a device).

        Args:
            y: The coefficients.
            span: The position of the chunk.
            vectors: K and V of each layer in turn, [tokens, heads, dim] of one float dtype, which receive the values.
                Those that no group covers are left as they are.
            scores: float32 [tokens, rank], of a predictor.
            base: The coefficients as the coarsest level decodes them, for a chain. None: y.
        """
        device, dtype = y.device, vectors[0].dtype
        narrow = dtype == torch.bfloat16 and multiplies_bfloat16()
        reads = self._reads(y if base is None else base, scores)
        rotary = self.profile.rotary
        angles = rotary.angles(torch.arange(span.first, span.first + span.tokens, device=device))
        matrices = self._matrices(device, narrow)
        arranging = ARRANGING_AMX if narrow and _capabilities().get("amx_bf16") else ARRANGING
        for (group, components), matrix, read in zip(self._groups(), matrices, reads, strict=True):
            mean = None if isinstance(matrix, Narrow) else matrix[1]
            with full_precision(device):
                back = _multiplied(y[:, components], arranging, partial(_product, matrix), read)
            mine = [vectors[2 * layer + group.kind] for layer in range(group.first, group.first + group.count)]
            heads.write(back, mean, mine, (rotary, angles) if group.kind == 0 else None)

    def rows(self, y: Tensor, span: Span, dtype: torch.dtype = torch.float32) -> Tensor:
        """Convert coefficients to rows [tokens, channels] of `dtype`, as `restore` does without a predictor."""
        rows = torch.empty(len(y), len(self.profile.means), dtype=dtype, device=y.device)
        self.restore(y, span, self.split(rows))
        return rows

    def _reads(self, base: Tensor, scores: Tensor | None) -> list[Tensor]:
        """Return what each group's prediction reads, float32 [tokens, numbers], from all coefficients of the base."""
        chain, nothing = self._chain(base.device), base[:, :0]
        scores, summaries, found = None if scores is None else send(scores, base.device), list[Tensor](), list[Tensor]()
        with full_precision(base.device):
            for index, (_, components) in enumerate(self._groups()):
                read = chain.read(index, scores, summaries)
                found.append(nothing if read is None else read)
                if chain.reach:
                    summary = partial(chain.summary, index)
                    summaries.append(_multiplied(base[:, components], ARRANGING, summary, found[-1]))
        return found

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

    def _chain(self, device: torch.device) -> Chain:
        def make() -> tuple[Chain, list[tuple[Tensor, Tensor | None]]]:
            chain = Chain(self.learnt.groups, self.learnt.reach, device)
            return chain, chain.maps

        found: Chain = _RESIDENT.setdefault(self.learnt, Resident()).get(device, "chain", make)[0]
        return found

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


def _rounded(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def _product(matrix: Any, part: Tensor, read: Tensor) -> Tensor:
    """Multiply part [tokens, components], all or the leading ones, by a matrix of `Basis._matrices`."""
    if isinstance(matrix, Narrow):
        return matrix.product(part, read)
    stacked, _, rank = matrix
    part = torch.cat([read, part], 1) if rank else part
    return part @ stacked[: part.shape[1]]


def _multiplied(part: Tensor, arranging: int, product: Callable[[Tensor, Tensor], Tensor], read: Tensor) -> Tensor:
    """Return `product(part, read)`; on the CPU tokens are multiplied by the components that they need.

    Args:
        part: The coefficients, float32 [tokens, components].
        arranging: As in `_pieces`.
        product: Multiplies tokens, by all components or the leading ones.
        read: What the prediction reads, float32 [tokens, numbers].
    """
    pieces = _pieces(part, arranging) if transfer.is_host(part.device) else [(None, part.shape[1])]
    if len(pieces) == 1:
        return product(part[:, : pieces[0][1]], read)
    products = [(tokens, product(part[tokens, :width], read[tokens])) for tokens, width in pieces]
    found = products[0][1].new_empty(len(part), products[0][1].shape[1])
    for tokens, own in products:
        found[tokens] = own
    return found


def _pieces(part: Tensor, arranging: int) -> list[tuple[Tensor, int]]:
    """Cut the tokens of a product into pieces by the number of leading components beyond which all are zero.

    Args:
        part: The coefficients, float32 [tokens, components].
        arranging: The time to arrange the matrix of a piece, in tokens.

    Returns:
        Of each piece the tokens, int64 [n], and the number of components that they need.
    """
    count, octets = part.shape[1], -(-part.shape[1] // _OCTET)
    used = torch.zeros(len(part), octets * _OCTET, dtype=torch.bool)
    np.not_equal(part.numpy(), 0, out=used.numpy()[:, :count])  # torch takes four times as long
    last = (used.view(torch.int64) != 0) * torch.arange(1, octets + 1, dtype=torch.int16)
    needed, order = (last.amax(1) * _OCTET).clamp(min(LEADING, count), count).sort()

    def cut(pieces: int) -> list[tuple[Tensor, int]]:
        widths = [int(part[-1]) for part in needed.tensor_split(pieces)]
        return list(zip(order.tensor_split(pieces), widths, strict=True))

    possible = [cut(pieces) for pieces in PIECES if pieces <= len(part)]
    return min(possible, key=lambda found: sum((len(tokens) + arranging) * width for tokens, width in found))


def slices_of(geometry: Geometry) -> list[slice]:
    """Return the channel range of each vector: layer 0's K, layer 0's V, layer 1's K, ..."""
    found, at = [], 0
    for layer in geometry.layers:
        for width in (layer.k_channels, layer.v_channels):
            found.append(slice(at, at + width))
            at += width
    return found
