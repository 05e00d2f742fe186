"""Decoding on a device with memory of its own: what is copied, what waits, and what other streams may use."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from benchmarks import host_time
from hf_cachegen import CacheGenConfig, decode_kv, encode_kv
from hf_cachegen.artifact.encoded import EncodedContext
from hf_cachegen.codec import abi, native, transfer
from hf_cachegen.codec.chunk import Span
from hf_cachegen.codec.context import Encoder
from hf_cachegen.codec.rows import gather
from hf_cachegen.codec.spread import Destination, decoder_of
from hf_cachegen.codec.transforms.klt import adjacent
from hf_cachegen.errors import CorruptError, NativeError, TruncatedError
from hf_cachegen.models import checksum
from hf_cachegen.streaming.layers import LayerWriter
from tests.klt_support import CONFIG, make_profile
from tests.kv_samples import same, sample_kv
from tests.lockstep import in_lockstep, needs_compiler
from tests.separate_device import separate_device

CUDA, CPU, META = torch.device("cuda", 0), torch.device("cpu"), torch.device("meta")
pytestmark = [
    needs_compiler,
    pytest.mark.skipif(not native.available(), reason="the package was installed without a C++ compiler"),
]
COPIES = ("pinned", "upload", "send", "download", "wait")


def encoded(transform: str, tokens: int) -> EncodedContext:
    """Return a context in chunks of 64 tokens, with exceptions in several of them."""
    keys, values = sample_kv(tokens=tokens, dim=64)
    for layer, token in itertools.product((0, 2), range(40, tokens, 50)):
        keys[layer][0, 1, token, 5] *= 7
    for x in (*keys, *values):
        x[:, :, 0] /= 30  # a symbol that no byte holds is decoded on the CPU
    return encode_kv(keys, values, CacheGenConfig(transform=transform, chunk_tokens=64))  # type: ignore[arg-type]


@pytest.mark.parametrize("level", [1, 3])
@pytest.mark.parametrize("transform", ["identity", "delta"])
def test_a_batch_is_one_copy_and_one_wait(transform: str, level: int) -> None:
    context = encoded(transform, 1300)
    alone = decode_kv(context, level)
    with separate_device() as notes:
        found = decode_kv(context, level)
    assert all(same(x, y) for x, y in zip(alone, found, strict=True))
    counts = Counter(name for name, _ in notes)
    batches = 3  # of 21 chunks
    assert {name: counts[name] for name in COPIES} == {
        "pinned": batches, "upload": batches, "send": 0, "download": batches, "wait": batches,
    }  # fmt: skip


def test_the_statuses_of_a_batch_are_read_two_batches_later() -> None:
    context = encoded("identity", 64 * 40)
    with separate_device() as notes:
        decode_kv(context, 1)
    order = "".join({"upload": "u", "wait": "w"}.get(name, "") for name, _ in notes)
    assert order == "uuuwuwuwww"


def test_damage_is_found_by_the_last_wait() -> None:
    context = encoded("delta", 1300)
    data = bytearray(context.parts[0][20])
    data[-9] ^= 64
    parts = [list(chunks) for chunks in context.parts]
    parts[0][20] = bytes(data)
    damaged = EncodedContext(context.geometry, context.config, context.side, tuple(map(tuple, parts)))
    with separate_device(), pytest.raises((CorruptError, TruncatedError)):
        decode_kv(damaged, 2)


@pytest.mark.parametrize("dim", [64, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lossless_chunks_are_decoded_on_the_device(dtype: torch.dtype, dim: int) -> None:
    """Coded bytes are copied there, not values, and several chunks are launched before the first wait."""
    keys, values = sample_kv(tokens=600, dim=dim, dtype=dtype)
    context = encode_kv(keys, values, CacheGenConfig(lossless=True, chunk_tokens=64))
    with separate_device() as notes:
        found = decode_kv(context)
    assert same(found[0], keys)
    assert same(found[1], values)
    assert not any(name == "send" for name, _ in notes)
    copied = sum(size for name, size in notes if name == "upload")
    coded, whole = sum(map(len, context.parts[0])), sum(x.nbytes for x in (*keys, *values))
    assert copied < 1.02 * coded < whole
    names = [name for name, _ in notes if name in ("cg_decode", "wait")]
    assert names[:9] == ["cg_decode"] * 9


@pytest.mark.parametrize("level", [1, 3])
def test_klt_decodes_chunks_together(level: int) -> None:
    """One launch, one copy of coded bytes, one matrix product and one wait for up to eight chunks, to the values of the
    CPU. Protected tokens have a launch of their own; wide symbols are sent for them, and for all others.
    """
    generator = torch.Generator().manual_seed(5)
    keys, values = ([torch.randn(1, 2, 832, 8, generator=generator) for _ in range(3)] for _ in range(2))
    for x in (*keys, *values):
        x[:, :, [40, 41, 300, 800]] *= 2000
    context = encode_kv(keys, values, CONFIG, make_profile())
    alone = decode_kv(context, level)
    with separate_device() as notes:
        found = decode_kv(context, level)
    for x, y in zip((*alone[0], *alone[1]), (*found[0], *found[1]), strict=True):
        assert float((x - y).norm() / x.norm()) < 1e-5
    order = "".join({"cg_decode_chunks": "c", "download": "d", "wait": "w"}.get(name, "") for name, _ in notes)
    assert order == "ccd" + "cd" + "cdw" + "ccdw" + "ww", "26 chunks are four batches"
    names = Counter(name for name, _ in notes)
    assert set(names) == {
        "cg_read_parts", "cg_decode_chunks", "cg_gather_operands", "cg_write_heads", "pinned", "upload", "download",
        "wait",
    }  # fmt: skip
    assert names["cg_gather_operands"] == names["cg_write_heads"] == 4, "one for all groups of layers"
    assert names["upload"] == names["pinned"] == 4 + 3, "the coded bytes, and wide symbols of three batches"


def test_layers_on_several_devices_get_pieces_of_one_decoding() -> None:
    """The meta device stands for another GPU: its values cannot be read, only their shapes and addresses."""
    keys, values = sample_kv(tokens=100, dim=64)
    made = Encoder(keys, values, CacheGenConfig(transform="identity", chunk_tokens=64))
    parts, span = next(made.chunks()), made.rows.spans[0]
    pairs = [x for pair in zip(keys, values, strict=True) for x in pair]
    found = [torch.zeros_like(x, device=META if i in (2, 3) else CPU) for i, x in enumerate(pairs)]
    Destination(found).launch(made.codec, [(parts, span, span.first)])()
    whole = [torch.zeros_like(x) for x in pairs]
    (apart,), check = Destination(whole).launch_apart(made.codec, [(parts, span, span.first)])
    check()
    assert [x.shape[2] for x in apart.values] == [span.tokens] * len(whole)
    Destination(whole).put(apart)
    assert all(same([x], [y]) for x, y in zip(found, whole, strict=True) if x.device == CPU)
    assert same([gather(whole[::2], whole[1::2], span)], [made.codec.decode(parts, span, torch.bfloat16)])


def test_the_first_device_with_a_coder_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda device: device.index == 1)
    assert decoder_of([CPU, CUDA, torch.device("cuda", 1)]) == torch.device("cuda", 1)
    assert decoder_of([CPU, CUDA]) == CPU


def test_nothing_is_pinned_or_sent_where_readers_wait() -> None:
    """`put` is called under the lock that a generation needs."""
    keys, values = sample_kv(tokens=100, dim=64)
    made = Encoder(keys, values, CacheGenConfig(transform="identity", chunk_tokens=64))
    parts, span = next(made.chunks()), made.rows.spans[0]
    writer = LayerWriter(replace(made.geometry, tokens=100), [CPU] * len(keys))
    with separate_device() as notes:
        launch = writer.rows(made.codec, [(parts, span)])
        launch.check()
        (apart,) = launch.apart
        before = len(notes)
        writer.put(apart)
        assert before == len(notes) > 0
    assert same([writer.keys[1][:, :, :64]], [apart.values[2]])


class Stream:
    """A CUDA stream that notes what it waits for."""

    def __init__(self, number: int):
        self.cuda_stream, self.waits = number, list[object]()

    def wait_event(self, event: object) -> None:
        self.waits.append(event)

    def wait_stream(self, stream: object) -> None:
        self.waits.append(stream)


class Event:
    def record(self, stream: Stream) -> None:
        self.stream = stream


def test_other_streams_wait_for_what_stays_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once each, and the allocator is informed; a tensor is made once."""
    first, second = Stream(1), Stream(2)
    used: list[object] = []
    current = [first]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[0])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: used.append(stream))
    kept, made = transfer.Resident(), list[int]()

    def make() -> list[object]:
        made.append(1)
        return [(torch.ones(2), 3), torch.ones(1)]

    for stream in (first, first, second, second, first):
        current[0] = stream
        kept.get(CUDA, "tables", make)
    assert len(made) == 1
    assert first.waits == []
    assert [event.stream for event in second.waits] == [first]  # type: ignore[attr-defined]
    assert used == [second, second], "the two tensors, once"


