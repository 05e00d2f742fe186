"""Where the stages meet: rows of a chunk -> transform -> nested symbols -> streams, and back.

A chunk is a matrix of rows [tokens, columns]; its columns are every channel of every layer's K and V. It becomes one
*part* per level: part 0 is the base, parts 1.. are refinements. What all chunks of an artifact share (steps, means,
table entries: at most 6 bytes a column) is the side information, `Side`.

Order within the parts, for the tokens that are not anchors:

    base          [delta only: anchor scales bf16 [anchors, vectors], anchor symbols], base symbols of all tokens,
                  then digits of every refinement, protected tokens only
    refinement k  digits of refinement k, tokens that are not protected only

so every level has the protected tokens at the finest step (the first and last of a context, which attention leans on).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hf_cachegen import native
from hf_cachegen.codec import batch, into, passes, quantize, section, transform
from hf_cachegen.codec.into import Rows, Sections, Target
from hf_cachegen.codec.passes import Grid, Symbols, Wide
from hf_cachegen.codec.section import Assignment, Coded, Cursor
from hf_cachegen.codec.tables import DIGIT_ZERO, ZERO_INDEX, shipped_codebooks
from hf_cachegen.codec.transform import Anchors
from hf_cachegen.config import CacheGenConfig
from hf_cachegen.errors import CorruptError


@dataclass(frozen=True)
class Span:
    """A chunk's place in its context: tokens [first, first + tokens) of `total`."""

    first: int
    tokens: int
    total: int

    def ordinary(self, config: CacheGenConfig) -> slice:
        """Which of the coded tokens are not protected; the others every level has at the finest step."""

        def coded_before(position: int) -> int:
            tokens = min(max(position - self.first, 0), self.tokens)
            return tokens - transform.anchor_count(tokens, config)

        first = coded_before(config.protect_first)
        return slice(first, max(first, coded_before(self.total - config.protect_last)))


@dataclass(frozen=True)
class Columns:
    """What the columns are. vectors int64 [columns] numbers the (layer, K or V) that each belongs to, 2 x layer + (0 or
    1), rising; thirds int64 [columns] says in which third of the layers that is.
    """

    vectors: Tensor
    thirds: Tensor

    def __len__(self) -> int:
        return len(self.vectors)


@dataclass(frozen=True)
class Side:
    """The side information of one artifact; every tensor is [columns] (refine_entries [levels - 1, columns]).

    step_codes uint8 give the finest steps (`quantize.steps_of`); means int16, in 1/16 of the coarsest step (zero
    for delta); table entries uint8 of the shipped codebooks (anchor_entries zero for identity).
    """

    step_codes: Tensor
    means: Tensor
    anchor_entries: Tensor
    base_entries: Tensor
    refine_entries: Tensor

    def to_bytes(self, config: CacheGenConfig) -> bytes:
        own = self.anchor_entries if config.transform == "delta" else self.means
        parts = (self.step_codes, own, self.base_entries, self.refine_entries)
        return b"".join(part.contiguous().numpy().tobytes() for part in parts)

    @classmethod
    def from_bytes(cls, data: bytes | memoryview, columns: int, config: CacheGenConfig) -> Side:
        """Raises TruncatedError or CorruptError for bytes that no encoder writes."""
        cursor, delta = Cursor(data), config.transform == "delta"
        steps = cursor.tensor(columns, torch.uint8)
        means = torch.zeros(columns, dtype=torch.int16) if delta else cursor.tensor(columns, torch.int16)
        anchors = cursor.tensor(columns, torch.uint8) if delta else torch.zeros(columns, dtype=torch.uint8)
        base = cursor.tensor(columns, torch.uint8)
        refine = cursor.tensor(columns * (config.levels - 1), torch.uint8).reshape(config.levels - 1, columns)
        cursor.finish()
        values, digits = shipped_codebooks(config.prob_bits)
        for entries, book in ((anchors, values), (base, values), (refine, digits)):
            if bool((entries >= book.entries).any()):
                raise CorruptError("the side information names a table that the codebook does not have")
        return cls(steps, means, anchors, base, refine)


class _Read(NamedTuple):
    """The sections of a chunk's parts: anchors (delta only), base, digits of the protected tokens, of the others."""

    scales: Tensor | None
    peaks: Coded | None
    base: Coded
    finest: list[Coded]
    rest: list[Coded]


class Codec(Protocol):
    """What an artifact needs of a codec; `rows` are [tokens, columns]."""

    @property
    def parts(self) -> int: ...
    def side_bytes(self) -> bytes: ...
    def encode(self, rows: Tensor, span: Span) -> list[bytes]: ...
    def decode(self, parts: Sequence[bytes | memoryview], span: Span, dtype: torch.dtype) -> Tensor: ...
    def decode_into(self, parts: Sequence[bytes | memoryview], span: Span, target: Target, row: int) -> None: ...
    def approximations(self, rows: Tensor, span: Span) -> list[Tensor]: ...


