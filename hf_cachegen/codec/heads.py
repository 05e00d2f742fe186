"""Rows of a matrix product -> the keys or values of several layers: the means added, keys turned to their positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from hf_cachegen.codec import abi, native
from hf_cachegen.codec.geometry import Geometry
from hf_cachegen.codec.into import Target
from hf_cachegen.codec.passes import DTYPES
from hf_cachegen.codec.profile import Rotary

WRITE = "cg_write_heads"
_JOB = np.dtype(abi.Heads)


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
    jobs, at = list[abi.Heads](), 0
    for own in targets:
        job = _job(own, mean, at, None if turn is None else turn[0])
        job.rows, job.row_stride = rows.data_ptr() + at * rows.element_size(), rows.stride(0)
        job.tokens, job.from_dtype = len(rows), DTYPES[rows.dtype]
        if angles is not None:
            job.cosines, job.sines = angles[0].data_ptr(), angles[1].data_ptr()
        jobs.append(job)
        at += job.heads * job.dim
    native.call(WRITE, (abi.Heads * len(jobs))(*jobs), len(jobs), device=rows.device)


def read(sources: Sequence[Tensor], rows: Tensor, turn: tuple[Rotary, Tensor] | None = None) -> None:
    """Read the layers' tensors to rows, keys turned back from their positions: the inverse of `write` without means.

    Args:
        sources: [tokens, heads, dim] of each layer in turn, of one float dtype.
        rows: float32 [tokens, channels], contiguous, which receive the values.
        turn: As in `write`.
    """
    turn = None if turn is None or turn[0].style == "none" else turn
    plain = sources[0].dtype in (torch.float32, torch.bfloat16)
    plain = plain and all(x.stride(-1) == 1 and x.device == rows.device for x in sources)
    if not plain or not native.offers(WRITE, rows.device):
        _read_by_torch(sources, rows, turn)
        return
    # To the library each head of a layer is a matrix of its own.
    starts = [x.data_ptr() + h * x.stride(1) * x.element_size() for x in sources for h in range(x.shape[1])]
    dims = np.repeat([x.shape[2] for x in sources], [x.shape[1] for x in sources])
    jobs = np.zeros(len(starts), _JOB)
    jobs["rows"], jobs["dim"], jobs["heads"], jobs["tokens"] = starts, dims, 1, len(rows)
    jobs["row_stride"] = np.repeat([x.stride(0) for x in sources], [x.shape[1] for x in sources])
    jobs["address"] = rows.data_ptr() + rows.element_size() * (dims.cumsum() - dims)
    jobs["token_stride"] = rows.stride(0) * rows.element_size()
    jobs["from_dtype"], jobs["to_dtype"] = DTYPES[sources[0].dtype], DTYPES[rows.dtype]
    if turn is not None:
        rotary, angles = turn
        back = angles * angles.new_tensor([1, -1]).view(2, 1, 1, 1) / rotary.scaling
        jobs["cosines"], jobs["sines"], jobs["pairs"] = back[0].data_ptr(), back[1].data_ptr(), back.shape[-1]
        jobs["interleaved"] = rotary.style == "interleaved"
    native.call(WRITE, jobs.ctypes.data, len(jobs), device=rows.device)


def by_token(target: Target, geometry: Geometry) -> list[Tensor]:
    """Return views [tokens, heads, dim] of a target for caches of one context: K and V of each layer in turn."""
    if target.kept[0].dim() == 2:
        return split(target.kept[0], geometry)
    return [x[0].transpose(0, 1) for x in target.kept]


def split(rows: Tensor, geometry: Geometry) -> list[Tensor]:
    """Return views [tokens, heads, dim] of rows [tokens, channels]: K and V of each layer in turn."""
    shapes = [shape for x in geometry.layers for shape in ((x.heads, x.k_dim), (x.v_heads, x.v_dim))]
    parts = rows.split([heads * dim for heads, dim in shapes], 1)
    return [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)]


class Writer:
    """Writes the rows of several products to the layers of one target, at any row of it, in one compiled call.

    Args:
        geometry: Of the cache.
        target: Of its keys and values.
        vectors: What each product gives, side by side: 2 x layer + (0 for K, 1 for V).
        means: float32 [products, channels], which are added. None: nothing is.
        rotary: How keys are rotated.
    """

    def __init__(
        self, geometry: Geometry, target: Target, vectors: Sequence[Sequence[int]], means: Tensor | None, rotary: Rotary
    ):
        self._geometry, self._vectors, self._means, self._rotary = geometry, vectors, means, rotary
        views, device = by_token(target, geometry), target.device
        plain = target.dtype in DTYPES and all(x.stride(-1) == 1 for x in views)
        self._compiled = plain and native.offers(WRITE, device)
        jobs, where = list[abi.Heads](), list[tuple[int, int, int]]()
        for product, mine in enumerate(vectors):
            channel, mean = 0, None if means is None else means[product]
            for vector in mine:
                turned = vector % 2 == 0 and rotary.style != "none"
                jobs.append(_job(views[vector], mean, channel, rotary if turned else None))
                where.append((product, channel, turned))
                channel += jobs[-1].heads * jobs[-1].dim
        self._jobs = np.frombuffer(bytes((abi.Heads * len(jobs))(*jobs)), _JOB)
        self._products, self._channels, self._turned = np.array(where, np.uint64).reshape(-1, 3).T
        self._sized: tuple[tuple[int, torch.dtype], np.ndarray] | None = None

    def write(self, rows: Tensor, target: Target, row: int, angles: Tensor | None) -> None:
        """Write rows to [row, row + tokens) of the target.

        Args:
            rows: [products, tokens, channels], float32 or bfloat16, contiguous, on the target's device.
            target: The one that this was made for.
            row: The first row.
            angles: The rotation's `angles` of the tokens, times its scaling. None: it has none.
        """
        if not self._compiled:
            tokens = slice(row, row + rows.shape[1])
            self._write_by_torch(rows, by_token(target, self._geometry), tokens, angles)
            return
        jobs = self._for(rows).view(np.uint64).copy().view(_JOB)  # numpy copies structures field by field
        jobs["rows"] += np.uint64(rows.data_ptr())
        jobs["address"] += jobs["token_stride"] * np.uint64(row)
        if angles is not None:
            jobs["cosines"] = self._turned * np.uint64(angles[0].data_ptr())
            jobs["sines"] = self._turned * np.uint64(angles[1].data_ptr())
        native.call(WRITE, jobs.ctypes.data, len(jobs), device=rows.device)

    def _for(self, rows: Tensor) -> np.ndarray:
        """Return the jobs for rows of this size, if they and the target's rows began at address 0. Most have one size.
        """
        _, tokens, channels = rows.shape
        if self._sized is None or self._sized[0] != (tokens, rows.dtype):
            jobs, size = self._jobs.copy(), rows.element_size()
            jobs["rows"] = (self._products * np.uint64(tokens * channels) + self._channels) * np.uint64(size)
            jobs["row_stride"], jobs["tokens"], jobs["from_dtype"] = channels, tokens, DTYPES[rows.dtype]
            self._sized = (tokens, rows.dtype), jobs
        return self._sized[1]

    def _write_by_torch(self, rows: Tensor, views: Sequence[Tensor], tokens: slice, angles: Tensor | None) -> None:
        rotary = replace(self._rotary, scaling=1.0)
        for product, mine in enumerate(self._vectors):
            turn = (rotary, angles) if mine[0] % 2 == 0 and angles is not None else None
            mean = None if self._means is None else self._means[product]
            _write_by_torch(rows[product], mean, [views[vector][tokens] for vector in mine], turn)


def _read_by_torch(sources: Sequence[Tensor], rows: Tensor, turn: tuple[Rotary, Tensor] | None) -> None:
    """Do the same in torch, layer by layer: a layer's values stay in a core's cache."""
    parts = rows.split([x.shape[1] * x.shape[2] for x in sources], 1)
    for own, part in zip(sources, parts, strict=True):
        values = own if turn is None else turn[0].turn(own.to(rows.device).float(), turn[1], -1)
        part.unflatten(1, own.shape[1:]).copy_(values)


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


def _job(own: Tensor, mean: Tensor | None, channel: int, rotary: Rotary | None) -> abi.Heads:
    """Return the part of a job that is the same for all rows: the tensor, its means and its kind of rotation.

    Args:
        own: [tokens, heads, dim] of a layer, which receives the values.
        mean: float32 [channels] of the product.
        channel: The first one of this tensor.
        rotary: How keys are rotated. None: they are not.
    """
    _, heads, dim = own.shape
    return abi.Heads(
        means=None if mean is None else mean.data_ptr() + channel * mean.element_size(),
        address=own.data_ptr(), token_stride=own.stride(0) * own.element_size(),
        head_stride=own.stride(1) * own.element_size(), heads=heads, dim=dim,
        pairs=0 if rotary is None else len(rotary.inv_freq),
        interleaved=rotary is not None and rotary.style == "interleaved", to_dtype=DTYPES.get(own.dtype, 0),
    )  # fmt: skip
