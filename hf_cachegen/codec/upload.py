"""Bring the coded bytes of a batch of chunks to a device: one copy from pinned memory, and the jobs that point into it.

A compiled call reads the sections of all chunks, up to where their streams begin, and writes

    u64 offsets[sections][tiles + 1]; scales; u64 patches; u32 patch_offsets[jobs][tiles + 1]; streams, one by one

The streams are gathered behind it by several threads. On the host they are not copied: the jobs point to the given
bytes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_cachegen.codec import abi, native, ops, transfer

READ, GATHER = "cg_read_parts", "cg_gather"
JOB = np.dtype(abi.Job)
_HOST = torch.device("cpu")


class Sent(NamedTuple):
    """The bytes of a batch, on the device.

    Attributes:
        memory: What the jobs point into, which must outlive the launch.
        scales: bfloat16 [anchors of all chunks, vectors].
        sound: Whether an encoder wrote the bytes. If not, nothing was copied.
        wide: The number of each chunk's base symbols that no byte holds.
    """

    memory: Tensor
    scales: Tensor
    sound: bool
    wide: list[int]


class Upload:
    """Copy the bytes of batches, and let their jobs point to them.

    Args:
        device: Of the target.
        channels: Of a chunk.
        digits: Number of refinements that are decoded.
        end_digits: Number of refinements of the protected tokens.
        vectors: Number of scales of an anchor; 0 without anchors.
    """

    def __init__(self, device: torch.device, channels: int, digits: int, end_digits: int, vectors: int):
        self._device, self._tiles, self._vectors = device, ops.tile_count(1, channels), vectors
        self._parts = abi.Parts(columns=channels, anchor_bytes=2 * vectors, n_digits=digits, n_end_digits=end_digits)

    def send(self, parts: Sequence[bytes | memoryview], jobs: np.ndarray) -> Sent:
        """Copy the parts of chunks. Nothing waits for the device.

        Args:
            parts: The base of each chunk, then the first refinement of each, and so on.
            jobs: JOB [jobs], as cg_read_parts takes them.
        """
        host, segments, staged = transfer.is_host(self._device), native.segments_of(parts), abi.Staged()
        self._parts.chunks, self._parts.segments = len(parts) // (1 + self._parts.n_digits), segments.ctypes.data
        sections = abi.PARTS_SECTIONS * self._parts.chunks
        size = int(segments[:, 1].sum()) + sections * (16 + 8 * self._tiles) + len(jobs) * (8 + 4 * self._tiles)
        memory, pieces = transfer.memory(size, self._device), np.empty((sections, 3), np.uint64)
        to = memory if host else transfer.pinned((size,), torch.uint8, self._device)
        native.call(
            READ, self._parts, jobs.ctypes.data, to.data_ptr(), size, memory.data_ptr(),
            None if host else pieces.ctypes.data, staged, device=self._device,
        )  # fmt: skip
        sound, anchors = staged.status == native.TileStatus.OK, int(jobs["tokens"][self._parts.chunks :].sum())
        if sound and not host:
            _gather(pieces[: staged.pieces], to)
            transfer.upload(to[: staged.used], self._device, memory[: staged.used])
        scales = memory[staged.scales :][: 2 * anchors * self._vectors].view(torch.bfloat16)
        return Sent(memory, scales.view(anchors, self._vectors), sound, list(staged.wide))


def _gather(pieces: np.ndarray, host: Tensor) -> None:
    """Copy pieces of memory (struct cg_piece) to a host tensor: by several threads, if there is the compiled coder."""
    if native.offers(GATHER, _HOST):
        native.call(GATHER, pieces.ctypes.data, len(pieces), host, host.numel())
        return
    for address, start, size in pieces.tolist():
        ctypes.memmove(host.data_ptr() + start, address, size)
