"""Convert the rows of a chunk to nested symbols and streams, and back.

A chunk is a matrix of rows [tokens, channels] with every channel of every layer's K and V. It becomes one *part* per
level: part 0 is the base, parts 1.. are refinements. All chunks of an artifact share the side information (`Side`).

Order within the parts, for the tokens that are not anchors:

    base          [with anchors: their scales bf16 [anchors, vectors] and their symbols], base symbols of all tokens,
                  then digits of every refinement, protected tokens only
    refinement k  digits of refinement k, tokens that are not protected only

So every level has the protected tokens at the finest step. They are the first and last tokens of a context, which
attention depends on most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from operator import mul
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_cachegen.codec import anchors as anchoring
from hf_cachegen.codec import into, native, passes, quantize, section, transfer
from hf_cachegen.codec.anchors import Anchors
from hf_cachegen.codec.geometry import Geometry
from hf_cachegen.codec.into import Rows, Sections, Target
from hf_cachegen.codec.passes import Grid, Symbols
from hf_cachegen.codec.section import Assignment, Coded, Cursor
from hf_cachegen.codec.side import Side
from hf_cachegen.codec.source import Source
from hf_cachegen.codec.tables import DIGIT_ZERO, ZERO_INDEX, shipped_codebooks
from hf_cachegen.codec.transfer import Check, Resident, all_of, keep
from hf_cachegen.codec.wide import Wide, correct, split
from hf_cachegen.config import CacheGenConfig


@dataclass(frozen=True)
class Span:
    """The position of a chunk in its context: tokens [first, first + tokens) of `total`."""

    first: int
    tokens: int
    total: int

    def ordinary(self, config: CacheGenConfig, group_tokens: int = 0) -> slice:
        """Return the range of the coded tokens that are not protected. Every level has the others at the finest step.
        """

        def coded_before(position: int) -> int:
            tokens = min(max(position - self.first, 0), self.tokens)
            return tokens - anchoring.anchor_count(tokens, group_tokens)

        first = coded_before(config.protect_first)
        return slice(first, max(first, coded_before(self.total - config.protect_last)))


Placed = tuple[Sequence[bytes | memoryview], Span, int]
"""The parts of a chunk up to a level, its position in its context, and the target's row of its first token."""


@dataclass(frozen=True)
class Channels:
    """The vector and the third of the layers of each channel.

    Attributes:
        vectors: int64 [channels], ascending: the vector of each channel, 2 x layer + (0 for K, 1 for V).
        thirds: int64 [channels]: 0, 1 or 2, the third of the layers that the channel's layer is in.
    """

    vectors: Tensor
    thirds: Tensor

    @classmethod
    def of(cls, geometry: Geometry) -> Channels:
        """Return the channels of a cache, in the order of `codec.rows`."""
        widths = tuple(geometry.batch * n for layer in geometry.layers for n in (layer.k_channels, layer.v_channels))
        return cls(*_channels(widths))

    def __len__(self) -> int:
        return len(self.vectors)


