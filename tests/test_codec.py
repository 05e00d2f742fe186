"""Transforms, quantiser and tables: the properties of each stage, and of all stages together."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_samples import same, sample_kv

from hf_cachegen.artifact.encoded import decode_kv, encode_kv
from hf_cachegen.codec import anchors as anchoring
from hf_cachegen.codec import native, passes, quantize, rans
from hf_cachegen.codec.chunk import LossyCodec
from hf_cachegen.codec.context import Encoder
from hf_cachegen.codec.passes import Grid
from hf_cachegen.codec.transforms.delta import Delta
from hf_cachegen.codec.transforms.identity import Identity
from hf_cachegen.config import CacheGenConfig
from hf_cachegen.errors import CacheGenError, ConfigError, CorruptError, LevelError, TensorError, TruncatedError

LOSSY = [CacheGenConfig(chunk_tokens=64, transform=name) for name in ("delta", "identity")]
needs_native = pytest.mark.skipif(not native.available(), reason="the package was installed without a C++ compiler")
IDS = [config.transform for config in LOSSY]


def lossy(encoder: Encoder) -> LossyCodec:
    """Return the codec of nested symbols in an encoder's transform."""
    assert isinstance(encoder.codec, Delta | Identity)
    return encoder.codec.inner


def coded_positions(tokens: int, group_tokens: int) -> torch.Tensor:
    """Return the positions, within a chunk, of the tokens that are not anchors: int64."""
    position = torch.arange(tokens)
    return position[position % group_tokens != 0] if group_tokens else position


@given(st.lists(st.integers(-(2**24), 2**24), min_size=1, max_size=50), st.integers(1, 3))
def test_levels_nest(values: list[int], levels: int) -> None:
    fine = torch.tensor([values], dtype=torch.int32)
    base, digits = quantize.split(fine, levels)
    assert all(int(d.abs().max()) <= 1 for d in digits)
    for done, digit in enumerate(digits):
        exact = fine.double() / 3 ** (levels - 1 - done)
        assert torch.equal(base.double(), exact.round())  # each level equals rounding at its own step
        base = quantize.refine(base, digit)
    assert torch.equal(base, fine)


