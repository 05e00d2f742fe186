"""Floating-point buffers that no checkpoint holds: rotary frequencies, embedding scales and the like.

They are computed when a model is made, and another machine or release of torch may round them otherwise. So a few
numbers of each are kept and compared within rounding: all values of a small buffer, signed sums of a larger one. A
buffer that was edited, or that `model.bfloat16()` rounded, is another buffer.
"""

from __future__ import annotations

import base64
import binascii
import struct

import torch
from torch import Tensor, nn

from hf_cachegen.errors import ManifestError
from hf_cachegen.models.checksum import signed, words
from hf_cachegen.models.weights import weights

KEPT_VALUES = 64
"""The largest buffer of which all values are kept: the rotary frequencies of a head of 128 channels."""
SUMS = 32
"""Signed sums kept of a larger buffer, and as many sums of magnitudes, which say how well rounding lets them agree."""
MAX_BUFFERS = 64
"""Buffers that are compared; equal ones count once."""
ROUNDING = 8 * torch.finfo(torch.float32).eps
"""Relative difference of one buffer's values on two machines: they come from a few float32 operations."""
SIGN_SEED = 0x6275_6666_6572


@torch.no_grad()
def computed_buffers(model: nn.Module) -> dict[str, str]:
    """Summarise the floating-point buffers of `model` that no checkpoint holds, by name.

    Returns:
        Name -> dtype, shape and base64 of float32 numbers; at most MAX_BUFFERS, equal ones once.
    """
    names: dict[str, str] = {}
    for weight in weights(model):
        if weight.computed:
            for suffix, tensor in weight.stored.parts():
                names.setdefault(_summary(tensor), f"{weight.name}{suffix}".lstrip("."))
    return {name: text for text, name in sorted(names.items(), key=lambda item: item[1])[:MAX_BUFFERS]}


def wrong_buffers(expected: dict[str, str], got: dict[str, str]) -> list[str]:
    """Name the buffers that differ by more than rounding. Raises ManifestError for a damaged summary."""
    return [name for name in sorted(expected.keys() | got.keys()) if not _close(expected.get(name), got.get(name))]


def _summary(tensor: Tensor) -> str:
    values = tensor.detach().reshape(-1).double().cpu()
    if len(values) > KEPT_VALUES:
        period = torch.tensor([signed(word) >> 63 | 1 for word in words(1009, SIGN_SEED)], dtype=torch.float64)
        signs = period.repeat(-(-len(values) // len(period)))[: len(values)]
        rows = torch.zeros(-(-len(values) // SUMS) * SUMS, dtype=torch.float64)
        rows[: len(values)] = values * signs
        values = torch.cat([rows.view(-1, SUMS).sum(0), rows.view(-1, SUMS).abs().sum(0)])
    numbers = base64.b64encode(struct.pack(f"<{len(values)}f", *values.tolist())).decode()
    return f"{str(tensor.dtype).removeprefix('torch.')} {'x'.join(map(str, tensor.shape))} {numbers}"


def _numbers(text: str) -> tuple[str, Tensor, Tensor]:
    """(dtype and shape, numbers, magnitude of what each is a sum of)."""
    try:
        dtype, shape, encoded = text.split(" ")
        data = base64.b64decode(encoded, validate=True)
        numbers = torch.tensor(struct.unpack(f"<{len(data) // 4}f", data), dtype=torch.float64)
        count = 1
        for size in shape.split("x"):
            count *= int(size or 1)
    except (ValueError, binascii.Error, struct.error) as error:
        raise ManifestError(f"fingerprint: {text!r:.80} is no summary of a buffer") from error
    if len(numbers) != (count if count <= KEPT_VALUES else 2 * SUMS):
        raise ManifestError(f"fingerprint: {text!r:.80} holds {len(numbers)} numbers, which is not what its shape has")
    if count <= KEPT_VALUES:
        return f"{dtype} {shape}", numbers, numbers.abs()
    return f"{dtype} {shape}", numbers[:SUMS], numbers[SUMS:].abs()


def _close(expected: str | None, got: str | None) -> bool:
    if expected == got or expected is None or got is None:
        return expected == got
    (kind, numbers, scale), (other_kind, other, _) = _numbers(expected), _numbers(got)
    if kind != other_kind:
        return False
    dtype = getattr(torch, kind.split(" ")[0], None)
    coarse = isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize < 4
    rounding = 1.01 * torch.finfo(dtype).eps if isinstance(dtype, torch.dtype) and coarse else ROUNDING
    return bool(((numbers - other).abs() <= rounding * scale).all())
