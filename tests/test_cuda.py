"""The CUDA back-end on a GPU: the same bytes and values as on the CPU, from every door of the package.

Without a GPU these tests skip, and with FAIL_WITHOUT_CUDA=1 they fail. The kernels are tested without one too,
in lockstep (tests/test_native.py, tests/test_rans.py).
"""

from __future__ import annotations

import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import hf_cachegen
from hf_cachegen import CacheGenCache, CacheGenConfig, decode_kv, encode_kv
from hf_cachegen.codec import native, passes, rans
from hf_cachegen.codec.batch import OUTSTANDING
from hf_cachegen.codec.chunk import Span
from hf_cachegen.codec.context import Encoder
from hf_cachegen.codec.context import codec_of as codec_of_side
from hf_cachegen.codec.heads import by_token
from hf_cachegen.codec.into import Target
from hf_cachegen.codec.rows import empty_kv
from hf_cachegen.codec.spread import Apart
from hf_cachegen.errors import CorruptError, TensorError, TruncatedError
from hf_cachegen.models import checksum
from hf_cachegen.streaming.layers import LayerWriter
from tests.coder_support import draw_section, laplace_tables
from tests.klt_support import CONFIG, make_profile
from tests.kv_samples import sample_kv
from tests.products_support import LAYERS, chained, codec_of
from tests.products_support import TOKENS as PRODUCT_TOKENS
from tests.streaming_support import damage, report, same_kv

READY = torch.cuda.is_available() and native.available("cuda")
if not READY and os.environ.get("FAIL_WITHOUT_CUDA") == "1":
    raise RuntimeError(
        f"FAIL_WITHOUT_CUDA=1, but torch sees {torch.cuda.device_count()} GPUs and _cuda.so is "
        f"{'there' if native.CUDA_LIBRARY.exists() else 'missing'}"
    )
pytestmark = pytest.mark.skipif(not READY, reason="NO GPU HERE: nothing of the CUDA back-end ran on a device")
TABLES = laplace_tables([0.3, 0.7, 2.0, 9.0], 11)


def reference() -> Any:
    """Return the reference model, bf16, on the CPU."""
    return AutoModelForCausalLM.from_pretrained("eval/reference/model", dtype=torch.bfloat16)


@settings(max_examples=40, deadline=None)
@given(
    st.one_of(st.integers(1, 300), st.sampled_from([256, 4096])),
    st.one_of(st.integers(0, 40), st.sampled_from([255, 3000])),
    st.sampled_from([1, 3]),
    st.integers(0, 2**32),
)
def test_each_decodes_what_the_other_encodes(columns: int, tokens: int, contexts: int, seed: int) -> None:
    section = draw_section(seed, tokens, columns, TABLES, contexts)
    streams = section.encode()
    known = None if section.contexts is None else section.contexts.cuda()
    assert rans.encode(section.symbols.cuda(), TABLES, section.table_ids, known) == streams
    if not streams:
        return
    packed = torch.frombuffer(bytearray(b"".join(streams)), dtype=torch.uint8).cuda()
    sizes = torch.tensor([len(stream) for stream in streams])
    side = (TABLES.on(packed.device), section.table_ids.cuda(), known)
    assert torch.equal(torch.ops.cachegen.decode(packed, sizes, *side, tokens).cpu(), section.symbols)


def test_a_few_hostile_streams_end_in_errors() -> None:
    """Few enough for a sanitizer."""
    assert damaged(1, 20) > 10


@pytest.mark.parametrize("contexts", [1, 3])
def test_hostile_streams_end_in_errors(contexts: int) -> None:
    assert damaged(contexts, 500) > 400


