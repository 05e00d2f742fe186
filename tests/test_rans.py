"""The coder: one format with two implementations, and errors for bytes that no encoder wrote."""

from __future__ import annotations

import hashlib
import random
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_cachegen.codec import native, rans
from hf_cachegen.codec.rans import Tables
from hf_cachegen.errors import ConfigError, CorruptError, TensorError, TruncatedError
from tests.coder_support import Section, draw_section, frequencies_of, laplace_tables
from tests.lockstep import COMPILER, in_lockstep

BACKENDS = (*(isa.name.lower() for isa in native.available_isas()), "reference")
needs_native = pytest.mark.skipif(not native.available(), reason="the package was installed without a C++ compiler")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@st.composite
def tables(draw: st.DrawFn) -> Tables:
    """Draw skewed, uniform and degenerate tables."""
    prob_bits = draw(st.sampled_from([10, 11, 12]))
    n_symbols = draw(st.sampled_from([1, 2, 3, 32, 256] if prob_bits < 12 else [2, 3, 32, 256]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    rows = []
    for kind in draw(st.lists(st.sampled_from(["skewed", "uniform", "gaps", "single"]), min_size=1, max_size=5)):
        weights = torch.ones(n_symbols)
        if kind == "skewed":
            weights = torch.exp(-torch.arange(n_symbols) * (0.1 + torch.rand(1, generator=generator) * 3)).clamp(1e-6)
        elif kind == "gaps":
            weights = (torch.rand(n_symbols, generator=generator) > 0.5).float()
            weights[:2] = 1
        elif kind == "single":
            weights = torch.full((n_symbols,), 0.0)
            weights[int(torch.randint(n_symbols, (1,), generator=generator))] = 1e9
            if prob_bits == 12:  # 4096 is one too many
                weights[weights == 0] = 0.0
                weights[:2] += 1
        rows.append(weights)
    return Tables(frequencies_of(torch.stack(rows), prob_bits), prob_bits)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    tables(),
    st.one_of(st.integers(1, 300), st.sampled_from([256, 512, 800])),
    st.one_of(st.integers(0, 40), st.sampled_from([255, 3000])),
    st.sampled_from([1, 3]),
    st.integers(0, 2**32),
)
def test_all_back_ends_give_the_same_bytes_and_decode_each_other(
    tables: Tables, channels: int, tokens: int, contexts: int, seed: int
) -> None:
    section = draw_section(seed, tokens, channels, tables, contexts)
    streams = section.encode(backend="reference")
    for backend in BACKENDS:
        assert section.encode(backend=backend) == streams
        assert torch.equal(section.decode(streams, backend=backend), section.symbols)
    if COMPILER:
        with in_lockstep():  # the CUDA kernels
            assert section.encode(backend="native") == streams
            assert torch.equal(section.decode(streams, backend="native"), section.symbols)


@pytest.mark.parametrize("channels", [256, 512, 768])
def test_tables_of_three_symbols_among_others(channels: int, backend: str) -> None:
    """A decoder may have a special path for tiles whose tables all have three symbols.

    Cover symbols that never occur, and an adjacent tile whose tables have more symbols.
    """
    rows = [
        [1022, 1, 1, 0],
        [1, 1022, 1, 0],
        [0, 512, 512, 0],
        [512, 0, 512, 0],
        [512, 512, 0, 0],
        [256, 256, 256, 256],
    ]
    chance = torch.Generator().manual_seed(channels)
    table_ids = torch.randint(0, 5, (channels, 3), generator=chance).to(torch.uint8)
    contexts = torch.randint(0, 3, (50, channels), generator=chance).to(torch.uint8)
    for last in (0, 5):
        table_ids[-1] = last
        used = torch.tensor(rows)[table_ids.long()[torch.arange(channels), contexts.long()]].flatten(0, 1)
        symbols = used.double().multinomial(1, generator=chance).reshape(50, channels).to(torch.uint8)
        section = Section(symbols, Tables(torch.tensor(rows), 10), table_ids, contexts)
        streams = section.encode(backend="reference")
        assert section.encode(backend=backend) == streams
        assert torch.equal(section.decode(streams, backend=backend), symbols)


@pytest.mark.parametrize("prob_bits", [10, 11, 12])
def test_tables_of_three_symbols_at_all_frequencies(prob_bits: int) -> None:
    """Their encoder divides floats, which must be exact for every state and frequency; the scalar one does not."""
    torch.manual_seed(prob_bits)
    total = 1 << prob_bits
    ends = torch.tensor([[1, 1], [1, total - 2], [total - 2, 1], [1, total // 2], [total // 3, total // 3]])
    some = (torch.rand(79, 2) * (total - 2) / 2).long() + 1
    pairs = torch.cat([ends, some])
    tables = Tables(torch.cat([pairs, total - pairs.sum(1, keepdim=True)], 1), prob_bits)
    ids = torch.randint(0, len(pairs), (512, 3), dtype=torch.uint8)
    symbols, contexts = torch.randint(0, 3, (2, 1500, 512), dtype=torch.uint8)
    known = rans.encode(symbols, tables, ids, contexts, backend="scalar")
    for backend in (isa.name.lower() for isa in native.available_isas()):
        assert rans.encode(symbols, tables, ids, contexts, backend=backend) == known
        for wrong in (3, 4, 131, 255):
            damaged = symbols.clone()
            damaged[1499, 500] = wrong
            with pytest.raises(TensorError, match="no frequency"):
                rans.encode(damaged, tables, ids, contexts, backend=backend)
    tables = Tables(torch.tensor([[total // 2, 0, total // 2]]).expand(3, 3), prob_bits)
    for backend in (isa.name.lower() for isa in native.available_isas()):
        with pytest.raises(TensorError, match="no frequency"):
            rans.encode(torch.ones_like(symbols), tables, ids % 3, contexts, backend=backend)


@pytest.mark.parametrize("channels", [1, 31, 32, 33, 64, 65, 255, 256, 257, 512, 530])
def test_tile_edges(channels: int, backend: str) -> None:
    section = draw_section(channels, 5, channels, laplace_tables([0.5, 3.0], 11), 1)
    streams = section.encode(backend=backend)
    assert len(streams) == rans.tile_count(channels)
    assert torch.equal(section.decode(streams, backend=backend), section.symbols)


@pytest.mark.parametrize(("tokens", "channels"), [(0, 0), (0, 40), (3, 0)])
def test_empty_sections_have_no_streams(tokens: int, channels: int, backend: str) -> None:
    section = draw_section(0, tokens, channels, laplace_tables([1.0], 11), 3)
    assert section.encode(backend=backend) == []
    assert section.decode([], backend=backend).shape == (tokens, channels)


def test_a_stream_by_hand(backend: str) -> None:
    """One lane, two equal symbols of 512 in 1024: x = (x // 512 << 10) + x % 512 + start."""
    half = Tables(torch.tensor([[512, 512]]), 10)
    section = Section(torch.tensor([[0], [1]], dtype=torch.uint8), half, torch.zeros(1, 1, dtype=torch.uint8), None)
    after_last = (0x8000 // 512 << 10) + 512
    after_first = (after_last // 512 << 10) + after_last % 512
    assert section.encode(backend=backend) == [struct.pack("<I", after_first)]


def test_words_interleave_in_lane_order(backend: str) -> None:
    """Two lanes, frequency 1 of 1024: 10 bits per symbol, so both lanes write their word at the same step."""
    rare = Tables(torch.tensor([[1023, 1]]), 10)
    section = Section(torch.ones(3, 2, dtype=torch.uint8), rare, torch.zeros(2, 1, dtype=torch.uint8), None)
    state, words = 0x8000, []
    for _ in range(3):
        if state >= 1 << 21:
            words.append(state & 0xFFFF)
            state >>= 16
        state = (state << 10) + 1023
    assert len(words) == 1
    assert section.encode(backend=backend) == [struct.pack("<IIHH", state, state, words[0], words[0])]


def test_the_bytes_never_change(backend: str) -> None:
    """Artifacts of version 1 hold these bytes. A change here is a new format version."""
    digest = hashlib.sha256()
    whole = torch.arange(40 * 300).reshape(40, 300)
    for contexts, prob_bits in ((1, 10), (3, 11), (1, 12)):
        weights = torch.stack([torch.arange(1, 32).pow(power) for power in range(4)])
        book = Tables(frequencies_of(weights, prob_bits), prob_bits)
        table_ids = (whole[:contexts].T * 31 // 5 % 4).to(torch.uint8).contiguous()
        chosen = (whole * 17 % 3).to(torch.uint8) if contexts == 3 else None
        section = Section((whole * 7919 // 3 % 31).to(torch.uint8), book, table_ids, chosen)
        digest.update(b"".join(section.encode(backend=backend)))
    assert digest.hexdigest() == "5fae053fb1c3c8b76412af2d80528897f31ded552e28c67262383282c6f59233"


@pytest.mark.parametrize(
    ("scale", "bits", "tokens", "limit"),
    [pytest.param(0.77, 2.0, 256, 0.010, id="2.0-bits"), pytest.param(0.205, 0.3, 1024, 0.030, id="0.3-bits")],
)
@needs_native
def test_overhead_above_the_cross_entropy(scale: float, bits: float, tokens: int, limit: float) -> None:
    section = draw_section(5, tokens, 1024, laplace_tables([scale], 11), 1)
    entropy = section.entropy_bytes()
    assert entropy * 8 / section.symbols.numel() == pytest.approx(bits, rel=0.05)
    overhead = sum(map(len, section.encode())) / entropy - 1
    assert 0 < overhead <= limit, f"{overhead:.3%} above the cross-entropy of {bits} bits"


# Bytes that no encoder wrote.


def sample(contexts: int = 1, channels: int = 300, tokens: int = 20) -> Section:
    return draw_section(3, tokens, channels, laplace_tables([0.7, 2.0, 5.0], 11), contexts)


def test_a_stream_cut_anywhere_is_truncated_or_corrupt(backend: str) -> None:
    section = sample(channels=40)
    (stream,) = section.encode()
    for length in range(len(stream)):
        with pytest.raises((TruncatedError, CorruptError)):
            section.decode([stream[:length]], backend=backend)
    with pytest.raises(TruncatedError, match=r"tile 0 .* ends before its last symbol"):
        section.decode([stream[:-2]], backend=backend)


def test_extra_bytes_are_corrupt(backend: str) -> None:
    section = sample()
    first, second = section.encode()
    for extra in (b"\0", b"\0\0", bytes(1000)):
        with pytest.raises(CorruptError):
            section.decode([first, second + extra], backend=backend)
    with pytest.raises((CorruptError, TruncatedError)):
        section.decode([first + second[:2], second[2:]], backend=backend)


def test_initial_states_out_of_range_are_corrupt(backend: str) -> None:
    section = sample(channels=40)
    (stream,) = section.encode()
    for state in (0, 0x7FFF, 0x80000000, 0xFFFFFFFF):
        with pytest.raises(CorruptError):
            section.decode([struct.pack("<I", state) + stream[4:]], backend=backend)


def test_damaged_streams_are_refused_or_are_other_valid_streams(backend: str) -> None:
    """The coder's own check is no checksum, but it detects most damage."""
    section = sample()
    streams = section.encode()
    data = b"".join(streams)
    sizes = [len(stream) for stream in streams]
    chance = random.Random(1)
    rounds = 60 if backend == "reference" else 5000
    refused = 0
    for _ in range(rounds):
        damaged = bytearray(data)
        for _ in range(chance.choice([1, 1, 1, 2, 20])):
            damaged[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        if chance.random() < 0.1:
            damaged = bytearray(chance.randbytes(len(data)))
        try:
            decoded = rans.decode(damaged, sizes, 20, section.tables, section.table_ids, backend=backend)
            assert torch.equal(decoded, section.symbols) == (damaged == data)
        except (TruncatedError, CorruptError):
            refused += 1
    assert refused >= rounds * 0.99


def outcome(section: Section, streams: list[bytearray], backend: str) -> object:
    """Return the symbols, or the error, in a form that can be compared."""
    try:
        return section.decode([bytes(stream) for stream in streams], backend=backend).numpy().tobytes()
    except (TruncatedError, CorruptError) as error:
        return type(error), str(error)


def test_all_back_ends_report_the_same_errors() -> None:
    section = sample(contexts=3)
    streams = section.encode()
    chance = random.Random(2)
    for _ in range(40):
        damaged = [bytearray(stream) for stream in streams]
        victim = chance.choice(damaged)
        victim[chance.randrange(len(victim))] ^= 1 << chance.randrange(8)
        del victim[len(victim) - chance.choice([0, 0, 1, 2, 40]) :]
        assert len({outcome(section, damaged, backend) for backend in BACKENDS}) == 1


def test_ids_and_contexts_from_hostile_side_information(backend: str) -> None:
    section = sample(contexts=3)
    streams = section.encode()
    assert section.contexts is not None
    section.contexts[7, 280] = 3
    with pytest.raises(CorruptError, match=r"tile 1 .* context"):
        section.decode(streams, backend=backend)
    with pytest.raises(TensorError, match=r"tile 1 .* context"):
        section.encode(backend=backend)
    section.contexts[7, 280] = 0
    section.table_ids[5, 1] = 3
    with pytest.raises(CorruptError, match=r"tile 0 .* table id"):
        section.decode(streams, backend=backend)
    with pytest.raises(TensorError, match=r"tile 0 .* table id"):
        section.encode(backend=backend)


def test_sizes_that_do_not_match(backend: str) -> None:
    section = sample()
    data = b"".join(section.encode())
    side = (section.tables, section.table_ids)
    for sizes in ([], [len(data)], [len(data), 0, 0], [-1, len(data) + 1]):
        with pytest.raises(CorruptError):
            rans.decode(data, sizes, 20, *side, backend=backend)
    with pytest.raises(TruncatedError):
        rans.decode(data, [100, len(data)], 20, *side, backend=backend)
    with pytest.raises(CorruptError):
        rans.decode(data, [100, 100], 20, *side, backend=backend)


# Arguments.


@pytest.mark.parametrize(
    ("frequencies", "prob_bits", "error"),
    [
        pytest.param([[1024]], 9, ConfigError, id="prob-bits"),
        pytest.param([[1000, 23]], 10, TensorError, id="sum"),
        pytest.param([[4096]], 12, TensorError, id="above-4095"),
        pytest.param([[1025, -1]], 10, TensorError, id="negative"),
        pytest.param([1024], 10, TensorError, id="one-row-without-tables"),
        pytest.param([[1024.0]], 10, TensorError, id="floats"),
        pytest.param([[1] * 257], 10, TensorError, id="257-symbols"),
        pytest.param([[1024]] * 257, 10, TensorError, id="257-tables"),
        pytest.param([[]], 10, TensorError, id="no-symbols"),
    ],
)
def test_tables_are_checked(frequencies: list[list[int]], prob_bits: int, error: type[Exception]) -> None:
    with pytest.raises(error):
        Tables(torch.tensor(frequencies), prob_bits)


def test_uint16_frequencies_are_accepted() -> None:
    assert Tables(torch.tensor([[1000, 24]], dtype=torch.uint16), 10).frequencies.tolist() == [[1000, 24]]


@pytest.mark.parametrize("symbol", [2, 3, 255])
def test_a_symbol_without_a_frequency_cannot_be_encoded(symbol: int, backend: str) -> None:
    book = Tables(torch.tensor([[1000, 24, 0]]), 10)
    section = Section(torch.full((2, 300), 1, dtype=torch.uint8), book, torch.zeros(300, 1, dtype=torch.uint8), None)
    section.symbols[1, 299] = symbol
    with pytest.raises(TensorError, match=r"tile 1 .* no frequency"):
        section.encode(backend=backend)


def test_shapes_dtypes_and_names_are_checked(backend: str) -> None:
    section = sample()
    symbols, book, ids = section.symbols, section.tables, section.table_ids
    contexts = torch.zeros_like(symbols)
    bad_calls = [
        (symbols.int(), book, ids),
        (symbols[0], book, ids),
        (symbols, book, ids[1:]),
        (symbols, book, ids.repeat(1, 2)),
        (symbols, book, ids[:, 0]),
        (symbols, book, ids, contexts),
        (symbols, book, ids.repeat(1, 3)),
        (symbols, book, ids.repeat(1, 3), contexts[1:]),
        (symbols, book, ids.repeat(1, 3), contexts.int()),
    ]
    for arguments in bad_calls:
        with pytest.raises(TensorError):
            rans.encode(*arguments, backend=backend)
    with pytest.raises(TensorError):
        rans.decode(b"", [], -1, book, ids, backend=backend)
    with pytest.raises(ConfigError, match="coder"):
        rans.encode(symbols, book, ids, coder="zip")
    with pytest.raises(ConfigError, match="backend"):
        rans.encode(symbols, book, ids, backend="gpu")


def test_views_that_are_not_contiguous(backend: str) -> None:
    section = sample()
    streams = section.encode(backend=backend)
    section.symbols = section.symbols.T.contiguous().T
    section.table_ids = section.table_ids.repeat(1, 2)[:, :1]
    assert section.encode(backend=backend) == streams
    assert torch.equal(section.decode(streams, backend=backend), section.symbols)
