"""Measure the value of the number of tables in klt's codebook: a part of the shipped ones, a finer grid of the same
densities, or tables learnt from the samples' histograms.

Symbols do not depend on the tables, and so divergence does not: bits are those of the default, and the difference of
the code lengths, entries of the context's own counted as the encoder counts them. An entry of the digits' is three
tables, and a table's id one byte, so there are 85 of them at most, as many as are shipped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from unittest import mock

import torch
from torch import Tensor

from benchmarks.klt_variants import BASE, Bench
from benchmarks.rate_distortion import Curve
from hf_cachegen.codec import codebook
from hf_cachegen.codec.fit import Counts, repeated
from hf_cachegen.codec.tables import Codebook, normalise, shipped_codebooks
from hf_cachegen.codec.transforms.klt import ENTRY_BITS, Klt
from hf_cachegen.profiles.learning.exact import Exact
from hf_cachegen.profiles.learning.learning import HELD_OUT_EVERY
from hf_cachegen.profiles.learning.measuring import Coded

SIZES = (16, 32, 64)
LEARNT_SIZES = (16, 64, 256)
GRID, OCTAVES = 63, 8.5
"""Scales of each shape of value tables in a grid of 256 tables, and how far they reach: as far as the shipped ones."""
MOST_DIGITS = 85
ROUNDS, SMOOTHING = 6, 0.03
"""Share of the best shipped table in a learnt one, for symbols that the samples have not seen."""

Books = tuple[Codebook, Codebook]
SHIPPED: Books = shipped_codebooks(BASE.prob_bits)


def part_of(book: Codebook, size: int) -> Codebook:
    """Return `size` entries, evenly from a book, with its first ("always zero")."""
    rows = book.tables.frequencies.reshape(book.entries, book.contexts, -1)
    kept = torch.linspace(1, book.entries - 1, min(size, book.entries) - 1).round().long()
    return Codebook(torch.cat([rows[:1], rows[kept]]).flatten(0, 1), BASE.prob_bits, book.contexts)


def finer_grid() -> Codebook:
    """Return 256 value tables of the densities of the shipped ones, on closer scales."""
    with mock.patch.object(codebook, "VALUE_SCALES", [0.125 * 2 ** (OCTAVES * k / (GRID - 1)) for k in range(GRID)]):
        return _book(codebook.value_rows(), 1)


def _book(rows: list[list[int]], contexts: int) -> Codebook:
    frequencies = [normalise(row, BASE.prob_bits) for row in rows]
    return Codebook(torch.tensor(frequencies, dtype=torch.int32), BASE.prob_bits, contexts)


def clustered(histograms: Tensor, size: int, shipped: Codebook) -> Codebook:
    """Learn `size` entries that code histograms, integers [components, contexts x symbols], in few bits: components in
    the order of their cost, then, in turns, each to its cheapest entry and every entry again from its components.
    """
    given, bits = shipped.choose(histograms)
    ours = histograms[given > 0]
    order = (bits / histograms.sum(1).clamp_min(1))[given > 0].argsort(stable=True)
    owner = torch.empty_like(order)
    owner[order] = torch.arange(len(order)) * (size - 1) // len(order)
    shares = shipped.tables.frequencies.reshape(shipped.entries, -1).double() / (1 << BASE.prob_bits)
    zero = shipped.tables.frequencies[: shipped.contexts]
    for _ in range(ROUNDS):
        sums = torch.zeros(size - 1, ours.shape[1], dtype=torch.int64).index_add_(0, owner, ours.long())
        sums = sums[sums.sum(1) > 0]
        near = shares[shipped.choose(sums)[0].long()]
        mixed = (sums + SMOOTHING * sums.sum(1, keepdim=True) * near / shipped.contexts) * (1 << 16)
        rows = mixed.reshape(-1, shipped.tables.frequencies.shape[1]).long().tolist()
        learnt = _book(rows, shipped.contexts)
        owner = learnt.choose(ours)[0].long()
    return Codebook(torch.cat([zero, learnt.tables.frequencies]), BASE.prob_bits, shipped.contexts)


@dataclass
class Seen:
    """Return histograms of contexts at each profile's step: int32 [components, contexts x symbols] by part."""

    parts: list[list[Tensor]]

    @classmethod
    def of(cls, bench: Bench, contexts: Sequence[Tensor]) -> Seen:
        counts = [Counts(len(profile.base_entries), profile.levels) for profile in bench.profiles]
        for context in contexts:
            coded = Coded(Exact(bench.model), bench.profiles[0], context, BASE)
            for profile, found in zip(bench.profiles, counts, strict=True):
                found.add(Klt(coded.codec.geometry, BASE, profile).inner.symbols(coded.coefficients)[0])
        return cls([found.parts for found in counts])


