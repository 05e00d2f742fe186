"""lossless: bit-exact coding of bf16, fp16 and fp32 values by byte planes.

A value's bits are rotated left by one, so that the exponent comes first and the sign last. They are then cut into
bytes: plane 0 is the most significant. Exponents of a channel are similar and compress; the lowest planes hardly do.
Every (plane, channel) pair is coded as a channel. The tables are learnt from the context by clustering the histograms
of these. They are the side information (`hf_cachegen.codec.learnt`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from hf_cachegen.codec import into, learnt, native, passes, section, transfer
from hf_cachegen.codec.chunk import Placed, Span
from hf_cachegen.codec.geometry import DTYPE_BYTES, Geometry
from hf_cachegen.codec.into import Sections, Target
from hf_cachegen.codec.profile import Profile
from hf_cachegen.codec.rans import TILE_COLUMNS
from hf_cachegen.codec.rows import ContextRows
from hf_cachegen.codec.section import Cursor
from hf_cachegen.codec.source import Source
from hf_cachegen.codec.tables import VALUE_SYMBOLS, Codebook
from hf_cachegen.codec.transfer import Check, Checks, all_of
from hf_cachegen.codec.transforms.protocol import Fitted, Transform
from hf_cachegen.config import CacheGenConfig

TABLES_PER_PLANE = 16
MAX_LEARNT = 4096
"""Of more channels, only some are learnt from."""
SAMPLED, TABLES_PER_LOW_PLANE = 1024, 2
"""Then that number of them; and tables of the planes after the first, whose bytes hardly differ between channels."""
CHOSEN_FROM, RUN = 256, 16
"""Of more tokens, each channel's table is then chosen by about that number, in runs: 0.03 to 0.05 % more bytes."""
OUTSTANDING = 8
"""Number of chunks whose errors are not read yet, so that the host does not wait for the chunk on the device."""
_INTEGERS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def to_planes(rows: Tensor) -> Tensor:
    """Convert rows [tokens, channels] to bytes, uint8 [tokens, planes x channels]."""
    bits = rows.contiguous().view(_INTEGERS[rows.dtype])
    rotated = bits << 1 | (bits < 0)
    planes = rotated.view(torch.uint8).reshape(*rows.shape, rows.dtype.itemsize).flip(2)  # the most significant first
    return planes.transpose(1, 2).reshape(len(rows), -1)


