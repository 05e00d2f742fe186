"""klt keeps symbols between its passes: the bytes are those of two products, the errors near the decoded values'."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hf_cachegen import CacheGenConfig, Profile, encode_kv
from hf_cachegen.artifact.encoded import EncodedContext
from hf_cachegen.codec import abi, kept, native
from hf_cachegen.codec.into import Target
from hf_cachegen.codec.kept import Kept
from hf_cachegen.codec.rows import geometry_of, spans_of
from hf_cachegen.codec.source import Source
from hf_cachegen.codec.tables import shipped_codebooks
from hf_cachegen.codec.transforms.klt import Klt
from hf_cachegen.errors import NativeError, TensorError
from tests.klt_support import CONFIG, TOKENS, make_profile

pytestmark = pytest.mark.skipif(not native.available(), reason="the package was installed without a C++ compiler")
BACK_ENDS = ["scalar", "avx2", "avx512", "neon"]
STEP = 136


@pytest.fixture(autouse=True, params=BACK_ENDS)
def back_end(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run on each instruction set of this machine."""
    if native.Isa[request.param.upper()] not in native.available_isas():
        pytest.skip(f"this machine has no {request.param}")
    monkeypatch.setenv("CACHEGEN_CPU", request.param)


def drawn(dtype: torch.dtype = torch.float32, sinks: tuple[int, ...] = ()) -> tuple[list[Tensor], list[Tensor]]:
    """Return K and V of three layers. Sinks have short keys."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(6, 1, 2, TOKENS, 8, generator=generator)
    x[::2, ..., list(sinks), :] *= 0.01
    x[1, 0, 0, 40] *= 30  # wide symbols
    tensors = list(x.to(dtype))
    return tensors[::2], tensors[1::2]


def both(
    monkeypatch: pytest.MonkeyPatch, kv: tuple[list[Tensor], list[Tensor]], config: CacheGenConfig, profile: Profile
) -> tuple[EncodedContext, EncodedContext]:
    """Encode with symbols that are kept, and with two products."""
    own = encode_kv(*kv, config, profile)
    with monkeypatch.context() as patch:
        patch.setattr(kept, "MOST_BYTES", 0)
        return own, encode_kv(*kv, config, profile)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sinks", [(), (0, 50)], ids=["no sinks", "sinks"])
@pytest.mark.parametrize("levels", [1, 3])
def test_the_bytes_are_those_of_two_products(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, sinks: tuple[int, ...], levels: int
) -> None:
    profile = make_profile(step_code=STEP)
    profile = replace(profile, refine_entries=profile.refine_entries[: levels - 1])
    own, twice = both(monkeypatch, drawn(dtype, sinks), replace(CONFIG, levels=levels), profile)
    assert own.side == twice.side
    assert own.parts == twice.parts
    for a, b in zip(own.report["layers"], twice.report["layers"], strict=True):
        for name in ("k_error", "v_error"):
            assert a[name] != b[name], "the first must not have decoded"
            assert a[name] == pytest.approx(b[name], rel=0.1)


def test_a_context_is_multiplied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    products, before = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *x, **options: products.append(1) or before(*x, **options))
    encode_kv(*drawn(), CONFIG, make_profile(step_code=STEP))
    assert len(products) == 2 * len(spans_of(TOKENS, CONFIG.chunk_tokens))  # one for K, one for V


@pytest.mark.parametrize("size", [3e3, 1e30])
def test_symbols_beyond_16_bits(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    """They are not kept; those beyond all symbols are refused."""
    kv, profile = drawn(), make_profile(step_code=STEP)
    kv[1][1][0, 1, 60, 3] = size
    if size > 1e9:
        with pytest.raises(TensorError, match="too large"):
            encode_kv(*kv, CONFIG, profile)
        return
    own, twice = both(monkeypatch, kv, CONFIG, profile)
    assert (own.side, own.parts, own.report) == (twice.side, twice.parts, twice.report)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    kv = drawn()
    kv[0][2][0, 0, 99, 7] = value
    with pytest.raises(TensorError, match=r"layer 2.*not all finite"):
        encode_kv(*kv, CONFIG, make_profile(step_code=STEP))


def test_chunks_apart_are_not_kept() -> None:
    first, _, last = spans_of(30, 10)
    kv = drawn()
    codec = Klt(geometry_of(*kv, None), replace(CONFIG, transform="klt"), make_profile(step_code=STEP)).inner
    assert Kept.of(codec, [first, last], lambda span, code: pytest.fail("computed"), torch.ones(30)) is None


def test_fine_symbols_and_their_errors() -> None:
    torch.manual_seed(0)
    rows = torch.randn(70, 300) * 40
    steps, weights = torch.rand(300) + 0.5, torch.rand(70)
    means = torch.randn(300)
    config = CacheGenConfig(protect_first=3, protect_last=5)
    [span], fine = spans_of(70, 70), torch.empty(70, 300, dtype=torch.int16)
    source = Source.of(Target.matrix(rows), torch.zeros(300, dtype=torch.int64))
    assert source is not None
    squares = source.fine(span, config, (means, steps), weights, fine)
    y, symbols = rows - means, ((rows - means) / steps).round()
    assert torch.equal(fine.float(), symbols)
    assert squares is not None
    for level in range(3):
        unit = 3 ** (2 - level) * steps.double()
        error = y - (y.double() / unit).round() * unit
        exact = y - symbols.double() * steps
        error[:3], error[-5:] = exact[:3], exact[-5:]
        torch.testing.assert_close(squares[level], (error.square() * weights[:, None]).sum(0), rtol=1e-2, atol=1e-3)
    within = torch.zeros(70, 310, dtype=torch.int16)
    assert source.fine(span, config, (means, steps), weights, within[:, 4:304]) is not None
    assert torch.equal(within[:, 4:304], fine)
    assert not within[:, :4].any()
    assert not within[:, 304:].any()
    rows[1, 299] = 70000
    assert source.fine(span, config, (means, steps), weights, fine) is None


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_what_the_coarsest_level_decodes(levels: int) -> None:
    """The values may be overwritten by it."""
    torch.manual_seed(0)
    rows, steps = torch.randn(70, 300) * 40, torch.rand(300) + 0.5
    config = CacheGenConfig(levels=levels, protect_first=3, protect_last=5)
    [span], symbols = spans_of(70, 70), (rows / steps).round()
    source = Source.of(Target.matrix(rows), torch.zeros(300, dtype=torch.int64))
    assert source is not None
    coarsest = 3 ** (levels - 1)
    expected = (symbols / coarsest).round() * (steps * coarsest)
    expected[:3], expected[-5:] = (symbols * steps)[:3], (symbols * steps)[-5:]
    fine, scale = torch.empty(70, 300, dtype=torch.int16), (torch.zeros(300), steps)
    assert source.fine(span, config, scale, torch.ones(70), fine, rows) is not None
    assert torch.equal(rows, expected)
    assert torch.equal(fine.float(), symbols)


def test_costs_of_other_entries() -> None:
    rows, [span] = torch.randn(90, 40) * 4, spans_of(90, 90)
    source, books = Source.of(Target.matrix(rows), torch.zeros(40, dtype=torch.int64)), shipped_codebooks(11)
    assert source is not None
    scale, config = (torch.zeros(40), torch.ones(40)), CacheGenConfig()
    first = source.choose([span], config, scale, books)
    assert first is not None
    entries, bits, _ = first
    again = source.choose([span], config, scale, books, torch.stack([entries, entries.flip(1)]))
    assert again is not None
    assert torch.equal(again[2][0], bits)
    assert bool((again[2][1] >= bits).all())
    with pytest.raises(NativeError, match="BAD_ARGUMENT"):
        source.choose([span], config, scale, books, torch.full_like(entries, 255)[None])


def test_bad_arguments_of_fine_symbols_are_refused() -> None:
    rows = torch.randn(20, 8)
    source = Source.of(Target.matrix(rows), torch.zeros(8, dtype=torch.int64))
    assert source is not None
    [span], scale = spans_of(20, 20), (torch.zeros(8), torch.ones(8))
    view, spans = source._view(*scale), source._spans([span], CacheGenConfig())
    fine, squares, refused = torch.empty(20, 8, dtype=torch.int16), torch.empty(3, 8).double(), ctypes.c_uint32()
    out = ctypes.byref(refused)
    grouped = abi.Source.from_buffer_copy(view)
    grouped.group_tokens = 4
    unscaled = abi.Source.from_buffer_copy(view)
    unscaled.steps = None
    typed = abi.Source.from_buffer_copy(view)
    typed.dtype = 3
    for arguments in (
        (grouped, spans, 2, None, fine, 8, None, squares, out),
        (unscaled, spans, 2, None, fine, 8, None, squares, out),
        (typed, spans, 2, None, fine, 8, None, squares, out),
        (view, None, 2, None, fine, 8, None, squares, out),
        (view, spans, 3, None, fine, 8, None, squares, out),
        (view, spans, 2, None, None, 8, None, squares, out),
        (view, spans, 2, None, fine, 7, None, squares, out),
        (view, spans, 2, None, fine, 8, None, squares, None),
    ):
        with pytest.raises(NativeError, match="BAD_ARGUMENT"):
            native.call("cg_fine", *arguments, device=rows.device)
    native.call("cg_fine", view, spans, 2, None, fine, 8, None, None, out)
