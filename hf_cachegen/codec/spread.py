"""Decode chunks into the tensors of a context, whose layers may be on several devices.

Where all layers are on one device, chunks are decoded straight into them. Otherwise the coded bytes go to one GPU,
which decodes them beside the tensors, several chunks together. From there the values of all layers of another device
are one copy. So coded bytes, not values, cross the bus between the host and the GPUs. Without a GPU that can run the
compiled coder the CPU decodes, and values are copied from pinned memory.

Nothing waits for a device before the check of a launch. Values that were decoded beside the tensors are written when
they are known to be sound.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from hf_cachegen.codec import abi, native, transfer
from hf_cachegen.codec.batch import OUTSTANDING
from hf_cachegen.codec.chunk import Placed
from hf_cachegen.codec.into import Target
from hf_cachegen.codec.transfer import Check, Checks, Download, all_of
from hf_cachegen.codec.transforms import Transform

APART_BYTES = 256 << 20
"""Size of the chunks that one launch decodes beside the tensors, in bytes; a larger chunk is decoded alone."""
HOST_BYTES = 64 << 20
"""Size of the chunks that one launch decodes on the host, in bytes: some 40 ms of work, in which no plan can change."""


def decoder_of(devices: Sequence[torch.device]) -> torch.device:
    """Return the device that decodes: the first one beside the CPU that has a compiled coder, else the CPU."""
    for device in devices:
        if device.type != "cpu" and native.available(device):
            return device
    return torch.device("cpu")


class Apart(NamedTuple):
    """Values that were decoded beside the tensors that they belong to.

    Attributes:
        first: The token of the tensors that they begin at.
        values: For each tensor [batch, heads, tokens, dim], on its device. Those of the CPU are there once the launch
            was checked.
    """

    first: int
    values: list[Tensor]


class Destination:
    """The tensors of a context that chunks are decoded into.

    Args:
        tensors: Layer 0's keys, its values, layer 1's keys, ..., [batch, heads, tokens, dim], one or more.

    Attributes:
        device: The device that decodes.
        ahead: Most launches that should stay unchecked while others follow. Where the host decodes there is none.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        devices = [x.device for x in tensors]
        self.device = decoder_of(devices)
        self.ahead = 0 if transfer.is_host(self.device) else OUTSTANDING
        self._tensors = tensors
        self._target = Target.layers(tensors) if len(set(devices)) == 1 else None
        self._widths = [x.shape[0] * x.shape[1] * x.shape[3] for x in tensors]
        self._token_bytes = sum(self._widths) * tensors[0].element_size()

    @property
    def spread(self) -> bool:
        """Whether the tensors are on several devices."""
        return self._target is None

    def together(self, tokens: int, *, apart: bool) -> int:
        """Return how many chunks of that many tokens one launch should decode.

        Args:
            tokens: Of a chunk.
            apart: Whether they are decoded beside the tensors, which is so in any case where these are spread.
        """
        host, apart = transfer.is_host(self.device), apart or self.spread
        if host and apart:
            return 1
        if not host and not apart:
            return abi.MAX_BATCH
        most = HOST_BYTES if host else APART_BYTES
        return min(max(most // max(self._token_bytes * tokens, 1), 1), abi.MAX_BATCH)

    def launch(self, codec: Transform, chunks: Iterable[Placed]) -> Check:
        """Start decoding chunks of one level into the tensors. After an error their values are undefined.

        Args:
            codec: The fitted transform.
            chunks: The chunks, which are taken one by one.

        Returns:
            What waits until all are in the tensors, and known to be sound.

        Raises:
            CorruptError, TruncatedError: The bytes are damaged; the check raises these too.
        """
        if self._target is not None:
            return codec.launch(chunks, self._target)
        checks = Checks(self.ahead)
        for group in self._groups(chunks):
            found, check = self.launch_apart(codec, group)
            checks.add(partial(self._settle, found, check))
        return checks.finish

    def launch_apart(self, codec: Transform, chunks: Sequence[Placed]) -> tuple[list[Apart], Check]:
        """Start decoding chunks of one level beside the tensors.

        Returns:
            The values, for `put`: adjacent chunks together; what waits until they are known to be sound.

        Raises:
            CorruptError, TruncatedError: The bytes are damaged; the check raises these too.
        """
        count = sum(span.tokens for _, span, _ in chunks)
        rows = torch.empty(count, sum(self._widths), dtype=self._tensors[0].dtype, device=self.device)
        placed, at = list[Placed](), 0
        for parts, span, _ in chunks:
            placed.append((parts, span, at))
            at += span.tokens
        checks, found = [codec.launch(placed, Target.matrix(rows))], list[Apart]()
        for first, begin, end in _runs(chunks):
            values, copies = self._values(rows[begin:end])
            found.append(Apart(first, values))
            checks += [_arrived(copy) for copy in copies]
        return found, all_of(checks)

    def put(self, apart: Apart) -> None:
        """Write values to the tensors. Each device copies its own memory."""
        for x, values in zip(self._tensors, apart.values, strict=True):
            x[:, :, apart.first : apart.first + values.shape[2]] = values

    def _settle(self, found: Sequence[Apart], check: Check) -> None:
        check()
        for apart in found:
            self.put(apart)

    def _groups(self, chunks: Iterable[Placed]) -> Iterator[list[Placed]]:
        """Group chunks by what one launch should decode."""
        group: list[Placed] = []
        for chunk in chunks:
            if group and len(group) >= self.together(max(span.tokens for _, span, _ in (*group, chunk)), apart=True):
                yield group
                group = []
            group.append(chunk)
        if group:
            yield group

    def _values(self, rows: Tensor) -> tuple[list[Tensor], list[Download]]:
        """Return the values of rows for each tensor, on its device, and the copies to the host that are under way.

        All tensors of a device that follow one another are one copy.
        """
        values, copies, at = list[Tensor](), list[Download](), 0
        for device, run in groupby(zip(self._tensors, self._widths, strict=True), lambda pair: pair[0].device):
            mine = list(run)
            width = sum(own for _, own in mine)
            part = rows[:, at : at + width]
            at += width
            if device != rows.device and transfer.is_host(device):
                copies.append(Download(part))
                part = copies[-1].host
            elif device != rows.device:
                part = transfer.send(part, device)
            for (x, _), own in zip(mine, part.split([own for _, own in mine], 1), strict=True):
                values.append(own.unflatten(1, (x.shape[0], x.shape[1], x.shape[3])).permute(1, 2, 0, 3))
        return values, copies


def _arrived(copy: Download) -> Check:
    def check() -> None:
        copy.wait()

    return check


def _runs(chunks: Sequence[Placed]) -> Iterator[tuple[int, int, int]]:
    """Yield the tokens of chunks that follow one another: the first in the tensors; the first and the end of all."""
    first, begin, end = 0, 0, 0
    for _, span, row in chunks:
        if row != first + end - begin:
            if end > begin:
                yield first, begin, end
            first, begin = row, end
        end += span.tokens
    if end > begin:
        yield first, begin, end