def damaged(contexts: int, rounds: int) -> int:
    """Decode damaged streams. Return how often an error was found."""
    section = draw_section(3, 40, 300, TABLES, contexts)
    streams = section.encode()
    side = (TABLES.on(torch.device("cuda", 0)), section.table_ids.cuda())
    known = None if section.contexts is None else section.contexts.cuda()
    chance, caught = random.Random(1), 0
    for _ in range(rounds):
        data = bytearray(b"".join(streams))
        for _ in range(chance.randint(1, 30)):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        cut = chance.randrange(3) == 0
        sizes = [len(streams[0]), len(streams[1]) - (chance.randrange(200) if cut else 0)]
        packed = torch.frombuffer(data, dtype=torch.uint8).cuda()
        try:
            torch.ops.cachegen.decode(packed, torch.tensor(sizes), *side, known, 40)
        except (CorruptError, TruncatedError):
            caught += 1
    torch.cuda.synchronize()
    return caught


def test_ops_refuse_tensors_on_different_devices() -> None:
    section = draw_section(3, 40, 300, TABLES, 1)
    with pytest.raises(TensorError, match="must be"):
        torch.ops.cachegen.encode(section.symbols.cuda(), TABLES.native, section.table_ids, None)
    with pytest.raises(TensorError, match="must be"):
        torch.ops.cachegen.encode(section.symbols.cuda(), TABLES.on(torch.device("cuda", 0)), section.table_ids, None)


def test_ops_pass_opcheck() -> None:
    section = draw_section(3, 40, 300, TABLES, 3)
    side = (TABLES.on(torch.device("cuda", 0)), section.table_ids.cuda(), section.contexts.cuda())  # type: ignore[union-attr]
    torch.library.opcheck(torch.ops.cachegen.encode, (section.symbols.cuda(), *side))
    packed, sizes = torch.ops.cachegen.encode(section.symbols.cuda(), *side)
    torch.library.opcheck(torch.ops.cachegen.decode, (packed, sizes, *side, 40))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("transform", ["delta", "identity"])
