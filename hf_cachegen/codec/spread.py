"""Decode a chunk for layers that are on several devices.

The coded bytes go to one GPU, which decodes them. From there the values of every other layer are copied to its own
device. So coded bytes, not values, cross the bus between the host and the GPUs. Without a GPU that can run the compiled
coder the CPU decodes, and values are copied from pinned memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_cachegen.codec import native, transfer
from hf_cachegen.codec.chunk import Span
from hf_cachegen.codec.into import Target
from hf_cachegen.codec.transforms import Transform


def decoder_of(devices: Sequence[torch.device]) -> torch.device:
    """Return the device that decodes: the first one beside the CPU that has a compiled coder, else the CPU."""
    for device in devices:
        if device.type != "cpu" and native.available(device):
            return device
    return torch.device("cpu")


def decode_apart(
    codec: Transform, parts: Sequence[bytes | memoryview], span: Span, found: Sequence[Tensor]
) -> list[Tensor]:
    """Decode a chunk beside the tensors that it belongs to, and wait until it is known to be sound.

    Args:
        codec: The fitted transform.
        parts: The bytes of parts 0..level-1.
        span: The position of the chunk in the context.
        found: Layer 0's keys, its values, layer 1's keys, ..., [batch, heads, tokens, dim]. They are not written.

    Returns:
        For each tensor the chunk's values [batch, heads, tokens of the chunk, dim], on its device, for `put_pieces`.

    Raises:
        CorruptError, TruncatedError: The bytes are damaged.
    """
    widths = [x.shape[0] * x.shape[1] * x.shape[3] for x in found]
    device = decoder_of([x.device for x in found])
    rows = torch.empty(span.tokens, sum(widths), dtype=found[0].dtype, device=device)
    codec.decode_into(parts, span, Target.matrix(rows))
    pieces = []
    for x, channels in zip(found, rows.split(widths, 1), strict=True):
        piece = channels.reshape(span.tokens, x.shape[0], x.shape[1], x.shape[3]).permute(1, 2, 0, 3)
        if x.device != device:
            # A copy to the CPU is read by the host: it waits.
            waits = transfer.is_host(x.device)
            piece = piece.to(x.device) if waits else transfer.send(piece, x.device)
        pieces.append(piece)
    return pieces


def put_pieces(pieces: Sequence[Tensor], found: Sequence[Tensor], first: int) -> None:
    """Write the values of `decode_apart` to tokens [first, ...) of the tensors. Each device copies its own memory."""
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
        put_pieces(decode_apart(codec, parts, span, found), found, first)
