"""Products of coefficients that are mostly zero: the values of torch, the same bits on every instruction set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_cachegen.codec import native, sparse
from hf_cachegen.errors import NativeError, TensorError

pytestmark = pytest.mark.skipif(not native.available(), reason="the package was installed without a C++ compiler")
ISAS = [isa for isa in native.Isa if isa]
SHAPES = [(1, 1, 1), (3, 5, 2), (300, 37, 200), (257, 130, 400), (0, 4, 4), (4, 0, 4), (4, 4, 0)]


@pytest.fixture(params=ISAS, ids=lambda isa: isa.name.lower())
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run on each instruction set of this machine."""
    if request.param not in native.available_isas():
        pytest.skip(f"this machine has no compiled coder for {request.param.name.lower()}")
    monkeypatch.setenv("CACHEGEN_CPU", request.param.name.lower())


def drawn(tokens: int, components: int, channels: int) -> tuple[Tensor, Tensor]:
    """Return coefficients, within larger rows, of which a tenth is not zero, and a matrix."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(tokens, components + 3, generator=generator)[:, 1 : components + 1]
    y[torch.rand(y.shape, generator=generator) < 0.9] = 0
    y[::3, ::2] = -0.0
    return y, torch.randn(components, channels, generator=generator)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("start", [None, torch.float32, torch.bfloat16], ids=str)
def test_products_are_those_of_torch(shape: tuple[int, int, int], start: torch.dtype | None) -> None:
    y, matrix = drawn(*shape)
    begun = None if start is None else torch.randn(shape[0], shape[2]).to(start)
    expected = y @ matrix if begun is None else begun.float() + y @ matrix
    torch.testing.assert_close(sparse.multiply(y, matrix, begun), expected, rtol=1e-5, atol=1e-5)
    if start == torch.float32:
        assert sparse.multiply(y, matrix, begun, out=begun) is begun
        torch.testing.assert_close(begun, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("compiled")
def test_coefficients_are_taken_as_the_coarsest_level_has_them() -> None:
    y, matrix = drawn(300, 37, 200)
    coarse = torch.stack([torch.full((300,), 0.7), torch.ones(300)])
    coarse[0, :9], coarse[1, 5:20] = 0, 1 / 3
    base = sparse.coarsened(y, coarse)
    assert torch.equal(base[:9], y[:9])
    assert bool((base[9:] != y[9:]).any())
    assert torch.equal(base[20:], (y[20:] / 0.7).round() * 0.7)
    assert torch.equal(sparse.multiply(y, matrix, None, coarse), sparse.multiply(base, matrix))


def test_all_instruction_sets_and_threads_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    (y, matrix), found = drawn(1500, 130, 400), []
    for isa in native.available_isas():
        monkeypatch.setenv("CACHEGEN_CPU", isa.name.lower())
        for threads in (1, 3):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                found.append(sparse.multiply(y, matrix))
            finally:
                torch.set_num_threads(before)
    assert all(torch.equal(one, found[0]) for one in found)


def test_bad_arguments_are_refused() -> None:
    y, matrix = drawn(8, 5, 6)
    with pytest.raises(TensorError, match="follow one another"):
        sparse.multiply(y, matrix.T.contiguous().T)
    with pytest.raises(TensorError, match="follow one another"):
        sparse.multiply(y.T.contiguous().T, matrix)
    with pytest.raises(TensorError, match=r"5 components"):
        sparse.multiply(y, matrix[1:])
    with pytest.raises(NativeError, match="BAD_ARGUMENT"):
        sparse.multiply(y, matrix, torch.zeros(8, 6, dtype=torch.float16))


@pytest.mark.parametrize(
    ("shares", "fixed", "expected"),
    [
        ([0.9, 0.5, 0.1, 0.0], 0, 128),
        ([0.9, 0.5, 0.1, 0.0], 512, 0),
        ([0.1, 0.9, 0.1, 0.0], 0, 128),
        ([0.9, 0.9, 0.9, 0.9], 0, 250),
        ([0.0, 0.0, 0.0, 0.0], 0, 0),
    ],
)
def test_the_cheapest_width_is_chosen(shares: list[float], fixed: float, expected: int) -> None:
    share = torch.tensor(shares).repeat_interleave(sparse.BLOCK)[:250]
    assert sparse.dense_width(share, 4.0, fixed) == expected
