"""Encoding from the layers' own tensors: the compiled passes against their twins in `codec/passes.py`, bit by bit."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_cachegen import CacheGenConfig, decode_kv, encode_kv
from hf_cachegen.artifact.encoded import EncodedContext
from hf_cachegen.codec import abi, fit, native
from hf_cachegen.codec.into import Target
from hf_cachegen.codec.rows import ContextRows, geometry_of, spans_of
from hf_cachegen.codec.source import Source
from hf_cachegen.codec.tables import shipped_codebooks
from hf_cachegen.codec.transforms import lossless
from hf_cachegen.codec.transforms.lossless import CHOSEN_FROM, RUN, runs_of, sample_of
from hf_cachegen.errors import NativeError, TensorError

pytestmark = pytest.mark.skipif(not native.available(), reason="the package was installed without a C++ compiler")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
BACK_ENDS = ["scalar", "avx2", "avx512"]


@pytest.fixture(autouse=True, params=BACK_ENDS)
def back_end(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run on each instruction set of this machine."""
    if native.Isa[request.param.upper()] not in native.available_isas():
        pytest.skip(f"this machine has no {request.param}")
    monkeypatch.setenv("CACHEGEN_CPU", request.param)
    return str(request.param)


def drawn(seed: int, dtype: torch.dtype, shape: Sequence[int], layout: str = "plain", layers: int = 2) -> list[Tensor]:
    """Return K and V of every layer [batch, heads, tokens, dim], in one of several layouts."""
    torch.manual_seed(seed)
    batch, heads, tokens, dim = shape
    x = torch.randn(2 * layers, batch, heads, tokens, dim) * torch.rand(dim).exp2() + torch.randn(dim)
    if layout == "far":  # values far from the rest of their channel
        x[0, 0, 0, tokens // 2] *= 200
        x[1, 0, -1, -1, 0] = 3e3
    x = x.to(dtype)
    if layout == "tokens first":
        return [y.transpose(1, 2).contiguous().transpose(1, 2) for y in x]
    if layout == "dims apart":
        return [y.transpose(2, 3).contiguous().transpose(2, 3) for y in x]
    if layout == "padded":
        wide = torch.zeros(2 * layers, batch, heads, tokens + 3, dim, dtype=dtype)
        wide[:, :, :, 1:-2] = x
        return list(wide[:, :, :, 1:-2])
    return list(x)


def encoded(tensors: list[Tensor], config: CacheGenConfig, *, twin: bool) -> EncodedContext:
    with pytest.MonkeyPatch.context() as patch:
        if twin:
            patch.setattr(Source, "of", classmethod(lambda cls, target, vectors: None))
        return encode_kv(tensors[::2], tensors[1::2], config)


def assert_equal(tensors: list[Tensor], config: CacheGenConfig) -> None:
    own, twin = (encoded(tensors, config, twin=which) for which in (False, True))
    assert own.config == twin.config
    assert own.side == twin.side
    assert own.parts == twin.parts
    assert own.report == twin.report


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, 2**30),
    st.sampled_from(DTYPES),
    st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 70), st.sampled_from([1, 5, 12, 64])),
    st.sampled_from(["plain", "tokens first", "dims apart", "padded", "far"]),
    st.sampled_from(["delta", "identity", "auto", "lossless"]),
    st.integers(1, 3),
    st.sampled_from([1, 7, 16, 512]),
    st.sampled_from([(0, 0), (4, 64), (3, 5)]),
)
def test_the_same_bytes_as_the_passes_over_rows(
    seed: int, dtype: torch.dtype, shape: tuple[int, int, int, int], layout: str, transform: str, levels: int,
    chunk: int, protected: tuple[int, int],
) -> None:  # fmt: skip
    config = CacheGenConfig(
        transform="identity" if transform == "lossless" else transform, lossless=transform == "lossless", levels=levels,
        chunk_tokens=chunk, measure=False, protect_first=protected[0], protect_last=protected[1], group_tokens=4,
    )  # fmt: skip
    assert_equal(drawn(seed, dtype, shape, layout), config)


@pytest.mark.parametrize("transform", ["delta", "identity", "lossless"])
def test_whole_tiles_in_threads(transform: str) -> None:
    config = CacheGenConfig(
        transform="identity" if transform == "lossless" else transform, lossless=transform == "lossless",
        chunk_tokens=200, measure=False,
    )  # fmt: skip
    tensors = drawn(5, torch.bfloat16, (1, 4, 530, 64), "far")
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert_equal(tensors, config)
    finally:
        torch.set_num_threads(before)


