"""Batches of chunks: decoded together by the kernel, lane by lane on the CPU, they give what each gives alone."""

from __future__ import annotations

import itertools

import pytest
import torch

from hf_cachegen import CacheGenConfig, decode_kv, encode_kv
from hf_cachegen.artifact.encoded import EncodedContext
from hf_cachegen.codec import launching, native
from hf_cachegen.codec.context import Encoder
from hf_cachegen.errors import CorruptError, TruncatedError
from tests.kv_samples import same, sample_kv
from tests.lockstep import in_lockstep, needs_compiler

pytestmark = [
    needs_compiler,
    pytest.mark.skipif(not native.available(), reason="the package was installed without a C++ compiler"),
]


def encoded(transform: str, tokens: int = 700, **options: object) -> EncodedContext:
    keys, values = sample_kv(tokens=tokens, dim=64, **options)  # type: ignore[arg-type]
    return encode_kv(keys, values, CacheGenConfig(transform=transform, chunk_tokens=64, protect_last=64))  # type: ignore[arg-type]


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("transform", ["identity", "delta"])
@pytest.mark.parametrize("tokens", [50, 700])
def test_a_batch_gives_the_values_of_its_chunks(transform: str, level: int, tokens: int, calls: list[str]) -> None:
    context = encoded(transform, tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launching, "serves", lambda *_: False)
        alone = decode_kv(context, level)
    assert "cg_decode_chunks" not in calls
    own = decode_kv(context, level)
    with in_lockstep():
        together = decode_kv(context, level)
    launches = calls.count("cg_decode_chunks")
    assert 2 <= launches <= 12, "11 chunks are two batches, each of ends, of the others, and of anchors"
    for found in (own, together):
        assert all(same(x, y) for x, y in zip(alone, found, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_dtype(dtype: torch.dtype, calls: list[str]) -> None:
    context = encoded("delta", 300, dtype=dtype)
    alone = decode_kv(context, 3)
    with in_lockstep():
        together = decode_kv(context, 3)
    assert "cg_decode_chunks" in calls
    assert all(same(x, y) for x, y in zip(alone, together, strict=True))


def test_chunks_that_no_batch_takes_are_decoded_beside_it(calls: list[str]) -> None:
    """A base symbol that no byte holds, and heads that are no vectors of eight channels."""
    keys, values = sample_kv(tokens=300, dim=64)
    keys[0][0, 0, 70, 3] = 3e4
    for context in (
        encode_kv(keys, values, CacheGenConfig(transform="identity", chunk_tokens=64)),
        encode_kv(*sample_kv(tokens=100, dim=36), CacheGenConfig(transform="identity", chunk_tokens=64)),
    ):
        alone = decode_kv(context, 2)
        with in_lockstep():
            together = decode_kv(context, 2)
        assert all(same(x, y) for x, y in zip(alone, together, strict=True))


@pytest.mark.parametrize("dim", [64, 40])
def test_a_channel_of_zeros_is_coded(dim: int) -> None:
    keys, values = sample_kv(tokens=300, dim=dim)
    keys[1][..., 5] = 0
    made = Encoder(keys, values, CacheGenConfig(transform="identity", chunk_tokens=64)).codec
    assert bool((made.inner.side.base_entries > 0).all())  # type: ignore[union-attr]


@pytest.mark.parametrize("transform", ["identity", "delta"])
def test_damage_in_any_chunk_is_an_error(transform: str) -> None:
    context = encoded(transform, 1200)
    with in_lockstep():
        for chunk, part, cut in itertools.product((0, 7, 16), (0, 2), (False, True)):
            parts = [list(chunks) for chunks in context.parts]
            data = bytearray(parts[part][chunk])
            data[-9] ^= 64
            parts[part][chunk] = bytes(data[:-2] if cut else data)
            damaged = EncodedContext(context.geometry, context.config, context.side, tuple(map(tuple, parts)))
            with pytest.raises((CorruptError, TruncatedError)):
                decode_kv(damaged, 3)
