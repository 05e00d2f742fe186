"""Steps of tokens in the klt transform: what they go by, how they are stored, and what they do to the error."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_cachegen import CacheGenConfig, Profile, decode_kv, encode_kv, learn_profile
from hf_cachegen.codec import token_steps
from hf_cachegen.codec.chunk import Span
from hf_cachegen.codec.into import Target
from hf_cachegen.codec.klt import KltCodec
from hf_cachegen.codec.section import Cursor
from hf_cachegen.encoding import gather
from hf_cachegen.errors import CorruptError, ProfileError, TruncatedError
from hf_cachegen.geometry import Geometry, LayerGeometry
from hf_cachegen.profile import TokenSteps
from tests.test_klt import samples
from tests.test_klt_tables import CONFIG, TOKENS, geometry, make_profile
from tests.tiny_models import make

STEPS = TokenSteps((0.0, 1.0), (-6, 0, 6))
LOUD = (math.exp(-0.5), math.exp(0.5), math.exp(1.5))


def loud_kv() -> tuple[list[Tensor], list[Tensor]]:
    """Random values; the norm of all keys of token i is LOUD[i % 3]."""
    x = torch.randn(2, 3, 1, 2, TOKENS, 8, generator=torch.Generator().manual_seed(0))
    x[0] *= torch.tensor(LOUD)[torch.arange(TOKENS) % 3][:, None] / x[0].norm(dim=-1, keepdim=True)
    return list(x[0]), list(x[1])


def test_norms_are_those_of_the_keys_of_every_layer_and_head() -> None:
    layers = (LayerGeometry("full", 2, 4, 1, 6), LayerGeometry("full", 1, 8, 3, 2))
    keys = [torch.randn(1, layer.heads, 5, layer.k_dim) for layer in layers]
    values = [torch.randn(1, layer.v_heads, 5, layer.v_dim) for layer in layers]
    rows = gather(keys, values, Span(0, 5, 5))
    expected = sum(x[0].norm(dim=-1).log().sum(0) for x in keys) / 3
    torch.testing.assert_close(token_steps.key_norms(rows, Geometry(layers, 5, 1, "float32")), expected)
    silent = token_steps.key_norms(torch.zeros(2, rows.shape[1]), Geometry(layers, 2, 1, "float32"))
    assert bool(silent.isfinite().all())


def test_codes_are_half_a_byte_each() -> None:
    for tokens in range(9):
        codes = torch.randint(-8, 8, (tokens,), dtype=torch.int8)
        data = token_steps.to_bytes(codes)
        assert len(data) == -(-tokens // 2)
        cursor = Cursor(data + b"more")
        assert torch.equal(token_steps.from_bytes(cursor, tokens), codes)
        assert bytes(cursor.rest()) == b"more"
    assert token_steps.to_bytes(torch.tensor([-8, 7, 0], dtype=torch.int8)) == b"\xf0\x08"
    with pytest.raises(CorruptError):
        token_steps.from_bytes(Cursor(b"\xf0\x18"), 3)
    with pytest.raises(TruncatedError):
        token_steps.from_bytes(Cursor(b"\xf0"), 3)
    assert token_steps.finer(torch.tensor([-8, 0, 4], dtype=torch.int8)).tolist() == [[0.25], [1.0], [2.0]]


def test_a_tokens_error_follows_its_step() -> None:
    """Six quarters of an octave apart, in each level; the tokens that are protected as well."""
    profile, (keys, values) = make_profile(step_code=136, token_steps=STEPS), loud_kv()
    encoded = encode_kv(keys, values, CONFIG, profile)
    for level in (1, 2, 3):
        decoded = decode_kv(encoded, level)
        squares = sum((a - b).square().sum((0, 1, 3)) for a, b in zip(decoded[1], values, strict=True))
        ordinary = range(CONFIG.protect_first, TOKENS - CONFIG.protect_last)
        error = [float(squares[[i for i in ordinary if i % 3 == kind]].mean().sqrt()) for kind in range(3)]
        for coarser, finer in pairwise(error):
            assert coarser / finer == pytest.approx(2**1.5, rel=0.15)


def test_what_is_measured_is_what_is_decoded() -> None:
    codec, span = KltCodec(geometry(), CONFIG, make_profile(token_steps=STEPS)), Span(32, 31, TOKENS)
    rows = gather(*loud_kv(), span)
    parts = codec.encode(rows, span)
    assert parts[0][:16] == token_steps.to_bytes(token_steps.codes_of(rows, geometry(), STEPS))
    for level, expected in enumerate(codec.approximations(rows, span), 1):
        found = torch.empty(40, rows.shape[1])
        codec.decode_into([memoryview(part) for part in parts[:level]], span, Target.matrix(found), 5)
        torch.testing.assert_close(found[5:36], expected)
    for damaged in (b"", parts[0][:15], parts[0][:-1], parts[0][1:]):
        with pytest.raises((TruncatedError, CorruptError)):
            codec.decode([damaged, *parts[1:]], span)
    unused = bytes([*parts[0][:15], parts[0][15] | 0xF0])
    with pytest.raises(CorruptError, match="token that it does not have"):
        codec.decode([unused + parts[0][16:], *parts[1:]], span)


def test_steps_follow_what_the_samples_minded() -> None:
    norms = torch.linspace(-3, 3, 4800)
    sensitivities = (2 * norms).exp()
    learnt = token_steps.steps_by_norm(norms, sensitivities / sensitivities.mean())
    assert learnt is not None
    assert learnt.is_sound()
    assert list(learnt.codes) == sorted(learnt.codes)
    assert learnt.codes[0] < 0 < learnt.codes[-1]
    assert len(learnt.codes) == token_steps.BINS
    assert token_steps.steps_by_norm(norms, torch.ones(4800)) is None
    alike = token_steps.steps_by_norm(torch.ones(100), torch.rand(100))
    assert alike is None


def test_a_profile_learns_and_keeps_them(tmp_path: Any) -> None:
    config = CacheGenConfig(transform="klt", chunk_tokens=32, protect_last=8)
    model = make("llama")
    profile = learn_profile(model, samples(), config=config)
    assert profile.token_steps is not None
    assert profile.token_steps.is_sound()
    found = Profile.from_bytes(profile.to_bytes())
    assert found.token_steps == profile.token_steps
    assert found.digest == profile.digest
    assert learn_profile(model, samples(), config=config, token_steps=False).token_steps is None


@pytest.mark.parametrize("steps", [
    TokenSteps((1.0, 0.0), (0, 1, 2)), TokenSteps((0.0, 0.0), (0, 1, 2)), TokenSteps((0.0,), (0,)),
    TokenSteps((), ()), TokenSteps((float("nan"),), (0, 1)), TokenSteps((1e300,), (0, 1)), TokenSteps((0.0,), (0, 8)),
    TokenSteps((0.0,), (-9, 0)), TokenSteps(tuple(map(float, range(256))), (1,) * 257),
], ids=str)  # fmt: skip
def test_steps_that_no_profile_has_are_refused(steps: TokenSteps) -> None:
    assert not steps.is_sound()
    with pytest.raises(ProfileError):
        Profile.from_bytes(replace(make_profile(), token_steps=steps).to_bytes())
