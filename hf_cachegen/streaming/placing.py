"""Decoded chunks into the context's final tensors, layer by layer on the devices where they will be used.

A chunk that is not there yet is decoded straight into place. A refinement is decoded beside it and copied over it when
it is whole: decoding that fails must not harm what is there, and who reads shall not wait for a decoder.

On one CUDA device all that happens on a stream of its own, and rows go over from pinned memory, so that neither the
decoder nor the model waits for a copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from hf_cachegen.codec.chunk import Span
from hf_cachegen.codec.geometry import Geometry
from hf_cachegen.codec.into import Target
from hf_cachegen.codec.rows import empty_kv, scatter
from hf_cachegen.codec.transforms import Transform
from hf_cachegen.models.layers import KVTensors


class Placer:
    """The tensors of a context of that geometry, layer i's on devices[i]."""

    def __init__(self, geometry: Geometry, devices: Sequence[torch.device]) -> None:
        self.geometry = geometry
        self._tensors = empty_kv(geometry, devices)
        self.keys, self.values = self._tensors[::2], self._tensors[1::2]
        self._target = Target.layers(self._tensors) if len(set(devices)) == 1 else None
        self._stream = None
        if self._target is not None and devices[0].type == "cuda":
            self._stream = torch.cuda.Stream(devices[0])
            self._stream.wait_stream(torch.cuda.current_stream(devices[0]))
            for x in self._tensors:  # whoever drops them: their memory is not given away before that stream is done
                x.record_stream(self._stream)

    def decode(self, codec: Transform, parts: Sequence[bytes], span: Span) -> None:
        """Into place. Raises what the codec does, and then the chunk's tokens mean nothing."""
        if self._target is None:
            self.put(self.rows(codec, parts, span), span)
            return
        with self._aside():
            codec.decode_into(parts, span, self._target, span.first)

    def rows(self, codec: Transform, parts: Sequence[bytes], span: Span) -> Tensor:
        """[tokens, columns], on the CPU, for `put`. Raises what the codec does."""
        return codec.decode(parts, span, self._tensors[0].dtype)

    def put(self, rows: Tensor, span: Span) -> None:
        """Into place."""
        if self._stream is None:
            scatter(rows, self._tensors, span)
            return
        with self._aside():
            scatter(rows.pin_memory().to(self._tensors[0].device, non_blocking=True), self._tensors, span)

    def settle(self) -> None:
        """What was decoded and put is there for whatever the calling thread does next."""
        if self._stream is not None:
            torch.cuda.current_stream(self._tensors[0].device).wait_stream(self._stream)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """What the calling thread reads meanwhile is not written over before its device has read it; nothing else may
        be decoded or put meanwhile.
        """
        self.settle()
        yield
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._tensors[0].device))

    def kv(self) -> KVTensors:
        """All of it."""
        self.settle()
        return KVTensors(tuple(self.keys), tuple(self.values), self.geometry)

    def _aside(self) -> Any:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
