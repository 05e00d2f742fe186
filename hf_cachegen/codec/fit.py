"""Fit the side information to the context itself: steps, means and table entries, in two passes over its chunks.

The first pass measures each channel's spread: of the values, or of their differences to the decoded anchor. The steps
follow from it as in CacheGen, section 5.2: 0.5, 1 and 1.5 standard deviations in the first, middle and last third of
the layers (the first layers matter more). The second pass counts symbols and picks the cheapest table of the codebook
for every channel. Protected tokens do not count towards the spread where there are others: the values of a first token
can be a hundred times as large.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from hf_cachegen.codec import anchors as anchoring
from hf_cachegen.codec import passes, quantize
from hf_cachegen.codec.chunk import Channels, LossyCodec, Span
from hf_cachegen.codec.passes import Grid
from hf_cachegen.codec.side import Side
from hf_cachegen.codec.source import Source
from hf_cachegen.codec.tables import DIGIT_CONTEXTS, DIGIT_SYMBOLS, VALUE_SYMBOLS, ZERO_INDEX, Codebook
from hf_cachegen.config import CacheGenConfig
from hf_cachegen.errors import TensorError

Chunks = Callable[[], Iterator[tuple[Tensor, Span]]]
"""Yields (rows [tokens, channels], span) of every chunk, from the first at each call."""
SMALLEST_STEP = 2.0**-40
"""The step of channels that never change."""
LARGEST_STEP = 2.0**23.75
"""The largest step that a step code expresses."""


def fit(
    chunks: Chunks, channels: Channels, config: CacheGenConfig, group_tokens: int = 0, source: Source | None = None,
    spans: Sequence[Span] = (),
) -> tuple[LossyCodec, Tensor]:  # fmt: skip
    """Fit the codec of one context.

    Args:
        chunks: The rows of every chunk.
        channels: Of the rows.
        config: Its steps, levels and protected tokens are used.
        group_tokens: Tokens per group, of which the first is an anchor. 0: there are no anchors.
        source: The same values as the chunks, where the compiled passes can read them in place.
        spans: The chunks of the source.

    Returns:
        The codec, and the bits of each part's channels under its tables, float64 [levels, channels].

    Raises:
        TensorError: A value is not finite, or no step expresses it: it is too large, too small, or too far from the
            rest of its channel.
    """
    if source is not None and group_tokens:
        source = source.anchored(spans, group_tokens)
    if source is None:
        spread = _spread(chunks, channels, config, group_tokens)
    else:
        spread = _spread_of(source, spans, config, chunks)
    codes, means = _steps(*spread, channels, config)
    none = torch.zeros(len(channels), dtype=torch.uint8)
    blank = Side(codes, means, none, none, none.expand(config.levels - 1, -1))
    codec = LossyCodec(channels, config, blank, group_tokens)
    fitted = None if source is None else _chosen(source, spans, codec)
    side, bits = fitted or _with_entries(chunks, codec)
    return LossyCodec(channels, config, side, group_tokens, source), bits


def _spread(
    chunks: Chunks, channels: Channels, config: CacheGenConfig, group_tokens: int
) -> tuple[Tensor, Tensor]:
    """Return (mean, deviation) of the values to quantise, float64 [channels]. The mean of differences to anchors is
    zero.
    """
    nothing = torch.zeros(len(channels))
    protected, ordinary = torch.zeros(2, 2, len(channels), dtype=torch.float64)
    count, every = 0, 0
    for rows, span in chunks():
        anchors = anchoring.anchors_of(rows, channels.vectors, group_tokens)
        grid = Grid.of(anchors, channels.vectors, group_tokens, nothing, nothing).to(rows.device)
        here = span.ordinary(config, group_tokens)
        coded = span.tokens - anchoring.anchor_count(span.tokens, group_tokens)
        ordinary += passes.moments(rows, grid, here.start, here.stop)
        protected += passes.moments(rows, grid, 0, here.start) + passes.moments(rows, grid, here.stop, coded)
        count, every = count + here.stop - here.start, every + coded
        sums = [ordinary, protected] if anchors is None else [ordinary, protected, anchors.scales]
        if not all(bool(torch.isfinite(x).all()) for x in sums):
            require_finite(rows, channels.vectors)
    return _mean_and_deviation(ordinary, protected, count, every, group_tokens)


def _spread_of(source: Source, spans: Sequence[Span], config: CacheGenConfig, chunks: Chunks) -> tuple[Tensor, Tensor]:
    """Return `_spread` of a source. The chunks are needed only to find a value that is not finite."""
    group = source.group_tokens
    ordinary, protected = source.spread(spans, config)
    if not all(bool(torch.isfinite(x).all()) for x in (ordinary, protected, source.scales)):
        vectors = source.vectors.long()
        for rows, _ in chunks():
            require_finite(rows, vectors)
    ranges = [span.ordinary(config, group) for span in spans]
    every = sum(span.tokens - anchoring.anchor_count(span.tokens, group) for span in spans)
    count = sum(part.stop - part.start for part in ranges)
    return _mean_and_deviation(ordinary, protected, count, every, group)


def _mean_and_deviation(
    ordinary: Tensor, protected: Tensor, count: int, every: int, group_tokens: int
) -> tuple[Tensor, Tensor]:
    """Convert sums float64 [2, channels] over `count` ordinary tokens, of `every` coded ones, to (mean, deviation)."""
    if count < 2:
        count, ordinary = max(1, every), ordinary + protected
    total, squares = ordinary
    mean = torch.zeros_like(total) if group_tokens else total / count
    return mean, (squares / count - mean.square()).clamp_min(0).sqrt()


def require_finite(rows: Tensor, vectors: Tensor) -> None:
    """Raise TensorError unless all rows [tokens, channels] are finite; vectors as in `Channels`."""
    damaged = ~torch.isfinite(rows)
    if bool(damaged.any()):
        _refuse(int(vectors[int(damaged.any(0).int().argmax())]), "are not all finite")


def _steps(mean: Tensor, deviation: Tensor, channels: Channels, config: CacheGenConfig) -> tuple[Tensor, Tensor]:
    """Return (step codes uint8, means int16), each [channels]."""
    unit = quantize.step_factor(1, config.levels) / quantize.MEANS_PER_STEP
    step = deviation * torch.tensor(config.steps, dtype=torch.float64)[channels.thirds] / quantize.RATIO
    # The mean must fit into its bytes, whatever the step is rounded to.
    floor = mean.abs() / (0.9 * quantize.LARGEST_MEAN * unit)
    wanted = torch.maximum(step, floor)
    _require_steps(wanted, channels)
    codes = quantize.step_codes(wanted.clamp_min(SMALLEST_STEP))
    means = (mean / (quantize.steps_of(codes).double() * unit)).round()
    return codes, means.clamp(-quantize.LARGEST_MEAN, quantize.LARGEST_MEAN).to(torch.int16)


def _require_steps(wanted: Tensor, channels: Channels) -> None:
    """Raise TensorError for steps float64 [channels] that are too large, or too small in all channels of a vector."""
    vectors = int(channels.vectors[-1]) + 1
    largest = torch.zeros(vectors, dtype=torch.float64).scatter_reduce_(0, channels.vectors, wanted, "amax")
    sound = (largest == 0) | (largest >= SMALLEST_STEP / 4) & (largest <= LARGEST_STEP)  # a NaN is not
    if not bool(sound.all()):
        _refuse(int((~sound).int().argmax()), "are too large or too small for any step")


def _require_symbols(symbols: passes.Symbols, channels: Channels, levels: int) -> None:
    """Raise TensorError where a symbol was clamped."""
    limit = int(quantize.split(torch.tensor(quantize.LARGEST_SYMBOL), levels)[0])
    clamped = (symbols.wide.indices - ZERO_INDEX).abs() >= limit
    if bool(clamped.any()):
        position = int(symbols.wide.positions[int(clamped.int().argmax())])
        _refuse(int(channels.vectors[position % len(channels)]), "have some too far from the rest of their channel")


def _refuse(vector: int, why: str) -> NoReturn:
    raise TensorError(
        f"the {('keys', 'values')[vector % 2]} of layer {vector // 2} {why}; only lossless=True keeps such values"
    )


class Counts:
    """Counts of each symbol of the base and each digit of the refinements, in every channel."""

    def __init__(self, channels: int, levels: int):
        self.base = torch.zeros(channels, VALUE_SYMBOLS, dtype=torch.int32)
        self.digits = torch.zeros(levels - 1, channels, DIGIT_CONTEXTS * DIGIT_SYMBOLS, dtype=torch.int32)

    def add(self, symbols: passes.Symbols) -> None:
        """Count one chunk on the device of its symbols, so that 64 MB of counts are not copied for each chunk."""
        self.base, self.digits = self.base.to(symbols.base.device), self.digits.to(symbols.base.device)
        passes.count(self.base, symbols.base)
        for part, digit, contexts in zip(self.digits, symbols.digits, symbols.contexts, strict=True):
            passes.count(part, digit, contexts)

    @property
    def parts(self) -> list[Tensor]:
        """The histograms of the base and of each refinement, each int32 [channels, contexts x symbols], on the CPU."""
        return [self.base.cpu(), *self.digits.cpu()]

    def choose(self, values: Codebook, digits: Codebook) -> tuple[Tensor, Tensor]:
        """Choose the cheapest tables: entries uint8 [levels, channels], and their bits float64 [levels, channels].

        Channels of zeros are coded, too: one that is left out shifts all channels behind it, so that base and digits
        could not be decoded together. It costs about a thousandth of a bit per token.

        Args:
            values: The codebook of the base.
            digits: The codebook of the refinements.
        """
        books = repeated(values, digits)
        chosen = [book.choose(part, coded=True) for part, book in zip(self.parts, books, strict=False)]
        return torch.stack([entries for entries, _ in chosen]), torch.stack([bits for _, bits in chosen])


def repeated(values: Codebook, digits: Codebook) -> Iterator[Codebook]:
    """Yield the codebook of each part: the base's, then the refinements' without end."""
    yield values
    while True:
        yield digits


def _chosen(source: Source, spans: Sequence[Span], codec: LossyCodec) -> tuple[Side, Tensor] | None:
    """Return `_with_entries` of a source; None where a value must be refused, which that function does."""
    books, config = (codec.values, codec.digits), codec.config
    found = source.choose(spans, config, (codec.means, codec.steps), books)
    if found is None:
        return None
    entries, bits, _ = found
    levels, none = config.levels, torch.zeros(len(codec.channels), dtype=torch.uint8)
    if source.group_tokens:
        bits[0] += bits[levels]
    anchor_entries = entries[levels] if source.group_tokens else none
    side = Side(codec.side.step_codes, codec.side.means, anchor_entries, entries[0], entries[1:levels])
    return side, bits[:levels]


def _with_entries(chunks: Chunks, codec: LossyCodec) -> tuple[Side, Tensor]:
    """Return the codec's side information with the cheapest table of every channel, and the bits [levels, channels]."""
    channels, levels = len(codec.channels), codec.config.levels
    anchors, counts = torch.zeros(channels, VALUE_SYMBOLS, dtype=torch.int32), Counts(channels, levels)
    for rows, _ in chunks():
        symbols, found = codec.symbols(rows)
        _require_symbols(symbols, codec.channels, levels)
        if found is not None:
            passes.count(anchors, (found.symbols + ZERO_INDEX).to(torch.uint8))
        counts.add(symbols)
    anchor_entries, anchor_bits = codec.values.choose(anchors, coded=True)
    entries, bits = counts.choose(codec.values, codec.digits)
    bits[0] += anchor_bits
    return Side(codec.side.step_codes, codec.side.means, anchor_entries, entries[0], entries[1:]), bits