def from_planes(planes: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert uint8 [tokens, planes x channels] to rows [tokens, channels] of `dtype`. Inverse of `to_planes`."""
    channels = planes.shape[1] // dtype.itemsize
    rotated = planes.reshape(len(planes), dtype.itemsize, channels).flip(1).transpose(1, 2).contiguous()
    rotated = rotated.view(_INTEGERS[dtype]).squeeze(2)
    sign = torch.iinfo(rotated.dtype).min
    return (rotated >> 1 & ~sign | (rotated & 1) * sign).view(dtype)


def sample_of(channels: int) -> Tensor | None:
    """Return the channels to learn from, int64, ascending: whole tiles, evenly spread. None: all of them."""
    if channels <= MAX_LEARNT or channels % TILE_COLUMNS:
        return None
    tiles = torch.linspace(0, channels // TILE_COLUMNS - 1, SAMPLED // TILE_COLUMNS, dtype=torch.float64).long()
    return (tiles[:, None] * TILE_COLUMNS + torch.arange(TILE_COLUMNS)).flatten()


def runs_of(spans: Sequence[Span]) -> list[Span]:
    """Return the token ranges to choose tables by, evenly spread over these chunks. All of them, if they are few."""
    every = -(-sum(span.tokens for span in spans) // CHOSEN_FROM)
    if every <= 1:
        return list(spans)
    found = []
    for span in spans:
        last = span.first + span.tokens
        starts = range(span.first, last, RUN * every)
        found += [Span(first, min(RUN, last - first), span.total) for first in starts]
    return found


def _book(counts: Tensor, planes: int, sampled: bool, config: CacheGenConfig) -> Codebook:
    """Learn the tables from the counts of the planes, int32 [planes x channels, 256]; `sampled`: of some channels."""
    groups = counts.chunk(planes)
    if not sampled:
        return learnt.learn_book(groups, TABLES_PER_PLANE, config.prob_bits)
    most = [TABLES_PER_PLANE, *[TABLES_PER_LOW_PLANE] * (planes - 1)]
    return learnt.sampled_book(groups, most, config.prob_bits)


def _counts(context: ContextRows, spans: Sequence[Span]) -> Tensor:
    """Return `Source.count_planes`, from rows."""
    itemsize = getattr(torch, context.geometry.dtype).itemsize
    counts = torch.zeros(len(context.channels) * itemsize, VALUE_SYMBOLS, dtype=torch.int32)
    for span in spans:
        passes.count(counts, to_planes(context.chunk(span).cpu()))
    return counts


def _readable(context: ContextRows) -> Source | None:
    """Return the source of the context, if the compiled passes over planes can read it."""
    return context.source if context.source is not None and context.source.has_whole_tiles else None


class Lossless(Transform):
    """Code the bytes of the values, in one level. `CacheGenConfig.lossless` selects it, not its name.

    Args:
        dtype: Of the cache.
        config: Its `coder` is used.
        book: The learnt tables.
        entries: uint8 [planes x channels]: the table of each.
    """

    name = "lossless"

    def __init__(self, dtype: torch.dtype, config: CacheGenConfig, book: Codebook, entries: Tensor):
        self.dtype, self.config, self.book, self.entries = dtype, config, book, entries
        self.channels = len(entries) // dtype.itemsize
        self.assignment = section.Assignment(book, entries)

    @classmethod
    def fit(cls, context: ContextRows, config: CacheGenConfig, profile: Profile | None) -> Fitted:
        dtype = getattr(torch, context.geometry.dtype)
        source, spans, planes = _readable(context), context.spans, dtype.itemsize
        sample = sample_of(len(context.channels))
        runs = spans if sample is None else runs_of(spans)
        if source is not None and sample is not None:
            own = source.only(sample).count_planes(spans)
            book = _book(own, planes, True, config)
            entries, bits = source.choose_planes(runs, book)
        else:
            counts = _counts(context, spans) if source is None else source.count_planes(spans)
            own = counts if sample is None else counts.reshape(planes, -1, VALUE_SYMBOLS)[:, sample].flatten(0, 1)
            book = _book(own, planes, sample is not None, config)
            entries, bits = book.choose(counts if sample is None else _counts(context, runs))
        bits *= sum(span.tokens for span in spans) / max(1, sum(span.tokens for span in runs))
        return Fitted(cls(dtype, config, book, entries), bits.reshape(dtype.itemsize, -1).sum(0, keepdim=True))

    @classmethod
    def from_side(cls, side: bytes, geometry: Geometry, config: CacheGenConfig, profile: Profile | None) -> Lossless:
        cursor, dtype = Cursor(side), getattr(torch, geometry.dtype)
        book, entries = learnt.read(cursor, geometry.channels * dtype.itemsize, config.prob_bits)
        cursor.finish()
        return cls(dtype, config, book, entries)

    @classmethod
    def side_lengths(cls, geometry: Geometry, config: CacheGenConfig) -> range:
        rest, table = 1 + geometry.channels * DTYPE_BYTES[geometry.dtype], 2 * VALUE_SYMBOLS
        return range(rest + table, rest + learnt.MAX_TABLES * table + 1, table)

    @classmethod
    def levels(cls, config: CacheGenConfig) -> int:
        return 1

    def side_bytes(self) -> bytes:
        return learnt.to_bytes(self.book, self.entries)

    def encode(self, rows: Tensor, span: Span) -> list[bytes]:
        return [section.encode(to_planes(rows.cpu()), self.assignment, coder=self.config.coder)]

    def encode_chunk(self, context: ContextRows, span: Span) -> list[bytes]:
        source = _readable(context)
        if source is None or self.config.coder != "rans" or len(self.assignment.dead) or not span.tokens:
            return super().encode_chunk(context, span)
        return [source.join([source.encode_planes(span, self.assignment)])]

    def decode_into(self, parts: Sequence[bytes | memoryview], span: Span, target: Target, row: int = 0) -> None:
        self._launch_one(parts, span, target, row)()

    def launch(self, chunks: Iterable[Placed], target: Target) -> Check:
        checks = Checks(OUTSTANDING)
        for parts, span, row in chunks:
            checks.add(self._launch_one(parts, span, target, row))
        return checks.finish

    def _launch_one(self, parts: Sequence[bytes | memoryview], span: Span, target: Target, row: int) -> Check:
        """Decode a chunk on the target's device. Return what waits for it."""
        cursor, device = Cursor(parts[0]), target.device
        coded = section.read_narrow(cursor, span.tokens, self.assignment)
        cursor.finish()
        whole = self.channels % TILE_COLUMNS == 0 and not len(self.assignment.dead)
        if whole and self.config.coder == "rans" and native.offers("cg_decode_planes", device):
            sections = Sections(target, row, span.tokens, span.tokens, self.channels)
            sections.planes(coded)
            return sections.launched()
        if self.config.coder == "rans" and native.available(device) and not transfer.is_host(device):
            planes, check = into.indices(coded, device)
            target.put(from_planes(planes, self.dtype), row)
            return check
        target.put(from_planes(coded.decode(coder=self.config.coder), self.dtype), row)
        return all_of([])

    def approximations(self, rows: Tensor, span: Span) -> list[Tensor]:
        return [rows]
