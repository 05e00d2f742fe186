"""Convert the rows of a cache to coefficients in a profile's basis and back: one matrix product per group of layers.

Implementation notes:
1. In bfloat16 the means are part of the product, so that it is rounded once. In float32 they are added layer by layer.
2. Where rows are wanted in bfloat16 and the machine multiplies bfloat16 (AMX, AVX512-BF16), the product takes bfloat16
   and sums in float32. That is several times as fast as float32. The leading components of a group have coefficients
   that are large beside their step. They take part with twice the digits (`Narrow`). Decoded rows therefore differ
   between machines by about a rounding of the cache's own dtype. Symbols never differ.
3. Components are ordered by their spread, so most of the later coefficients are zero. On the CPU they are multiplied
   sparsely, in float32 (`codec.sparse`), and added to the product of the leading ones.
4. A prediction adds rows to the same product: the numbers that it reads take part like coefficients.
5. In a chain (`codec.chain`) all summaries are computed first, from the coefficients of the base: small products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from hf_cachegen.codec import heads, sparse
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
SPARSE, SPARSE_NARROW, SPARSE_AMX = 3.5, 5.0, 20.0
"""The time that a sparse product takes for a coefficient that is not zero, in those of a dense product of 512 tokens:
in float32, in bfloat16 (measured on Zen 4), and in bfloat16 with AMX (estimated).
"""


Code = Callable[[slice, Tensor], Tensor]
"""Takes a group's components, and its coefficients float32 [tokens, components], in memory that the next group
overwrites. Returns these coefficients as the coarsest level decodes them, which a chain reads.
"""


class Memory:
    """Memory that the products of a chunk share: new memory takes as long as a product of some dozen components."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return memory of this name, which the next call of the same name overwrites."""
        kept, size = self._kept.get(name), shape[0] * shape[1]
        if kept is None or len(kept) < size or kept.dtype != dtype or kept.device != device:
            with torch.inference_mode(False):  # else a call outside that mode could not write into it
                kept = self._kept[name] = torch.empty(size, dtype=dtype, device=device)
        return kept[:size].view(shape)


class Narrow(NamedTuple):
    """A group's matrix U in bfloat16, with the mean and U itself in float32.

    The rows of `matrix`: the means; the prediction; for the leading components the rounding error of U, and U again
    (for the rounding error of their coefficients); rounded U [components, channels].
    """

    matrix: Tensor
    rank: int
    mean: Tensor
    synthesis: Tensor

    @classmethod
    def of(cls, group: Group, mean: Tensor) -> Narrow:
        """Build the matrix of a group and its mean float32 [channels]."""
        synthesis, prediction, exact = group.synthesis, _prediction(group), mean
        means = []
        for _ in range(MEAN_TERMS):
            means.append(_rounded(mean)[None])
            mean = mean - means[-1][0]
        rounded = _rounded(synthesis)
        rows = [*means, prediction, synthesis[:LEADING] - rounded[:LEADING], rounded[:LEADING], rounded]
        return cls(torch.cat(rows).bfloat16(), len(prediction), exact, synthesis.contiguous())

    def product(self, part: Tensor, scores: Tensor, memory: Memory, *, means: bool = True) -> Tensor:
        """Multiply part float32 [tokens, components], all or the leading ones, and add the prediction and the means.

        Args:
            part: The coefficients: none, or LEADING or more.
            scores: float32 [tokens, rank]; rank 0 without a prediction.
            memory: Of the result.
            means: Whether to add the means.

        Returns:
            bfloat16 [tokens, channels].
        """
        skipped = 0 if means else MEAN_TERMS
        first = MEAN_TERMS - skipped + self.rank
        leading = min(LEADING, len(self.synthesis)) if part.shape[1] else 0
        extra, tokens, device = first + 2 * leading, len(part), part.device
        y = memory.take("factor", (tokens, extra + part.shape[1]), torch.bfloat16, device)
        y[:, : MEAN_TERMS - skipped] = 1
        y[:, MEAN_TERMS - skipped : first] = scores
        y[:, extra:] = part
        rounded = y[:, extra : extra + leading]
        y[:, first : first + leading] = rounded
        y[:, first + leading : extra] = part[:, :leading] - rounded
        found = memory.take("narrow", (tokens, self.matrix.shape[1]), torch.bfloat16, device)
        return torch.mm(y, self.matrix[skipped : skipped + y.shape[1]], out=found)


