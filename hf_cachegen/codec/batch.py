"""Decode several chunks of an artifact in one launch, on a device whose library can do it (cg_decode_chunks).

One chunk has too few tiles to keep a GPU busy, so up to 8 chunks are decoded together. A warp decodes the base and the
digits of a tile, and the warps of a block share tables. The coded bytes of a batch are copied to the device once, from
pinned memory, and the statuses of its tiles are read two batches later. Nothing waits before. On the CPU the tiles of
all chunks of a batch are the work of one parallel loop.

`serves` and `Batches.add` return whether a batch can take a chunk: all channels are coded, and the rows of the target
are aligned. Other chunks are decoded section by section (`into.Sections`), to the same values.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_cachegen.codec import abi, native, ops, section, transfer
from hf_cachegen.codec.anchors import Anchors, anchor_count
from hf_cachegen.codec.chunk import LossyCodec, Span
from hf_cachegen.codec.into import Rows, Sections, Target
from hf_cachegen.codec.passes import DTYPES
from hf_cachegen.codec.section import Arrays, Assignment, Cursor
from hf_cachegen.codec.transfer import Check, Checks, all_of
from hf_cachegen.codec.upload import Part, Upload
from hf_cachegen.codec.wide import NONE_WIDE, Wide

OUTSTANDING = 2
"""Number of batches whose statuses are not read yet, so that the host does not wait for the batch on the device."""
PAIR_BYTES = 6 << 10
"""Shared memory for the digit tables of a tile, in bytes."""
TABLE_BYTES = 4 << abi.BATCH_PROB_BITS
"""Shared memory for a base table, in bytes."""
UNLIMITED = (1 << 64) - 1
"""Shared memory of the CPU, whose cores share all memory, in bytes."""


class _Read(NamedTuple):
    """The sections of a chunk.

    Attributes:
        tokens: Number of tokens of the chunk.
        row: The target's row of its first token.
        coded: Number of tokens that are not anchors.
        ordinary: Range of the coded tokens that have `digits`. The others have `end_digits`.
        scales: The bytes of the anchors' scales.
        peaks: The anchors' symbols.
        base: The base of all coded tokens.
        digits: One section per refinement.
        end_digits: One section per refinement.
        wide: The base symbols that no byte holds. `base` has the nearest ones.
    """

    tokens: int
    row: int
    coded: int
    ordinary: slice
    scales: memoryview | None
    peaks: Arrays | None
    base: Arrays
    digits: list[Arrays]
    end_digits: list[Arrays]
    wide: Wide

    @property
    def has_ends(self) -> bool:
        return self.ordinary.stop - self.ordinary.start < self.coded

    def parts(self, job: abi.Job) -> list[Part]:
        """Return the sections, each with the job's streams that it becomes."""
        first, count = self.ordinary.start, self.ordinary.stop - self.ordinary.start
        middle, ends = Rows(first), Rows(0, first, count)
        parts = [Part(job.base, self.base)]
        if count:
            parts += [Part(job.digits[k], found, 1 + k, middle) for k, found in enumerate(self.digits)]
        if self.has_ends:
            parts += [Part(job.end_digits[k], found, 1 + k, ends) for k, found in enumerate(self.end_digits)]
        return parts


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
        self._reads: list[_Read] = []
        self._checks = Checks(OUTSTANDING)
        self._shared: dict[bool, abi.Batch] = {}
        self._anchor_rows: tuple[Tensor, Target, abi.Batch | None] | None = None

    def add(self, parts: Sequence[bytes | memoryview], span: Span, row: int) -> bool:
        """Take a chunk, which is written from row `row` on. Return False for one that no batch can decode.

        Raises:
            TruncatedError, CorruptError: The bytes of this chunk, or of one before it, are damaged.
        """
        read = self._read(parts, span, row)
        if read is None:
            return False
        self._reads.append(read)
        if len(self._reads) == abi.MAX_BATCH:
            self.flush()
        return True

    def finish(self) -> None:
        """Decode the remaining chunks, and wait for all. Raises TruncatedError or CorruptError for damaged bytes."""
        self.flush()
        self._checks.finish()

    def _read(self, parts: Sequence[bytes | memoryview], span: Span, row: int) -> _Read | None:
        config, (anchors, values, refinements) = self._codec.config, self._codec.assignments
        cursor, n_anchors = Cursor(parts[0]), anchor_count(span.tokens, self._codec.group_tokens)
        scales = peaks = None
        if n_anchors:
            scales = cursor.take(2 * n_anchors * self._codec.n_vectors)
            peaks = section.read_narrow_arrays(cursor, n_anchors, anchors)
        ordinary, coded = span.ordinary(config, self._codec.group_tokens), span.tokens - n_anchors
        count = ordinary.stop - ordinary.start
        base = section.read_arrays(cursor, coded, values)
        ends = [section.read_narrow_arrays(cursor, coded - count, part) for part in refinements]
        cursor.finish()
        digits = []
        for bytes_, part in zip(parts[1:], refinements, strict=False):
            cursor = Cursor(bytes_)
            digits.append(section.read_narrow_arrays(cursor, count, part))
            cursor.finish()
        wide = NONE_WIDE
        if base.is_wide(values):
            if not self._codec.scales_alone(self._target):
                return None
            wide, base = section.in_tensors(base, coded, values).wide, base.within_bytes()
        if span.tokens > abi.MAX_BATCH_TOKENS:
            return None
        return _Read(span.tokens, row, coded, ordinary, scales, peaks, base, digits, ends, wide)

    def flush(self) -> None:
        """Launch the remaining chunks. Raises TruncatedError or CorruptError for damaged bytes of chunks before them.
        """
        if not self._reads:
            return
        # Chunks without ends have a kernel with fewer registers.
        reads, self._reads = sorted(self._reads, key=lambda read: read.has_ends), []
        device, n = self._target.device, len(reads)
        upload = Upload(device, len(self._codec.channels))
        jobs, peaks = (abi.Job * n)(), (abi.Job * n)()
        anchors = self._anchors_of(reads)
        together = anchors is not None and anchors[2] is not None
        for job, peak, read in zip(jobs, peaks, reads, strict=True):
            job.tokens, job.row = read.tokens, read.row
            job.first, job.last = read.ordinary.start, read.ordinary.stop
            upload.add(job, read.parts(job))
            if read.peaks is not None and read.scales is not None:
                peak.tokens = peak.last = read.tokens - read.coded
                upload.scales(read.scales)
                if together:
                    upload.add(peak, [Part(peak.base, read.peaks)])
        memory, scales = upload.send()
        tiles = ops.tile_count(1, len(self._codec.channels))
        statuses = torch.zeros(2, n, tiles, dtype=torch.int32, device=device)
        checks: list[Check] = []
        for k, part in enumerate((peaks, jobs)):
            for i, job in enumerate(part):
                job.tile_status = statuses.data_ptr() + 4 * tiles * (k * n + i)
        values = None
        if anchors is not None:
            values = self._anchor_values(anchors, peaks, scales, reads, checks)
            at = values.data_ptr()
            for job, peak in zip(jobs, peaks, strict=True):
                job.anchors = at
                at += 4 * len(self._codec.channels) * peak.tokens
        without = sum(not read.has_ends for read in reads)
        self._call(self._values(False), jobs, 0, without)
        self._call(self._values(True), jobs, without, n)
        wide = [(read.wide, read.ordinary, read.row) for read in reads if len(read.wide.positions)]
        if wide:
            self._codec.correct(wide, self._level, self._target.kept[0])
        self._checks.add(all_of([*checks, _Statuses(statuses, memory, values).check]))

    def _anchors_of(self, reads: Sequence[_Read]) -> tuple[Tensor, Target, abi.Batch | None] | None:
        """Return memory for the symbols of all anchors, float32 [anchors, channels], with what a batch needs to write
        them; None for a codec without anchors.

        Every batch takes the same memory: the launches of a stream follow one another.
        """
        codec, device = self._codec, self._target.device
        needed = sum(read.tokens - read.coded for read in reads)
        if not needed:
            return None
        if self._anchor_rows is None or len(self._anchor_rows[0]) < needed:
            rows = max(needed, abi.MAX_BATCH * max(read.tokens - read.coded for read in reads))
            found = Target.memory(rows, len(codec.channels), device)
            assignment, target, unit, shared = codec.assignments[0], Target.matrix(found), codec.unit(device), None
            if not len(assignment.dead):
                shared = _shared(assignment, [], target)
                shared.means, shared.steps = unit.means.data_ptr(), unit.steps.data_ptr()
                shared.end_steps = shared.steps
            self._anchor_rows = found, target, shared
        return self._anchor_rows

    def _anchor_values(
        self, memory: tuple[Tensor, Target, abi.Batch | None], jobs: ctypes.Array[abi.Job], scales: Tensor,
        reads: Sequence[_Read], checks: list[Check],
    ) -> Tensor:  # fmt: skip
        """Return the anchors of all chunks, float32 [anchors, channels], one chunk after the other."""
        codec, device, at = self._codec, self._target.device, 0
        found, target, shared = memory
        for job in jobs:
            job.row, at = at, at + job.tokens
        if shared is not None:
            self._call(shared, jobs, 0, len(jobs))
        else:
            assignment = codec.assignments[0]
            for job, read in zip(jobs, reads, strict=True):
                if read.peaks is not None:
                    sections = Sections(target, job.row, job.tokens, job.tokens, len(assignment))
                    peaks = section.in_tensors(read.peaks, job.tokens, assignment)
                    sections.values(peaks, Rows(), [], codec.unit(device))
                    checks.append(sections.launched())
        factors = scales.view(torch.bfloat16).view(-1, codec.n_vectors)
        return Anchors(found[:at], factors).values(codec.vectors(device))

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

    def _call(self, shared: abi.Batch, jobs: ctypes.Array[abi.Job], first: int, last: int) -> None:
        if first < last:
            address = ctypes.addressof(jobs) + first * ctypes.sizeof(abi.Job)
            native.call(abi.BATCH, shared, address, last - first, device=self._target.device)


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
    """The statuses of a batch's tiles, int32 [2, chunks, tiles], on their way to the host.

    Args:
        found: The statuses.
        kept: What the launch reads, kept until it is done.
    """

    def __init__(self, found: Tensor, *kept: Tensor | None):
        self._tiles, self._kept = found.shape[2], kept
        self._host = transfer.Download(found)

    def check(self) -> None:
        """Wait for the statuses. Raises TruncatedError or CorruptError."""
        statuses = self._host.wait().numpy()
        if statuses.any():
            for of_chunk in statuses.reshape(-1, self._tiles):
                native.check_decoded(of_chunk.tolist())
