"""Read the sections of several segments together, up to where their streams begin (`codec.section` has the layout).

A batch of chunks has tens of sections. Some calls of numpy for each would take longer than to launch the batch, so the
numbers of all sections are read as one table, and their exceptions are checked together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from hf_cachegen.codec import rans
from hf_cachegen.codec.section import LARGEST_INDEX, Assignment, Coded, Cursor, stream_of
from hf_cachegen.errors import CorruptError


class Headers(NamedTuple):
    """Sections that were read together: those that have tokens.

    Attributes:
        cursors: All cursors that were read.
        which: int64 [sections], ascending: the cursor of each section.
        starts: Where each section's streams begin in its segment.
        offsets: uint64 [sections, tiles + 1]: where each tile's stream begins, counted from there, and where the last
            one ends.
        of: int64 [exceptions], ascending: the section of each exception.
        positions: int64 [exceptions], ascending in each section.
        indices: int32 [exceptions].
    """

    cursors: Sequence[Cursor]
    which: np.ndarray
    starts: list[int]
    offsets: np.ndarray
    of: np.ndarray
    positions: np.ndarray
    indices: np.ndarray

    def addresses(self) -> np.ndarray:
        """Return the address of each section's streams, uint64 [sections]."""
        pairs = zip(self.which.tolist(), self.starts, strict=True)
        return np.array([self.cursors[number].address + start for number, start in pairs], np.uint64)

    def wide(self, assignment: Assignment) -> np.ndarray:
        """Return which exceptions have an index outside their tables, bool [exceptions]."""
        return (self.indices < 0) | (self.indices >= assignment.book.tables.frequencies.shape[1])

    def coded(self, section: int, tokens: int, assignment: Assignment) -> Coded:
        """Return a section in tensors, which share the memory of its streams."""
        offsets, start, own = self.offsets[section], self.starts[section], self.of == section
        streams = stream_of(self.cursors[self.which[section]].data[start : start + int(offsets[-1])])
        tile_bytes, positions, indices = (
            torch.from_numpy(x) for x in (np.diff(offsets).astype(np.int64), self.positions[own], self.indices[own])
        )
        return Coded(assignment, tokens, tile_bytes, positions, indices, streams)


_NONE, _NO_INDICES = np.empty(0, np.int64), np.empty(0, np.int32)


def read_all(cursors: Sequence[Cursor], tokens: Sequence[int], assignment: Assignment) -> Headers:
    """Read the section at each cursor.

    Args:
        cursors: They are moved behind the sections.
        tokens: Of each section.
        assignment: Of all sections; others with as many channels and symbols may stand for it.

    Raises:
        TruncatedError, CorruptError: The bytes are damaged.
    """
    words, which, heads = 1 + rans.tile_count(assignment.coded), list[int](), list[np.ndarray]()
    for number, (cursor, count) in enumerate(zip(cursors, tokens, strict=True)):
        if count:
            which.append(number)
            heads.append(cursor.words(words))
        elif int.from_bytes(cursor.take(4), "little"):  # most chunks have no protected tokens
            raise CorruptError("a section without tokens must have no exceptions")
    if not which:
        return Headers(cursors, _NONE, [], np.empty((0, words), np.uint64), _NONE, _NONE, _NO_INDICES)
    table = np.concatenate(heads, dtype=np.uint64).reshape(len(which), words)
    counts = table[:, 0].tolist()
    table[:, 0] = 0
    offsets, starts, pairs = table.cumsum(1), list[int](), list[np.ndarray]()
    for number, count, size in zip(which, counts, offsets[:, -1].tolist(), strict=True):
        if count:
            pairs.append(cursors[number].words(2 * count))
        starts.append(cursors[number].skip(size))
    own = np.array(which)
    if not pairs:
        return Headers(cursors, own, starts, offsets, _NONE, _NONE, _NO_INDICES)
    of, found = np.repeat(np.arange(len(which)), counts), np.concatenate(pairs).reshape(-1, 2)
    positions, indices = found[:, 0].astype(np.int64), found[:, 1].astype(np.int32)
    limits = np.array([tokens[number] * len(assignment) for number in which])
    if not bool((np.diff(of << 32 | positions) > 0).all()) or bool((positions >= limits[of]).any()):
        raise CorruptError("positions of exceptions must ascend and be within the chunk")
    if int(indices.min()) < -LARGEST_INDEX or int(indices.max()) > LARGEST_INDEX:
        raise CorruptError(f"the index of an exception must be within {LARGEST_INDEX} of zero")
    return Headers(cursors, own, starts, offsets, of, positions, indices)


def read_all_narrow(cursors: Sequence[Cursor], tokens: Sequence[int], assignment: Assignment) -> Headers:
    """Read as `read_all` does sections that must have no wide indices. Raises TruncatedError or CorruptError."""
    found = read_all(cursors, tokens, assignment)
    if bool(found.wide(assignment).any()):
        raise CorruptError("the index of an exception must be within its tables")
    return found


def read(cursor: Cursor, tokens: int, assignment: Assignment) -> Coded:
    """Read the section at the cursor. Raises TruncatedError or CorruptError for damaged bytes."""
    return _alone(read_all([cursor], [tokens], assignment), tokens, assignment)


def read_narrow(cursor: Cursor, tokens: int, assignment: Assignment) -> Coded:
    """Read the section at the cursor, which must have no wide indices. Raises TruncatedError or CorruptError."""
    return _alone(read_all_narrow([cursor], [tokens], assignment), tokens, assignment)


def _alone(found: Headers, tokens: int, assignment: Assignment) -> Coded:
    if tokens:
        return found.coded(0, tokens, assignment)
    tile_bytes, positions, indices = (torch.from_numpy(x) for x in (_NONE, _NONE, _NO_INDICES))
    return Coded(assignment, 0, tile_bytes, positions, indices, torch.empty(0, dtype=torch.uint8))
