"""Side information learnt from the context itself: steps, means and table entries, in two passes over its chunks.

The first pass measures each channel's spread (of the values, or of their differences to the decoded anchor), from which
its steps follow as in CacheGen, section 5.2: 0.5, 1 and 1.5 standard deviations in the first, middle and last third of
the layers (first layers matter more). The second counts symbols and picks for every column the cheapest table of the
codebook. Protected tokens do not count towards the spread where there are others: a first token's values can be a
hundred times the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NoReturn

import torch
from torch import Tensor

from hf_cachegen.codec import passes, quantize, transform
from hf_cachegen.codec.chunk import Columns, LossyCodec, Side, Span
from hf_cachegen.codec.passes import Grid
from hf_cachegen.codec.rans import TILE_COLUMNS
from hf_cachegen.codec.tables import DIGIT_CONTEXTS, DIGIT_SYMBOLS, VALUE_SYMBOLS, ZERO_INDEX, Codebook
from hf_cachegen.config import CacheGenConfig
from hf_cachegen.errors import TensorError

Chunks = Callable[[], Iterator[tuple[Tensor, Span]]]
"""Yields (rows [tokens, columns], span) of every chunk, anew at each call."""
SMALLEST_STEP = 2.0**-40
"""For channels that never change."""
LARGEST_STEP = 2.0**23.75


def fit(chunks: Chunks, columns: Columns, config: CacheGenConfig) -> tuple[LossyCodec, Tensor]:
    """The codec of one context, and the bits of each part's columns under its tables, float64 [levels, columns].

    Raises TensorError for values that are not finite, or that no step serves: too large, too small, or too far from
    the rest of their channel.
    """
    codes, means = _steps(*_spread(chunks, columns, config), columns, config)
    none = torch.zeros(len(columns), dtype=torch.uint8)
    codec = LossyCodec(columns, config, Side(codes, means, none, none, none.expand(config.levels - 1, -1)))
    side, bits = _with_entries(chunks, codec)
    return LossyCodec(columns, config, side), bits


def _spread(chunks: Chunks, columns: Columns, config: CacheGenConfig) -> tuple[Tensor, Tensor]:
    """(mean, deviation) of what is quantised, float64 [columns]; delta's differences have mean zero by fiat."""
    nothing = torch.zeros(len(columns))
    protected, ordinary = torch.zeros(2, 2, len(columns), dtype=torch.float64)
    count, every = 0, 0
    for rows, span in chunks():
        anchors = transform.anchors_of(rows, columns.vectors, config)
        grid = Grid.of(anchors, columns.vectors, config, nothing, nothing).to(rows.device)
        here, coded = span.ordinary(config), span.tokens - transform.anchor_count(span.tokens, config)
        ordinary += passes.moments(rows, grid, here.start, here.stop)
        protected += passes.moments(rows, grid, 0, here.start) + passes.moments(rows, grid, here.stop, coded)
        count, every = count + here.stop - here.start, every + coded
        sums = [ordinary, protected] if anchors is None else [ordinary, protected, anchors.scales]
        if not all(bool(torch.isfinite(x).all()) for x in sums):
            require_finite(rows, columns.vectors)
    if count < 2:
        count, ordinary = max(1, every), ordinary + protected
    total, squares = ordinary
    mean = torch.zeros_like(total) if config.transform == "delta" else total / count
    return mean, (squares / count - mean.square()).clamp_min(0).sqrt()


def require_finite(rows: Tensor, vectors: Tensor) -> None:
    """Raises TensorError for rows [tokens, columns] that are not all finite; vectors as in `Columns`."""
    damaged = ~torch.isfinite(rows)
    if bool(damaged.any()):
        _refuse(int(vectors[int(damaged.any(0).int().argmax())]), "are not all finite")


def _steps(mean: Tensor, deviation: Tensor, columns: Columns, config: CacheGenConfig) -> tuple[Tensor, Tensor]:
    """(step codes uint8, means int16), [columns]."""
    unit = quantize.step_factor(1, config.levels) / quantize.MEANS_PER_STEP
    step = deviation * torch.tensor(config.steps, dtype=torch.float64)[columns.thirds] / quantize.RATIO
    # So that the mean fits its bytes, whatever its step is rounded to.
    floor = mean.abs() / (0.9 * quantize.LARGEST_MEAN * unit)
    wanted = torch.maximum(step, floor)
    _require_steps(wanted, columns)
    codes = quantize.step_codes(wanted.clamp_min(SMALLEST_STEP))
    means = (mean / (quantize.steps_of(codes).double() * unit)).round()
    return codes, means.clamp(-quantize.LARGEST_MEAN, quantize.LARGEST_MEAN).to(torch.int16)


