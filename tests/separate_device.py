"""A stand-in for a device with memory of its own: what the codec would copy to a GPU is copied, counted, and computed on
the CPU by the kernels in lockstep.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from hf_cachegen.codec import native, transfer
from tests.lockstep import in_lockstep


@contextmanager
def separate_device() -> Iterator[Counter[str]]:
    """Count the copies to and from the device, the waits for it and the library's calls inside this context."""
    counts: Counter[str] = Counter()
    call = native.call

    def pinned(shape: tuple[int, ...], dtype: torch.dtype, _: torch.device) -> Tensor:
        counts["pinned"] += 1
        return torch.empty(shape, dtype=dtype)

    def upload(host: Tensor, _: torch.device) -> Tensor:
        counts["upload"] += 1
        return host.clone()

    class Download(transfer.Download):
        def __init__(self, tensor: Tensor):
            counts["download"] += 1
            super().__init__(tensor)

        def wait(self) -> Tensor:
            counts["wait"] += 1
            return super().wait()

    def counted(name: str, *arguments: object, **options: object) -> None:
        counts[name] += 1
        call(name, *arguments, **options)  # type: ignore[arg-type]

    from hf_cachegen.codec import batch

    with in_lockstep(), mock.patch.object(transfer, "is_host", lambda _: False), \
            mock.patch.object(transfer, "pinned", pinned), mock.patch.object(transfer, "upload", upload), \
            mock.patch.object(transfer, "Download", Download), mock.patch.object(batch, "Download", Download), \
            mock.patch.object(native, "call", counted):  # fmt: skip
        yield counts