class LossyCodec:
    """Encodes and decodes the chunks of one artifact, at levels 1 (the base alone) to `config.levels`."""

    def __init__(self, columns: Columns, config: CacheGenConfig, side: Side):
        self.columns, self.config, self.side = columns, config, side
        self.values, self.digits = shipped_codebooks(config.prob_bits)
        self.steps = quantize.steps_of(side.step_codes)
        unit = quantize.step_factor(1, config.levels) / quantize.MEANS_PER_STEP
        self.means = side.means.float() * (self.steps * unit)
        self._anchors = Assignment(self.values, side.anchor_entries)
        self._base = Assignment(self.values, side.base_entries)
        self._refinements = [Assignment(self.digits, entries) for entries in side.refine_entries]
        self._scales: dict[tuple[int, torch.device], Grid] = {}
        self._vectors: dict[torch.device, Tensor] = {}

    @property
    def parts(self) -> int:
        return self.config.levels

    @property
    def assignments(self) -> tuple[Assignment, Assignment, list[Assignment]]:
        """Tables of the anchors, of the base and of each refinement."""
        return self._anchors, self._base, self._refinements

    @cached_property
    def n_vectors(self) -> int:
        return int(self.columns.vectors[-1]) + 1 if len(self.columns) else 0

    def vectors(self, device: torch.device) -> Tensor:
        """`columns.vectors` on a device, copied there once."""
        if device not in self._vectors:
            self._vectors[device] = self.columns.vectors.to(device)
        return self._vectors[device]

    def unit(self, device: torch.device) -> Grid:
        """The grid on which values are the symbols themselves."""
        if (0, device) not in self._scales:
            ones = torch.ones(len(self.columns), device=device)
            self._scales[0, device] = Grid(None, 0, torch.zeros_like(ones), ones)
        return self._scales[0, device]

    def side_bytes(self) -> bytes:
        return self.side.to_bytes(self.config)

    def symbols(self, rows: Tensor) -> tuple[Symbols, Anchors | None]:
        """rows [tokens, columns], float, to symbols and anchors: on the CPU, or where there is a compiled coder for it
        on the rows' device.
        """
        anchors = transform.anchors_of(rows, self.columns.vectors, self.config)
        grid = Grid.of(anchors, self.columns.vectors, self.config, self.means, self.steps)
        symbols = passes.quantise(rows, grid.to(rows.device), self.config.levels)
        return symbols, anchors

    def encode(self, rows: Tensor, span: Span) -> list[bytes]:
        """rows [tokens, columns] to the bytes of every part."""
        (symbols, anchors), coder = self.symbols(rows), self.config.coder
        base, parts = [], []
        if anchors is not None:
            indices = (anchors.symbols + ZERO_INDEX).to(torch.uint8)
            base.append(anchors.scales.view(torch.int16).numpy().tobytes())
            base.append(section.encode(indices, self._anchors, coder=coder))
        base.append(section.encode(symbols.base, self._base, wide=symbols.wide, coder=coder))
        ordinary = span.ordinary(self.config)
        for digits, contexts, columns in zip(symbols.digits, symbols.contexts, self._refinements, strict=True):
            ends = without(digits, ordinary), without(contexts, ordinary)
            base.append(section.encode(ends[0], columns, ends[1], coder=coder))
            parts.append(section.encode(digits[ordinary], columns, contexts[ordinary], coder=coder))
        return [b"".join(base), *parts]

    def decode(self, parts: Sequence[bytes | memoryview], span: Span, dtype: torch.dtype = torch.float32) -> Tensor:
        """The bytes of parts 0..level-1 to rows [tokens, columns], at level len(parts).

        Raises TruncatedError or CorruptError on damaged bytes.
        """
        rows = torch.empty(span.tokens, len(self.columns), dtype=dtype)
        self.decode_into(parts, span, Target.matrix(rows))
        return rows

    def decode_into(self, parts: Sequence[bytes | memoryview], span: Span, target: Target, row: int = 0) -> None:
        """As `decode`, to rows [row, row + tokens) of the target. After an error these rows mean nothing."""
        level = len(parts)
        if batch.serves(self, level, target):
            batches = batch.Batches(self, level, target)
            if batches.add(parts, span, row):
                batches.finish()
                return
        read = self._read(parts, span)
        narrow = len(read.base.wide.positions) == 0
        if narrow and self.config.coder == "rans" and native.available(target.device):
            self._place(read, span, target, row)
        else:
            target.put(self._rows(read, span, target.dtype), row)

    def decode_many(self, chunks: Iterable[tuple[Sequence[bytes | memoryview], Span, int]], target: Target) -> None:
        """As `decode_into` for each (parts, span, row), all of one level, side by side where the device can."""
        batches = None
        for parts, span, row in chunks:
            if batches is None and batch.serves(self, len(parts), target):
                batches = batch.Batches(self, len(parts), target)
            if batches is None or not batches.add(parts, span, row):
                self.decode_into(parts, span, target, row)
        if batches is not None:
            batches.finish()

    def _read(self, parts: Sequence[bytes | memoryview], span: Span) -> _Read:
        config = self.config
        cursor, scales, peaks = Cursor(parts[0]), None, None
        n_anchors = transform.anchor_count(span.tokens, config)
        if n_anchors:
            scales = cursor.tensor(n_anchors * self.n_vectors, torch.bfloat16).reshape(n_anchors, self.n_vectors)
            peaks = section.read_narrow(cursor, n_anchors, self._anchors)
        ordinary, coded = span.ordinary(config), span.tokens - n_anchors
        base = section.read(cursor, coded, self._base)
        count = ordinary.stop - ordinary.start
        finest = [section.read_narrow(cursor, coded - count, columns) for columns in self._refinements]
        cursor.finish()
        rest = []
        for part, columns in zip(parts[1:], self._refinements, strict=False):
            cursor = Cursor(part)
            rest.append(section.read_narrow(cursor, count, columns))
            cursor.finish()
        return _Read(scales, peaks, base, finest, rest)

    def scale(self, level: int, device: torch.device) -> Grid:
        """The grid of a level without its anchors, on a device."""
        if (level, device) not in self._scales:
            steps = self.steps * quantize.step_factor(level, self.config.levels)
            self._scales[level, device] = Grid(None, 0, self.means, steps).to(device)
        return self._scales[level, device]

    def _place(self, read: _Read, span: Span, target: Target, row: int) -> None:
        """Straight into place: a chunk without wide symbols."""
        device, coded, ordinary = target.device, read.base.tokens, span.ordinary(self.config)
        sections = Sections(target, row, span.tokens, coded, len(self.columns))
        grid, finest = self.scale(1 + len(read.rest), device), self.scale(self.config.levels, device)
        if read.peaks is not None and read.scales is not None:
            anchors = Anchors(into.symbols(read.peaks, device), read.scales.to(device))
            values = anchors.values(self.vectors(device))
            grid, finest = (g._replace(anchors=values, group_tokens=self.config.group_tokens) for g in (grid, finest))
            sections.anchors(grid)
        middle = Rows(ordinary.start, coded)
        ends = Rows(0, ordinary.start, ordinary.stop - ordinary.start)
        refined = read.rest or any(section.tokens for section in read.finest)
        if not read.rest:
            sections.values(read.base, Rows(0, coded), [], grid)  # the protected among them are written over below
        if refined:
            base = sections.index(read.base, Rows(0, coded), [])
            sections.refine(read.rest, middle, base, grid)
            sections.refine(read.finest, ends, base, finest)
        sections.finish()

    def _rows(self, read: _Read, span: Span, dtype: torch.dtype) -> Tensor:
        """Stage by stage, on the CPU: any chunk, any coder."""
        coder, ordinary = self.config.coder, span.ordinary(self.config)
        anchors = None
        if read.peaks is not None and read.scales is not None:
            anchors = Anchors(read.peaks.decode(coder=coder).int() - ZERO_INDEX, read.scales)
        base = read.base.decode(coder=coder)
        finest = self._digits(read.finest, without(base, ordinary))
        rest = self._digits(read.rest, base[ordinary])
        return self._restored(base, read.base.wide, finest, rest, anchors, span, dtype)

    def approximations(self, rows: Tensor, span: Span) -> list[Tensor]:
        """What `decode` would give at level 1, 2, ..., without coding anything: each float32 [tokens, columns]."""
        symbols, anchors = self.symbols(rows)
        ordinary, found = span.ordinary(self.config), []
        finest, rest = [without(d, ordinary) for d in symbols.digits], [d[ordinary] for d in symbols.digits]
        for level in range(1, self.config.levels + 1):
            found.append(
                self._restored(symbols.base, symbols.wide, finest, rest[: level - 1], anchors, span, torch.float32)
            )
        return found

    def _digits(self, sections: Sequence[Coded], base: Tensor) -> list[Tensor]:
        """The digits that refine `base`, uint8 [tokens, columns], one matrix from each section."""
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
        """Base symbols of all coded tokens, all digits of the protected ones, some of the rest, to rows."""
        rows = torch.empty(span.tokens, len(self.columns), dtype=dtype)
        a, b = (ordinary := span.ordinary(self.config)).start, ordinary.stop
        grid = Grid.of(anchors, self.columns.vectors, self.config, self.means, self.steps)
        if grid.anchors is not None:
            rows[:: grid.group_tokens] = grid.anchors.to(dtype)
        passes.restore(rows, grid, 0, base[:a], [digits[:a] for digits in finest], wide)
        passes.restore(rows, grid, b, base[b:], [digits[a:] for digits in finest], wide)
        coarse = grid._replace(steps=self.steps * quantize.step_factor(len(rest) + 1, self.config.levels))
        passes.restore(rows, coarse, a, base[ordinary], rest, wide)
        return rows


def without(rows: Tensor, ordinary: slice) -> Tensor:
    """The rows before and after those."""
    return torch.cat([rows[: ordinary.start], rows[ordinary.stop :]])
