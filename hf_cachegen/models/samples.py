"""Samples of tensors: a few values of each, read before every reuse of a cache.

Some writers go past the version counter of a tensor: `parameter.data`, through which PEFT merges adapters, and fused
optimisers. The samples find these writes if they change a sampled value.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
import xxhash
from torch import Tensor

SAMPLE_BYTES = 64
"""Bytes read at the beginning and in the middle of a tensor on the CPU."""
SAMPLES = 8
"""Values read of a tensor elsewhere, evenly spread (at most one more for each, where they do not divide its size)."""


class Samples:
    """Where the samples of some tensors are; reads them without touching the tensors again.

    The tensors must not be freed, moved or resized between two reads. No memory is kept alive: one of them may be the
    memory of a model that its owner moves to another device.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._windows: list[ctypes.Array[ctypes.c_char]] = []
        elsewhere: list[Tensor] = []
        for tensor in tensors:
            size = tensor.nbytes
            if size and tensor.is_cpu and tensor.is_contiguous():
                # The tensor's memory has `size` bytes from its address on.
                address, part = tensor.data_ptr(), min(SAMPLE_BYTES, size // 2 + 1)
                for at, count in ((0, part), (size // 2, min(part, size - size // 2))):
                    self._windows.append((ctypes.c_char * count).from_address(address + at))
            elif size:
                elsewhere.append(tensor)
        self.all_here = not elsewhere
        """Whether `read` needs no tensors."""

    def read(self, tensors: Sequence[Tensor]) -> str:
        """Hash the samples of `tensors`, which are those that this object was made for; on devices, with at most one
        transfer for each dtype.
        """
        # One join and one hash of memory are much cheaper than an operation of torch for each tensor.
        found = xxhash.xxh3_128(b"".join(self._windows))
        if not self.all_here:
            _read_elsewhere(tensors, found)
        return found.hexdigest()


def _read_elsewhere(tensors: Sequence[Tensor], found: xxhash.xxh3_128) -> None:
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.nbytes and not (tensor.is_cpu and tensor.is_contiguous()):
            # Not every operation knows every float of 8 bits.
            values = tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
            values = values.view(-1) if values.is_contiguous() else values[(0,) * (values.dim() - 1)]
            groups.setdefault((values.device, values.dtype), []).append(values[:: max(1, len(values) // SAMPLES)])
    for values_of in groups.values():
        found.update(torch.cat(values_of).view(torch.uint8).cpu().numpy().tobytes())
