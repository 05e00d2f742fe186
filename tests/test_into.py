"""Decoding in place: the same values as stage by stage, into any tensors, and by the kernels in lockstep."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from hf_cachegen import CacheGenConfig
from hf_cachegen.codec import launching, native
from hf_cachegen.codec.context import Encoder
from hf_cachegen.codec.into import Target
from hf_cachegen.codec.section import Cursor
from hf_cachegen.codec.transforms.delta import Delta
from hf_cachegen.codec.transforms.identity import Identity
from hf_cachegen.errors import CorruptError, TruncatedError
from tests.kv_samples import sample_kv
from tests.lockstep import in_lockstep, needs_compiler

pytestmark = pytest.mark.skipif(not native.available(), reason="the package was installed without a C++ compiler")

CASES = [
    pytest.param(transform, protect, dtype, id=f"{transform}-protect {protect}-{str(dtype).removeprefix('torch.')}")
    for transform in ("delta", "identity")
    for protect in ((0, 0), (4, 64), (500, 500))
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
]


def encoder(transform: str, protect: tuple[int, int] = (4, 64), dtype: torch.dtype = torch.bfloat16) -> Encoder:
    config = CacheGenConfig(transform=transform, chunk_tokens=64, protect_first=protect[0], protect_last=protect[1])
    return Encoder(*sample_kv(dtype=dtype), config)


def both_ways(made: Encoder, level: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Decode all chunks in place and stage by stage, into tensors that hold NaN before."""
    assert isinstance(made.codec, Delta | Identity)
    inner = made.codec.inner
    found = []
    for staged in (False, True):
        pairs = zip(made.rows.keys, made.rows.values, strict=True)
        tensors = [torch.full_like(x, float("nan")) for pair in pairs for x in pair]
        target = Target.layers(tensors)
        for span, parts in zip(made.rows.spans, made.chunks(), strict=True):
            if staged:
                rows = inner._rows(inner.read(parts[:level], span), span, tensors[0].dtype)
                target.put(rows, span.first)
            else:
                made.codec.decode_into(parts[:level], span, target, span.first)
        found.append(tensors)
    return found[0], found[1]


@pytest.mark.parametrize(("transform", "protect", "dtype"), CASES)
@pytest.mark.parametrize("level", [1, 2, 3])
def test_decoding_in_place_equals_the_stages(
    transform: str, protect: tuple[int, int], dtype: torch.dtype, level: int
) -> None:
    direct, staged = both_ways(encoder(transform, protect, dtype), level)
    for x, y in zip(direct, staged, strict=True):
        assert torch.equal(x, y)


@needs_compiler
@pytest.mark.parametrize("transform", ["delta", "identity"])
def test_the_kernels_write_the_same_bytes_and_values(transform: str) -> None:
    here = encoder(transform)
    chunks, expected = list(here.chunks()), [both_ways(here, level)[0] for level in (1, 2, 3)]
    with in_lockstep():
        there = encoder(transform)
        assert there.codec.side_bytes() == here.codec.side_bytes()
        assert list(there.chunks()) == chunks
        for level, tensors in zip((1, 2, 3), expected, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(both_ways(there, level)[0], tensors, strict=True))


def test_tensors_may_have_any_strides() -> None:
    made = encoder("delta")
    direct, _ = both_ways(made, 2)
    strange = [torch.empty(*x.shape[:2], x.shape[3], x.shape[2], dtype=x.dtype).transpose(2, 3) for x in direct]
    target = Target.layers(strange)
    for span, parts in zip(made.rows.spans, made.chunks(), strict=True):
        made.codec.decode_into(parts[:2], span, target, span.first)
    assert all(torch.equal(x, y) for x, y in zip(direct, strange, strict=True))


def test_values_that_no_byte_holds_are_decoded_by_stages() -> None:
    keys, values = sample_kv(dtype=torch.float32)
    keys[0][0, 0, 140] *= 1e4
    made = Encoder(keys, values, CacheGenConfig(transform="identity", chunk_tokens=64))
    direct, staged = both_ways(made, 3)
    assert all(torch.equal(x, y) for x, y in zip(direct, staged, strict=True))
    assert float((direct[0] - keys[0]).abs().max()) < 100


def test_streams_are_not_copied_and_are_kept_alive() -> None:
    data = bytes(range(200)) * 5
    cursor = Cursor(data)
    cursor.take(3)
    stream = cursor.stream(900)
    assert stream.data_ptr() == np.frombuffer(data, np.uint8).ctypes.data + 3
    assert cursor.stream(0).shape == (0,)
    del cursor, data
    gc.collect()
    others = [bytes(1000) for _ in range(100)]  # would use freed memory
    assert stream.tolist() == (list(range(200)) * 5)[3:903]
    assert others[0] == others[99]
    with pytest.raises(TruncatedError):
        Cursor(b"12").stream(3)


def test_damaged_streams_are_refused() -> None:
    made = encoder("identity")
    target = Target.layers([x.clone() for pair in zip(made.rows.keys, made.rows.values, strict=True) for x in pair])
    parts, span = next(made.chunks()), made.rows.spans[0]
    for at in range(len(parts[0]) // 2, len(parts[0]), 97):
        damaged = bytearray(parts[0])
        damaged[at] ^= 0x10
        with pytest.raises((CorruptError, TruncatedError)):
            made.codec.decode_into([bytes(damaged)], span, target, span.first)


@needs_compiler
@pytest.mark.parametrize("kernels", [False, True], ids=["here", "lockstep"])
def test_contexts_are_the_coarser_symbols(kernels: bool) -> None:
    """Both libraries refuse a section that has other contexts, or tables for contexts where there are none."""
    with in_lockstep() if kernels else nullcontext():
        made, library = encoder("identity"), native._need_library()
        call, refused = library.cg_decode_into, []

        def spy(section: Any, *arguments: Any) -> int:
            for field, value in (("ids_per_column", 4 - section._obj.ids_per_column), ("contexts", 64)):
                before = getattr(section._obj, field)
                setattr(section._obj, field, value)
                refused.append(call(section, *arguments))
                setattr(section._obj, field, before)
            return int(call(section, *arguments))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(library, "cg_decode_into", spy)
            patch.setattr(launching, "serves", lambda *_: False)
            direct, staged = both_ways(made, 3)
    assert all(torch.equal(x, y) for x, y in zip(direct, staged, strict=True))
    assert set(refused) == {native.TileStatus.BAD_ARGUMENT}
