"""Encode from the layers' own tensors: compiled passes over values that stay where the model wrote them.

`passes.py` takes a chunk as one matrix, which is a copy. Here nothing is copied: a `Source` has the address of each
channel's values. The passes are

1. `spread`: sums of the values and of their squares;
2. `choose`: counts of the symbols, and the choice of the tables;
3. `encode`: quantisation and coding.

Every pass gives the numbers that `passes.py` gives for the rows of the chunks. `passes.py` is the readable twin. It
runs on other devices, and where there is no compiler.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from hf_cachegen.codec import abi, native
from hf_cachegen.codec.anchors import ANCHOR_PEAK, anchor_count, bf16_at_least
from hf_cachegen.codec.into import Target
from hf_cachegen.codec.passes import DTYPES
from hf_cachegen.codec.section import Assignment
from hf_cachegen.codec.tables import COST_SCALE, Codebook
from hf_cachegen.config import CacheGenConfig

SOURCES = {**DTYPES, torch.int16: 4}
"""The dtypes that the compiled passes read: CG_INT16 beside those of enum cg_dtype."""
_TILE = 256
_EXCEPTION = np.dtype([("position", "<u8"), ("index", "<i4"), ("stream", "<u4")])
"""struct cg_exception."""
_HEAD_BYTES = 128
"""Of a tile's stream: the states of its lanes."""
_FIRST_EXCEPTIONS = 1 << 16
"""Room for exceptions in a chunk's first attempt."""


class Chunk(Protocol):
    """A `chunk.Span`."""

    @property
    def first(self) -> int:
        """First token."""

    @property
    def tokens(self) -> int:
        """Number of tokens."""

    def ordinary(self, config: CacheGenConfig, group_tokens: int = 0) -> slice:
        """Return the range of the coded tokens that are not protected."""


class Section(NamedTuple):
    """A section's bytes: the head, and streams in the memory of its source.

    Attributes:
        head: Its counts, lengths and exceptions.
        offsets: int64 [tiles]: of each stream.
        sizes: int64 [tiles].
    """

    head: bytes
    offsets: np.ndarray
    sizes: np.ndarray


@dataclass
class _Memory(threading.local):
    """What chunk after chunk is coded into. Threads keep it, for the first use of new memory takes long."""

    streams: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint8))
    exceptions: np.ndarray = field(default_factory=lambda: np.empty(_FIRST_EXCEPTIONS, _EXCEPTION))


_MEMORY = _Memory()


