"""The products of klt on a device: the values of the CPU's products, in a number of calls that chunks do not change."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import host_time
from hf_cachegen import encode_kv
from hf_cachegen.codec import abi, basis, native, plan
from hf_cachegen.codec.chunk import Span
from hf_cachegen.codec.context import codec_of as codec_of_side
from hf_cachegen.codec.heads import by_token
from hf_cachegen.codec.into import Target
from hf_cachegen.codec.operands import GATHER, Coefficients, Kind, _gathered_by_torch, gather, listed
from hf_cachegen.codec.rows import empty_kv
from hf_cachegen.codec.transforms.klt import Klt
from hf_cachegen.errors import NativeError
from tests import klt_support
from tests.lockstep import in_lockstep, needs_compiler
from tests.products_support import LAYERS, TOKENS, chained, codec_of
from tests.separate_device import separate_device

pytestmark = [
    needs_compiler,
    pytest.mark.skipif(not native.available(), reason="the package was installed without a C++ compiler"),
]
CPU = torch.device("cpu")


def both(codec: Klt, span: Span, level: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Return the values of the CPU's products and of a device's, from drawn symbols."""
    generator = torch.Generator().manual_seed(span.first + level)
    symbols = torch.randn(span.tokens, codec.entries.shape[1], generator=generator) * 6
    y = symbols.round() * codec.inner.scale(level, CPU).steps
    expected, found = (empty_kv(codec.geometry, [CPU] * LAYERS) for _ in range(2))
    for x in (*expected, *found):
        x.zero_()
    own = slice(span.first, span.first + span.tokens)
    codec._restore(y.clone(), span, level, [x[own] for x in by_token(Target.layers(expected), codec.geometry)])
    codec.products.restore(y, span, level, Target.layers(found), span.first, codec._scores(span))
    return expected, found