def test_a_first_token_that_is_stored_is_read_as_its_neighbour() -> None:
    tensors = drawn(1, torch.bfloat16, (1, 2, 80, 64))
    for x in tensors[::2]:
        x[:, :, 0] /= 256
    config = CacheGenConfig(transform="identity", measure=False, chunk_tokens=32)
    last = tensors[-1][0, -1, 0, -1:].view(torch.uint8).numpy().tobytes()
    assert encoded(tensors, config, twin=False).side[-2:] == last
    assert_equal(tensors, config)
    assert_equal(tensors, CacheGenConfig(transform="identity", measure=False, chunk_tokens=1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("token", [0, 5, 30])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("transform", ["delta", "identity"])
def test_the_same_error_for_values_that_are_not_finite(
    dtype: torch.dtype, token: int, value: float, transform: str
) -> None:
    tensors = drawn(2, dtype, (1, 2, 31, 64))
    tensors[3][0, 1, token, 7] = value
    messages = []
    for twin in (False, True):
        with pytest.raises(TensorError) as caught:
            encoded(tensors, CacheGenConfig(transform=transform, measure=False, group_tokens=5), twin=twin)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert "values of layer 1" in messages[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_lossless_keeps_every_bit_of_a_sampled_context(dtype: torch.dtype) -> None:
    tensors = drawn(3, dtype, (1, 4, 40, 64), layers=20)
    assert sample_of(20 * 2 * 256) is not None
    tensors[11][0, 2, :, 5] *= 1e-30  # unlike every channel of the sample
    tensors[12][0, 2, 3, :4] = torch.tensor([float("nan"), float("inf"), -0.0, 1e4])
    config = CacheGenConfig(lossless=True, measure=False, chunk_tokens=16)
    assert_equal(tensors, config)
    keys, values = decode_kv(encoded(tensors, config, twin=False))
    whole = torch.int32 if dtype == torch.float32 else torch.int16
    for found, x in zip([y for pair in zip(keys, values, strict=True) for y in pair], tensors, strict=True):
        assert torch.equal(found.view(whole), x.view(whole))


@pytest.mark.parametrize(("tokens", "chunk"), [(1, 8), (256, 100), (257, 257), (1000, 300), (5000, 700)])
def test_runs_lie_within_the_chunks_and_spread_over_them(tokens: int, chunk: int) -> None:
    spans = spans_of(tokens, chunk)
    runs = runs_of(spans)
    seen = [token for run in runs for token in range(run.first, run.first + run.tokens)]
    assert sorted(set(seen)) == seen
    assert set(seen) <= set(range(tokens))
    assert all(any(span.first <= run.first < span.first + span.tokens for run in runs) for span in spans)
    if tokens <= CHOSEN_FROM:
        assert runs == spans
    else:
        assert CHOSEN_FROM // 2 <= len(seen) <= CHOSEN_FROM + RUN * len(spans)


def test_a_long_context_is_coded_by_tables_of_some_tokens() -> None:
    tensors = drawn(3, torch.bfloat16, (1, 2, 700, 64), layers=20)
    config = CacheGenConfig(lossless=True, measure=False, chunk_tokens=300)
    assert_equal(tensors, config)
    own = encoded(tensors, config, twin=False)
    assert all(torch.equal(x, y) for x, y in zip(decode_kv(own)[0], tensors[::2], strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lossless, "runs_of", lambda spans: spans)
        every = encoded(tensors, config, twin=False)
    assert every.nbytes < own.nbytes < 1.005 * every.nbytes


def test_the_spread_is_that_of_the_rows() -> None:
    tensors = drawn(4, torch.float16, (1, 2, 50, 24))
    rows = ContextRows(tensors[::2], tensors[1::2], geometry_of(tensors[::2], tensors[1::2], None), spans_of(50, 20))
    config = CacheGenConfig(protect_first=2, protect_last=9)
    assert rows.source is not None
    own = rows.source.spread(rows.spans, config)
    x = torch.cat([y.permute(2, 0, 1, 3).flatten(1) for y in tensors], 1).double()
    for found, part in ((own[0], x[2:41]), (own[1], torch.cat([x[:2], x[41:]]))):
        torch.testing.assert_close(found, torch.stack([part.sum(0), part.square().sum(0)]), rtol=1e-12, atol=1e-12)


BAD_SOURCES: dict[str, dict[str, int]] = {
    "dtype": {"dtype": 3},
    "blank": {"blank": 2},
    "group": {"group_tokens": 1},
    "places": {"places": 0},
    "means": {"means": 0},
    "scales": {"group_tokens": 5},
}


@pytest.mark.parametrize("change", BAD_SOURCES.values(), ids=BAD_SOURCES)
def test_contradictory_arguments_are_refused(change: dict[str, int]) -> None:
    x = torch.randn(1, 1, 10, 8)
    source = Source.of(Target.layers([x, x]), torch.arange(16) // 8)
    assert source is not None
    scale = torch.zeros(16), torch.ones(16)
    view, spans = source._view(*scale), source._spans(spans_of(10, 10), CacheGenConfig())
    for field, value in change.items():
        setattr(view, field, value)
    book = shipped_codebooks(11)[0]
    costs = abi.Costs(book.compiled_cost.data_ptr(), book.compiled_cost.shape[1], 0)
    entries, found, refused = torch.empty(16, dtype=torch.uint8), torch.empty(16, dtype=torch.int64), ctypes.c_uint32()
    with pytest.raises(NativeError, match="BAD_ARGUMENT"):
        native.call("cg_choose", view, spans, 1, 0, costs, None, entries, found, ctypes.byref(refused), None, 0, None)


def test_spans_beyond_the_chunk_are_refused() -> None:
    x = torch.randn(1, 1, 10, 8)
    source = Source.of(Target.layers([x, x]), torch.arange(16) // 8)
    assert source is not None
    spans = source._spans(spans_of(10, 10), CacheGenConfig())
    spans[0].ordinary_last = 11
    with pytest.raises(NativeError, match="BAD_ARGUMENT"):
        native.call("cg_spread", source._view(), spans, 1, torch.empty(4, 16, dtype=torch.float64))


def test_fitting_reads_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ContextRows, "chunk", lambda self, span: pytest.fail("a chunk was copied"))
    monkeypatch.setattr(fit, "_with_entries", lambda *_: pytest.fail("the passes over rows ran"))
    for transform in ("delta", "identity"):
        encode_kv(*[drawn(6, torch.bfloat16, (1, 2, 90, 64))] * 2, CacheGenConfig(transform=transform, measure=False))


@pytest.mark.parametrize("size", [0, 1, 7, 3 << 20])
def test_pieces_of_memory_are_joined(size: int) -> None:
    data = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    ends = np.array([0, size // 3, size // 3, size])  # one piece is empty
    assert native.joined(data.ctypes.data + ends[:-1], np.diff(ends)) == data.tobytes()


def test_two_threads_encode_two_contexts() -> None:
    contexts = [drawn(seed, torch.bfloat16, (1, 4, 40, 64)) for seed in (4, 5)]
    config = CacheGenConfig(transform="identity", chunk_tokens=8)
    alone = [encoded(x, config, twin=False).parts for x in contexts]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda x: encoded(x, config, twin=False).parts, contexts * 4))
    assert together == alone * 4


def test_the_first_of_the_cheapest_tables_is_chosen() -> None:
    """Of 64 entries, those of the last three groups of 16 are copies of the first one, whatever a symbol costs."""
    x = drawn(6, torch.bfloat16, (1, 1, 200, 32))
    layers, n, parts = Target.layers(x), 128, 1
    source = Source.of(layers, torch.arange(4).repeat_interleave(32))
    assert source is not None
    costs = torch.randint(1, 1 << 12, (256, 16), dtype=torch.int32).repeat(1, 4).contiguous()
    span, book = (abi.Span * 1)(abi.Span(0, 200, 0, 200, 0)), abi.Costs(costs.data_ptr(), 64, 1)
    entries, found = torch.empty(parts, n, dtype=torch.uint8), torch.empty(parts, n, dtype=torch.int64)
    refused, none = ctypes.c_uint32(), torch.empty(0, dtype=torch.uint8)
    means, steps = torch.zeros(n), torch.full((n,), 0.1)
    arguments = (0, book, None, entries, found, ctypes.byref(refused), none, 0, torch.empty(0, dtype=torch.int64))
    native.call("cg_choose", source._view(means, steps), span, 1, *arguments)
    symbols = (torch.cat([y[0, 0] for y in x], 1).float() / 0.1).round().long() + 128
    assert symbols.min() >= 0
    assert symbols.max() <= 255
    sums = torch.stack([costs.long()[symbols[:, c]].sum(0) for c in range(n)])
    sums[:, 0] = sums.max() + 1  # entries before the first are not chosen
    assert torch.equal(found[0], sums.min(1).values)
    assert torch.equal(entries[0].long(), sums.argmin(1))