@dataclass(frozen=True)
class Source:
    """Values [tokens, channels] that are read where they lie, on the CPU.

    Attributes:
        target: The addresses of the values.
        vectors: int32 [channels], ascending: the vector of each channel.
        n_vectors: Number of vectors.
        blank: Whether the first token is read as a copy of the second one.
        group_tokens: Tokens per group, of which the first is an anchor. 0: there are no anchors.
        scales: Of the anchors of some chunks, bfloat16 [anchors, vectors].
        anchors: By a chunk's first token: its first row of `scales`.
    """

    target: Target
    vectors: Tensor
    n_vectors: int
    blank: bool = False
    group_tokens: int = 0
    scales: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.bfloat16))
    anchors: dict[int, int] = field(default_factory=dict)
    _wide_scales: Tensor = field(default_factory=lambda: torch.empty(0, 0))

    @classmethod
    def of(cls, target: Target, vectors: Tensor) -> Source | None:
        """Return the source of these values; None where no compiled code can read them.

        Args:
            target: The addresses of the values.
            vectors: int64 [channels], ascending: the vector of each channel.
        """
        on_cpu = target.device.type == "cpu" and all(x.device.type == "cpu" for x in target.kept)
        if not on_cpu or target.dtype not in SOURCES or not len(vectors) or not native.offers("cg_code", target.device):
            return None
        return cls(target, vectors.to(torch.int32), int(vectors[-1]) + 1)

    def __len__(self) -> int:
        return len(self.vectors)

    def anchored(self, chunks: Sequence[Chunk], group_tokens: int) -> Source:
        """Return the source with anchors in these chunks, at the scales of `anchors.quantise_anchors`."""
        counts = [anchor_count(chunk.tokens, group_tokens) for chunk in chunks]
        firsts = np.cumsum([0, *counts[:-1]]).tolist() if counts else []
        rows = {chunk.first: first for chunk, first in zip(chunks, firsts, strict=True)}
        source = replace(self, group_tokens=group_tokens, anchors=rows)
        peaks = torch.empty(sum(counts), self.n_vectors)
        native.call("cg_peaks", source._view(), *source._plain(chunks), peaks)
        scales = bf16_at_least(peaks / peaks.new_full((), ANCHOR_PEAK)).clamp_min(torch.finfo(torch.bfloat16).tiny)
        return replace(source, scales=scales, _wide_scales=scales.float())

    def _view(self, means: Tensor | None = None, steps: Tensor | None = None) -> abi.Source:
        scale = (None if x is None else x.data_ptr() for x in (means, steps))
        scales = self._wide_scales.data_ptr() if len(self._wide_scales) else None
        vectors = self.vectors.data_ptr() if self.group_tokens else None
        places, dtype = self.target.places.data_ptr(), SOURCES[self.target.dtype]
        anchors = (self.group_tokens, vectors, scales, self.n_vectors)
        return abi.Source(places, len(self), *anchors, *scale, dtype, self.blank)

    def _spans(self, chunks: Sequence[Chunk], config: CacheGenConfig) -> ctypes.Array[abi.Span]:
        found = (abi.Span * len(chunks))()
        for span, chunk in zip(found, chunks, strict=True):
            part = chunk.ordinary(config, self.group_tokens)
            at = self.anchors.get(chunk.first, 0)
            span.first, span.tokens, span.anchor = chunk.first, chunk.tokens, at
            span.ordinary_first, span.ordinary_last = part.start, part.stop
        return found

    def spread(self, chunks: Sequence[Chunk], config: CacheGenConfig) -> tuple[Tensor, Tensor]:
        """Return `passes.moments` of the ordinary and of the protected tokens of these chunks: float64 [2, channels]
        each.
        """
        sums = torch.empty(2, 2, len(self), dtype=torch.float64)
        native.call("cg_spread", self._view(), self._spans(chunks, config), len(chunks), sums)
        return sums[0], sums[1]

    def squares(self, chunks: Sequence[Chunk]) -> Tensor:
        """Return the sum of the squared values of each channel in these chunks: float64 [channels]."""
        sums = torch.empty(2, 2, len(self), dtype=torch.float64)
        native.call("cg_spread", replace(self, group_tokens=0)._view(), *self._plain(chunks), sums)
        return sums[0, 1] + sums[1, 1]

    def choose(
        self, chunks: Sequence[Chunk], config: CacheGenConfig, scale: tuple[Tensor, Tensor],
        books: tuple[Codebook, Codebook], others: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor] | None:  # fmt: skip
        """Count the symbols of these chunks and choose the cheapest tables, as `fit.Counts.choose` does.

        Args:
            chunks: The chunks.
            config: Its levels and protected tokens are used.
            scale: (means, steps), each float32 [channels].
            books: The codebooks of the base, and of the refinements.
            others: Entries, uint8 [n, parts, channels], whose bits are wanted, too.

        Returns:
            The entries uint8 [parts, channels], their bits float64 [parts, channels], and the bits of the others. The
            parts are the base, the refinements, and the anchors if there are any. None if a value is not finite or too
            large.
        """
        parts = config.levels + (self.group_tokens > 0)
        others = torch.empty(0, parts, len(self), dtype=torch.uint8) if others is None else others.contiguous()
        other_costs = torch.empty(others.shape, dtype=torch.int64)
        entries = torch.empty(parts, len(self), dtype=torch.uint8)
        costs, refused = torch.empty(parts, len(self), dtype=torch.int64), ctypes.c_uint32()
        views = [abi.Costs(book.compiled_cost.data_ptr(), book.compiled_cost.shape[1], 1) for book in books]
        arguments = (
            config.levels - 1, *views, entries, costs, ctypes.byref(refused), others, len(others), other_costs
        )  # fmt: skip
        native.call("cg_choose", self._view(*scale), self._spans(chunks, config), len(chunks), *arguments)
        if refused.value:
            return None
        return entries, costs.double() / COST_SCALE, other_costs.double() / COST_SCALE

    def fine(
        self, chunk: Chunk, config: CacheGenConfig, scale: tuple[Tensor, Tensor], weights: Tensor, to: Tensor,
        base: Tensor | None = None,
    ) -> Tensor | None:  # fmt: skip
        """Write the fine symbols of a chunk of values without anchors.

        Args:
            chunk: The chunk.
            config: Its levels and protected tokens are used.
            scale: (means, steps), each float32 [channels].
            weights: float32 [tokens]: factors of the squared errors.
            to: Receives the symbols: int16 [tokens, channels], which follow one another in a row.
            base: Receives the values less the means as the coarsest level decodes them: float32 [tokens, channels],
                contiguous. It may be the values themselves.

        Returns:
            The sums of the squared errors at each level, float64 [levels, channels]. None if a symbol does not fit.
        """
        squares, refused = torch.zeros(config.levels, len(self), dtype=torch.float64), ctypes.c_uint32()
        arguments = (config.levels - 1, weights, to.data_ptr(), max(to.stride(0), len(self)), base, squares)
        view, spans = self._view(*scale), self._spans([chunk], config)
        native.call("cg_fine", view, spans, *arguments, ctypes.byref(refused))
        return None if refused.value else squares

    def encode(
        self, chunk: Chunk, config: CacheGenConfig, scale: tuple[Tensor, Tensor],
        parts: tuple[Assignment, Assignment, Sequence[Assignment]],
    ) -> list[Section]:  # fmt: skip
        """Quantise and encode a chunk.

        Args:
            chunk: The chunk; one of those of `anchored`, if there are anchors.
            config: Its levels and protected tokens are used.
            scale: (means, steps), each float32 [channels].
            parts: The tables of the anchors, of the base, and of each refinement.

        Returns:
            The sections, for `join`: of the base, of the anchors (empty without any), then for each refinement of the
            ordinary and of the protected tokens. They are valid until the next call.

        Raises:
            TensorError: A value is not finite.
        """
        anchors, base, refinements = parts
        order = [base, anchors, *refinements]
        views = (abi.Part * len(order))(*(_part(part) for part in order))
        tiles = -(-len(self) // _TILE)
        offsets, sizes = np.empty((2, abi.MAX_STREAMS, tiles), np.int64)
        statuses = np.empty((abi.MAX_STREAMS, tiles), np.int32)
        self._reserve(chunk.tokens * len(self) * config.levels, abi.MAX_STREAMS * tiles)
        arguments = (self._view(*scale), self._spans([chunk], config), config.levels - 1, views)
        exceptions = self._code("cg_code", arguments, offsets, sizes, statuses)
        rows = chunk.tokens - anchor_count(chunk.tokens, self.group_tokens)
        ordinary = chunk.ordinary(config, self.group_tokens)
        middle = ordinary.stop - ordinary.start
        tokens = [rows, chunk.tokens - rows, *[middle, rows - middle] * (config.levels - 1)]
        assignments = [base, anchors, *(part for part in refinements for _ in range(2))]
        sections = []
        for stream, (count, part) in enumerate(zip(tokens, assignments, strict=True)):
            n = -(-len(part.live) // _TILE) if count else 0
            own = exceptions[exceptions["stream"] == stream]
            sections.append(self._section(own, offsets[stream, :n], sizes[stream, :n]))
        return sections

    def _reserve(self, symbols: int, tiles: int) -> None:
        """Make room for streams of so many symbols in so many tiles. What they do not take is never touched."""
        most = 2 * symbols + _HEAD_BYTES * tiles
        if len(_MEMORY.streams) < most:
            _MEMORY.streams = np.empty(most, np.uint8)

    def _code(
        self, name: str, arguments: tuple[object, ...], offsets: np.ndarray, sizes: np.ndarray, statuses: np.ndarray
    ) -> np.ndarray:
        """Call a function that encodes. Return its exceptions."""
        memory = _MEMORY
        while True:
            found = memory.exceptions
            out = abi.StreamsOut(
                memory.streams.ctypes.data, len(memory.streams), offsets.ctypes.data, sizes.ctypes.data,
                statuses.ctypes.data, found.ctypes.data, len(found), 0, 0,
            )  # fmt: skip
            native.call(name, *arguments, out, device=self.target.device)
            if out.n_exceptions <= len(found):
                native.check_encoded(statuses.ravel().tolist())
                return found[: out.n_exceptions]
            memory.exceptions = np.empty(out.n_exceptions, _EXCEPTION)

    def _section(self, exceptions: np.ndarray, offsets: np.ndarray, sizes: np.ndarray) -> Section:
        exceptions = exceptions[exceptions["position"].argsort()]
        pairs = np.empty((len(exceptions), 2), "<u4")  # positions wrap, as in `section.encode`
        pairs[:, 0], pairs[:, 1] = exceptions["position"], exceptions["index"].view("<u4")
        head = struct.pack(f"<{1 + len(sizes)}I", len(exceptions), *sizes.tolist())
        return Section(head + pairs.tobytes(), offsets, sizes)

    def join(self, sections: Sequence[Section], before: bytes = b"") -> bytes:
        """Return the bytes `before`, then those of these sections."""
        data, addresses, sizes = _MEMORY.streams.ctypes.data, [], []
        for head, offsets, own in (Section(before, *np.empty((2, 0), np.int64)), *sections):
            addresses += [np.array([native.address(head)]), data + offsets]
            sizes += [np.array([len(head)]), own]
        return native.joined(np.concatenate(addresses), np.concatenate(sizes))

    @property
    def has_whole_tiles(self) -> bool:
        """Whether the channels fill whole tiles, which the passes over planes need."""
        return len(self) % _TILE == 0

    def only(self, channels: Tensor) -> Source:
        """Return the source of these channels, int64, ascending."""
        places = self.target.places[channels].contiguous()
        return replace(self, target=replace(self.target, places=places), vectors=self.vectors[channels])

    def count_planes(self, chunks: Sequence[Chunk]) -> Tensor:
        """Return how often each byte occurs in these chunks: int32 [planes x channels, 256] (`transforms.lossless`)."""
        counts = torch.empty(self.target.dtype.itemsize * len(self), _TILE, dtype=torch.int32)
        native.call("cg_choose_planes", self._view(), *self._plain(chunks), None, None, None, counts)
        return counts

    def choose_planes(self, chunks: Sequence[Chunk], book: Codebook) -> tuple[Tensor, Tensor]:
        """Choose the cheapest table of each plane and channel, as `tables.Codebook.choose` does."""
        entries = torch.empty(self.target.dtype.itemsize * len(self), dtype=torch.uint8)
        costs = torch.empty(len(entries), dtype=torch.int64)
        cost = abi.Costs(book.compiled_cost.data_ptr(), book.compiled_cost.shape[1], 0)
        native.call("cg_choose_planes", self._view(), *self._plain(chunks), cost, entries, costs, None)
        return entries, costs.double() / COST_SCALE

    def _plain(self, chunks: Sequence[Chunk]) -> tuple[ctypes.Array[abi.Span], int]:
        return self._spans(chunks, CacheGenConfig(protect_first=0, protect_last=0)), len(chunks)

    def encode_planes(self, chunk: Chunk, part: Assignment) -> Section:
        """Encode the bytes of a chunk's values to a section, valid until the next call."""
        tiles = len(part) // _TILE
        offsets, sizes = np.empty((2, tiles), np.int64)
        statuses = np.empty(tiles, np.int32)
        self._reserve(chunk.tokens * len(part), tiles)
        arguments = (self._view(), self._plain([chunk])[0], _part(part))
        exceptions = self._code("cg_code_planes", arguments, offsets, sizes, statuses)
        return self._section(exceptions, offsets, sizes)


def _part(part: Assignment) -> abi.Part:
    """Return the C view of a part's tables. Its tensors belong to the assignment."""
    bounds = part.bounds(torch.device("cpu"))
    low, high = (None, None) if bounds is None else (bound.T.data_ptr() for bound in bounds)
    columns = part.order.data_ptr() if len(part.dead) else None
    tables = part.book.tables.native
    return abi.Part(
        columns, len(part.live), part.table_ids.data_ptr(), tables.data_ptr(), tables.numel(), low, high
    )
