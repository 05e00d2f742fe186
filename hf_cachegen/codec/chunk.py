"""Where the stages meet: rows of a chunk -> transform -> nested symbols -> streams, and back.

A chunk is a matrix of rows, float32 [tokens, columns]; its columns are every channel of every layer's K and V. It becomes one
*part* per level: part 0 is the base, parts 1.. are refinements. What all chunks of an artifact share (steps, means, table entries:
at most 6 bytes a column) is the side information, `Side`.

Order within the parts, for the tokens that are not anchors:

    base          [delta only: anchor scales bf16 [anchors, vectors], anchor symbols], base symbols of all tokens,
                  then digits of every refinement, protected tokens only
    refinement k  digits of refinement k, tokens that are not protected only

so every level has the protected tokens at the finest step (the first and last of a context, which attention leans on).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hf_cachegen.codec import quantize, section, transform
from hf_cachegen.codec.section import Cursor
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

    def protected(self, config: CacheGenConfig) -> Tensor:
        """bool [coded tokens]: which of them every level has at the finest step."""
        position = self.first + transform.coded_positions(self.tokens, config)
        return (position < config.protect_first) | (position >= self.total - config.protect_last)


@dataclass(frozen=True)
class Columns:
    """What the columns are. vectors int64 [columns] numbers the (layer, K or V) that each belongs to: 2 x layer + (0 or 1);
    thirds int64 [columns] says in which third of the layers that is."""

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


@dataclass(frozen=True)
class Symbols:
    """A chunk's symbols, int32: base and digits [coded tokens, columns], anchors of their own shape."""

    base: Tensor
    digits: list[Tensor]
    anchors: Anchors | None


class Codec(Protocol):
    """What an artifact needs of a codec; `rows` are [tokens, columns]."""

    @property
    def parts(self) -> int: ...
    def side_bytes(self) -> bytes: ...
    def encode(self, rows: Tensor, span: Span) -> list[bytes]: ...
    def decode(self, parts: Sequence[bytes | memoryview], span: Span) -> Tensor: ...
    def approximations(self, rows: Tensor, span: Span) -> list[Tensor]: ...


class LossyCodec:
    """Encodes and decodes the chunks of one artifact, at levels 1 (the base alone) to `config.levels`."""

    def __init__(self, columns: Columns, config: CacheGenConfig, side: Side):
        self.columns, self.config, self.side = columns, config, side
        self.values, self.digits = shipped_codebooks(config.prob_bits)
        self.steps = quantize.steps_of(side.step_codes)
        self.means = side.means.float() * (self.steps * (quantize.step_factor(1, config.levels) / quantize.MEANS_PER_STEP))

    @property
    def parts(self) -> int:
        return self.config.levels

    def side_bytes(self) -> bytes:
        return self.side.to_bytes(self.config)

    def symbols(self, rows: Tensor) -> Symbols:
        """rows [tokens, columns], float, on any device, to symbols on the CPU."""
        y, anchors = transform.forward(rows.float(), self.columns.vectors.to(rows.device), self.config)
        fine = quantize.fine_symbols(y - self.means.to(y.device), self.steps.to(y.device)).cpu()
        base, digits = quantize.split(fine, self.config.levels)
        return Symbols(base, digits, anchors and Anchors(anchors.symbols.cpu(), anchors.scales.cpu()))

    def encode(self, rows: Tensor, span: Span) -> list[bytes]:
        """rows [tokens, columns] to the bytes of every part."""
        symbols, coder = self.symbols(rows), self.config.coder
        protected = span.protected(self.config)
        base = []
        if symbols.anchors is not None:
            base.append(symbols.anchors.scales.view(torch.int16).numpy().tobytes())
            anchors = symbols.anchors.symbols + ZERO_INDEX
            base.append(section.encode(anchors, self.values, self.side.anchor_entries, coder=coder))
        base.append(section.encode(symbols.base + ZERO_INDEX, self.values, self.side.base_entries, coder=coder))
        parts, coarser = [], symbols.base
        for digits, entries in zip(symbols.digits, self.side.refine_entries, strict=True):
            contexts = quantize.contexts(coarser)
            for kept, into in ((protected, base), (~protected, parts)):
                into.append(section.encode(digits[kept] + DIGIT_ZERO, self.digits, entries, contexts[kept], coder=coder))
            coarser = quantize.refine(coarser, digits)
        return [b"".join(base), *parts]

    def decode(self, parts: Sequence[bytes | memoryview], span: Span) -> Tensor:
        """The bytes of parts 0..level-1 to rows float32 [tokens, columns], at level len(parts).

        Raises TruncatedError or CorruptError on damaged bytes.
        """
        config, coder = self.config, self.config.coder
        cursor, anchors = Cursor(parts[0]), None
        if n_anchors := transform.anchor_count(span.tokens, config):
            n_vectors = int(self.columns.vectors[-1]) + 1
            scales = cursor.tensor(n_anchors * n_vectors, torch.bfloat16).reshape(n_anchors, n_vectors)
            peaks = section.decode(cursor, n_anchors, self.values, self.side.anchor_entries, coder=coder)
            anchors = Anchors(peaks - ZERO_INDEX, scales)
        protected = span.protected(config)
        symbols = section.decode(cursor, len(protected), self.values, self.side.base_entries, coder=coder) - ZERO_INDEX
        finest = self._refined(cursor, symbols[protected], self.side.refine_entries)
        cursor.finish()
        rest = symbols[~protected]
        for part, entries in zip(parts[1:], self.side.refine_entries, strict=False):
            cursor = Cursor(part)
            rest = self._refined(cursor, rest, entries[None])
            cursor.finish()
        return self._rows(finest, rest, anchors, span, len(parts))

    def approximations(self, rows: Tensor, span: Span) -> list[Tensor]:
        """What `decode` would give at level 1, 2, ..., without coding anything: each float32 [tokens, columns]."""
        symbols, protected, found = self.symbols(rows), span.protected(self.config), []
        at_level = [symbols.base]
        for digits in symbols.digits:
            at_level.append(quantize.refine(at_level[-1], digits))
        for level, known in enumerate(at_level, 1):
            found.append(self._rows(at_level[-1][protected], known[~protected], symbols.anchors, span, level))
        return found

    def _rows(self, finest: Tensor, rest: Tensor, anchors: Anchors | None, span: Span, level: int) -> Tensor:
        """Symbols (of protected tokens at the finest level, of the rest at `level`) to rows float32."""
        protected = span.protected(self.config)
        y = torch.empty(len(protected), len(self.columns))
        y[protected] = finest * self.steps
        y[~protected] = rest * (self.steps * quantize.step_factor(level, self.config.levels))
        return transform.inverse(y.add_(self.means), anchors, self.columns.vectors, span.tokens, self.config)

    def _refined(self, cursor: Cursor, symbols: Tensor, entries: Tensor) -> Tensor:
        """symbols, finer by one level for each row of `entries`, whose digits follow in `cursor`."""
        for row in entries:
            contexts = quantize.contexts(symbols)
            digits = section.decode(cursor, len(symbols), self.digits, row, contexts, coder=self.config.coder)
            symbols = quantize.refine(symbols, digits - DIGIT_ZERO)
        return symbols
