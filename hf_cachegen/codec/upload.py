"""Bring the coded bytes of a batch of chunks to a device: one copy from pinned memory, and the jobs that point into it.

    u64 offsets[sections][tiles + 1]; u64 patches; u32 patch_offsets[jobs][tiles + 1]; scales; streams, one by one

The offsets, patches and addresses of all chunks are computed together. A numpy call per section would take longer than
the launch. On the host nothing is copied: the jobs point to the given bytes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hf_cachegen.codec import abi, native, ops, transfer
from hf_cachegen.codec.headers import Headers
from hf_cachegen.codec.wide import nearest

_WORD = 8
"""Alignment of every array in the copied bytes, in bytes."""
GATHER = "cg_gather"
_HOST = torch.device("cpu")
JOB = np.dtype(abi.Job)
_STREAMS = abi.Job.base.offset // _WORD
"""The word of a job that its `Streams` begin at: of the base, two digits and two end digits, of three words each."""
_NUMBERS = np.array([0, 1, 2, 1, 2])
"""The number of each of them in a patch (cg_job)."""


class Upload:
    """Gather the sections of a batch's jobs, then copy them.

    Args:
        device: Of the target.
        channels: Of a chunk.
        jobs: JOB [jobs]. Those without sections stay as they are.
    """

    def __init__(self, device: torch.device, channels: int, jobs: np.ndarray):
        self._device, self._channels, self._jobs = device, channels, jobs
        self._parts: list[tuple[Headers, np.ndarray]] = []
        self._kept: list[np.ndarray] = []

    def add(
        self, found: Headers, job: np.ndarray, streams: np.ndarray | int, first: np.ndarray | int = 0,
        gap_at: np.ndarray | int = 0, gap: np.ndarray | int = 0,
    ) -> None:  # fmt: skip
        """Add sections. Every argument has a number for each of them, or one number for all.

        Args:
            found: The sections.
            job: Their jobs.
            streams: What each becomes in its job: 0: the base; 1, 2: digits; 3, 4: end digits.
            first, gap_at, gap: The coded rows of its tokens (`into.Rows`).
        """
        places = np.empty((len(found.which), 5), np.int64)
        for column, values in enumerate((job, streams, first, gap_at, gap)):
            places[:, column] = values
        self._parts.append((found, places))

    def send(self, scales: Sequence[memoryview]) -> tuple[Tensor, Tensor]:
        """Copy all bytes, and write their addresses into the jobs. Nothing waits for the device.

        Args:
            scales: The scales of the chunks' anchors.

        Returns:
            The memory that the addresses point into, which must outlive the launch; the scales, uint8 [bytes], on the
            device.
        """
        offsets, places, streams = (
            np.concatenate(x)
            for x in zip(*((x.offsets, own, x.addresses()) for x, own in self._parts), strict=True)
        )
        sizes, packed = offsets[:, -1], np.frombuffer(bytearray().join(scales), np.uint8)
        patches, patch_offsets = self._patches(places)
        arrays = self._kept = [offsets, patches, patch_offsets, packed]
        if transfer.is_host(self._device):
            memory, at = torch.empty(0, dtype=torch.uint8), [_address(array) for array in arrays]
            factors = torch.from_numpy(packed)
        else:
            memory, begins = self._copied(arrays, streams, sizes)
            addresses = begins + memory.data_ptr()
            at, streams = addresses[: len(arrays)].tolist(), addresses[len(arrays) :]
            factors = memory[int(begins[3]) :][: len(packed)]
        words = self._jobs.view(np.uint64).reshape(len(self._jobs), -1)
        job, word = places[:, 0], _STREAMS + 3 * places[:, 1]
        words[job, word], words[job, word + 1] = streams, sizes
        words[job, word + 2] = at[0] + offsets.strides[0] * np.arange(len(offsets))
        if len(patches):
            counts = patch_offsets[:, -1].astype(np.int64)
            self._jobs["n_patches"] = counts
            self._jobs["patches"] = at[1] + patches.itemsize * (np.cumsum(counts) - counts)
            self._jobs["patch_offsets"] = at[2] + patch_offsets.strides[0] * np.arange(len(counts))
        return memory, factors

    def _copied(
        self, arrays: Sequence[np.ndarray], streams: np.ndarray, sizes: np.ndarray
    ) -> tuple[Tensor, np.ndarray]:
        """Copy everything to the device.

        Args:
            arrays: What lies before the streams.
            streams: uint64 [sections], their addresses.
            sizes: uint64 [sections], in bytes.

        Returns:
            The device's memory; where each array and stream begins in it.
        """
        own = np.array([(_address(array), array.nbytes) for array in arrays], np.uint64)
        addresses, sizes = np.concatenate([own[:, 0], streams]), np.concatenate([own[:, 1], sizes])
        rooms = (sizes + (_WORD - 1)) // _WORD * _WORD
        ends = np.cumsum(rooms)
        begins = ends - rooms
        host = transfer.pinned((int(ends[-1]),), torch.uint8, self._device)
        _gather(np.stack([addresses, begins, sizes], 1), host)
        return transfer.upload(host, self._device), begins

    def _patches(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the exceptions of all jobs (cg_job).

        Args:
            places: Those of all sections.

        Returns:
            The patches, uint64 [n]: by job, tile and row; the first patch of each tile, counted in its job, and behind
            the last one the job's number, uint32 [jobs, tiles + 1].
        """
        tiles, jobs = ops.tile_count(1, self._channels), len(self._jobs)
        counts = [len(found.of) for found, _ in self._parts]
        if not any(counts):
            return np.empty(0, np.uint64), np.empty((0, tiles + 1), np.uint32)
        before = np.cumsum([0, *(len(found.which) for found, _ in self._parts[:-1])])
        of = np.concatenate([found.of for found, _ in self._parts]) + np.repeat(before, counts)
        positions, indices = (
            np.concatenate(found) for found in zip(*((x.positions, x.indices) for x, _ in self._parts), strict=True)
        )
        job, streams, first, gap_at, gap = places[of].T
        token, channel = np.divmod(positions, self._channels)
        row = token + first + (token >= gap_at) * gap
        of_tile = job * tiles + channel // ops.TILE_COLUMNS
        order = np.argsort(of_tile << 32 | row, kind="stable")
        words = row << 32 | channel % ops.TILE_COLUMNS << 16 | _NUMBERS[streams] << 8 | nearest(indices)
        per_tile = np.bincount(of_tile, minlength=jobs * tiles).reshape(jobs, tiles)
        offsets = np.zeros((jobs, tiles + 1), np.uint32)
        np.cumsum(per_tile, axis=1, out=offsets[:, 1:])
        return words[order].view(np.uint64), offsets


def _gather(pieces: np.ndarray, host: Tensor) -> None:
    """Copy pieces of memory (struct cg_piece) to a host tensor: by several threads, if there is the compiled coder."""
    if native.offers(GATHER, _HOST):
        native.call(GATHER, _address(pieces), len(pieces), host, host.numel())
        return
    for address, start, size in pieces.tolist():
        ctypes.memmove(host.data_ptr() + start, address, size)


def _address(array: np.ndarray) -> int:
    found: int = array.__array_interface__["data"][0]
    return found
