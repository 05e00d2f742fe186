"""Attention sinks: how they are told, that they are finer or exact, and that nothing else pays for them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from hf_cachegen import CacheGenConfig, decode_kv, encode_kv
from hf_cachegen.artifact.artifact import Artifact, write
from hf_cachegen.codec.chunk import Span
from hf_cachegen.codec.context import codec_of
from hf_cachegen.codec.into import Target
from hf_cachegen.codec.rows import gather, spans_of
from hf_cachegen.codec.sinks import FINER, LEAST_TOKENS, find_sinks
from hf_cachegen.codec.transforms.identity import Identity
from hf_cachegen.codec.transforms.klt import DIGEST_BYTES, Klt
from hf_cachegen.errors import CorruptError, TensorError, TruncatedError
from hf_cachegen.stores import LocalStore
from tests.test_klt_tables import CONFIG, TOKENS, geometry, make_profile

IDENTITY = CacheGenConfig(transform="identity", chunk_tokens=32, protect_first=2, protect_last=8)
SINKS = [0, 40, 70]


def kv(sinks: list[int], dtype: torch.dtype = torch.float32, batch: int = 1) -> tuple[list[Tensor], list[Tensor]]:
    """Random values; keys of sinks are a tenth as long as others', and their values far from others'."""
    x = torch.randn(2, 3, batch, 2, TOKENS, 8, generator=torch.Generator().manual_seed(0))
    x[0] /= x[0].norm(dim=-1, keepdim=True)
    x[0, ..., sinks, :] /= 10
    x[1, ..., sinks, :] += 30
    return list(x[0].to(dtype)), list(x[1].to(dtype))


@pytest.mark.parametrize("sinks", [[], [0], [99], SINKS], ids=str)
def test_sinks_are_told_by_their_keys(sinks: list[int]) -> None:
    keys, _ = kv(sinks)
    assert find_sinks(keys).tolist() == sinks
    assert find_sinks([x.bfloat16() for x in keys]).tolist() == sinks
    assert find_sinks([x[:, :, : LEAST_TOKENS - 1] for x in keys]).tolist() == []


def test_where_lengths_vary_a_short_key_says_nothing() -> None:
    keys, _ = kv([])
    lengths = torch.logspace(-1, 1, TOKENS)[torch.randperm(TOKENS, generator=torch.Generator().manual_seed(0))]
    assert find_sinks([x * lengths[:, None] for x in keys]).tolist() == []
    for strange in (torch.zeros_like(keys[0]), torch.full_like(keys[0], float("nan"))):
        assert find_sinks([strange] * 3).tolist() == []


def test_several_rows_have_none() -> None:
    keys, values = kv(SINKS, batch=2)
    assert find_sinks(keys).tolist() == []
    assert not keeps_first(_codec(encode_kv(keys, values, IDENTITY)))


def keeps_first(codec: object) -> bool:
    return isinstance(codec, Identity) and codec.first is not None


def _codec(encoded):
    return codec_of(encoded.geometry, encoded.config, encoded.side, encoded.profile)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_identity_keeps_the_first_token(dtype: torch.dtype) -> None:
    keys, values = kv(SINKS, dtype)
    encoded = encode_kv(keys, values, IDENTITY)
    for level in (1, 2, 3):
        decoded = decode_kv(encoded, level)
        for a, b in zip((*decoded[0], *decoded[1]), (*keys, *values), strict=True):
            assert torch.equal(a[:, :, 0], b[:, :, 0])
            assert not torch.equal(a[:, :, 1], b[:, :, 1])
    codec, rows = _codec(encoded), gather(keys, values, Span(0, 32, TOKENS))
    assert keeps_first(codec)
    for level, expected in enumerate(codec.approximations(rows, Span(0, 32, TOKENS)), 1):
        parts = [part[0] for part in encoded.parts[:level]]
        assert torch.equal(codec.decode(parts, Span(0, 32, TOKENS)), expected)
        target = torch.empty(40, rows.shape[1])
        codec.decode_into(parts, Span(0, 32, TOKENS), Target.matrix(target), 5)
        assert torch.equal(target[5:37], expected)


def test_a_first_token_of_its_own_costs_the_others_nothing() -> None:
    """Its values, far from the rest, are in no symbol."""
    with_one, without = (encode_kv(*kv(sinks), IDENTITY) for sinks in ([0], []))
    row = with_one.geometry.elements // TOKENS * 4
    assert len(with_one.side) == len(without.side) + row
    for one, other in zip(with_one.parts, without.parts, strict=True):
        assert sum(map(len, one)) == pytest.approx(sum(map(len, other)), rel=0.02)


def test_delta_and_lossless_need_nothing_of_it() -> None:
    for config in (CacheGenConfig(transform="delta"), CacheGenConfig(transform="identity", lossless=True, levels=1)):
        with_one, without = (encode_kv(*kv(sinks), config) for sinks in ([0], []))
        assert not keeps_first(_codec(with_one))
        assert config.lossless or len(with_one.side) == len(without.side)


def test_klt_codes_sinks_finer() -> None:
    profile, (keys, values) = make_profile(step_code=136), kv(SINKS)
    values = [x.where(x < 20, x - 30) for x in values]
    encoded = encode_kv(keys, values, CONFIG, profile)
    codec = _codec(encoded)
    assert isinstance(codec, Klt)
    assert codec.sinks.tolist() == SINKS
    for level in (1, 2, 3):
        _, decoded = decode_kv(encoded, level)
        squares = sum((a - b).square().mean((0, 1, 3)) for a, b in zip(decoded, values, strict=True))
        ordinary = [i for i in range(CONFIG.protect_first, TOKENS - CONFIG.protect_last) if i not in SINKS]
        ratio = float((squares[ordinary].mean() / squares[SINKS[1:]].mean()).sqrt())
        assert ratio == pytest.approx(FINER, rel=0.2)
    for span in spans_of(TOKENS, 32):
        rows = gather(keys, values, span)
        parts = codec.encode(rows, span)
        for level, expected in enumerate(codec.approximations(rows, span), 1):
            torch.testing.assert_close(codec.decode(parts[:level], span), expected)


def test_sinks_that_no_encoder_writes() -> None:
    profile = make_profile()
    bitmaps = bytes(3 * 12)

    def side(*positions: int) -> bytes:
        return bytes.fromhex(profile.digest) + bitmaps + torch.tensor(positions, dtype=torch.int32).numpy().tobytes()

    sound = codec_of(geometry(), CONFIG, side(0, 5, 99), profile)
    assert isinstance(sound, Klt)
    assert sound.side_bytes() == side(0, 5, 99)
    for positions in ((5, 5), (5, 4), (100,), (-1,), (0, 2**31 - 1)):
        with pytest.raises(CorruptError, match="sinks"):
            codec_of(geometry(), CONFIG, side(*positions), profile)
    for cut in (1, 2, 3):
        with pytest.raises(CorruptError):
            codec_of(geometry(), CONFIG, side(0, 5)[:-cut], profile)
    assert len(side()) > DIGEST_BYTES


def test_a_first_token_must_be_whole() -> None:
    encoded = encode_kv(*kv([0]), IDENTITY)
    with pytest.raises((CorruptError, TruncatedError)):
        codec_of(encoded.geometry, encoded.config, encoded.side[:-1], None)
    with pytest.raises(CorruptError):
        codec_of(encoded.geometry, encoded.config, encoded.side + b"\0", None)
    keys, values = kv([0])
    values[1][0, 0, 0, 3] = float("inf")
    with pytest.raises(TensorError, match="values of layer 1"):
        encode_kv(keys, values, IDENTITY)


def test_auto_and_files_know_them(tmp_path: Path) -> None:
    keys, values = kv([0])
    encoded = encode_kv(keys, values, CacheGenConfig(chunk_tokens=32))
    assert encoded.config.transform == "identity"
    write(encoded, tmp_path / "a")
    artifact = Artifact(LocalStore(tmp_path / "a"))
    assert artifact.manifest.required == ("sinks",)
    assert artifact.read().side == encoded.side
    assert torch.equal(artifact.decode(1)[1][2][:, :, 0], values[2][:, :, 0])