def test_copies_of_an_owner_make_their_own() -> None:
    kept = transfer.Resident()
    kept.get(CPU, "tables", lambda: torch.ones(1))
    assert copy.deepcopy(kept)._kept == pickle.loads(pickle.dumps(kept))._kept == {}


def test_a_failed_reader_is_waited_for_too(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, values = sample_kv(tokens=100, dim=64)
    made = Encoder(keys, values, CacheGenConfig(transform="identity", chunk_tokens=64))
    writer = LayerWriter(made.geometry, [CPU] * len(keys))
    own, reader = Stream(1), Stream(2)
    changed = Event()
    writer._streams, writer._changed = {CUDA: own}, {CUDA: changed}  # type: ignore[dict-item]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: reader)
    with pytest.raises(ValueError, match="reader"), writer.reading():
        raise ValueError("the reader failed")
    assert (own.waits, reader.waits) == ([reader], [changed])


def test_readers_wait_for_changes_not_for_decoding_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, values = sample_kv(tokens=100, dim=64)
    made = Encoder(keys, values, CacheGenConfig(transform="identity", chunk_tokens=64))
    chunk = next(made.chunks()), made.rows.spans[0]
    writer = LayerWriter(made.geometry, [CPU] * len(keys))
    own, changes = Stream(1), list[Stream]()
    changed = Event()
    monkeypatch.setattr(changed, "record", changes.append)
    writer._streams, writer._changed = {CUDA: own}, {CUDA: changed}  # type: ignore[dict-item]
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    (apart,) = writer.rows(made.codec, [chunk]).apart
    assert changes == []
    writer.put(apart)
    assert changes == [own]
    writer.decode(made.codec, [chunk])
    assert changes == [own, own]


@pytest.mark.parametrize("threads", [1, 4])
def test_pieces_are_gathered_to_their_offsets(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        source = torch.randint(0, 256, (3_000_000,), dtype=torch.uint8)
        for sizes in ([0, 1, 15, 16, 17, 63, 64, 65, 1000], [2_000_000, 900_001]):
            pieces, at = [], 3
            to = torch.zeros(3_000_000, dtype=torch.uint8)
            expected = to.clone()
            for size in sizes:
                pieces.append([source.data_ptr() + 5, at, size])
                expected[at : at + size] = source[5 : 5 + size]
                at += size + 1
            native.call("cg_gather", torch.tensor(pieces), len(pieces), to, len(to))
            assert torch.equal(to, expected)
    finally:
        torch.set_num_threads(before)


def test_a_piece_outside_its_memory_is_refused() -> None:
    to = torch.zeros(100, dtype=torch.uint8)
    for at, size in ((99, 2), (101, 1), (2**63, 2**63), (0, 101)):
        piece = torch.tensor([[to.data_ptr(), at - 2**64 if at >> 63 else at, size - 2**64 if size >> 63 else size]])
        with pytest.raises(NativeError, match="BAD_ARGUMENT"):
            native.call("cg_gather", piece, 1, to, len(to))


def test_batches_keep_to_the_limit_of_a_launch() -> None:
    with separate_device() as notes:
        decode_kv(encoded("identity", 64 * 17), 1)
    launches = sum(name == abi.BATCH for name, _ in notes)
    assert launches == 2 + 1 + 1, "the first batch has protected tokens and others, the last one protected ones alone"


def test_spans_of_a_whole_context_are_one_group() -> None:
    chunks = [([b""], Span(64 * i, 64, 64 * 20), 64 * i) for i in range(20)]
    assert [len(group) for group in adjacent(chunks, 8)] == [8, 8, 4]
    apart = [chunks[0], chunks[2], ([b"", b""], *chunks[3][1:]), chunks[4]]
    assert [len(group) for group in adjacent(apart, 8)] == [1, 1, 1, 1]


@pytest.mark.parametrize("nbytes", [0, 1, 7, 8, 9, 15, 16, 17, 24, 511, 16384, 16385, 16392, 16400, 100_003])
def test_the_kernel_sums_blocks_as_torch_does(nbytes: int) -> None:
    """The checksum of a weight must not depend on the device that computes it."""
    data = torch.randint(0, 256, (nbytes,), dtype=torch.uint8)
    with in_lockstep():
        found = checksum._block_sums(data)
    assert torch.equal(found, checksum.torch_block_sums(data))
    assert torch.equal(found, checksum._block_sums(data))


def test_the_kernel_refuses_memory_that_is_not_aligned() -> None:
    data, keys, sums = torch.zeros(64, dtype=torch.uint8), torch.zeros(2048, dtype=torch.int64), torch.zeros(2)
    with in_lockstep():
        for part, words in ((data[8:], 2048), (data, 3), (data, 0)):
            with pytest.raises(NativeError, match="BAD_ARGUMENT"):
                native.call("cg_block_sums", part, len(part), keys, words, sums)


def test_a_batch_takes_few_calls_of_the_host() -> None:
    """The benchmark runs, and counts what a GPU would launch. Times depend on the machine, and are not tested."""
    figures = host_time.measure("delta", 1)
    assert list(figures) == ["level 1", "level 2", "level 3"]
    assert all(0 < level["calls of a batch"] <= 8 for level in figures.values())
