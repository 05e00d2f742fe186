"""Decode several chunks of an artifact in one launch, on a device whose library can do it (cg_decode_chunks).

One chunk has too few tiles to keep a GPU busy, so up to 8 chunks are decoded together. A warp decodes the base and the
digits of a tile, and the warps of a block share tables. The coded bytes of a batch are copied to the device once, from
pinned memory, and the statuses of its tiles are read two batches later. Nothing waits before. On the CPU the tiles of
all chunks of a batch are the work of one parallel loop.

`serves` returns whether a batch can take the chunks of a codec: all channels are coded, and the rows of the target are
aligned. Other chunks, and those that `Batches.add` and `flush` return, are decoded section by section
(`into.Sections`), to the same values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_cachegen.codec import abi, headers, native, ops, transfer
from hf_cachegen.codec.anchors import Anchors, anchor_count
from hf_cachegen.codec.chunk import LossyCodec, Span
from hf_cachegen.codec.headers import Headers
from hf_cachegen.codec.into import Rows, Sections, Target
from hf_cachegen.codec.passes import DTYPES
from hf_cachegen.codec.section import Assignment, Cursor
from hf_cachegen.codec.transfer import Check, Checks, all_of
from hf_cachegen.codec.upload import JOB, Upload
from hf_cachegen.codec.wide import Wide

OUTSTANDING = 2
"""Number of batches whose statuses are not read yet, so that the host does not wait for the batch on the device."""
PAIR_BYTES = 6 << 10
"""Shared memory for the digit tables of a tile, in bytes."""
TABLE_BYTES = 4 << abi.BATCH_PROB_BITS
"""Shared memory for a base table, in bytes."""
UNLIMITED = (1 << 64) - 1
"""Shared memory of the CPU, whose cores share all memory, in bytes."""
Placed = tuple[Sequence[bytes | memoryview], Span, int]
"""The parts of a chunk, its position, and the target's row of its first token."""


class _Chunk(NamedTuple):
    """A chunk of a batch.

    Attributes:
        placed: The chunk.
        anchors: Number of its anchors.
        ordinary: Range of its coded tokens that have `digits`.
        middle: Number of these.
        ends: Number of the other coded tokens, which have `ends`.
    """

    placed: Placed
    anchors: int
    ordinary: slice
    middle: int
    ends: int


class _Read(NamedTuple):
    """The sections of a batch.

    Attributes:
        scales: The bytes of each chunk's scales of anchors.
        peaks: The anchors' symbols. None: there are none.
        base: The base of all coded tokens.
        digits: One section per refinement and chunk: those of the first refinement, then those of the second. None: no
            refinement is decoded.
        ends: One section per chunk, for each refinement.
    """

    scales: list[memoryview]
    peaks: Headers | None
    base: Headers
    digits: Headers | None
    ends: list[Headers]


def serves(codec: LossyCodec, target: Target) -> bool:
    """Return whether chunks of this codec can be decoded in batches into this target."""
    config, (_, base, refinements) = codec.config, codec.assignments
    if config.coder != "rans" or config.prob_bits != abi.BATCH_PROB_BITS or config.levels > 3:
        return False
    if not len(base) or any(len(part.dead) for part in (base, *refinements)):
        return False
    return target.dtype in DTYPES and target.vectors is not None and native.batch_shared_bytes(target.device) > 0


def _tables_per_tile(assignment: Assignment, device: torch.device) -> int:
    """Return how many tables a block has to copy to its shared memory; 0 where they do not fit there."""
    shared = native.batch_shared_bytes(device)
    if shared == UNLIMITED:  # counting takes milliseconds
        return 0
    most = assignment.tables_per_tile
    return most if PAIR_BYTES + most * TABLE_BYTES <= shared else 0