class Wide(NamedTuple):
    """A group's matrix in float32, [numbers that the prediction reads and components, channels], and its mean."""

    matrix: Tensor
    rank: int
    mean: Tensor

    @classmethod
    def of(cls, group: Group, mean: Tensor) -> Wide:
        """Build the matrix of a group and its mean float32 [channels]."""
        prediction = _prediction(group)
        stacked = torch.cat([prediction, group.synthesis]) if len(prediction) else group.synthesis.contiguous()
        return cls(stacked, len(prediction), mean)

    @property
    def synthesis(self) -> Tensor:
        """U itself."""
        return self.matrix[self.rank :]

    def product(self, part: Tensor, scores: Tensor, memory: Memory, *, means: bool = False) -> Tensor:
        """Multiply as `Narrow.product` does, without the means. Returns float32 [tokens, channels]."""
        found = memory.take("wide", (len(part), self.matrix.shape[1]), torch.float32, part.device)
        torch.mm(part, self.synthesis[: part.shape[1]], out=found)
        return found.addmm_(scores, self.matrix[: self.rank]) if self.rank else found


_RESIDENT: WeakKeyDictionary[Profile | Predictor, Resident] = WeakKeyDictionary()
"""For each profile or predictor its matrices on every device, each made once: its chain; (mean, analysis, prediction)
of each group; and, by whether in bfloat16, for each group a Narrow or a Wide.
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
        self._memories: list[Memory] = []  # one for each thread that multiplies at the same time
        self._components = sum(len(group.synthesis) for group in self.learnt.groups)

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
        found = torch.empty(span.tokens, self._components, device=vectors[0].device)

        def code(components: slice, y: Tensor) -> Tensor:
            found[:, components] = y
            return y if base is None else base(y)

        self.analyse(vectors, span, scores, code)
        return found

    @without_autocast()
    def analyse(self, vectors: Sequence[Tensor], span: Span, scores: Tensor | None, code: Code) -> None:
        """Convert the values of a chunk to coefficients, one group of layers after the other.

        Args:
            vectors: K and V of each layer in turn, [tokens, heads, dim] of any float dtype.
            span: The position of the chunk.
            scores: float32 [tokens, rank], of a predictor.
            code: Is called for each group.
        """
        device, rotary, summaries = vectors[0].device, self.profile.rotary, list[Tensor]()
        turn = rotary, rotary.angles(torch.arange(span.first, span.first + span.tokens, device=device))
        chain, scores = self._chain(device), None if scores is None else send(scores, device)
        memory = self._memory()
        for index, (group, components) in enumerate(self._groups()):
            mean, analysis, prediction = self._analyses(device)[index]
            x = memory.take("rows", (span.tokens, len(mean)), torch.float32, device)
            mine = [vectors[2 * layer + group.kind] for layer in range(group.first, group.first + group.count)]
            heads.read(mine, x, turn if group.kind == 0 else None)
            x -= mean
            with full_precision(device):
                read = chain.read(index, scores, summaries)
                if read is not None:
                    x.addmm_(read, prediction, alpha=-1)
                y = memory.take("coefficients", (span.tokens, analysis.shape[1]), torch.float32, device)
                coarse = code(components, torch.mm(x, analysis, out=y))
                if chain.reach:
                    summaries.append(chain.summary(index, coarse, read))
        self._memories.append(memory)

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
        coarse: Tensor | None = None, shares: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Convert coefficients float32 [tokens, components] to values, on the CPU (`codec.products` does on a device).

        Args:
            y: The coefficients.
            span: The position of the chunk.
            vectors: K and V of each layer in turn, [tokens, heads, dim] of one float dtype, which receive the values.
                Those that no group covers are left as they are.
            scores: float32 [tokens, rank], of a predictor.
            coarse: float32 [2, tokens]: how the coarsest level follows from y, for a chain (`sparse.coarsened`). None:
                it is y.
            shares: For each component the share of coefficients that are expected not to be zero, float32
                [components]. None: all of them.
        """
        device, dtype = y.device, vectors[0].dtype
        narrow = dtype == torch.bfloat16 and multiplies_bfloat16()
        reads = self._reads(y, scores, coarse)
        rotary = self.profile.rotary
        angles = rotary.angles(torch.arange(span.first, span.first + span.tokens, device=device))
        matrices = self._matrices(device, narrow)
        memory = self._memory()
        for (group, components), matrix, read in zip(self._groups(), matrices, reads, strict=True):
            with full_precision(device):
                back = _product(matrix, y[:, components], read, memory, None if shares is None else shares[components])
            mean = None if back.dtype == torch.bfloat16 else matrix.mean
            mine = [vectors[2 * layer + group.kind] for layer in range(group.first, group.first + group.count)]
            heads.write(back, mean, mine, (rotary, angles) if group.kind == 0 else None)
        self._memories.append(memory)

    def rows(self, y: Tensor, span: Span, dtype: torch.dtype = torch.float32) -> Tensor:
        """Convert coefficients to rows [tokens, channels] of `dtype`, as `restore` does without a predictor."""
        rows = torch.empty(len(y), len(self.profile.means), dtype=dtype, device=y.device)
        self.restore(y, span, self.split(rows))
        return rows

    def _memory(self) -> Memory:
        """Take memory out of `_memories`."""
        try:
            return self._memories.pop()
        except IndexError:  # all are in use by other threads
            return Memory()

    def _reads(self, y: Tensor, scores: Tensor | None, coarse: Tensor | None) -> list[Tensor]:
        """Return what each group's prediction reads, float32 [tokens, numbers]. Arguments are those of `restore`."""
        chain, nothing, device = self._chain(y.device), y[:, :0], y.device
        scores, summaries, found = None if scores is None else send(scores, device), list[Tensor](), list[Tensor]()
        with full_precision(device):
            for index, (_, components) in enumerate(self._groups()):
                read = chain.read(index, scores, summaries)
                found.append(nothing if read is None else read)
                if chain.reach:
                    summaries.append(chain.summary(index, y[:, components], read, coarse))
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
            kind = Narrow if narrow else Wide
            made = [kind.of(group, self._mean(group)) for group in self.learnt.groups]
            return [one._replace(matrix=one.matrix.to(device), mean=one.mean.to(device)) for one in made]

        found: list[Any] = _RESIDENT.setdefault(self.learnt, Resident()).get(device, narrow, make)
        return found


