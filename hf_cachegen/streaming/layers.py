"""Write decoded chunks into the context's tensors, layer by layer, on the devices where they will be used.

A chunk that is not in place yet is decoded straight into the tensors. A refinement is decoded beside them, on the GPU
where there is one, and copied over the coarser values when it is whole: a failed decoding must not harm them, and a
reader must not wait for a decoder.

On CUDA devices all of this happens on streams of their own, one per device. So neither the decoder nor the model waits
for the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from torch import Tensor

from hf_cachegen.codec.chunk import Span
from hf_cachegen.codec.geometry import Geometry
from hf_cachegen.codec.into import Target
from hf_cachegen.codec.rows import empty_kv
from hf_cachegen.codec.spread import decoder_of, launch_apart, put_pieces
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
        cuda = dict.fromkeys(device for device in devices if device.type == "cuda")
        # The decoder's device comes last, so that its stream is the innermost context.
        order = sorted(cuda, key=lambda device: device == decoder_of(devices))
        self._streams = {device: torch.cuda.Stream(device) for device in order}
        self.adopt(self._tensors)

    def adopt(self, tensors: Iterable[Tensor]) -> None:
        """Order the calling thread's launches before all decoding from now on, which may use `tensors`."""
        for device, stream in self._streams.items():
            stream.wait_stream(torch.cuda.current_stream(device))
        for x in tensors:
            if x.is_cuda and x.device in self._streams:  # when x is freed, the allocator must wait for that stream
                x.record_stream(self._streams[x.device])

    def decode(self, codec: Transform, parts: Sequence[bytes], span: Span) -> None:
        """Decode a chunk into the tensors. Raises what the codec does; then the chunk's values mean nothing."""
        if not self._tensors:  # a model whose layers hold states alone
            return
        if self._target is None:
            self.put(self.rows(codec, parts, span), span)
            return
        with self._aside():
            codec.decode_into(parts, span, self._target, span.first)

    def rows(self, codec: Transform, parts: Sequence[bytes], span: Span) -> list[Tensor]:
        """Decode a chunk beside the tensors, for `put`: a piece [1, heads, tokens, dim] for each, on its device.

        Raises what the codec does. No lock need be held.
        """
        with self._aside():
            (pieces,), check = launch_apart(codec, [(parts, span)], self._tensors)
            check()
        return pieces

    def put(self, pieces: Sequence[Tensor], span: Span) -> None:
        """Copy a decoded chunk into the tensors. Only copies on the tensors' own devices are launched."""
        with self._aside():
            put_pieces(pieces, self._tensors, span.first)

    def settle(self) -> None:
        """Order all decoding and copying so far before whatever the calling thread does next."""
        for device, stream in self._streams.items():
            torch.cuda.current_stream(device).wait_stream(stream)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Protect what the calling thread reads within this context until its device has read it.

        No other thread may decode or copy meanwhile.
        """
        self.settle()
        try:
            yield
        finally:
            for device, stream in self._streams.items():
                stream.wait_stream(torch.cuda.current_stream(device))

    def kv(self) -> KVTensors:
        """Return all tensors."""
        self.settle()
        return KVTensors(tuple(self.keys), tuple(self.values), self.geometry)

    def _aside(self) -> AbstractContextManager[object]:
        """Launch on the streams of this writer inside this context."""
        entered = ExitStack()
        for stream in self._streams.values():
            entered.enter_context(torch.cuda.stream(stream))
        return entered