class Batches:
    """Decode chunks at one level into a target. After an error the target's values are undefined.

    Args:
        codec: Of the chunks. `serves` must hold.
        level: The level, 1 to the codec's `config.levels`.
        target: Receives the rows.
    """

    def __init__(self, codec: LossyCodec, level: int, target: Target):
        self._codec, self._level, self._target = codec, level, target
        self._chunks: list[_Chunk] = []
        self._checks = Checks(OUTSTANDING)
        self._shared: dict[bool, abi.Batch] = {}
        self._anchor_rows: tuple[Tensor, Target, abi.Batch | None] | None = None

    def add(self, parts: Sequence[bytes | memoryview], span: Span, row: int) -> list[Placed]:
        """Take a chunk, which is written from row `row` on. Return those, of all added, that no batch can decode.

        Raises:
            TruncatedError, CorruptError: The bytes of this chunk, or of one before it, are damaged.
        """
        if span.tokens > abi.MAX_BATCH_TOKENS:
            return [(parts, span, row)]
        group_tokens = self._codec.group_tokens
        anchors, ordinary = anchor_count(span.tokens, group_tokens), span.ordinary(self._codec.config, group_tokens)
        middle = ordinary.stop - ordinary.start
        self._chunks.append(_Chunk((parts, span, row), anchors, ordinary, middle, span.tokens - anchors - middle))
        return self.flush() if len(self._chunks) == abi.MAX_BATCH else []

    def flush(self) -> list[Placed]:
        """Launch the chunks that were added. Return those that no batch can decode.

        Raises:
            TruncatedError, CorruptError: The bytes of these chunks, or of chunks before them, are damaged.
        """
        # Chunks without ends have a kernel with fewer registers.
        chunks, self._chunks = sorted(self._chunks, key=lambda chunk: chunk.ends > 0), []
        alone: list[Placed] = []
        while chunks:
            read = self._read(chunks)
            wide = read.base.wide(self._codec.assignments[1])
            if not wide.any() or self._codec.scales_alone(self._target):
                self._launch(chunks, read)
                break
            which = set(read.base.which[read.base.of[wide]].tolist())
            alone = [chunks[number].placed for number in which]
            chunks = [chunk for number, chunk in enumerate(chunks) if number not in which]
        return alone

    def finish(self) -> None:
        """Wait for all that was launched. Raises TruncatedError or CorruptError for damaged bytes."""
        self._checks.finish()

    def _read(self, chunks: Sequence[_Chunk]) -> _Read:
        anchors, values, refinements = self._codec.assignments
        cursors, scales, peaks = [Cursor(chunk.placed[0][0]) for chunk in chunks], list[memoryview](), None
        if self._codec.group_tokens:
            width = 2 * self._codec.n_vectors
            scales = [cursor.take(width * chunk.anchors) for cursor, chunk in zip(cursors, chunks, strict=True)]
            peaks = headers.read_all_narrow(cursors, [chunk.anchors for chunk in chunks], anchors)
        middle, ends = [chunk.middle for chunk in chunks], [chunk.ends for chunk in chunks]
        base = headers.read_all(cursors, [chunk.middle + chunk.ends for chunk in chunks], values)
        others = [headers.read_all_narrow(cursors, ends, part) for part in refinements]
        finer = [Cursor(chunk.placed[0][1 + k]) for k in range(self._level - 1) for chunk in chunks]
        # All refinements have as many tiles and symbols.
        digits = headers.read_all_narrow(finer, middle * (self._level - 1), refinements[0]) if finer else None
        for cursor in (*cursors, *finer):
            cursor.finish()
        return _Read(scales, peaks, base, digits, others)

    def _launch(self, chunks: Sequence[_Chunk], read: _Read) -> None:
        codec, device, n = self._codec, self._target.device, len(chunks)
        channels, anchors = len(codec.channels), [chunk.anchors for chunk in chunks]
        jobs = np.zeros(n if read.peaks is None else 2 * n, JOB)
        own, peaks = jobs[:n], jobs[n:]
        first, middle = (np.array(x) for x in zip(*((c.ordinary.start, c.middle) for c in chunks), strict=True))
        own["tokens"], own["row"] = [c.placed[1].tokens for c in chunks], [c.placed[2] for c in chunks]
        own["first"], own["last"] = first, first + middle
        upload = Upload(device, channels, jobs)
        which = read.base.which
        upload.add(read.base, which, 0)
        if read.digits is not None:
            which = read.digits.which % n
            upload.add(read.digits, which, 1 + read.digits.which // n, first[which])
        for k, found in enumerate(read.ends):
            which = found.which
            upload.add(found, which, 3 + k, 0, first[which], middle[which])
        rows = None
        if read.peaks is not None:
            peaks["tokens"] = peaks["last"] = anchors
            peaks["row"][1:] = np.cumsum(anchors[:-1])
            rows = self._anchors_of(anchors)
            if rows[2] is not None:
                upload.add(read.peaks, n + read.peaks.which, 0)
        memory, scales = upload.send(read.scales)
        tiles = ops.tile_count(1, channels)
        statuses = torch.zeros(len(jobs), tiles, dtype=torch.int32, device=device)
        jobs["tile_status"] = statuses.data_ptr() + 4 * tiles * np.arange(len(jobs))
        checks, values = list[Check](), None
        if rows is not None and read.peaks is not None:
            values = self._anchor_values(rows, peaks, read.peaks, scales, checks)
            own["anchors"] = values.data_ptr() + 4 * channels * peaks["row"]
        without = sum(not chunk.ends for chunk in chunks)
        self._call(self._values(False), own[:without])
        self._call(self._values(True), own[without:])
        if wide := self._wide(chunks, read.base):
            codec.correct(wide, self._level, self._target.kept[0])
        self._checks.add(all_of([*checks, _Statuses(statuses, memory, values).check]))

    def _wide(self, chunks: Sequence[_Chunk], base: Headers) -> list[tuple[Wide, slice, int]]:
        """Return the wide symbols of each chunk that has some, with its ordinary tokens and its first row."""
        found, which = [], base.wide(self._codec.assignments[1])
        for section in np.unique(base.of[which]).tolist():
            mine = which & (base.of == section)
            wide = Wide(*(torch.from_numpy(x[mine]) for x in (base.positions, base.indices)))
            chunk = chunks[int(base.which[section])]
            found.append((wide, chunk.ordinary, chunk.placed[2]))
        return found

    def _anchors_of(self, counts: Sequence[int]) -> tuple[Tensor, Target, abi.Batch | None]:
        """Return memory for the symbols of all anchors, float32 [anchors, channels], with what a batch needs to write
        them: of so many anchors of each chunk.

        Every batch takes the same memory: the launches of a stream follow one another.
        """
        codec, device = self._codec, self._target.device
        if self._anchor_rows is None or len(self._anchor_rows[0]) < sum(counts):
            rows = abi.MAX_BATCH * max(counts)
            found = Target.memory(rows, len(codec.channels), device)
            assignment, target, unit, shared = codec.assignments[0], Target.matrix(found), codec.unit(device), None
            if not len(assignment.dead):
                shared = _shared(assignment, [], target)
                shared.means, shared.steps = unit.means.data_ptr(), unit.steps.data_ptr()
                shared.end_steps = shared.steps
            self._anchor_rows = found, target, shared
        return self._anchor_rows

    def _anchor_values(
        self, memory: tuple[Tensor, Target, abi.Batch | None], jobs: np.ndarray, peaks: Headers, scales: Tensor,
        checks: list[Check],
    ) -> Tensor:  # fmt: skip
        """Return the anchors of all chunks, float32 [anchors, channels], one chunk after the other."""
        codec, device = self._codec, self._target.device
        found, target, shared = memory
        if shared is not None:
            self._call(shared, jobs)
        else:
            assignment = codec.assignments[0]
            for section, number in enumerate(peaks.which.tolist()):
                tokens = int(jobs["tokens"][number])
                sections = Sections(target, int(jobs["row"][number]), tokens, tokens, len(assignment))
                sections.values(peaks.coded(section, tokens, assignment), Rows(), [], codec.unit(device))
                checks.append(sections.launched())
        factors = scales.view(torch.bfloat16).view(-1, codec.n_vectors)
        return Anchors(found[: len(factors)], factors).values(codec.vectors(device))

    def _values(self, with_ends: bool) -> abi.Batch:
        if with_ends not in self._shared:
            codec, config, device = self._codec, self._codec.config, self._target.device
            _, base, refinements = codec.assignments
            shared = _shared(base, refinements, self._target)
            grid = codec.scale(self._level, device)
            shared.means, shared.steps = grid.means.data_ptr(), grid.steps.data_ptr()
            shared.end_steps = codec.scale(config.levels, device).steps.data_ptr()
            shared.group_tokens = codec.group_tokens
            shared.n_digits, shared.n_end_digits = self._level - 1, len(refinements) if with_ends else 0
            self._shared[with_ends] = shared
        return self._shared[with_ends]

    def _call(self, shared: abi.Batch, jobs: np.ndarray) -> None:
        if len(jobs):
            native.call(abi.BATCH, shared, jobs.ctypes.data, len(jobs), device=self._target.device)


def _shared(base: Assignment, refinements: Sequence[Assignment], target: Target) -> abi.Batch:
    """Return what the chunks of a batch share, without their scale."""
    tables, ids, *_ = base.on(target.device)
    found = abi.Batch(columns=len(base), base_ids=ids.data_ptr(), dtype=DTYPES[target.dtype])
    found.base_tables, found.base_tables_bytes = tables.data_ptr(), tables.numel()
    found.tables_per_tile = _tables_per_tile(base, target.device)
    if target.vectors is not None:  # `serves` has tested it
        found.places = target.vectors.data_ptr()
    for k, part in enumerate(refinements):
        tables, ids, *_ = part.on(target.device)
        found.digit_ids[k] = ids.data_ptr()
        found.digit_tables, found.digit_tables_bytes = tables.data_ptr(), tables.numel()
    return found


class _Statuses:
    """The statuses of a batch's tiles, int32 [jobs, tiles], on their way to the host.

    Args:
        found: The statuses.
        kept: What the launch reads, kept until it is done.
    """

    def __init__(self, found: Tensor, *kept: Tensor | None):
        self._tiles, self._kept = found.shape[1], kept
        self._host = transfer.Download(found)

    def check(self) -> None:
        """Wait for the statuses. Raises TruncatedError or CorruptError."""
        statuses = self._host.wait().numpy()
        if statuses.any():
            for of_job in statuses.reshape(-1, self._tiles):
                native.check_decoded(of_job.tolist())
