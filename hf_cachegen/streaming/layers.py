"""Write decoded chunks into the context's tensors, layer by layer, on the devices where they will be used.

A chunk that is not in place yet is decoded straight into the tensors. A refinement is decoded beside them and copied
over the coarser values when it is whole: a failed decoding must not harm them, and a reader must not wait for a
decoder.

On one CUDA device all of this happens on a stream of its own, and values are copied from pinned memory. So neither the
decoder nor the model waits for a copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from hf_cachegen.codec.chunk import Span
from hf_cachegen.codec.geometry import Geometry
from hf_cachegen.codec.into import Target
from hf_cachegen.codec.rows import empty_kv, scatter
from hf_cachegen.codec.transforms import Transform
from hf_cachegen.models.layers import KVTensors


class LayerWriter:
    """The keys and values of a context, [1, heads, tokens, dim] for each layer.

    Args:
        geometry: Of the context.
        devices: The device of each layer.
    """

    def __init__(self, geometry: Geometry, devices: Sequence[torch.device]) -> None:
        self.geometry = geometry
        self._tensors = empty_kv(geometry, devices)
        self.keys, self.values = self._tensors[::2], self._tensors[1::2]
        self._target = Target.layers(self._tensors) if len(set(devices)) == 1 else None
        self._stream = None
        if self._target is not None and devices[0].type == "cuda":
            self._stream = torch.cuda.Stream(devices[0])
            self._stream.wait_stream(torch.cuda.current_stream(devices[0]))
            for x in self._tensors:  # when they are freed, the allocator must wait for that stream
                x.record_stream(self._stream)

    def decode(self, codec: Transform, parts: Sequence[bytes], span: Span) -> None:
        """Decode a chunk into the tensors. Raises what the codec does; then the chunk's values mean nothing."""
        if not self._tensors:  # a model whose layers hold states alone
            return
        if self._target is None:
            self.put(self.rows(codec, parts, span), span)
            return
        with self._aside():
            codec.decode_into(parts, span, self._target, span.first)

    def rows(self, codec: Transform, parts: Sequence[bytes], span: Span) -> Tensor:
        """Decode a chunk to [tokens, channels], on the CPU, for `put`. Raises what the codec does."""
        return codec.decode(parts, span, self._tensors[0].dtype)

    def put(self, rows: Tensor, span: Span) -> None:
        """Copy a decoded chunk, [tokens, channels], into the tensors."""
        if self._stream is None:
            scatter(rows, self._tensors, span)
            return
        with self._aside():
            scatter(rows.pin_memory().to(self._tensors[0].device, non_blocking=True), self._tensors, span)

    def settle(self) -> None:
        """Order all decoding and copying so far before whatever the calling thread does next."""
        if self._stream is not None:
            torch.cuda.current_stream(self._tensors[0].device).wait_stream(self._stream)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Protect what the calling thread reads within this context until its device has read it.

        No other thread may decode or copy meanwhile.
        """
        self.settle()
        yield
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._tensors[0].device))

    def kv(self) -> KVTensors:
        """Return all tensors."""
        self.settle()
        return KVTensors(tuple(self.keys), tuple(self.values), self.geometry)

    def _aside(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
