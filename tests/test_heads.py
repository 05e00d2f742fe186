"""Rows are written to the layers' tensors by the compiled library as by torch, within a rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_cachegen.codec import abi, heads, native
from hf_cachegen.codec.profile import Rotary, RotaryStyle
from hf_cachegen.errors import NativeError
from tests.lockstep import in_lockstep, needs_compiler

TOKENS, HEADS, DIM = 133, 3, 20
ISAS = [isa for isa in native.Isa if isa]


@pytest.fixture(params=ISAS, ids=lambda isa: isa.name.lower())
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run on each instruction set of this machine."""
    if not native.available() or request.param not in native.available_isas():
        pytest.skip(f"this machine has no compiled coder for {request.param.name.lower()}")
    monkeypatch.setenv("CACHEGEN_CPU", request.param.name.lower())


def drawn(rows: torch.dtype, to: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return rows, means and the tensors of two layers: one as a layer has them, one within a larger tensor."""
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(TOKENS, 2 * HEADS * DIM, generator=generator).to(rows)
    mean = torch.randn(2 * HEADS * DIM, generator=generator)
    plain = torch.full((1, HEADS, TOKENS, DIM), torch.nan, dtype=to)[0].transpose(0, 1)
    within = torch.full((TOKENS + 5, HEADS + 1, DIM + 4), torch.nan, dtype=to)[2:-3, 1:, :DIM]
    return made, mean, [plain, within]


def rotary(style: RotaryStyle, pairs: int) -> Rotary:
    return Rotary(style, 100 ** -(torch.arange(pairs, dtype=torch.float64) / pairs), 1.5)


@pytest.mark.parametrize("to", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mean", [True, False], ids=["means", "no means"])
@pytest.mark.parametrize(("style", "pairs"), [("half", 10), ("half", 7), ("interleaved", 10), ("none", 10), (None, 0)])
@pytest.mark.usefixtures("compiled")
def test_values_are_those_of_torch(
    style: RotaryStyle | None, pairs: int, mean: bool, dtype: torch.dtype, to: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    rows, means, found = drawn(dtype, to)
    expected = [x.clone() for x in found]
    turned = rotary(style, pairs) if style else None
    turn = (turned, turned.angles(torch.arange(TOKENS) + 7)) if turned else None
    heads._write_by_torch(rows, means if mean else None, expected, turn)
    with monkeypatch.context() as patch:
        patch.setattr(heads, "_write_by_torch", lambda *_: pytest.fail("written by torch"))
        heads.write(rows, means if mean else None, found, turn)
    for own, other in zip(found, expected, strict=True):
        assert torch.allclose(own.float(), other.float(), rtol=2 * torch.finfo(to).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("style", "pairs"), [("half", 10), ("half", 7), ("interleaved", 10), ("none", 10), (None, 0)])
@pytest.mark.usefixtures("compiled")
def test_values_are_read_as_by_torch(
    style: RotaryStyle | None, pairs: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, layers = drawn(torch.float32, dtype)
    for own in layers:
        own.copy_(torch.randn(own.shape, generator=torch.Generator().manual_seed(1)))
    turned = rotary(style, pairs) if style else None
    turn = (turned, turned.angles(torch.arange(TOKENS) + 7)) if turned else None
    expected, found = torch.empty(2, TOKENS, 2 * HEADS * DIM)
    heads._read_by_torch(layers, expected, turn)
    with monkeypatch.context() as patch:
        patch.setattr(heads, "_read_by_torch", lambda *_: pytest.fail("read by torch"))
        heads.read(layers, found, turn)
    torch.testing.assert_close(found, expected, rtol=2**-22, atol=1e-6)
    heads.write(found, None, again := [torch.empty_like(own) for own in layers], turn)
    for own, other in zip(again, layers, strict=True):
        torch.testing.assert_close(own, other, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@needs_compiler
@pytest.mark.skipif(not native.available(), reason="the package was installed without a C++ compiler")
@pytest.mark.parametrize("to", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mean", [True, False], ids=["means", "no means"])
@pytest.mark.parametrize(("style", "pairs"), [("half", 10), ("half", 7), ("interleaved", 7), (None, 0)])
def test_the_kernel_writes_the_same_values(
    style: RotaryStyle | None, pairs: int, mean: bool, dtype: torch.dtype, to: torch.dtype
) -> None:
    rows, means, found = drawn(dtype, to)
    expected = [x.clone() for x in found]
    rows, layers = rows.repeat(1, 9), 9
    turned = rotary(style, pairs) if style else None
    turn = (turned, turned.angles(torch.arange(TOKENS) + 7)) if turned else None
    heads.write(rows, means.repeat(layers) if mean else None, expected * layers, turn)
    with in_lockstep():
        assert native.offers(heads.WRITE, rows.device)
        heads.write(rows, means.repeat(layers) if mean else None, found * layers, turn)
    assert all(torch.equal(own, other) for own, other in zip(found, expected, strict=True))


def test_a_dtype_that_the_library_lacks_is_written_by_torch() -> None:
    rows, means, _ = drawn(torch.float32, torch.float32)
    target = torch.empty(TOKENS, 2 * HEADS, DIM, dtype=torch.float64)
    heads.write(rows, means, [target])
    assert torch.equal(target.float(), (rows + means).unflatten(1, (2 * HEADS, DIM)))


def test_a_dtype_that_the_library_lacks_is_read_by_torch() -> None:
    own, found = torch.randn(TOKENS, HEADS, DIM).half(), torch.empty(TOKENS, HEADS * DIM)
    heads.read([own], found)
    assert torch.equal(found, own.float().flatten(1))


@pytest.mark.parametrize("field", ["rows", "address", "cosines", "sines"])
@pytest.mark.usefixtures("compiled")
def test_missing_memory_is_refused(field: str) -> None:
    rows, target = torch.zeros(4, 8), torch.zeros(4, 8)
    angles = torch.zeros(2, 4, 2)
    turn = angles[0].data_ptr(), angles[1].data_ptr()
    job = abi.Heads(rows.data_ptr(), 8, 4, None, *turn, target.data_ptr(), 32, 32, 1, 8, 2, 0, 0, 0)
    native.call(heads.WRITE, job, 1, device=rows.device)
    setattr(job, field, 0)
    with pytest.raises(NativeError, match="BAD_ARGUMENT"):
        native.call(heads.WRITE, job, 1, device=rows.device)


@pytest.mark.parametrize(("field", "value"), [("pairs", 5), ("from_dtype", 2), ("to_dtype", 3), ("tokens", 1 << 40)])
@pytest.mark.usefixtures("compiled")
def test_impossible_numbers_are_refused(field: str, value: int) -> None:
    rows, target = torch.zeros(4, 8), torch.zeros(4, 8)
    job = abi.Heads(rows.data_ptr(), 8, 4, None, None, None, target.data_ptr(), 32, 32, 1, 8, 0, 0, 0, 0)
    setattr(job, field, value)
    with pytest.raises(NativeError, match="BAD_ARGUMENT"):
        native.call(heads.WRITE, job, 1, device=rows.device)
