"""Write decoded chunks into the context's tensors, layer by layer, on the devices where they will be used.

A chunk that is not in place yet is decoded straight into the tensors. A refinement is decoded beside them, on the GPU
where there is one, and copied over the coarser values when it is whole: a failed decoding must not harm them, and a
reader must not wait for a decoder.

On CUDA devices all of this happens on streams of their own, one per device. So neither the decoder nor the model waits
for the other. Nor does the host wait: a `Launch` says later whether its chunks were sound.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_cachegen.codec.chunk import Span
from hf_cachegen.codec.geometry import Geometry
from hf_cachegen.codec.rows import empty_kv
from hf_cachegen.codec.spread import Apart, Destination, Placed, decoder_of
from hf_cachegen.codec.transfer import Check, Timer, all_of
from hf_cachegen.codec.transforms import Transform
from hf_cachegen.models.layers import KVTensors

Coded = tuple[Sequence[bytes], Span]
"""The parts of a chunk at one level, and its position."""


@dataclass(frozen=True)
class Launch:
    """The decoding of some chunks, which a device may not have done yet.

    Args:
        check: Waits until they are known to be sound. Raises what the codec does.
        timer: The time that the decoder's device takes.
        apart: Values that were decoded beside the tensors, for `put`.
    """

    check: Check
    timer: Timer
    apart: Sequence[Apart] = ()


class LayerWriter:
    """The keys and values of a context, [1, heads, tokens, dim] for each layer.

    Args:
        geometry: Of the context.
        devices: The device of each layer.

    Attributes:
        ahead: Most launches that stay unchecked while others follow. Where the host decodes there is none.
    """

    def __init__(self, geometry: Geometry, devices: Sequence[torch.device]) -> None:
        self.geometry = geometry
        self._tensors = empty_kv(geometry, devices)
        self.keys, self.values = self._tensors[::2], self._tensors[1::2]
        cuda = dict.fromkeys(device for device in devices if device.type == "cuda")
        self._decoder = decoder_of(devices)
        # The decoder's device comes last, so that its stream is the innermost context.
        order = sorted(cuda, key=lambda device: device == self._decoder)
        self._streams = {device: torch.cuda.Stream(device) for device in order}
        self._changed = {device: torch.cuda.Event() for device in order}
        """The last change of the tensors on each device. Decoding beside them may follow it on the same stream."""
        with self._aside():  # the memory that launches read is then not reused before they are done
            self._destination = Destination(self._tensors) if self._tensors else None
        self.ahead = 0 if self._destination is None else self._destination.ahead
        self.adopt(self._tensors)

    def adopt(self, tensors: Iterable[Tensor]) -> None:
        """Order the calling thread's launches before all decoding from now on, which may use `tensors`."""
        for device, stream in self._streams.items():
            stream.wait_stream(torch.cuda.current_stream(device))
        for x in tensors:
            if x.is_cuda and x.device in self._streams:  # when x is freed, the allocator must wait for that stream
                x.record_stream(self._streams[x.device])

    def together(self, tokens: int, *, apart: bool) -> int:
        """Return how many chunks of that many tokens one launch may decode. apart: beside the tensors."""
        return 1 if self._destination is None else self._destination.together(tokens, apart=apart)

    def decode(self, codec: Transform, chunks: Sequence[Coded]) -> Launch:
        """Start decoding chunks of one level into the tensors; beside them, for `put`, if these are on several devices.
        After an error their values are undefined.

        Raises:
            ArtifactError, NativeError: The bytes are damaged; the check of the result raises these too.
        """
        if self._destination is None:  # a model whose layers hold states alone
            return Launch(all_of([]), Timer(self._decoder))
        if self._destination.spread:
            return self.rows(codec, chunks)
        with self._aside():
            timer = Timer(self._decoder)
            check = self._destination.launch(codec, _placed(chunks))
            timer.stop()
        self._note()
        return Launch(check, timer)

    def rows(self, codec: Transform, chunks: Sequence[Coded]) -> Launch:
        """Start decoding chunks of one level beside the tensors, for `put`. No lock need be held.

        Raises:
            ArtifactError, NativeError: The bytes are damaged; the check of the result raises these too.
        """
        if self._destination is None:
            return Launch(all_of([]), Timer(self._decoder))
        with self._aside():
            timer = Timer(self._decoder)
            apart, check = self._destination.launch_apart(codec, _placed(chunks))
            timer.stop()
        return Launch(check, timer, apart)

    def put(self, apart: Apart) -> None:
        """Copy decoded values into the tensors. Only copies on the tensors' own devices are launched."""
        if self._destination is not None:
            with self._aside():
                self._destination.put(apart)
            self._note()

    def settle(self) -> None:
        """Order all changes of the tensors so far before whatever the calling thread does next."""
        for device, event in self._changed.items():
            torch.cuda.current_stream(device).wait_event(event)

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

    def _note(self) -> None:
        """Record that the tensors have changed."""
        for device, stream in self._streams.items():
            self._changed[device].record(stream)

    def _aside(self) -> AbstractContextManager[object]:
        """Launch on the streams of this writer inside this context."""
        entered = ExitStack()
        for stream in self._streams.values():
            entered.enter_context(torch.cuda.stream(stream))
        return entered


def _placed(chunks: Sequence[Coded]) -> list[Placed]:
    return [(parts, span, span.first) for parts, span in chunks]