@given(st.integers(1, 40), st.integers(2, 12))
@settings(max_examples=30, deadline=None)
def test_delta_inverts(tokens: int, group: int) -> None:
    vectors = torch.tensor([0, 0, 0, 1, 1])
    rows = torch.randn(tokens, 5) * torch.tensor([1e-3, 1, 50, 1, 1])
    anchors = anchoring.anchors_of(rows, vectors, group)
    assert anchors is not None
    assert len(anchors.symbols) == anchoring.anchor_count(tokens, group)
    grid = Grid.of(anchors, vectors, group, torch.zeros(5), torch.full((5,), 2.0**-8))
    symbols = passes.quantise(rows, grid, 3)
    back = torch.full_like(rows, torch.nan)
    passes.restore(back, grid, 0, symbols.base, list(symbols.digits), symbols.wide)
    others = coded_positions(tokens, group)
    torch.testing.assert_close(back[others], rows[others], rtol=1e-5, atol=2.0**-8)
    assert bool(back[::group].isnan().all())
    error = (anchors.values(vectors) - rows[::group]).abs()
    assert bool((error <= anchors.scales.float()[:, vectors] * 0.501).all())


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@given(st.integers(1, 30), st.sampled_from([1, 7, 300, 1100]), st.sampled_from([0, 2, 5]), st.integers(1, 3), st.data())
@settings(max_examples=25, deadline=None)
def test_compiled_passes_equal_torch(
    dtype: torch.dtype, tokens: int, channels: int, group: int, levels: int, data: st.DataObject
) -> None:
    """Use symbols of all sizes, up to ones that no float holds exactly, and every instruction set."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    rows = torch.randn(tokens, channels, generator=generator) * 10 ** (3 * torch.rand(channels, generator=generator))
    spread = data.draw(st.sampled_from([1, 30, 1e7, 1e12]))
    rows = torch.where(torch.rand(rows.shape, generator=generator) < 0.01, rows * spread, rows)
    rows = rows.clamp(-6e4, 6e4).to(dtype) if dtype == torch.float16 else rows.to(dtype)
    anchors = rows[::group].float() + 0.1 if group else None
    means, steps = torch.randn(2, channels, generator=generator)
    grid = Grid(anchors, group, means, steps.abs() + 0.1)
    low = torch.randint(0, 3, (channels, 3), generator=generator, dtype=torch.uint8)
    high = torch.maximum(low, torch.randint(0, 3, (channels, 3), generator=generator, dtype=torch.uint8))
    coded = len(grid.positions(tokens))
    first = data.draw(st.integers(0, coded))

    def everything() -> list[torch.Tensor]:
        sums = passes.moments(rows, grid, first, coded)
        base, wide, digits, contexts = passes.quantise(rows, grid, levels)
        counts = torch.ones(channels, 256, dtype=torch.int32)
        passes.count(counts, base)
        found = [base, *wide, digits, contexts, counts, *passes.clamp(base, low + 100, high + 150)]
        coarser = None
        for k in range(levels - 1):
            coarser = passes.contexts_of(*((digits[k - 1], 1) if k else (base, 128)), coarser)
            counts = torch.zeros(channels, 9, dtype=torch.int32)
            passes.count(counts, digits[k], coarser)
            found += [coarser, counts, *passes.clamp(digits[k], low, high, coarser)]
            assert torch.equal(coarser, contexts[k])
        for out in (torch.bfloat16, torch.float16, torch.float32):
            values = torch.zeros(tokens, channels, dtype=out)
            passes.restore(values, grid, first, base[first:], [digit[first:] for digit in digits], wide)
            found.append(values)
        return [*found, sums]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "available", lambda *device: False)
        *expected, expected_sums = everything()
    for isa in native.available_isas():
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CACHEGEN_CPU", isa.name.lower())
            *found, sums = everything()
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
        torch.testing.assert_close(sums, expected_sums, rtol=1e-12, atol=0)


def test_anchor_scale_never_clips() -> None:
    rows = torch.tensor([[1.0, -300.0], [0.0, 0.0], [1e-30, 1e30]])
    anchors = anchoring.quantise_anchors(rows, torch.tensor([0, 0]))
    assert int(anchors.symbols.abs().max()) <= anchoring.ANCHOR_PEAK
    assert bool((anchors.scales.float() * 127 >= rows.abs().amax(1, keepdim=True)).all())


@pytest.mark.parametrize("config", LOSSY, ids=IDS)
def test_errors_are_within_half_a_step_at_every_level(config: CacheGenConfig) -> None:
    keys, values = sample_kv(dtype=torch.float32)
    encoder = Encoder(keys, values, config)
    inner = lossy(encoder)
    for (rows, span), parts in zip(encoder.rows.chunks(), encoder.chunks(), strict=True):
        coded = coded_positions(span.tokens, inner.group_tokens)
        protected = torch.ones(len(coded), dtype=torch.bool)
        protected[span.ordinary(config, inner.group_tokens)] = False
        for level in (1, 2, 3):
            decoded = encoder.codec.decode(parts[:level], span)
            error = (decoded - rows).abs()[coded]
            finest = inner.steps * 0.51 + 1e-4 * rows.abs().max()
            assert bool((error[protected] <= finest).all())
            assert bool((error[~protected] <= finest * 3 ** (3 - level)).all())


@pytest.mark.parametrize("config", LOSSY, ids=IDS)
def test_approximations_equal_the_decoded_rows(config: CacheGenConfig) -> None:
    encoder = Encoder(*sample_kv(), config)
    for (rows, span), parts in zip(encoder.rows.chunks(), encoder.chunks(), strict=True):
        for level, expected in enumerate(encoder.codec.approximations(rows, span), 1):
            assert torch.equal(encoder.codec.decode(parts[:level], span), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_lossless_keeps_every_bit(dtype: torch.dtype) -> None:
    keys, values = sample_kv(dtype=dtype)
    strange = torch.tensor(
        [0.0, -0.0, float("inf"), float("-inf"), float("nan"), torch.finfo(dtype).tiny / 2], dtype=dtype
    )
    keys[1][0, 0, 7, :6] = strange
    values[2][0, 1, :6, 3] = -strange
    config = CacheGenConfig(transform="identity", lossless=True, chunk_tokens=64)
    encoded = encode_kv(keys, values, config)
    assert encoded.levels == 1
    decoded = decode_kv(encoded)
    assert same(decoded[0], keys)
    assert same(decoded[1], values)
    assert encoded.nbytes < sum(x.nbytes for x in (*keys, *values)) * 1.1


SHAPES = {
    "one token": {"tokens": 1},
    "fewer tokens than are protected": {"tokens": 12},
    "exactly one chunk": {"tokens": 64},
    "one token more than a chunk": {"tokens": 65},
    "batch of three": {"batch": 3, "tokens": 70},
    "K and V of different width": {"dim": 24, "v_dim": 8},
    "more channels than a tile": {"heads": 5, "dim": 40, "layers": 1},
    "fp32": {"dtype": torch.float32},
    "fp16": {"dtype": torch.float16},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("config", LOSSY, ids=IDS)
def test_round_trip(config: CacheGenConfig, shape: dict[str, object]) -> None:
    keys, values = sample_kv(**shape)  # type: ignore[arg-type]
    encoded = encode_kv(keys, values, config)
    errors = []
    for level in (1, 2, 3):
        decoded = decode_kv(encoded, level)
        for found, exact in zip((*decoded[0], *decoded[1]), (*keys, *values), strict=True):
            assert found.shape == exact.shape
            assert found.dtype == exact.dtype
        errors.append(sum((a.double() - b.double()).square().sum() for a, b in zip(decoded[0], keys, strict=True)))
    assert errors[0] >= errors[1] >= errors[2]
    energy = sum((x.double() - x.double().mean(2, keepdim=True)).square().sum() for x in keys)
    assert errors[2] <= 0.07 * energy + 1e-3 * sum(x.double().square().sum() for x in keys)


@pytest.mark.parametrize("config", LOSSY, ids=IDS)
def test_constant_channels_round_trip(config: CacheGenConfig) -> None:
    keys, values = sample_kv(layers=2, tokens=80)
    keys[0][..., 3] = 7.0
    keys[0][..., 4] = 0.0
    values[1].zero_()
    decoded = decode_kv(encode_kv(keys, values, config))
    assert torch.equal(decoded[1][1], values[1])
    assert torch.equal(decoded[0][0][..., 4], keys[0][..., 4])
    torch.testing.assert_close(decoded[0][0][..., 3], keys[0][..., 3], rtol=0.05, atol=0.2)  # as exact as the anchors


@pytest.mark.parametrize("config", LOSSY, ids=IDS)
def test_the_same_tensors_give_the_same_bytes(config: CacheGenConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, values = sample_kv()
    first = encode_kv(keys, values, config)
    assert encode_kv([k.clone() for k in keys], values, config) == first
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert encode_kv(keys, values, config) == first
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(rans.native, "available", lambda *device: False)  # the reference coder
    assert encode_kv(keys, values, config) == first
    assert same(decode_kv(first)[0], decode_kv(encode_kv(keys, values, config))[0])


@pytest.mark.parametrize("config", LOSSY, ids=IDS)
def test_side_information_is_six_bytes_a_channel(config: CacheGenConfig) -> None:
    encoder = Encoder(*sample_kv(), config)
    assert len(encoder.codec.side_bytes()) <= 6 * len(encoder.rows.channels)


def test_nested_levels_cost_as_much_as_the_finest_alone() -> None:
    keys, values = sample_kv(tokens=2000, heads=4, dim=32)
    config = CacheGenConfig(transform="identity", chunk_tokens=1000)
    alone = encode_kv(keys, values, replace(config, levels=1))
    nested = encode_kv(keys, values, config)
    assert nested.nbytes <= 1.02 * alone.nbytes


def test_layer_thirds_have_the_papers_steps() -> None:
    keys, values = sample_kv(layers=6, dtype=torch.float32)
    config = CacheGenConfig(transform="identity", protect_first=0, protect_last=0)
    encoder = Encoder(keys, values, config)
    rows = torch.cat([rows for rows, _ in encoder.rows.chunks()])
    ratio = lossy(encoder).steps / rows.std(0, unbiased=False)
    for vector in range(12):
        expected = (0.5, 1.0, 1.5)[vector // 2 // 2] / 3
        mine = encoder.rows.channels.vectors == vector
        torch.testing.assert_close(ratio[mine].mean().item(), expected, rtol=0.05, atol=0)


def test_auto_takes_the_smaller_transform() -> None:
    """Where neighbouring tokens are similar, differences are small; where they are independent, differences are larger
    than values.
    """
    still = [x.cumsum(2) for x in torch.randn(4, 1, 2, 400, 16)]
    noise = list(torch.randn(4, 1, 2, 400, 16))
    assert encode_kv(still[:2], still[2:]).config.transform == "delta"
    assert encode_kv(noise[:2], noise[2:]).config.transform == "identity"
    lossless = encode_kv(noise[:2], noise[2:], CacheGenConfig(lossless=True))
    assert (lossless.config.transform, lossless.config.lossless) == ("identity", True)


def test_report_counts_every_byte() -> None:
    encoded = encode_kv(*sample_kv(), LOSSY[0])
    total = len(encoded.side) + sum(len(data) for part in encoded.parts for data in part)
    assert encoded.report["bytes_per_level"][-1] == total
    assert total < encoded.nbytes
    assert [encoded.nbytes_at(level) for level in (1, 2, 3)] == sorted(encoded.nbytes_at(level) for level in (1, 2, 3))
    assert encoded.nbytes_at(3) == encoded.nbytes
    for layer in encoded.report["layers"]:
        assert layer["k_error"] == sorted(layer["k_error"], reverse=True)
        assert layer["v_bits"] == sorted(layer["v_bits"])


def wrong_tensors() -> dict[str, tuple[list[torch.Tensor], list[torch.Tensor]]]:
    keys, values = sample_kv(layers=2, tokens=20)
    nan, infinite = [k.clone() for k in keys], [v.clone() for v in values]
    nan[1][0, 0, 5, 5] = float("nan")
    infinite[0][0, 0, 19, 0] = float("inf")
    return {
        "no layers": ([], []),
        "fewer values than keys": (keys, values[:1]),
        "three dimensions": ([k[0] for k in keys], [v[0] for v in values]),
        "lengths differ": (keys, [values[0], values[1][:, :, :10]]),
        "batches differ": (keys, [values[0], values[1].expand(2, -1, -1, -1)]),
        "dtypes differ": (keys, [v.float() for v in values]),
        "integers": ([k.int() for k in keys], [v.int() for v in values]),
        "fp64": ([k.double() for k in keys], [v.double() for v in values]),
        "not a number": (nan, values),
        "infinite": (keys, infinite),
        "no tokens": ([k[:, :, :0] for k in keys], [v[:, :, :0] for v in values]),
    }


@pytest.mark.parametrize("name", wrong_tensors())
def test_wrong_tensors_are_refused(name: str) -> None:
    with pytest.raises(TensorError):
        encode_kv(*wrong_tensors()[name])


@pytest.mark.parametrize("level", [0, 4, -1, True, 1.5, "2"])
def test_wrong_levels_are_refused(level: object) -> None:
    encoded = encode_kv(*sample_kv(tokens=20))
    with pytest.raises(LevelError):
        decode_kv(encoded, level)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {"transform": "wavelet"}, {"coder": "zip"}, {"levels": 0}, {"levels": 4}, {"levels": True}, {"steps": (1, 2)},
        {"steps": ("1", 1, 1)}, {"steps": (None, 1, 1)}, {"steps": (True, 1, 1)}, {"steps": 3}, {"steps": [1, 1, 1]},
        {"lossless": 1}, {"lossless": "no"}, {"measure": None}, {"measure": 1},
        {"steps": (0, 1, 1)}, {"steps": (1, float("nan"), 1)}, {"chunk_tokens": 0}, {"group_tokens": 1},
        {"protect_last": -1},
        {"prob_bits": 9}, {"prob_bits": 13}, {"lossless": True, "transform": "delta"}, {"chunk_tokens": 1 << 20},
    ],
)  # fmt: skip
def test_wrong_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        CacheGenConfig(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("config", LOSSY, ids=IDS)
def test_damaged_parts_end_in_a_typed_error_or_in_numbers(config: CacheGenConfig) -> None:
    """Below the checksums, decoding any bytes ends, within its memory, in a typed error or in some tensors."""
    encoded = encode_kv(*sample_kv(layers=1, tokens=40), config)
    generator = torch.Generator().manual_seed(1)
    refused = 0
    for trial in range(300):
        part, data = trial % 3, bytearray(encoded.parts[trial % 3][0])
        if trial % 4 == 3:
            del data[int(torch.randint(len(data), (), generator=generator)) :]
        else:
            data[int(torch.randint(len(data), (), generator=generator))] ^= 1 << int(
                torch.randint(8, (), generator=generator)
            )
        parts = tuple((bytes(data),) if p == part else encoded.parts[p] for p in range(3))
        try:
            decode_kv(replace(encoded, parts=parts))
        except CacheGenError:
            refused += 1
    assert refused > 200


def test_damaged_side_information_is_refused() -> None:
    encoded = encode_kv(*sample_kv(layers=1, tokens=40), LOSSY[0])
    channels = len(encoded.side) // 5
    for side in (
        encoded.side[:-1],
        encoded.side + b"\0",
        encoded.side[:-1] + b"\xff",  # a missing refinement table
        encoded.side[:channels] + b"\xff" + encoded.side[channels + 1 :],  # a missing anchor table
        b"",
    ):
        with pytest.raises((CorruptError, TruncatedError)):
            decode_kv(replace(encoded, side=side))
