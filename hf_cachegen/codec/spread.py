"""Decode a chunk for layers that are on several devices.

The coded bytes go to one GPU, which decodes them. From there the values of every other layer are copied to its own
device. So coded bytes, not values, cross the bus between the host and the GPUs. Without a GPU that can run the compiled
coder the CPU decodes, and values are copied from pinned memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from hf_cachegen.codec import native, transfer
from hf_cachegen.codec.chunk import Span
from hf_cachegen.codec.into import Target
from hf_cachegen.codec.transfer import Check
from hf_cachegen.codec.transforms import Transform


def decoder_of(devices: Sequence[torch.device]) -> torch.device:
    """Return the device that decodes: the first one beside the CPU that has a compiled coder, else the CPU."""
    for device in devices:
        if device.type != "cpu" and native.available(device):
            return device
    return torch.device("cpu")


def launch_apart(
    codec: Transform, chunks: Sequence[tuple[Sequence[bytes | memoryview], Span]], found: Sequence[Tensor]
) -> tuple[list[list[Tensor]], Check]:
    """Start decoding chunks beside the tensors that they belong to.

    Args:
        codec: The fitted transform.
        chunks: The bytes of parts 0..level-1 of each, all of one level, and its position in the context.
        found: Layer 0's keys, its values, layer 1's keys, ..., [batch, heads, tokens, dim]. They are not written.

    Returns:
        For each chunk its values for each tensor [batch, heads, tokens of the chunk, dim], on its device, for
        `put_pieces`; what waits until they are known to be sound.

    Raises:
        CorruptError, TruncatedError: The bytes are damaged; the check raises these too.
    """
    widths, tokens = [x.shape[0] * x.shape[1] * x.shape[3] for x in found], [span.tokens for _, span in chunks]
    device = decoder_of([x.device for x in found])
    rows = torch.empty(sum(tokens), sum(widths), dtype=found[0].dtype, device=device)
    starts = accumulate(tokens, initial=0)
    placed = [(parts, span, row) for (parts, span), row in zip(chunks, starts, strict=False)]
    check = codec.launch(placed, Target.matrix(rows))
    return [_pieces(own, widths, found) for own in rows.split(tokens)], check


def _pieces(rows: Tensor, widths: Sequence[int], found: Sequence[Tensor]) -> list[Tensor]:
    """Return the values of a chunk's rows for each tensor, on its device."""
    pieces, device = [], rows.device
    for x, channels in zip(found, rows.split(list(widths), 1), strict=True):
        piece = channels.reshape(len(rows), x.shape[0], x.shape[1], x.shape[3]).permute(1, 2, 0, 3)
        if x.device != device:
            # A copy to the CPU is read by the host: it waits.
            waits = transfer.is_host(x.device)
            piece = piece.to(x.device) if waits else transfer.send(piece, x.device)
        pieces.append(piece)
    return pieces


def put_pieces(pieces: Sequence[Tensor], found: Sequence[Tensor], first: int) -> None:
    """Write a chunk's values to tokens [first, ...) of the tensors. Each device copies its own memory."""
    for x, piece in zip(found, pieces, strict=True):
        x[:, :, first : first + piece.shape[2]] = piece


def decode_to(
    codec: Transform, parts: Sequence[bytes | memoryview], span: Span, found: Sequence[Tensor], first: int
) -> None:
    """Decode a chunk into tokens [first, ...) of these tensors: at once, or apart where they are on several devices.

    Raises:
        CorruptError, TruncatedError: The bytes are damaged. The chunk's values are undefined then.
    """
    if len({x.device for x in found}) == 1:
        codec.decode_into(parts, span, Target.layers(found), first)
    else:
        (pieces,), check = launch_apart(codec, [(parts, span)], found)
        check()
        put_pieces(pieces, found, first)
