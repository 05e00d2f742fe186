"""Quantised recurrent states: an option, with the divergence that they cause."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hf_cachegen import CacheGenCache, CacheGenConfig
from hf_cachegen.artifact import STATES_FILE
from hf_cachegen.artifact.tensors import NamedTensor
from hf_cachegen.errors import ConfigError, CorruptError, TensorError
from hf_cachegen.models.recurrent import Checkpoint, Checkpoints
from hf_cachegen.models.state_coding import dequantise, quantise
from tests import state_models

CONTEXT = torch.randint(3, 97, (1, 120), generator=torch.Generator().manual_seed(1))
LOSSLESS = CacheGenConfig(lossless=True)
STATE = torch.randn(1, 4, 8, 16, generator=torch.Generator().manual_seed(2))
KEY = (3, "recurrent_states", 0)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_error_is_half_a_step(bits: int, dtype: torch.dtype) -> None:
    state = STATE.to(dtype)
    state[0, 0, 0] = 0
    codes, scales = quantise(state, bits)
    found = dequantise(codes, scales)
    assert (codes.dtype, found.dtype, found.shape) == (torch.uint8, dtype, state.shape)
    assert bool((found[0, 0, 0] == 0).all())
    most = (1 << bits - 1) - 1
    rounding = 0.02 if dtype is torch.bfloat16 else 1e-5
    step = state.float().abs().amax(-1, keepdim=True) / most
    assert bool(((found.float() - state.float()).abs() <= 0.5 * step + rounding * (1 + most * step)).all())


def test_a_state_that_is_not_finite_is_refused() -> None:
    with pytest.raises(TensorError, match="not finite"):
        quantise(torch.tensor([[1.0, torch.inf]]), 8)


@pytest.mark.parametrize("name", ["qwen3_next", "mamba", "kimi_linear"])
def test_a_context_with_quantised_states(name: str, tmp_path: Path) -> None:
    model = state_models.shared(name)
    sizes, divergences = [], []
    for bits in (None, 8, 3):
        cache = CacheGenCache.from_context(model, CONTEXT, LOSSLESS, state_bits=bits)
        cache.save_pretrained(tmp_path / str(bits))
        loaded = CacheGenCache.from_pretrained(tmp_path / str(bits), model)
        for ours, theirs in zip(cache.checkpoints.all, loaded.checkpoints.all, strict=True):
            assert ours.states.keys() == theirs.states.keys()
            for (layer, tensor, number), state in ours.states.items():
                got = theirs.states[layer, tensor, number]
                assert got.dtype == state.dtype
                assert torch.equal(got, state) == (bits is None or tensor == "conv_states")
        answer = model.generate(CONTEXT, cache=loaded, max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert answer.shape == (1, 123)
        sizes.append((tmp_path / str(bits) / STATES_FILE).stat().st_size)
        divergences.append(cache.report.state_kl)
    assert divergences[0] is None
    assert sizes[1] < sizes[0]
    assert abs(divergences[1]) < 1e-3
    assert abs(divergences[1]) <= divergences[2] + 1e-6


def test_a_copy_keeps_the_codes(tmp_path: Path) -> None:
    model = state_models.shared("qwen3_next")
    CacheGenCache.from_context(model, CONTEXT, LOSSLESS, state_bits=4).save_pretrained(tmp_path / "a")
    CacheGenCache.from_pretrained(tmp_path / "a", model).save_pretrained(tmp_path / "b")
    assert (tmp_path / "a" / STATES_FILE).read_bytes() == (tmp_path / "b" / STATES_FILE).read_bytes()


@pytest.mark.parametrize("bits", [1, 9])
def test_bits_out_of_range(bits: int) -> None:
    with pytest.raises(ConfigError, match="state_bits must be 2 to 8"):
        CacheGenCache.from_context(state_models.shared("qwen3_next"), CONTEXT, state_bits=bits)


def named(bits: int | None = 8) -> dict[str, NamedTensor]:
    return {item.name: item for item in Checkpoints((Checkpoint(5, {KEY: STATE}),), bits).named()}


def test_parts_that_do_not_fit_are_refused() -> None:
    codes, scales = named().values()
    hostile = {
        "codes alone": [codes],
        "scales alone": [scales],
        "both forms": [codes, scales, *named(None).values()],
        "another shape": [codes, NamedTensor(scales.name, scales.tensor[:, :1], 5)],
        "another dtype": [NamedTensor(codes.name, codes.tensor.int(), 5), scales],
        "whole scales": [codes, NamedTensor(scales.name, scales.tensor.int(), 5)],
    }
    assert Checkpoints.from_named([codes, scales], 9).all[0].states.keys() == {KEY}
    for name, tensors in hostile.items():
        with pytest.raises(CorruptError, match="expected codes"):
            Checkpoints.from_named(tensors, 9)
        assert name
