"""Decoded chunks into the context's final tensors, layer by layer on the devices where they will be used.

On one CUDA device rows go over in one piece from pinned memory, on a stream of their own, and are spread out there, so
that neither the decoder nor the model waits for a copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_cachegen.codec.chunk import Span
from hf_cachegen.encoding import empty_kv, scatter
from hf_cachegen.geometry import Geometry
from hf_cachegen.layout import KVTensors


class Placer:
    """The tensors of a context of that geometry, layer i's on devices[i]."""

    def __init__(self, geometry: Geometry, devices: Sequence[torch.device]) -> None:
        self.geometry = geometry
        shapes = empty_kv(geometry, "meta")
        places = [device for device in devices for _ in "kv"]
        self._tensors = [torch.empty_like(x, device=place) for x, place in zip(shapes, places, strict=True)]
        self.keys, self.values = self._tensors[::2], self._tensors[1::2]
        self._stream = None
        if len(set(devices)) == 1 and devices[0].type == "cuda":
            self._stream = torch.cuda.Stream(devices[0])
            self._stream.wait_stream(torch.cuda.current_stream(devices[0]))

    def put(self, rows: Tensor, span: Span) -> None:
        """rows [tokens, columns], on the CPU."""
        if self._stream is None:
            scatter(rows, self._tensors, span)
            return
        with torch.cuda.stream(self._stream):
            there = rows.pin_memory().to(self._tensors[0].device, non_blocking=True)
            scatter(there, self._tensors, span)

    def settle(self) -> None:
        """What was put is there for whatever the calling thread does next."""
        if self._stream is not None:
            torch.cuda.current_stream(self._tensors[0].device).wait_stream(self._stream)

    def kv(self) -> KVTensors:
        """All of it."""
        self.settle()
        return KVTensors(tuple(self.keys), tuple(self.values), self.geometry)