@lru_cache(maxsize=4)
def _channels(widths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return `Channels.vectors` and `Channels.thirds` of vectors of these widths. All contexts of a model share them.
    """
    vectors = np.repeat(np.arange(len(widths)), widths)  # numpy: torch takes milliseconds
    return torch.from_numpy(vectors), torch.from_numpy(vectors // 2 * 3 // (len(widths) // 2))


class Read(NamedTuple):
    """The sections of a chunk's parts: anchors (if any), base, digits of the protected tokens, digits of the others."""

    scales: Tensor | None
    peaks: Coded | None
    base: Coded
    finest: list[Coded]
    rest: list[Coded]


class LossyCodec:
    """Encode and decode the chunks of one artifact, at levels 1 (the base alone) to `config.levels`.

    Args:
        channels: Of the rows.
        config: Its `levels`, `coder`, `prob_bits` and protected tokens are used.
        side: The fitted side information.
        group_tokens: Tokens per group, of which the first is an anchor. 0: there are no anchors.
        source: The values that the codec was fitted to, for `encode_own`.
    """

    def __init__(
        self, channels: Channels, config: CacheGenConfig, side: Side, group_tokens: int = 0,
        source: Source | None = None,
    ):  # fmt: skip
        self.channels, self.config, self.side, self.group_tokens = channels, config, side, group_tokens
        self.source = source if config.coder == "rans" else None
        self.values, self.digits = shipped_codebooks(config.prob_bits)
        self.steps = quantize.steps_of(side.step_codes)
        unit = quantize.step_factor(1, config.levels) / quantize.MEANS_PER_STEP
        self.means = side.means.float() * (self.steps * unit)
        self._resident = Resident()

    @cached_property
    def assignments(self) -> tuple[Assignment, Assignment, list[Assignment]]:
        """Tables of the anchors, of the base and of each refinement."""
        anchors, base = (Assignment(self.values, own) for own in (self.side.anchor_entries, self.side.base_entries))
        return anchors, base, [Assignment(self.digits, entries) for entries in self.side.refine_entries]

    @cached_property
    def shares(self) -> list[Tensor]:
        """The share of each channel's symbols that should not be zero, float32 [channels], at each level."""
        _, base, refinements = self.assignments
        return [1 - zeros for zeros in accumulate([base.zeros, *(part.zeros for part in refinements)], mul)]

    @cached_property
    def n_vectors(self) -> int:
        """Number of vectors of the channels."""
        return int(self.channels.vectors[-1]) + 1 if len(self.channels) else 0

    def vectors(self, device: torch.device) -> Tensor:
        """Return `channels.vectors` on a device. It is copied there once."""
        found: Tensor = self._resident.get(device, "vectors", lambda: keep(self.channels.vectors, device))
        return found

    def unit(self, device: torch.device) -> Grid:
        """Return the grid on which the values are the symbols themselves."""
        return self._grid(0, device, lambda: (torch.zeros(len(self.channels)), torch.ones(len(self.channels))))

    def _grid(self, level: int, device: torch.device, make: Callable[[], tuple[Tensor, Tensor]]) -> Grid:
        """Return the grid of the means and steps that `make` returns, on a device. They are copied there once."""
        means, steps = self._resident.get(device, level, lambda: tuple(keep(x, device) for x in make()))
        return Grid(None, 0, means, steps)

    def symbols(self, rows: Tensor) -> tuple[Symbols, Anchors | None]:
        """Quantise rows [tokens, channels], of any float dtype, to symbols and anchors.

        Returns:
            Symbols on the rows' device where a compiled coder exists for it, else on the CPU; anchors on the CPU.
        """
        anchors = anchoring.anchors_of(rows, self.channels.vectors, self.group_tokens)
        grid = Grid.of(anchors, self.channels.vectors, self.group_tokens, self.means, self.steps)
        symbols = passes.quantise(rows, grid.to(rows.device), self.config.levels)
        return symbols, anchors

    def encode(self, rows: Tensor, span: Span) -> list[bytes]:
        """Encode rows [tokens, channels] to the bytes of every part."""
        (symbols, anchors), coder = self.symbols(rows), self.config.coder
        base, parts = [], []
        if anchors is not None:
            indices = (anchors.symbols + ZERO_INDEX).to(torch.uint8)
            base.append(anchors.scales.view(torch.int16).numpy().tobytes())
            base.append(section.encode(indices, self.assignments[0], coder=coder))
        base.append(section.encode(symbols.base, self.assignments[1], wide=symbols.wide, coder=coder))
        ordinary = span.ordinary(self.config, self.group_tokens)
        for digits, contexts, assignment in zip(symbols.digits, symbols.contexts, self.assignments[2], strict=True):
            ends = without(digits, ordinary), without(contexts, ordinary)
            base.append(section.encode(ends[0], assignment, ends[1], coder=coder))
            parts.append(section.encode(digits[ordinary], assignment, contexts[ordinary], coder=coder))
        return [b"".join(base), *parts]

    def encode_own(self, span: Span) -> list[bytes]:
        """Encode a chunk of `source` to the bytes of every part: the same as `encode` of its rows, without a copy."""
        if self.source is None:
            raise ValueError("this codec was not fitted to a source")
        return encode_from(self.source, self, span)

    def launch_alone(self, parts: Sequence[bytes | memoryview], span: Span, target: Target, row: int) -> Check:
        """Start decoding a chunk that no batch takes, section by section, or decode it stage by stage on the CPU.

        Raises:
            TruncatedError, CorruptError: The bytes are damaged; the result raises these too.
        """
        read = self.read(parts, span)
        direct = not len(read.base.wide.positions) or self.scales_alone(target)
        if direct and self.config.coder == "rans" and native.available(target.device):
            return self._write(read, span, target, row)
        target.put(self._rows(read, span, target.dtype), row)
        return all_of([])

    def read(self, parts: Sequence[bytes | memoryview], span: Span) -> Read:
        """Read the sections of a chunk. Raises TruncatedError or CorruptError for damaged bytes."""
        config = self.config
        cursor, scales, peaks = Cursor(parts[0]), None, None
        n_anchors = anchoring.anchor_count(span.tokens, self.group_tokens)
        if n_anchors:
            scales = cursor.tensor(n_anchors * self.n_vectors, torch.bfloat16).reshape(n_anchors, self.n_vectors)
            peaks = section.read_narrow(cursor, n_anchors, self.assignments[0])
        ordinary, coded = span.ordinary(config, self.group_tokens), span.tokens - n_anchors
        base = section.read(cursor, coded, self.assignments[1])
        count = ordinary.stop - ordinary.start
        finest = [section.read_narrow(cursor, coded - count, assignment) for assignment in self.assignments[2]]
        cursor.finish()
        rest = []
        for part, assignment in zip(parts[1:], self.assignments[2], strict=False):
            cursor = Cursor(part)
            rest.append(section.read_narrow(cursor, count, assignment))
            cursor.finish()
        return Read(scales, peaks, base, finest, rest)

    def scale(self, level: int, device: torch.device) -> Grid:
        """Return the grid of a level without its anchors, on a device."""
        return self._grid(
            level, device, lambda: (self.means, self.steps * quantize.step_factor(level, self.config.levels))
        )

    def scales_alone(self, target: Target) -> bool:
        """Return whether each value of the target is symbol x step, so that the symbol follows from it."""
        rows, plain = target.kept[0], not self.group_tokens and not bool(self.side.means.any())
        return plain and rows.dim() == 2 and rows.dtype == torch.float32

    def _write(self, read: Read, span: Span, target: Target, row: int) -> Check:
        """Decode a chunk directly into the target. Return what waits for it."""
        device, coded, ordinary = target.device, read.base.tokens, span.ordinary(self.config, self.group_tokens)
        sections = Sections(target, row, span.tokens, coded, len(self.channels))
        grid, finest = self.scale(1 + len(read.rest), device), self.scale(self.config.levels, device)
        if read.peaks is not None and read.scales is not None:
            anchors = Anchors(into.symbols(read.peaks, device, sections), transfer.send(read.scales, device))
            values = anchors.values(self.vectors(device))
            grid, finest = (g._replace(anchors=values, group_tokens=self.group_tokens) for g in (grid, finest))
            sections.anchors(grid)
        wide = read.base.wide
        read = read._replace(base=read.base.within_bytes()) if len(wide.positions) else read
        middle = Rows(ordinary.start, coded)
        ends = Rows(0, ordinary.start, ordinary.stop - ordinary.start)
        refined = read.rest or any(section.tokens for section in read.finest)
        if not read.rest:
            sections.values(read.base, Rows(0, coded), [], grid)  # the protected tokens are overwritten below
        if refined:
            base = sections.index(read.base, Rows(0, coded), [])
            sections.refine(read.rest, middle, base, grid)
            sections.refine(read.finest, ends, base, finest)
        self.correct([(wide, ordinary, row)], 1 + len(read.rest), target.kept[0])
        return sections.launched()

    def correct(self, chunks: Iterable[tuple[Wide, slice, int]], level: int, rows: Tensor) -> None:
        """Replace the values of wide symbols in rows of a target for which `scales_alone` holds.

        Args:
            chunks: Of each chunk the wide symbols, the tokens that are not protected, and the row of its first token.
            level: Of the tokens that are not protected.
            rows: float32 [tokens, channels], decoded with the nearest symbols that a byte holds.
        """
        columns, parts = rows.shape[1], (list[Wide](), list[Wide]())
        for wide, ordinary, row in chunks:
            if len(wide.positions):
                found = split(wide, ordinary.start * columns, ordinary.stop * columns)
                for part, own in zip(parts, found, strict=True):
                    part.append(Wide(own.positions + row * columns, own.indices))
        for part, at in zip(parts, (level, self.config.levels), strict=True):
            if any(len(wide.positions) for wide in part):
                positions, indices = (torch.cat(x) for x in zip(*part, strict=True))
                correct(rows, Wide(positions, indices), self.scale(at, rows.device).steps, at - 1)

    def _rows(self, read: Read, span: Span, dtype: torch.dtype) -> Tensor:
        """Decode stage by stage on the CPU. Takes any chunk and any coder."""
        coder, ordinary = self.config.coder, span.ordinary(self.config, self.group_tokens)
        anchors = None
        if read.peaks is not None and read.scales is not None:
            anchors = Anchors(read.peaks.decode(coder=coder).int() - ZERO_INDEX, read.scales)
        base = read.base.decode(coder=coder)
        finest = self._digits(read.finest, without(base, ordinary))
        rest = self._digits(read.rest, base[ordinary])
        return self._restored(base, read.base.wide, finest, rest, anchors, span, dtype)

    def approximations(self, rows: Tensor, span: Span) -> list[Tensor]:
        """Return the result of `decode` at level 1, 2, ..., each float32 [tokens, channels], without coding anything.
        """
        symbols, anchors = self.symbols(rows)
        ordinary, found = span.ordinary(self.config, self.group_tokens), []
        finest, rest = [without(d, ordinary) for d in symbols.digits], [d[ordinary] for d in symbols.digits]
        for level in range(1, self.config.levels + 1):
            found.append(
                self._restored(symbols.base, symbols.wide, finest, rest[: level - 1], anchors, span, torch.float32)
            )
        return found

    def _digits(self, sections: Sequence[Coded], base: Tensor) -> list[Tensor]:
        """Decode the digits that refine `base`: one uint8 [tokens, channels] per section."""
        found: list[Tensor] = []
        contexts = None
        for coded in sections:
            coarser = (base, ZERO_INDEX) if contexts is None else (found[-1], DIGIT_ZERO)
            contexts = passes.contexts_of(*coarser, contexts)
            found.append(coded.decode(contexts, coder=self.config.coder))
        return found

    def _restored(
        self,
        base: Tensor,
        wide: Wide,
        finest: Sequence[Tensor],
        rest: Sequence[Tensor],
        anchors: Anchors | None,
        span: Span,
        dtype: torch.dtype,
    ) -> Tensor:
        """Convert base symbols of all coded tokens, all digits of the protected ones and some of the rest to rows."""
        rows = torch.empty(span.tokens, len(self.channels), dtype=dtype)
        a, b = (ordinary := span.ordinary(self.config, self.group_tokens)).start, ordinary.stop
        grid = Grid.of(anchors, self.channels.vectors, self.group_tokens, self.means, self.steps)
        if grid.anchors is not None:
            rows[:: grid.group_tokens] = grid.anchors.to(dtype)
        passes.restore(rows, grid, 0, base[:a], [digits[:a] for digits in finest], wide)
        passes.restore(rows, grid, b, base[b:], [digits[a:] for digits in finest], wide)
        coarse = grid._replace(steps=self.steps * quantize.step_factor(len(rest) + 1, self.config.levels))
        passes.restore(rows, coarse, a, base[ordinary], rest, wide)
        return rows


def encode_from(
    source: Source, codec: LossyCodec, span: Span, scale: tuple[Tensor, Tensor] | None = None
) -> list[bytes]:
    """Encode a chunk of a source to the bytes of every part; scale: (means, steps) other than the codec's."""
    scale = scale or (codec.means, codec.steps)
    base, anchors, *digits = source.encode(span, codec.config, scale, codec.assignments)
    scales, sections = b"", [base, *digits[1::2]]
    if source.group_tokens:
        first = source.anchors[span.first]
        own = source.scales[first : first + anchoring.anchor_count(span.tokens, source.group_tokens)]
        scales, sections = own.view(torch.int16).numpy().tobytes(), [anchors, *sections]
    return [source.join(sections, scales), *(source.join([section]) for section in digits[::2])]


def without(rows: Tensor, ordinary: slice) -> Tensor:
    """Return the rows outside the range `ordinary`."""
    return torch.cat([rows[: ordinary.start], rows[ordinary.stop :]])