def _prediction(group: Group) -> Tensor:
    return group.synthesis[:0] if group.prediction is None else group.prediction


def _rounded(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def _product(
    matrix: Narrow | Wide, part: Tensor, read: Tensor, memory: Memory, shares: Tensor | None
) -> Tensor:  # fmt: skip
    """Multiply the coefficients of a group, and add its prediction.

    Args:
        matrix: Of `Basis._matrices`.
        part: float32 [tokens, components].
        read: What the prediction reads, float32 [tokens, numbers].
        memory: Of the result.
        shares: Of the coefficients that are expected not to be zero, float32 [components]. None: all of them.

    Returns:
        [tokens, channels]: bfloat16 with the means, or float32 without.
    """
    if shares is None or not sparse.offered(part.device):
        return matrix.product(part, read, memory)
    narrow = isinstance(matrix, Narrow)
    amx = narrow and _capabilities().get("amx_bf16")
    cost = SPARSE_AMX if amx else SPARSE_NARROW if narrow else SPARSE
    width = sparse.dense_width(shares, cost, 2 * LEADING if narrow else 0)
    if width == part.shape[1]:
        return matrix.product(part, read, memory)
    dense = matrix.product(part[:, :width], read, memory, means=False) if width or read.shape[1] else None
    found = memory.take("wide", (len(part), matrix.matrix.shape[1]), torch.float32, part.device)
    return sparse.multiply(part[:, width:], matrix.synthesis[width:], dense, out=found)


def slices_of(geometry: Geometry) -> list[slice]:
    """Return the channel range of each vector: layer 0's K, layer 0's V, layer 1's K, ..."""
    found, at = [], 0
    for layer in geometry.layers:
        for width in (layer.k_channels, layer.v_channels):
            found.append(slice(at, at + width))
            at += width
    return found
