"""Code one tensor of any shape exactly, alone or against another tensor of its shape.

The values are cut into byte planes. Plane 0 is the most significant byte. Floats are rotated left by one bit first, so
that plane 0 is the exponent of bf16 and fp32, and the sign comes last. Against a base tensor the difference of the two
integers (modulo their width) is coded in their place. The coding "planes" is:

    u8 bitmap of the coded planes (plane i: bit i); learnt tables (codec/learnt.py); a section; the other planes

The section's matrix is [rows, coded planes x runs], plane-major: a plane is cut into runs of rows = min(RUN, values)
consecutive values, the last one padded with zeros. A byte b has the index b xor 128, so that a run of zero bytes is not
coded. The other planes follow as they are, uint8 [values] each. The coding "raw" is the little-endian bytes of the
values; it is used where it is not longer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_cachegen.codec import learnt, passes, section
from hf_cachegen.codec.section import Assignment, Cursor
from hf_cachegen.codec.tables import VALUE_SYMBOLS, ZERO_INDEX
from hf_cachegen.errors import CorruptError, TensorError

CODINGS = ("raw", "planes")
RUN = 4096
"""Values in a run: the unit that has a table of its own."""
PROB_BITS = 12
RUNS_PER_TABLE = 8
MAX_TABLES_PER_PLANE = 8
"""A table takes 512 bytes: it must be shared by enough runs."""
WORTHWHILE_BITS = 7.9
"""Entropy in bits of a plane's bytes above which the plane is stored as it is."""
MAX_POSITIONS = 1 << 32
"""Exceptions of a section are addressed by 32 bits."""
DTYPES = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
    torch.int32: torch.int32,
    torch.int64: torch.int64,
    torch.uint8: torch.uint8,
}
"""The dtypes that can be coded, each with the integers that hold its bits."""


def encode(tensor: Tensor, base: Tensor | None = None) -> tuple[str, bytes]:
    """Encode a tensor to (coding, bytes).

    Args:
        tensor: any shape with at least one value, of a dtype in DTYPES, on any device.
        base: a tensor of the same shape and dtype, which a decoder has.

    Raises:
        TensorError: the tensor is empty or of another dtype.
    """
    if tensor.dtype not in DTYPES or not tensor.numel():
        names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
        raise TensorError(f"expected a tensor of at least one value, of {names}, got {_described(tensor)}")
    raw = _integers(tensor).view(torch.uint8).numpy().tobytes()
    if len(raw) < MAX_POSITIONS:
        coded = _encode_planes(_planes(tensor, base))
        if len(coded) < len(raw):
            return "planes", coded
    return "raw", raw


def decode(
    data: bytes | memoryview, coding: str, shape: Sequence[int], dtype: torch.dtype, base: Tensor | None = None
) -> Tensor:
    """Decode untrusted bytes to a tensor on the CPU. Inverse of `encode`.

    Args:
        data: the bytes.
        coding: one of CODINGS.
        shape: the shape of the tensor, whose product is within the caller's limits.
        dtype: one of DTYPES.
        base: the tensor that it was coded against.

    Raises:
        TruncatedError, CorruptError: the bytes are damaged, or of another coding or shape.
    """
    values, cursor = math.prod(shape), Cursor(data)
    if coding == "raw":
        bits = cursor.tensor(values, DTYPES[dtype])
    elif coding == "planes" and values * dtype.itemsize < MAX_POSITIONS:
        bits = _joined(_decode_planes(cursor, values, dtype.itemsize), dtype, base)
    else:
        raise CorruptError(f"expected one of the codings {CODINGS}, got {coding!r:.40} for {list(shape)}")
    cursor.finish()
    return bits.view(dtype).reshape(tuple(shape))


def _integers(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().view(DTYPES[tensor.dtype]).reshape(-1)


def _rotated(tensor: Tensor) -> Tensor:
    """Return the bits of a tensor, [values]; those of floats rotated left by one."""
    bits = _integers(tensor)
    return bits << 1 | (bits < 0) if tensor.dtype.is_floating_point else bits


def _planes(tensor: Tensor, base: Tensor | None) -> Tensor:
    """Return the byte planes of a tensor, minus those of its base: uint8 [planes, values]."""
    bits = _rotated(tensor)
    if base is not None:
        bits = bits - _rotated(base)
    return bits.view(torch.uint8).reshape(-1, tensor.dtype.itemsize).flip(1).T.contiguous()


def _joined(planes: Tensor, dtype: torch.dtype, base: Tensor | None) -> Tensor:
    """Return the integers [values] of byte planes. Inverse of `_planes`."""
    bits = planes.T.flip(1).contiguous().view(DTYPES[dtype]).reshape(-1)
    if base is not None:
        bits = bits + _rotated(base)
    if not dtype.is_floating_point:
        return bits
    sign = torch.iinfo(bits.dtype).min
    return bits >> 1 & ~sign | (bits & 1) * sign


def _encode_planes(planes: Tensor) -> bytes:
    chosen = [index for index, plane in enumerate(planes) if _entropy(plane) < WORTHWHILE_BITS]
    if not chosen:
        return bytes([0]) + planes.numpy().tobytes()
    matrix = torch.cat([_runs(planes[index]) for index in chosen], 1).contiguous()
    counts = torch.zeros(matrix.shape[1], VALUE_SYMBOLS, dtype=torch.int32)
    passes.count(counts, matrix)
    runs = matrix.shape[1] // len(chosen)
    tables = min(MAX_TABLES_PER_PLANE, max(1, runs // RUNS_PER_TABLE))
    book = learnt.learn_book(counts.chunk(len(chosen)), tables, PROB_BITS)
    entries, _ = book.choose(counts)
    kept = [planes[index].numpy().tobytes() for index in range(len(planes)) if index not in chosen]
    coded = section.encode(matrix, Assignment(book, entries), coder="rans")
    return b"".join([bytes([sum(1 << i for i in chosen)]), learnt.to_bytes(book, entries), coded, *kept])


def _decode_planes(cursor: Cursor, values: int, count: int) -> Tensor:
    bitmap = cursor.take(1)[0]
    if bitmap >> count:
        raise CorruptError(f"expected {count} byte planes, got the bitmap {bitmap:#x}; fetch the artifact again")
    chosen = [index for index in range(count) if bitmap >> index & 1]
    planes = torch.empty(count, values, dtype=torch.uint8)
    if chosen:
        rows = min(RUN, values)
        runs = -(-values // rows)
        book, entries = learnt.read(cursor, len(chosen) * runs, PROB_BITS)
        matrix = section.read_narrow(cursor, rows, Assignment(book, entries)).decode(coder="rans")
        for index, part in zip(chosen, matrix.chunk(len(chosen), 1), strict=True):
            planes[index] = part.T.reshape(-1)[:values] ^ ZERO_INDEX
    for index in sorted(set(range(count)) - set(chosen)):
        planes[index] = cursor.stream(values)
    return planes


def _runs(plane: Tensor) -> Tensor:
    """Return the indices of a plane as a matrix [rows, runs]."""
    rows = min(RUN, len(plane))
    runs = -(-len(plane) // rows)
    padded = plane.new_zeros(runs * rows)
    padded[: len(plane)] = plane
    return padded.reshape(runs, rows).T ^ ZERO_INDEX


def _entropy(plane: Tensor) -> float:
    """Return the empirical entropy of bytes, in bits per byte."""
    share = torch.bincount(plane.int(), minlength=VALUE_SYMBOLS).double() / len(plane)
    share = share[share > 0]
    return float(-(share * share.log2()).sum())


def _described(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