@pytest.mark.parametrize("limits", ["one part", "many parts"])
@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["joint", "chained", "predicted", "wide"])
def test_values_are_those_of_the_host(
    kind: str, dtype: torch.dtype, level: int, limits: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(basis, "multiplies_bfloat16", lambda: True)
    if limits == "many parts":
        monkeypatch.setattr(plan, "PART_BYTES", 500)
        monkeypatch.setattr(plan, "BLOCK_NUMBERS", 15)
    codec = codec_of(chained(kind), dtype)
    with in_lockstep():
        for span in (Span(0, 24, TOKENS), Span(24, 16, TOKENS)):
            expected, found = both(codec, span, level, dtype)
            limit = 4 * torch.finfo(dtype).eps + 1e-5
            for x, y in zip(expected, found, strict=True):
                assert float((x - y).float().norm()) <= limit * float(x.float().norm())


def test_a_device_without_the_library_multiplies_too(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = codec_of(chained("predicted"), torch.float32)
    monkeypatch.setattr(native, "offers", lambda *_: False)
    expected, found = both(codec, Span(24, 16, TOKENS), 3, torch.float32)
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(expected, found, strict=True))


def test_rows_of_a_matrix_are_written_too() -> None:
    """Layers on several devices are decoded to a matrix first."""
    codec = codec_of(chained("wide"), torch.float32)
    rows, span = torch.zeros(TOKENS + 2, codec.channels), Span(0, TOKENS, TOKENS)
    y = torch.randn(TOKENS, codec.entries.shape[1])
    expected = codec.basis.rows(codec.scaling.to_basis(y.clone(), span), span)
    with in_lockstep():
        codec.products.restore(y, span, 1, Target.matrix(rows), 1, None)
    torch.testing.assert_close(rows[1:-1], expected, atol=1e-5, rtol=1e-5)
    assert not rows[[0, -1]].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("factors", [True, False])
def test_the_kernel_gathers_as_torch_does(factors: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    y, numbers = torch.randn(37, 50, generator=generator)[:, :45], torch.randn(37, 6, generator=generator)
    scale = torch.rand(37, generator=generator) if factors else None
    found = Coefficients(y, scale, 0.25, slice(5, 30))
    kinds = torch.randint(0, 6, (3, 70), generator=generator, dtype=torch.int32)
    sizes = torch.tensor([1, 1, 6, 45, 45, 45], dtype=torch.int32)[kinds.long()]
    index = (torch.rand(3, 70, generator=generator) * sizes).int()
    all_, to = kinds * (1 << 28) + index, torch.empty(3, 37, 70, dtype=dtype)
    with in_lockstep():
        gather(found, numbers, all_, to)
    assert torch.equal(to, _gathered_by_torch(found, numbers, all_).to(dtype))


def test_the_kernel_reads_nothing_outside() -> None:
    found = Coefficients(torch.ones(2, 4), None, 1.0, slice(0, 0))
    all_ = torch.cat([listed(kind, 4, 1) for kind in Kind] + [torch.tensor([6 << 28, -1], dtype=torch.int32)])[None]
    to = torch.full((1, 2, 8), torch.nan)
    with in_lockstep():
        gather(found, torch.ones(2, 4), all_, to)
    assert to[0].tolist() == [[0, 1, 0, 0, 0, 0, 0, 0]] * 2


def test_the_kernel_refuses_sizes_beyond_its_contract() -> None:
    y, to = torch.ones(2, 4), torch.ones(8)
    sound = {"coefficients": y.data_ptr(), "row_stride": 4, "tokens": 2, "columns": 4, "sources": to.data_ptr(),
             "products": 1, "width": 1, "operands": to.data_ptr()}  # fmt: skip
    with in_lockstep():
        for wrong in ({"dtype": 2}, {"columns": 1 << 29}, {"n_numbers": 1}, {"operands": 0}, {"sources": None},
                      {"coefficients": None}, {"tokens": 1 << 32}):  # fmt: skip
            with pytest.raises(NativeError, match="BAD_ARGUMENT"):
                native.call(GATHER, abi.Operands(**{**sound, **wrong}), device=CPU)


def test_calls_do_not_grow_with_layers_or_chunks() -> None:
    """A part is three calls, a block of summaries one. Once, each group took eleven."""
    few, many = (host_time.products(layers)["level 3"]["calls of a batch"] for layers in (4, 32))
    assert few <= many <= 18


@pytest.mark.parametrize("level", [1, 3])
def test_the_product_path_takes_these_compiled_calls(level: int) -> None:
    codec = codec_of(chained("chained"), torch.float32)
    y, target = torch.randn(TOKENS, codec.entries.shape[1]), Target.layers(empty_kv(codec.geometry, [CPU] * LAYERS))
    with separate_device() as notes:
        for first in (0, 20):
            codec.products.restore(y[:20], Span(first, 20, TOKENS), level, target, first, None)
    counts = Counter(name for name, _ in notes)
    assert counts == {GATHER: 4, "cg_write_heads": 2}


def test_memory_of_a_launch_in_inference_mode_can_be_written_later() -> None:
    """A call of `generate` and a thread that refines share a codec. Wide symbols are corrected in that memory."""
    generator = torch.Generator().manual_seed(5)
    keys, values = ([torch.randn(1, 2, 64, 8, generator=generator) for _ in range(3)] for _ in range(2))
    for x in (*keys, *values):
        x[:, :, [40, 41]] *= 2000
    context = encode_kv(keys, values, klt_support.CONFIG, klt_support.make_profile())
    codec = codec_of_side(context.geometry, context.config, context.side, context.profile)
    rows, chunk = torch.empty(64, codec.channels), [part[1] for part in context.parts]
    with torch.inference_mode():
        codec.decode_into(chunk, Span(32, 32, 64), Target.matrix(rows), 0)
    codec.decode_into(chunk, Span(32, 32, 64), Target.matrix(rows), 32)
    assert torch.equal(rows[:32], rows[32:])


def test_memory_is_kept_from_launch_to_launch_until_it_is_released(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, values = ([torch.randn(1, 2, 64, 8) for _ in range(3)] for _ in range(2))
    context = encode_kv(keys, values, klt_support.CONFIG, klt_support.make_profile())
    codec = codec_of_side(context.geometry, context.config, context.side, context.profile)
    made, memory = list[weakref.ref[Tensor]](), Target.memory

    def noted(*arguments: Any) -> Tensor:
        found = memory(*arguments)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(Target, "memory", noted)
    rows, chunk = torch.empty(32, codec.channels), [part[0] for part in context.parts]
    for _ in range(3):
        codec.decode_into(chunk, Span(0, 32, 64), Target.matrix(rows))
    assert sum(one() is not None for one in made) == 1
    codec.release()
    gc.collect()
    assert not any(one() is not None for one in made)
