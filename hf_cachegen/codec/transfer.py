"""Copy between the host and a device without waiting for the device.

The rest of the codec asks here, so that a test can count copies and waits without a GPU. On the host nothing is copied
and nothing waits.

Notes:
1. Only pinned memory is copied asynchronously. torch keeps the pinned blocks and reuses a block once its copy is done,
   so two or three blocks of the size of a batch alternate.
2. A copy belongs to the current stream. Work that is launched on the same stream later finds it done.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_cachegen.errors import NativeError

_ALIGNMENT = 16
"""Alignment of the tensors that are copied together, in bytes."""
Check = Callable[[], None]
"""Waits for a launch, and raises TruncatedError or CorruptError if it met damaged bytes."""


def is_host(device: torch.device) -> bool:
    """Return whether a device's memory is the host's."""
    return device.type == "cpu"


def stream_number(device: torch.device) -> int:
    """Return a number of the current stream of a device."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def pinned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate host memory that can be copied to or from a device asynchronously."""
    return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")


def upload(host: Tensor, device: torch.device, to: Tensor | None = None) -> Tensor:
    """Copy a tensor of `pinned` to a device, to new memory or to a tensor there. Nothing waits."""
    return host.to(device, non_blocking=True) if to is None else to.copy_(host, non_blocking=True)


def memory(size: int, device: torch.device) -> Tensor:
    """Allocate memory on a device: uint8 [size]."""
    return torch.empty(size, dtype=torch.uint8, device=device)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device without waiting, from the host through pinned memory. One that is there is returned."""
    if is_host(device) or tensor.device == device:
        return tensor
    if not is_host(tensor.device):
        return tensor.to(device, non_blocking=True)
    host = pinned(tuple(tensor.shape), tensor.dtype, device)
    return upload(host.copy_(tensor), device)


def keep(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host to a device, where it stays, without waiting for what the device does."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def send_all(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copy tensors [n] of the host to a device together, in one copy from pinned memory."""
    if is_host(device):
        return list(tensors)
    starts, size = [], 0
    for tensor in tensors:
        starts.append(size)
        size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    host = pinned((size,), torch.uint8, device)
    for start, tensor in zip(starts, tensors, strict=True):
        host[start : start + tensor.nbytes].view(tensor.dtype).copy_(tensor)
    memory = upload(host, device)
    return [memory[a : a + x.nbytes].view(x.dtype) for a, x in zip(starts, tensors, strict=True)]


class Download:
    """The copy of a device's tensor to the host. It is under way until `wait` returns.

    Attributes:
        host: Receives the copy.
    """

    def __init__(self, tensor: Tensor):
        self._event: torch.cuda.Event | None = None
        self.host = tensor
        if tensor.is_cuda:
            self.host = pinned(tuple(tensor.shape), tensor.dtype, tensor.device)
            self.host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tensor.device))

    def wait(self) -> Tensor:
        """Return the copy, on the host. Raises NativeError if the device has failed since."""
        if self._event is not None:
            try:
                self._event.synchronize()
            except RuntimeError as error:
                raise NativeError(f"the device failed while it decoded: {error}") from error
        return self.host


class Timer:
    """The time from its construction to `stop`, on the current stream of a device; on the host, if the host computes.

    A device's time excludes what it had to do before, and work that is launched after `stop`.
    """

    def __init__(self, device: torch.device):
        self._device, self._began, self._seconds = device, time.perf_counter(), 0.0
        self._events: list[torch.cuda.Event] = []
        self._record()

    def stop(self) -> None:
        """End the measurement behind all work that has been launched."""
        self._seconds = time.perf_counter() - self._began
        self._record()

    @property
    def done(self) -> bool:
        """Whether the device has done the work. Nothing waits."""
        return not self._events or self._events[-1].query()

    def seconds(self) -> float:
        """Wait until the work is done, and return its time."""
        if not self._events:
            return self._seconds
        first, last = self._events
        last.synchronize()
        return first.elapsed_time(last) / 1e3

    def _record(self) -> None:
        if self._device.type == "cuda":
            self._events.append(torch.cuda.Event(enable_timing=True))
            self._events[-1].record(torch.cuda.current_stream(self._device))


def all_of(checks: Sequence[Check]) -> Check:
    """Return the check of several launches."""

    def check() -> None:
        for one in checks:
            one()

    return check


class Checks:
    """Checks of launches that are not done yet. At most `most` of them stay open, so that the host runs ahead of the
    device, but not without bound.
    """

    def __init__(self, most: int):
        self._most, self._open = most, deque[Check]()

    def add(self, check: Check) -> None:
        """Add the check of a launch, and settle the oldest ones above the limit."""
        self._open.append(check)
        self._settle(self._most)

    def finish(self) -> None:
        """Settle all. Raises the first error."""
        self._settle(0)

    def _settle(self, most: int) -> None:
        while len(self._open) > most:
            self._open.popleft()()


class Resident:
    """Tensors that stay on devices, each made once, for use on any stream.

    A stream that did not make a tensor waits for the event behind it, once, and the allocator is informed of the use.
    Without that, a stream could read a tensor before it is written, and its memory could be reused too early.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[Any, torch.cuda.Event | None, set[int]]] = {}

    def __reduce__(self) -> tuple[type[Resident], tuple[()]]:
        return Resident, ()  # a copy of its owner makes its own: events cannot be copied

    def get(self, device: torch.device, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return what `make` returned for this device and key: a tensor, or a tuple or list of tensors and numbers."""
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        entry = self._kept.get((device, key))
        if entry is None:
            made, event = make(), None
            if stream is not None:
                event = torch.cuda.Event()
                event.record(stream)
            entry = self._kept[device, key] = (made, event, set() if stream is None else {stream.cuda_stream})
        made, event, ordered = entry
        if stream is not None and event is not None and stream.cuda_stream not in ordered:
            stream.wait_event(event)
            for tensor in _tensors(made):
                tensor.record_stream(stream)
            ordered.add(stream.cuda_stream)
        return made


def _tensors(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    return [x for part in found for x in _tensors(part)] if isinstance(found, (tuple, list)) else []