def _require_steps(wanted: Tensor, columns: Columns) -> None:
    """Raises TensorError for steps float64 [columns] that are too large, or too small in all columns of a vector."""
    vectors = int(columns.vectors[-1]) + 1
    largest = torch.zeros(vectors, dtype=torch.float64).scatter_reduce_(0, columns.vectors, wanted, "amax")
    sound = (largest == 0) | (largest >= SMALLEST_STEP / 4) & (largest <= LARGEST_STEP)  # a NaN is not
    if not bool(sound.all()):
        _refuse(int((~sound).int().argmax()), "are too large or too small for any step")


def _require_symbols(symbols: passes.Symbols, columns: Columns, levels: int) -> None:
    """Raises TensorError where a symbol was clamped."""
    limit = int(quantize.split(torch.tensor(quantize.LARGEST_SYMBOL), levels)[0])
    clamped = (symbols.wide.indices - ZERO_INDEX).abs() >= limit
    if bool(clamped.any()):
        position = int(symbols.wide.positions[int(clamped.int().argmax())])
        _refuse(int(columns.vectors[position % len(columns)]), "have some too far from the rest of their channel")


def _refuse(vector: int, why: str) -> NoReturn:
    raise TensorError(
        f"the {('keys', 'values')[vector % 2]} of layer {vector // 2} {why}; only lossless=True keeps such values"
    )


class Counts:
    """How often each symbol of the base and each digit of the refinements occurs in every column."""

    def __init__(self, columns: int, levels: int):
        self.base = torch.zeros(columns, VALUE_SYMBOLS, dtype=torch.int32)
        self.digits = torch.zeros(levels - 1, columns, DIGIT_CONTEXTS * DIGIT_SYMBOLS, dtype=torch.int32)

    def add(self, symbols: passes.Symbols) -> None:
        """Count one chunk, where its symbols are: 64 MB of counts are not carried from a device for each."""
        self.base, self.digits = self.base.to(symbols.base.device), self.digits.to(symbols.base.device)
        passes.count(self.base, symbols.base)
        for part, digit, contexts in zip(self.digits, symbols.digits, symbols.contexts, strict=True):
            passes.count(part, digit, contexts)

    @property
    def parts(self) -> list[Tensor]:
        """Histograms of the base and of each refinement, each int32 [columns, contexts x symbols], on the CPU."""
        return [self.base.cpu(), *self.digits.cpu()]

    def choose(self, values: Codebook, digits: Codebook, *, coded: bool = False) -> tuple[Tensor, Tensor]:
        """The cheapest tables: entries uint8 [levels, columns], and their bits float64 [levels, columns].

        coded: without the entry "always zero".
        """
        books = repeated(values, digits)
        chosen = [book.choose(part, coded=coded) for part, book in zip(self.parts, books, strict=False)]
        return torch.stack([entries for entries, _ in chosen]), torch.stack([bits for _, bits in chosen])


def repeated(values: Codebook, digits: Codebook) -> Iterator[Codebook]:
    """The codebook of each part: the base's, then the refinements', for ever."""
    yield values
    while True:
        yield digits


def _with_entries(chunks: Chunks, codec: LossyCodec) -> tuple[Side, Tensor]:
    """The codec's side information with the cheapest table of every column, and the bits [levels, columns]."""
    columns, levels = len(codec.columns), codec.config.levels
    anchors, counts = torch.zeros(columns, VALUE_SYMBOLS, dtype=torch.int32), Counts(columns, levels)
    for rows, _ in chunks():
        symbols, found = codec.symbols(rows)
        _require_symbols(symbols, codec.columns, levels)
        if found is not None:
            passes.count(anchors, (found.symbols + ZERO_INDEX).to(torch.uint8))
        counts.add(symbols)
    # A channel that is left out shifts all behind it, and a GPU then decodes no tile of base and digits together. Where
    # channels fill whole tiles all are coded; one of zeros costs about a thousandth of a bit per token.
    coded = columns % TILE_COLUMNS == 0
    anchor_entries, anchor_bits = codec.values.choose(anchors, coded=coded)
    entries, bits = counts.choose(codec.values, codec.digits, coded=coded)
    bits[0] += anchor_bits
    return Side(codec.side.step_codes, codec.side.means, anchor_entries, entries[0], entries[1:]), bits
