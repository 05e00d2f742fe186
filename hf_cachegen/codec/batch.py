"""Decode several chunks of an artifact in one launch, on a device whose library can do it (cg_decode_chunks).

One chunk has too few tiles to keep a GPU busy, so up to 8 chunks are decoded together. A warp decodes the base and the
digits of a tile, and the warps of a block share tables. The coded bytes of a batch are copied to the device once, from
pinned memory, and the statuses of its tiles are read two batches later. Nothing waits before. On the CPU the tiles of
all chunks of a batch are the work of one parallel loop.

`serves` and `Batches.add` return whether a batch can take a chunk: all channels are coded, in whole tiles, and the rows
of the target are aligned. Other chunks are decoded section by section (`into.Sections`), to the same values.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_cachegen.codec import abi, native, ops, section
from hf_cachegen.codec.anchors import Anchors, anchor_count
from hf_cachegen.codec.into import Rows, Sections, Target
from hf_cachegen.codec.passes import DTYPES
from hf_cachegen.codec.section import Arrays, Assignment, Cursor

if TYPE_CHECKING:
    from hf_cachegen.codec.chunk import LossyCodec, Span

OUTSTANDING = 2
"""Number of batches whose statuses are not read yet, so that the host does not wait for the batch on the device."""
PAIR_BYTES = 6 << 10
"""Shared memory for the digit tables of a tile, in bytes."""
TABLE_BYTES = 4 << abi.BATCH_PROB_BITS
"""Shared memory for a base table, in bytes."""
UNLIMITED = (1 << 64) - 1
"""Shared memory of the CPU, whose cores share all memory, in bytes."""
_WORD = 8
"""Alignment of every array in the copied bytes, in bytes."""


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

    @property
    def has_ends(self) -> bool:
        return self.ordinary.stop - self.ordinary.start < self.coded

    def sections(self) -> Iterator[tuple[int, np.ndarray | None, Arrays]]:
        """Yield (0 for the base, 1 and 2 for digits; the coded row of each token, None: all in order; the section)."""
        yield 0, None, self.base
        row, first, last = np.arange(self.coded), self.ordinary.start, self.ordinary.stop
        for k, found in enumerate(self.digits):
            yield 1 + k, row[first:last], found
        for k, found in enumerate(self.end_digits):
            yield 1 + k, np.concatenate([row[:first], row[last:]]), found


def serves(codec: LossyCodec, level: int, target: Target) -> bool:
    """Return whether chunks of this codec can be decoded in batches into this target."""
    config, channels = codec.config, len(codec.channels)
    whole = channels > 0 and channels % ops.TILE_COLUMNS == 0 and config.prob_bits == abi.BATCH_PROB_BITS
    if config.coder != "rans" or not whole or target.dtype not in DTYPES or config.levels > 3:
        return False
    if not (shared := native.batch_shared_bytes(target.device)):
        return False
    _, base, refinements = codec.assignments
    if any(len(part.dead) for part in refinements) or target.vectors is None:
        return False
    return _fits(base, shared)


def _fits(assignment: Assignment, shared: int) -> bool:
    """Return whether all channels are coded, and the tables of a tile fit in a block's shared memory."""
    if shared == UNLIMITED:
        return not len(assignment.dead)
    return not len(assignment.dead) and PAIR_BYTES + assignment.tables_per_tile * TABLE_BYTES <= shared


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
        self._checks: deque[list[Callable[[], None]]] = deque()

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
            self._launch()
        return True

    def finish(self) -> None:
        """Decode the remaining chunks, and wait for all. Raises TruncatedError or CorruptError for damaged bytes."""
        self._launch()
        self._settle(0)

    def _settle(self, outstanding: int) -> None:
        while len(self._checks) > outstanding:
            for check in self._checks.popleft():
                check()

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
        if span.tokens > abi.MAX_BATCH_TOKENS or base.is_wide(values):
            return None
        return _Read(span.tokens, row, coded, ordinary, scales, peaks, base, digits, ends)

    def _launch(self) -> None:
        reads, self._reads = self._reads, []
        if not reads:
            return
        device, channels = self._target.device, len(self._codec.channels)
        upload = _Upload(device)
        jobs = [self._job(upload, read) for read in reads]
        peaks = [self._peaks(upload, read) for read in reads]
        scales = [read.scales for read in reads if read.scales is not None]
        copied = [upload.put(data) for data in scales] if device.type != "cpu" else []
        memory = upload.send([*jobs, *peaks])
        statuses = torch.zeros(2, len(reads), channels // ops.TILE_COLUMNS, dtype=torch.int32, device=device)
        for k, part in enumerate((peaks, jobs)):
            for job, status in zip(part, statuses[k], strict=True):
                job.tile_status = status.data_ptr()
        checks: list[Callable[[], None]] = []
        if scales:
            found = [memory[a:b] for a, b in copied] or [section.stream_of(data) for data in scales]
            anchors, at = self._anchors(peaks, found, reads, checks), 0
            for job, peak in zip(jobs, peaks, strict=True):
                job.anchors = anchors.data_ptr() + 4 * channels * at
                at += peak.tokens
        for with_ends in (False, True):  # chunks without ends have a kernel with fewer registers
            mine = [job for job, read in zip(jobs, reads, strict=True) if read.has_ends == with_ends]
            self._call(self._values(with_ends), mine)
        self._checks.append([*checks, _Statuses(statuses).check])
        self._settle(OUTSTANDING)

    def _job(self, upload: _Upload, read: _Read) -> abi.Job:
        ordinary = read.ordinary
        job = abi.Job(tokens=read.tokens, first=ordinary.start, last=ordinary.stop, row=read.row)
        upload.streams(job.base, read.base)
        for k, found in enumerate(read.digits):
            upload.streams(job.digits[k], found)
        for k, found in enumerate(read.end_digits):
            upload.streams(job.end_digits[k], found)
        upload.patches(job, read.sections(), len(self._codec.channels))
        return job

    def _peaks(self, upload: _Upload, read: _Read) -> abi.Job:
        """Return the job of the anchors' symbols, as values of step 1. It has no rows for a codec without anchors."""
        job = abi.Job()
        if read.peaks is not None:
            job.tokens = job.last = read.tokens - read.coded
            upload.streams(job.base, read.peaks)
            upload.patches(job, [(0, None, read.peaks)], len(self._codec.channels))
        return job

    def _anchors(
        self, jobs: list[abi.Job], scales: list[Tensor], reads: list[_Read], checks: list[Callable[[], None]]
    ) -> Tensor:
        """Return the anchors of all chunks, float32 [anchors, channels], one chunk after the other."""
        codec, device, at = self._codec, self._target.device, 0
        for job in jobs:
            job.row, at = at, at + job.tokens
        found = torch.empty(at, len(codec.channels), device=device)
        assignment, target, unit = codec.assignments[0], Target.matrix(found), codec.unit(device)
        if _fits(assignment, native.batch_shared_bytes(device)):
            shared = _shared(assignment, [], target)
            shared.means, shared.steps, shared.end_steps = (x.data_ptr() for x in (unit.means, unit.steps, unit.steps))
            self._call(shared, jobs)
        else:
            for job, read in zip(jobs, reads, strict=True):
                sections = Sections(target, job.row, job.tokens, job.tokens, len(assignment))
                if read.peaks is not None:
                    peaks = section.in_tensors(read.peaks, job.tokens, assignment)
                    sections.values(peaks, Rows(), [], unit)
                checks.append(sections.finish)
        factors = torch.cat(scales).view(torch.bfloat16).view(-1, codec.n_vectors)
        return Anchors(found, factors).values(codec.vectors(device))

    def _values(self, with_ends: bool) -> abi.Batch:
        codec, config, device = self._codec, self._codec.config, self._target.device
        _, base, refinements = codec.assignments
        shared = _shared(base, refinements, self._target)
        grid = codec.scale(self._level, device)
        shared.means, shared.steps = grid.means.data_ptr(), grid.steps.data_ptr()
        shared.end_steps = codec.scale(config.levels, device).steps.data_ptr()
        shared.group_tokens = codec.group_tokens
        shared.n_digits, shared.n_end_digits = self._level - 1, len(refinements) if with_ends else 0
        return shared

    def _call(self, shared: abi.Batch, jobs: list[abi.Job]) -> None:
        if jobs:
            array = (abi.Job * len(jobs))(*jobs)
            native.call("cg_decode_chunks", shared, array, len(jobs), device=self._target.device)


def _shared(base: Assignment, refinements: Sequence[Assignment], target: Target) -> abi.Batch:
    """Return what the chunks of a batch share, without their scale."""
    tables, ids, *_ = base.on(target.device)
    found = abi.Batch(columns=len(base), base_ids=ids.data_ptr(), dtype=DTYPES[target.dtype])
    found.base_tables, found.base_tables_bytes = tables.data_ptr(), tables.numel()
    unlimited = native.batch_shared_bytes(target.device) == UNLIMITED
    found.tables_per_tile = ops.TILE_COLUMNS if unlimited else base.tables_per_tile  # counting them takes milliseconds
    if target.vectors is not None:  # `serves` has tested it
        found.places = target.vectors.data_ptr()
    for k, part in enumerate(refinements):
        tables, ids, *_ = part.on(target.device)
        found.digit_ids[k] = ids.data_ptr()
        found.digit_tables, found.digit_tables_bytes = tables.data_ptr(), tables.numel()
    return found


class _Upload:
    """Gather bytes for one copy to a device. Jobs contain offsets until `send` replaces them by addresses.

    On the CPU nothing is copied, and the offsets are addresses from the beginning.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._parts: list[tuple[int, np.ndarray]] = []
        self._size = 0

    def put(self, data: np.ndarray | memoryview) -> tuple[int, int]:
        """Add bytes. Return their first offset and the offset behind the last."""
        array = np.frombuffer(data, np.uint8)
        if self._device.type == "cpu":
            self._parts.append((array.ctypes.data, array))
            return array.ctypes.data, array.ctypes.data + len(array)
        first = self._size
        self._parts.append((first, array))
        self._size = -(-(first + len(array)) // _WORD) * _WORD
        return first, first + len(array)

    def streams(self, to: abi.Streams, found: Arrays) -> None:
        if not len(found.tile_bytes):
            return
        offsets = np.zeros(len(found.tile_bytes) + 1, np.uint64)
        np.cumsum(found.tile_bytes, out=offsets[1:])
        to.data, to.bytes, to.offsets = self.put(found.streams)[0], len(found.streams), self.put(offsets)[0]

    def patches(
        self, job: abi.Job, sections: Iterable[tuple[int, np.ndarray | None, Arrays]], channels: int
    ) -> None:
        """Add the exceptions of these sections, tile by tile, in the order of their rows (cg_job)."""
        tiles, rows, words = [], [], []
        for number, coded, found in sections:
            if len(found.positions):
                token, channel = np.divmod(found.positions, channels)
                row = token if coded is None else coded[token]
                tiles.append(channel // ops.TILE_COLUMNS)
                rows.append(row)
                words.append(row << 32 | channel % ops.TILE_COLUMNS << 16 | number << 8 | found.indices)
        if not words:
            return
        tile = np.concatenate(tiles)
        order = np.lexsort((np.concatenate(rows), tile))
        offsets = np.zeros(channels // ops.TILE_COLUMNS + 1, np.uint32)
        np.cumsum(np.bincount(tile, minlength=len(offsets) - 1), out=offsets[1:])
        job.patches, job.n_patches = self.put(np.concatenate(words)[order])[0], len(order)
        job.patch_offsets = self.put(offsets)[0]

    def send(self, jobs: Sequence[abi.Job]) -> Tensor:
        """Copy all bytes, without waiting, and replace the jobs' offsets by addresses.

        Returns:
            The bytes, uint8 [bytes], on the device. The addresses point into them. Empty on the CPU, where the
            addresses are those of the given bytes.
        """
        if self._device.type == "cpu":
            return torch.empty(0, dtype=torch.uint8)
        pinned = self._device.type == "cuda"
        host = torch.empty(self._size, dtype=torch.uint8, pin_memory=pinned)  # torch reuses it once it is copied
        view = host.numpy()
        for first, array in self._parts:
            view[first : first + len(array)] = array
        memory = host.to(self._device, non_blocking=True)
        base = memory.data_ptr()
        for job in jobs:
            for streams in (job.base, *job.digits, *job.end_digits):
                if streams.offsets is not None:
                    streams.data, streams.offsets = base + (streams.data or 0), base + streams.offsets
            if job.n_patches:
                job.patches, job.patch_offsets = base + (job.patches or 0), base + job.patch_offsets
        return memory


class _Statuses:
    """The statuses of a batch's tiles, int32 [2, chunks, tiles], on their way to the host."""

    def __init__(self, found: Tensor):
        self._tiles = found.shape[2]
        self._event: torch.cuda.Event | None = None
        self._host = found
        if found.is_cuda:
            self._host = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
            self._host.copy_(found, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def check(self) -> None:
        """Wait for the statuses. Raises TruncatedError or CorruptError."""
        if self._event is not None:
            self._event.synchronize()
        statuses = self._host.numpy()
        if statuses.any():
            for of_chunk in statuses.reshape(-1, self._tiles):
                native.check_decoded(of_chunk.tolist())
