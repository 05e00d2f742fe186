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
from typing import NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from hf_cachegen.codec import abi, native, ops, transfer
from hf_cachegen.codec.anchors import Anchors, anchor_count
from hf_cachegen.codec.chunk import LossyCodec, Placed, Span
from hf_cachegen.codec.into import Target
from hf_cachegen.codec.passes import DTYPES
from hf_cachegen.codec.section import Assignment
from hf_cachegen.codec.transfer import Checks
from hf_cachegen.codec.upload import JOB, READ, Upload
from hf_cachegen.codec.wide import Wide
from hf_cachegen.errors import CorruptError

OUTSTANDING = 2
"""Number of batches whose statuses are not read yet, so that the host does not wait for the batch on the device."""
PAIR_BYTES = 6 << 10
"""Shared memory for the digit tables of a tile, in bytes."""
TABLE_BYTES = 4 << abi.BATCH_PROB_BITS
"""Shared memory for a base table, in bytes."""
UNLIMITED = (1 << 64) - 1
"""Shared memory of the CPU, whose cores share all memory, in bytes."""


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


def serves(codec: LossyCodec, target: Target) -> bool:
    """Return whether chunks of this codec can be decoded in batches into this target."""
    config, (anchors, base, refinements) = codec.config, codec.assignments
    if config.coder != "rans" or config.prob_bits != abi.BATCH_PROB_BITS or config.levels > 3:
        return False
    coded = (base, *refinements, *([anchors] if codec.group_tokens else []))
    if not len(base) or any(len(part.dead) for part in coded) or not native.offers(READ, target.device):
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
        self._anchor_rows: tuple[Target, abi.Batch] | None = None
        self._upload = Upload(
            target.device, len(codec.channels), level - 1, len(codec.assignments[2]),
            codec.n_vectors if codec.group_tokens else 0,
        )  # fmt: skip

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
        while chunks and (outside := self._launch(chunks)):
            alone += [chunks[number].placed for number in outside]
            chunks = [chunk for number, chunk in enumerate(chunks) if number not in outside]
        return alone

    def finish(self) -> None:
        """Wait for all that was launched. Raises TruncatedError or CorruptError for damaged bytes."""
        self._checks.finish()

    def _launch(self, chunks: Sequence[_Chunk]) -> list[int]:
        """Launch chunks, or return the numbers of those that no batch can decode: then nothing is launched."""
        codec, device, n = self._codec, self._target.device, len(chunks)
        anchors, channels = [chunk.anchors for chunk in chunks], len(codec.channels)
        jobs = np.zeros(2 * n if codec.group_tokens else n, JOB)
        own, peaks = jobs[:n], jobs[n:]
        own["tokens"], own["row"] = [chunk.placed[1].tokens for chunk in chunks], [chunk.placed[2] for chunk in chunks]
        own["first"], own["last"] = zip(*((c.ordinary.start, c.ordinary.stop) for c in chunks), strict=True)
        if codec.group_tokens:
            peaks["tokens"] = peaks["last"] = anchors
            peaks["row"] = np.cumsum(anchors) - anchors
        sent = self._upload.send([chunk.placed[0][k] for k in range(self._level) for chunk in chunks], jobs)
        if not sent.sound:
            self._refuse(chunks)
        wide = [number for number in range(n) if sent.wide[number]]
        if wide and not codec.scales_alone(self._target):
            return wide
        tiles = ops.tile_count(1, channels)
        statuses = torch.zeros(len(jobs), tiles, dtype=torch.int32, device=device)
        jobs["tile_status"] = statuses.data_ptr() + 4 * tiles * np.arange(len(jobs))
        values = None
        if codec.group_tokens:
            rows, shared = self._anchors_of(anchors)
            self._call(shared, peaks)
            values = Anchors(rows.kept[0][: sum(anchors)], sent.scales).values(codec.vectors(device))
            own["anchors"] = values.data_ptr() + 4 * channels * peaks["row"]
        without = sum(not chunk.ends for chunk in chunks)
        self._call(self._values(False), own[:without])
        self._call(self._values(True), own[without:])
        if wide:
            codec.correct([self._wide(chunks[number]) for number in wide], self._level, self._target.kept[0])
        self._checks.add(_Statuses(statuses, sent.memory, values).check)
        return []

    def _refuse(self, chunks: Sequence[_Chunk]) -> NoReturn:
        """Raise the error of damaged chunks, as reading them one by one finds it."""
        for chunk in chunks:
            parts, span, _ = chunk.placed
            self._codec.read(parts, span)
        raise CorruptError("a section of the chunks is not what an encoder writes")

    def _wide(self, chunk: _Chunk) -> tuple[Wide, slice, int]:
        """Return a chunk's wide symbols, its ordinary tokens and its first row."""
        parts, span, row = chunk.placed
        return self._codec.read(parts, span).base.wide, chunk.ordinary, row

    def _anchors_of(self, counts: Sequence[int]) -> tuple[Target, abi.Batch]:
        """Return memory for the symbols of so many anchors of each chunk, float32 [anchors, channels], with what a
        batch needs to write them.

        Every batch takes the same memory: the launches of a stream follow one another.
        """
        codec, device = self._codec, self._target.device
        if self._anchor_rows is None or len(self._anchor_rows[0].kept[0]) < sum(counts):
            found = Target.matrix(Target.memory(abi.MAX_BATCH * max(counts), len(codec.channels), device))
            shared, unit = _shared(codec.assignments[0], [], found), codec.unit(device)
            shared.means, shared.steps = unit.means.data_ptr(), unit.steps.data_ptr()
            shared.end_steps = shared.steps
            self._anchor_rows = found, shared
        return self._anchor_rows

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