def test_encoding_there_gives_the_bytes_of_here(transform: str, dtype: torch.dtype) -> None:
    keys, values = sample_kv(dtype=dtype)
    config = CacheGenConfig(transform=transform, chunk_tokens=64)
    here = encode_kv(keys, values, config)
    there = encode_kv([k.cuda() for k in keys], [v.cuda() for v in values], config)
    assert (there.side, there.parts) == (here.side, here.parts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("transform", ["delta", "identity"])
@pytest.mark.parametrize("level", [1, 2, 3])
def test_decoding_there_gives_the_values_of_here(transform: str, dtype: torch.dtype, level: int) -> None:
    encoded = encode_kv(*sample_kv(dtype=dtype), CacheGenConfig(transform=transform, chunk_tokens=64))
    for here, there in zip(decode_kv(encoded, level), decode_kv(encoded, level, device="cuda"), strict=True):
        for x, y in zip(here, there, strict=True):
            assert y.is_cuda
            assert torch.equal(x, y.cpu())


def test_a_small_batch_gives_the_values_of_here() -> None:
    """Small enough for a sanitizer: eight chunks of one tile, ends and anchors among them."""
    keys, values = sample_kv(layers=1, tokens=150, heads=2, dim=64)
    config = CacheGenConfig(transform="delta", chunk_tokens=20, protect_first=4, protect_last=4)
    encoded = encode_kv(keys, values, config)
    assert native.batch_shared_bytes(torch.device("cuda")) > 0
    for here, there in zip(decode_kv(encoded, 3), decode_kv(encoded, 3, device="cuda"), strict=True):
        assert all(torch.equal(x, y.cpu()) for x, y in zip(here, there, strict=True))


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("transform", ["delta", "identity"])
def test_batches_of_an_8b_layer_give_the_values_of_here(transform: str, level: int) -> None:
    keys, values = sample_kv(layers=2, tokens=1300, heads=8, dim=128)
    encoded = encode_kv(keys, values, CacheGenConfig(transform=transform, chunk_tokens=64))
    for here, there in zip(decode_kv(encoded, level), decode_kv(encoded, level, device="cuda"), strict=True):
        assert all(torch.equal(x, y.cpu()) for x, y in zip(here, there, strict=True))


@pytest.mark.parametrize("careless", [False, True], ids=["default precision", "TF32 and reduced sums allowed"])
def test_klt_products_are_precise_whatever_is_allowed(careless: bool) -> None:
    from hf_cachegen.codec.precision import full_precision

    x, y = torch.randn(256, 2048), torch.randn(2048, 512)
    exact = x.double() @ y.double()
    settings = torch.backends.cuda.matmul
    settings.allow_bf16_reduced_precision_reduction = careless
    torch.set_float32_matmul_precision("medium" if careless else "highest")
    try:
        with full_precision(torch.device("cuda")):
            found = (x.cuda() @ y.cuda()).cpu().double()
    finally:
        torch.set_float32_matmul_precision("highest")
        settings.allow_bf16_reduced_precision_reduction = True
    assert float((found - exact).norm() / exact.norm()) < 1e-6


@pytest.mark.parametrize("level", [1, 3])
def test_klt_decodes_there_to_a_rounding_of_here(level: int) -> None:
    cache = CacheGenCache.from_context(reference(), torch.randint(5, 200, (1, 700)))
    profile = cache.profile
    assert profile is not None
    encoded = encode_kv(cache.kv.keys, cache.kv.values, CacheGenConfig(transform="klt"), profile)
    for here, there in zip(decode_kv(encoded, level), decode_kv(encoded, level, device="cuda"), strict=True):
        for x, y in zip(here, there, strict=True):
            assert y.is_cuda
            assert float((x.float() - y.cpu().float()).norm() / x.float().norm()) < 4e-3  # 2^-8


@pytest.mark.parametrize("level", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["joint", "chained", "predicted", "wide"])
def test_products_of_chained_layers_are_those_of_here(kind: str, dtype: torch.dtype, level: int) -> None:
    codec = codec_of(chained(kind), dtype)
    y = torch.randn(PRODUCT_TOKENS, codec.entries.shape[1], generator=torch.Generator().manual_seed(level)) * 6
    y, span = y.round() * codec.inner.scale(level, y.device).steps, Span(0, PRODUCT_TOKENS, PRODUCT_TOKENS)
    expected = empty_kv(codec.geometry, ["cpu"] * LAYERS)
    found = empty_kv(codec.geometry, ["cuda"] * LAYERS)
    codec._restore(y.clone(), span, level, by_token(Target.layers(expected), codec.geometry))
    codec.products.restore(y.cuda(), span, level, Target.layers(found), 0, codec._scores(span))
    for x, mine in list(zip(expected, found, strict=True))[2 * (kind == "predicted") :]:
        assert float((x.float() - mine.cpu().float()).norm()) <= 0.02 * float(x.float().norm())


@pytest.mark.parametrize("transform", ["identity", "delta", "lossless", "klt"])
def test_nothing_waits_before_the_check(transform: str) -> None:
    """Torch raises an error for what it knows to wait, the first copy of a table included."""
    keys, values = sample_kv(tokens=512, dim=8)
    config = CacheGenConfig(transform="identity" if transform == "lossless" else transform, chunk_tokens=32)
    config = replace(config, lossless=transform == "lossless", levels=3)
    profile = make_profile() if transform == "klt" else None
    if transform == "klt":
        keys, values = ([x.float()[:, :2] for x in pair[:3]] for pair in (keys, values))
        config = replace(CONFIG, chunk_tokens=32)
    context = encode_kv(keys, values, config, profile)
    codec = codec_of_side(context.geometry, context.config, context.side, profile)
    found = empty_kv(context.geometry, ["cuda"] * len(keys))
    spans = [Span(first, 32, 512) for first in range(0, 512, 32)]
    spans = spans[:OUTSTANDING] if transform == "lossless" else spans  # a launch is a chunk
    parts = list(zip(*context.parts, strict=True))
    target, before = Target.layers(found), torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        check = codec.launch([(own, span, span.first) for own, span in zip(parts, spans, strict=False)], target)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    check()
    expected = decode_kv(context)
    tokens = slice(0, spans[-1].first + 32)
    for x, mine in zip((*expected[0], *expected[1]), (*found[::2], *found[1::2]), strict=True):
        assert torch.allclose(x[:, :, tokens].float(), mine[:, :, tokens].cpu().float(), atol=1e-4, rtol=1e-2)


def test_passes_give_the_same_symbols() -> None:
    rows = torch.randn(50, 1500).to(torch.bfloat16)
    rows[3, 7] = 3e4  # fits no byte
    grid = passes.Grid(torch.randn(5, 1500), 10, torch.randn(1500), torch.rand(1500) + 0.1)
    here, there = passes.quantise(rows, grid, 3), passes.quantise(rows.cuda(), grid.to(torch.device("cuda")), 3)
    for x, y in zip((here.base, here.digits, here.contexts), (there.base, there.digits, there.contexts), strict=True):
        assert torch.equal(x, y.cpu())
    assert torch.equal(here.wide.positions, there.wide.positions)
    sums = [passes.moments(x, grid.to(x.device), 2, 40) for x in (rows, rows.cuda())]
    assert torch.equal(sums[0], sums[1])


def test_the_current_stream_is_used() -> None:
    made = Encoder(*sample_kv(), CacheGenConfig(transform="delta", chunk_tokens=64))
    parts, span = next(made.chunks()), made.rows.spans[0]
    expected = made.codec.decode(parts, span, torch.bfloat16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        rows = torch.empty(*expected.shape, dtype=torch.bfloat16, device="cuda")
        made.codec.decode_into(parts, span, Target.matrix(rows), 0)
    stream.synchronize()
    assert torch.equal(rows.cpu(), expected)


def test_readers_get_what_was_put_before() -> None:
    keys, values = sample_kv(tokens=3000, dim=128)
    made = Encoder(keys, values, CacheGenConfig(transform="identity"))
    writer = LayerWriter(made.geometry, [torch.device("cuda", 0)] * len(keys))
    pieces = [x.cuda() for pair in zip(keys, values, strict=True) for x in pair]
    for sign in (1, -1):
        writer.adopt(changed := [sign * x for x in pieces])
        writer.put(Apart(0, changed))
        with writer.reading():
            found = [x.clone() for x in writer.keys]
        writer.adopt(nothing := [0 * x for x in pieces])
        writer.put(Apart(0, nothing))
        assert all(torch.equal(x.cpu(), sign * y) for x, y in zip(found, keys, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lossless_chunks_are_decoded_there(dtype: torch.dtype) -> None:
    keys, values = sample_kv(tokens=700, dim=64, dtype=dtype)
    found = decode_kv(encode_kv(keys, values, CacheGenConfig(lossless=True, chunk_tokens=64)), device="cuda")
    for x, y in zip((*keys, *values), (*found[0], *found[1]), strict=True):
        assert y.is_cuda
        assert torch.equal(x, y.cpu())


@pytest.mark.parametrize("elsewhere", ["cpu", "cuda"])
@pytest.mark.parametrize("transform", ["identity", "delta"])
def test_refinements_are_decoded_there(transform: str, elsewhere: str) -> None:
    """Beside the tensors, on a stream of their own; layers on another device get their values from the GPU."""
    keys, values = sample_kv(tokens=300, dim=64)
    made = Encoder(keys, values, CacheGenConfig(transform=transform, chunk_tokens=64))
    first, second = torch.device("cuda", 0), torch.device(elsewhere, 0 if elsewhere == "cuda" else None)
    writer = LayerWriter(made.geometry, [first, second, second])
    for level in (1, 3):
        for parts, span in zip(made.chunks(), made.rows.spans, strict=True):
            launch = writer.rows(made.codec, [(parts[:level], span)])
            launch.check()
            (apart,) = launch.apart
            assert apart.values[0].is_cuda
            assert launch.timer.seconds() > 0
            writer.put(apart)
    found, expected = writer.kv(), decode_kv(encode_kv(keys, values, made.config), 3)
    for x, y in zip((*found.keys, *found.values), (*expected[0], *expected[1]), strict=True):
        assert torch.equal(x.cpu(), y)


@pytest.mark.parametrize("transform", ["identity", "delta"])
def test_streams_give_the_values_of_loads(
    transform: Any, tmp_path: Path, own_cache: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those of refinements that arrive while a model generates. A damaged chunk is found among others."""
    model, ids = reference().cuda(), torch.randint(5, 200, (1, 700), device="cuda")
    config = CacheGenConfig(transform=transform, chunk_tokens=64)
    CacheGenCache.from_context(model, ids, config, profile=None).save_pretrained(tmp_path / "artifact")
    loaded = {level: CacheGenCache.from_pretrained(tmp_path / "artifact", model=model, level=level) for level in (1, 3)}
    for level, expected in loaded.items():
        found = CacheGenCache.stream(tmp_path / "artifact", model, level=level)
        assert same_kv(found, expected)
        assert all(chunk.decode_seconds for chunk in report(found).chunks)
    found = CacheGenCache.stream(tmp_path / "artifact", model, refine="while_generating")
    answer = hf_cachegen.generate(model, ids, cache=found, min_new_tokens=8, max_new_tokens=8, do_sample=False)
    assert answer.shape == (1, 708)
    assert found.refinement is not None
    assert found.refinement.wait(30)
    assert same_kv(found, loaded[3])
    damage(monkeypatch, (4, 0))
    found = CacheGenCache.stream(tmp_path / "artifact", model, level=1)
    assert [chunk.index for chunk in report(found).chunks if chunk.level is None] == [4]
    assert same_kv(found, loaded[1], slice(0, 256))
    assert same_kv(found, loaded[1], slice(320, None))


@pytest.mark.parametrize("nbytes", [1, 17, 16384, 1_000_003])
def test_sums_of_blocks_are_those_of_here(nbytes: int) -> None:
    data = torch.randint(0, 256, (nbytes + 8,), dtype=torch.uint8)
    for first in (0, 3):  # also memory that is not aligned
        part = slice(first, first + nbytes)
        found = checksum._block_sums(data.cuda()[part])
        assert torch.equal(found.cpu(), checksum.torch_block_sums(data[part]))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU only")
def test_the_tensors_device_is_used_not_the_current_one() -> None:
    encoded = encode_kv(*sample_kv(), CacheGenConfig(transform="delta", chunk_tokens=64))
    with torch.cuda.device(0):
        keys, _ = decode_kv(encoded, 2, device="cuda:1")
    assert torch.equal(keys[0].cpu(), decode_kv(encoded, 2)[0][0])


def test_a_cache_loads_onto_the_models_gpu(tmp_path_factory: pytest.TempPathFactory) -> None:
    model = reference()
    ids = torch.randint(5, 200, (1, 700))
    place = tmp_path_factory.mktemp("cache")
    CacheGenCache.from_context(model, ids, CacheGenConfig(transform="identity"), profile=None).save_pretrained(place)
    here = CacheGenCache.from_pretrained(place, model=model)
    model.cuda()
    there = CacheGenCache.from_pretrained(place, model=model)
    assert all(x.is_cuda and torch.equal(x.cpu(), y) for x, y in zip(there.kv.keys, here.kv.keys, strict=True))
    answer = hf_cachegen.generate(model, ids.cuda(), cache=there, max_new_tokens=4, do_sample=False)
    assert answer.shape == (1, 704)