def lengths(parts: Sequence[Tensor], given: Sequence[Tensor], books: Books) -> Tensor:
    """Return the bits of each part, float64 [parts], with the context's own entries where they save bits."""
    found = []
    for histograms, entries, book in zip(parts, given, repeated(*books), strict=False):
        bits = book.bits(histograms, entries)
        found.append(torch.minimum(bits, book.choose(histograms)[1] + ENTRY_BITS).sum())
    return torch.stack(found)


class Codebooks:
    """The sets that are compared on a bench."""

    def __init__(self, bench: Bench):
        self.bench = bench

    @cached_property
    def training(self) -> Seen:
        contexts = [context for index, (context, _) in enumerate(self.bench.mixed) if index % HELD_OUT_EVERY]
        return Seen.of(self.bench, contexts)

    @cached_property
    def tests(self) -> dict[str, list[Seen]]:
        return {task: [Seen.of(self.bench, [test.context]) for test in some] for task, some in self.bench.tests.items()}

    @cached_property
    def histograms(self) -> tuple[Tensor, Tensor]:
        """Histograms of values and of digits at every step, int32 [components, contexts x symbols]."""
        values = torch.cat([parts[0] for parts in self.training.parts])
        return values, torch.cat([part for parts in self.training.parts for part in parts[1:]])

    def curve(self, name: str, default: Curve) -> Curve:
        """Return the default's curve with the bits of these tables."""
        books = NAMES[name](self)
        print(name, [book.entries for book in books])
        both = [(some, _chosen(self.training.parts[0], some)) for some in (books, SHIPPED)]
        found, columns = {}, len(self.bench.profiles[0].means)
        for task, contexts in self.tests.items():
            more = torch.zeros(len(self.bench.profiles), BASE.levels, dtype=torch.float64)
            for seen in contexts:
                for index, parts in enumerate(seen.parts):
                    new, old = (lengths(parts, given, some) for some, given in both)
                    more[index] += (new - old).cumsum(0) / (int(parts[0][0].sum()) * columns * len(contexts))
            points = zip(default[task], more.flatten().tolist(), strict=True)
            found[task] = [[bits + extra, *rest] for (bits, *rest), extra in points]
        return found


def _chosen(parts: Sequence[Tensor], books: Books) -> list[Tensor]:
    """Return the entries of each part that the samples choose."""
    return [book.choose(part)[0] for part, book in zip(parts, repeated(*books), strict=False)]


def _part(size: int, _: Codebooks) -> Books:
    return part_of(SHIPPED[0], size), part_of(SHIPPED[1], size)


def _learnt(size: int, on: Codebooks) -> Books:
    values, digits = on.histograms
    return clustered(values, size, SHIPPED[0]), clustered(digits, min(size, MOST_DIGITS), SHIPPED[1])


NAMES: dict[str, Callable[[Codebooks], Books]] = {
    **{f"{size} tables": partial(_part, size) for size in SIZES},
    "256 tables, a finer grid": lambda _: (finer_grid(), SHIPPED[1]),
    **{f"{size} tables, learnt": partial(_learnt, size) for size in LEARNT_SIZES},
}
