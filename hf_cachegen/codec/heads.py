"""Rows of a matrix product -> the keys or values of several layers: the means added, keys turned to their positions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hf_cachegen.codec import abi, native
from hf_cachegen.codec.passes import DTYPES
from hf_cachegen.codec.profile import Rotary

WRITE = "cg_write_heads"


def write(
    rows: Tensor, mean: Tensor | None, targets: Sequence[Tensor], turn: tuple[Rotary, Tensor] | None = None
) -> None:
    """Write rows to the layers' tensors: in one compiled call, or in torch where the library cannot.

    Args:
        rows: [tokens, channels], float32 or bfloat16, contiguous.
        mean: float32 [channels], which is added; None: nothing.
        targets: [tokens, heads, dim] of each layer in turn, of one float dtype, which receive the values.
        turn: How keys are rotated, and the rotation's `angles` of the tokens. None: they are not.
    """
    turn = None if turn is None or turn[0].style == "none" else turn
    plain = targets[0].dtype in DTYPES and all(x.stride(-1) == 1 and x.device == rows.device for x in targets)
    if not plain or not native.offers(WRITE, rows.device):
        _write_by_torch(rows, mean, targets, turn)
        return
    angles = None if turn is None else turn[1] * turn[0].scaling
    jobs, at, tokens, size = (abi.Heads * len(targets))(), 0, len(rows), targets[0].element_size()
    for job, own in zip(jobs, targets, strict=True):
        _, job.heads, job.dim = own.shape
        job.rows, job.row_stride, job.tokens = rows.data_ptr() + at * rows.element_size(), rows.stride(0), tokens
        job.means = None if mean is None else mean.data_ptr() + at * mean.element_size()
        if turn is not None and angles is not None:
            job.angles, job.pairs, job.interleaved = angles.data_ptr(), angles.shape[-1], turn[0].style == "interleaved"
        job.address, job.token_stride, job.head_stride = own.data_ptr(), own.stride(0) * size, own.stride(1) * size
        job.from_dtype, job.to_dtype = DTYPES[rows.dtype], DTYPES[own.dtype]
        at += job.heads * job.dim
    native.call(WRITE, jobs, len(jobs), device=rows.device)


def _write_by_torch(
    rows: Tensor, mean: Tensor | None, targets: Sequence[Tensor], turn: tuple[Rotary, Tensor] | None
) -> None:
    """Do the same in torch, layer by layer: a layer's values stay in a core's cache."""
    at = 0
    for own in targets:
        part = slice(at, at := at + own.shape[1] * own.shape[2])
        values = rows[:, part] if mean is None else rows[:, part] + mean[part]
        values = values.unflatten(1, own.shape[1:])
        if turn is not None:
            values = turn[0].turn(values.float(), turn[1], 1)
        own.copy_(values)
