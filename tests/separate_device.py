"""A stand-in for a device with memory of its own: what would be copied to a GPU is copied and noted, and the kernels
run on the CPU in lockstep.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import Tensor

from hf_cachegen.codec import basis, native, transfer
from tests.lockstep import in_lockstep

Note = tuple[str, int]
"""What happened, and its bytes: "pinned", "upload", "send", "download", "wait", or a function of the library (0)."""


@contextmanager
def separate_device(*, busy: bool = False) -> Iterator[list[Note]]:
    """Note the copies to and from the device, the waits for it and the library's calls in this context, in order.

    busy: No launch is done before the host waits for it.
    """
    notes: list[Note] = []
    call = native.call

    def pinned(shape: tuple[int, ...], dtype: torch.dtype, _: torch.device) -> Tensor:
        found = torch.empty(shape, dtype=dtype)
        notes.append(("pinned", found.nbytes))
        return found

    def upload(host: Tensor, _: torch.device, to: Tensor | None = None) -> Tensor:
        notes.append(("upload", host.nbytes))
        return host.clone() if to is None else to.copy_(host)

    def send(tensor: Tensor, _: torch.device) -> Tensor:
        notes.append(("send", tensor.nbytes))
        return tensor.clone()

    class Download(transfer.Download):
        def __init__(self, tensor: Tensor):
            notes.append(("download", tensor.nbytes))
            super().__init__(tensor)

        def wait(self) -> Tensor:
            notes.append(("wait", 0))
            return super().wait()

    def counted(name: str, *arguments: object, **options: object) -> None:
        notes.append((name, 0))
        call(name, *arguments, **options)  # type: ignore[arg-type]

    patched = {"pinned": pinned, "upload": upload, "send": send, "Download": Download}
    with ExitStack() as stack:
        stack.enter_context(in_lockstep())
        stack.enter_context(mock.patch.object(transfer, "is_host", return_value=False))
        stack.enter_context(mock.patch.object(native, "call", counted))
        stack.enter_context(mock.patch.object(basis, "send", send))
        stack.enter_context(mock.patch.object(transfer.Timer, "done", not busy))
        for name, value in patched.items():
            stack.enter_context(mock.patch.object(transfer, name, value))
        yield notes
