"""Bring the coded bytes of a batch of chunks to a device: one copy from pinned memory, and the jobs that point into it.

    u64 offsets[sections][tiles + 1]; u64 patches; u32 patch_offsets[jobs][tiles + 1]; scales; streams, one by one

The offsets and patches of all chunks are computed together. A numpy call per section would take longer than the launch.
On the host nothing is copied: the jobs point to the given bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_cachegen.codec import abi, native, ops, transfer
from hf_cachegen.codec.into import Rows
from hf_cachegen.codec.section import Arrays, stream_of

_WORD = 8
"""Alignment of every array in the copied bytes, in bytes."""
GATHER = "cg_gather"
_HOST = torch.device("cpu")


class Part(NamedTuple):
    """A section of a job.

    Attributes:
        to: Receives the addresses of its streams.
        found: Its bytes.
        number: 0 for the base, 1 or 2 for digits.
        rows: The coded rows of its tokens.
    """

    to: abi.Streams
    found: Arrays
    number: int = 0
    rows: Rows = Rows()


class Upload:
    """Gather the sections of a batch's jobs, then copy them.

    Args:
        device: Of the target.
        channels: Of a chunk.
    """

    def __init__(self, device: torch.device, channels: int):
        self._device, self._channels, self._tiles = device, channels, ops.tile_count(1, channels)
        self._jobs: list[abi.Job] = []
        self._parts: list[Part] = []
        self._patched: list[tuple[int, Part]] = []
        self._scales: list[memoryview] = []
        self._kept: list[np.ndarray] = []

    def add(self, job: abi.Job, parts: Sequence[Part]) -> None:
        """Add a job with its sections, of which some may be empty."""
        for part in parts:
            if part.found.tile_bytes.size:
                self._parts.append(part)
                if len(part.found.positions):
                    self._patched.append((len(self._jobs), part))
        self._jobs.append(job)

    def scales(self, data: memoryview) -> None:
        """Add the scales of a chunk's anchors. `send` returns those of all chunks."""
        self._scales.append(data)

    def send(self) -> tuple[Tensor, Tensor]:
        """Copy all bytes, and write their addresses into the jobs. Nothing waits for the device.

        Returns:
            The memory that the addresses point into, which must outlive the launch; the scales, uint8 [bytes], on the
            device.
        """
        offsets = self._offsets()
        patches, patch_offsets, counts = self._patches()
        streams = [np.frombuffer(part.found.streams, np.uint8) for part in self._parts]
        arrays = [offsets.reshape(-1).view(np.uint8), patches.view(np.uint8), patch_offsets.reshape(-1).view(np.uint8)]
        if transfer.is_host(self._device):
            memory = torch.empty(0, dtype=torch.uint8)
            self._kept = [*arrays, *streams]
            at = [_address(array) for array in self._kept]
            scales = torch.cat([stream_of(data) for data in self._scales]) if self._scales else memory
        else:
            packed = [np.frombuffer(data, np.uint8) for data in self._scales]
            memory, at, (first, last) = self._copied(arrays, packed, streams)
            scales = memory[first:last]
        for k, (part, address) in enumerate(zip(self._parts, at[3:], strict=True)):
            part.to.data, part.to.bytes = address, len(streams[k])
            part.to.offsets = at[0] + k * offsets.strides[0]
        first_patch = 0
        for k in np.flatnonzero(counts).tolist():
            job, count = self._jobs[k], int(counts[k])
            job.patches, job.n_patches = at[1] + 8 * first_patch, count
            job.patch_offsets = at[2] + k * patch_offsets.strides[0]
            first_patch += count
        return memory, scales

    def _copied(
        self, arrays: list[np.ndarray], packed: list[np.ndarray], streams: list[np.ndarray]
    ) -> tuple[Tensor, list[int], tuple[int, int]]:
        """Copy everything to the device.

        Returns:
            The device's memory; the address of each array and stream there; the range of the packed bytes.
        """
        at, size = [], 0
        for array in arrays:
            at.append(size)
            size += _aligned(array.nbytes)
        first, pieces, starts = size, [*arrays, *packed], list(at)
        for array in packed:
            starts.append(size)
            size += array.nbytes
        last, size = size, _aligned(size)
        for stream in streams:
            at.append(size)
            starts.append(size)
            size += _aligned(stream.nbytes)
        host = transfer.pinned((size,), torch.uint8, self._device)
        _gather([*pieces, *streams], starts, host)
        memory = transfer.upload(host, self._device)
        base = memory.data_ptr()
        return memory, [base + offset for offset in at], (first, last)

    def _offsets(self) -> np.ndarray:
        """Return where the streams of each section begin, and where the last one ends: uint64 [sections, tiles + 1]."""
        offsets = np.zeros((len(self._parts), self._tiles + 1), np.uint64)
        if self._parts:
            sizes = np.concatenate([part.found.tile_bytes for part in self._parts])
            np.cumsum(sizes.reshape(len(self._parts), -1), axis=1, dtype=np.uint64, out=offsets[:, 1:])
        return offsets

    def _patches(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the exceptions of all jobs (cg_job).

        Returns:
            The patches, uint64 [n]: by job, tile and row; the first patch of each tile, counted in its job, and behind
            the last one the job's number, uint32 [jobs, tiles + 1]; the number of each job, int64 [jobs].
        """
        tiles, jobs = self._tiles, len(self._jobs)
        if not self._patched:
            return np.empty(0, np.uint64), np.empty((0, tiles + 1), np.uint32), np.zeros(jobs, np.int64)
        rows = [(k, p.number, *p.rows) for k, p in self._patched]
        lengths = [len(part.found.positions) for _, part in self._patched]
        job, number, first, gap_at, gap = np.repeat(np.array(rows, np.int64), lengths, axis=0).T
        positions = np.concatenate([part.found.positions for _, part in self._patched])
        indices = np.concatenate([part.found.indices for _, part in self._patched])
        token, channel = np.divmod(positions, self._channels)
        row = token + first + (token >= gap_at) * gap
        of_tile = job * tiles + channel // ops.TILE_COLUMNS
        order = np.argsort(of_tile << 32 | row, kind="stable")
        words = row << 32 | channel % ops.TILE_COLUMNS << 16 | number << 8 | indices
        per_tile = np.bincount(of_tile, minlength=jobs * tiles).reshape(jobs, tiles)
        offsets = np.zeros((jobs, tiles + 1), np.uint32)
        np.cumsum(per_tile, axis=1, out=offsets[:, 1:])
        return words[order].view(np.uint64), offsets, per_tile.sum(1)


def _gather(pieces: list[np.ndarray], starts: list[int], host: Tensor) -> None:
    """Copy arrays of bytes to these offsets of a host tensor, by several threads where the compiled coder is there."""
    if native.offers(GATHER, _HOST):
        table = np.empty((len(pieces), 3), np.uint64)
        table[:, 0] = [_address(piece) for piece in pieces]
        table[:, 1] = starts
        table[:, 2] = [piece.nbytes for piece in pieces]
        native.call(GATHER, _address(table), len(pieces), host, host.numel())
        return
    view = host.numpy()
    for start, piece in zip(starts, pieces, strict=True):
        view[start : start + piece.nbytes] = piece


def _aligned(size: int) -> int:
    return -(-size // _WORD) * _WORD


def _address(array: np.ndarray) -> int:
    found: int = array.__array_interface__["data"][0]
    return found
