"""Loads onto several devices, and loads from the prefix cache: the host waits for launches, not for each chunk."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_cachegen import CacheGenConfig, decode_kv, encode_kv
from hf_cachegen.artifact.encoded import EncodedContext
from hf_cachegen.codec import abi, native, transfer
from hf_cachegen.codec.chunk import Span
from hf_cachegen.codec.spread import APART_BYTES, Destination
from hf_cachegen.codec.transforms import Transform
from hf_cachegen.errors import CorruptError, TruncatedError
from hf_cachegen.generation import generate
from hf_cachegen.prefix_cache.coding import Coding
from tests.generation_support import seeded
from tests.kv_samples import same, sample_kv
from tests.lockstep import needs_compiler
from tests.prefix_cache_support import WIDTH, same_as_stock, small
from tests.separate_device import Note, separate_device
from tests.tiny_models import shared, tokens

CPU, META = torch.device("cpu"), torch.device("meta")
pytestmark = [
    needs_compiler,
    pytest.mark.skipif(not native.available(), reason="the package was installed without a C++ compiler"),
]


def order(notes: Sequence[Note], launch: str) -> str:
    """Return the launches (l) and waits (w) in order."""
    return "".join({launch: "l", "wait": "w"}.get(name, "") for name, _ in notes)


def encoded(chunks: int, transform: Any = "identity") -> tuple[EncodedContext, list[Tensor]]:
    keys, values = sample_kv(tokens=64 * chunks, dim=64)
    config = CacheGenConfig(transform=transform, chunk_tokens=64, protect_first=0, protect_last=0)
    context = encode_kv(keys, values, config)
    return context, [x for pair in zip(*decode_kv(context, 2), strict=True) for x in pair]


@pytest.mark.parametrize("transform", ["identity", "delta"])
def test_layers_on_several_devices_are_launched_in_batches(transform: str) -> None:
    """The meta device stands for another GPU."""
    context, expected = encoded(40, transform)
    with separate_device() as notes:
        keys, values = decode_kv(context, 2, device=[CPU, META, CPU])
    found = [x for pair in zip(keys, values, strict=True) for x in pair]
    assert [x.device for x in found] == [CPU, CPU, META, META, CPU, CPU]
    assert all(same([x], [y]) for x, y in zip(found, expected, strict=True) if x.device == CPU)
    assert order([note for note in notes if note[0] != "send"], "upload") == "lllwlwlwww", "40 chunks are five launches"
    assert sum(name == "send" for name, _ in notes) == 5, "the layers of another device are one copy"


def test_damage_is_raised_and_nothing_of_its_launch_is_written() -> None:
    context, _ = encoded(20)
    parts = [list(own) for own in context.parts]
    data = bytearray(parts[0][18])
    data[-9] ^= 64
    parts[0][18] = bytes(data)
    damaged = EncodedContext(context.geometry, context.config, context.side, tuple(map(tuple, parts)))
    with separate_device(), pytest.raises((CorruptError, TruncatedError)):
        decode_kv(damaged, 1, device=[CPU, META, CPU])


def test_launches_are_bounded_and_chunks_that_are_apart_stay_apart() -> None:
    tensors = [torch.zeros(1, 2, 40, 8, device=device) for device in (CPU, META) for _ in range(2)]
    with separate_device():
        spread = Destination(tensors)
        of_token = 4 * 2 * 8 * 4
        assert spread.together(16, apart=False) == abi.MAX_BATCH
        assert spread.together(APART_BYTES // of_token // 3, apart=False) == 3
        assert spread.together(10**9, apart=False) == 1
        alone = Destination(tensors[:2])
        assert (alone.together(10**9, apart=False), alone.together(10**9, apart=True)) == (abi.MAX_BATCH, 1)

    class Counting(Transform):
        """Decodes every chunk to its number."""

        def launch(self, chunks: Any, target: Any) -> Any:
            for (number,), span, row in chunks:
                target.kept[0][row : row + span.tokens] = number[0]
            return transfer.all_of([])

    codec = Counting.__new__(type("Concrete", (Counting,), dict.fromkeys(Counting.__abstractmethods__)))
    chunks = [([bytes([i])], Span(row, 5, 40), row) for i, row in ((1, 0), (2, 5), (3, 20), (4, 25), (5, 10))]
    with separate_device():
        apart, check = spread.launch_apart(codec, chunks)
        check()
        assert [(one.first, one.values[0].shape[2]) for one in apart] == [(0, 10), (20, 10), (10, 5)]
        spread.launch(codec, chunks)()
    assert tensors[0][0, 0, ::5, 0].tolist() == [1, 2, 5, 0, 3, 4, 0, 0]


@pytest.fixture(name="filled")
def _filled(tmp_path: Path, own_cache: None) -> Any:
    """Return a prefix cache that holds ten blocks of a prompt, and the prompt."""
    prefix_cache, ids = small(tmp_path / "prefixes", config=CacheGenConfig(lossless=True)), tokens(10 * WIDTH + 1)
    seeded(generate, shared("llama"), ids, prefix_cache=prefix_cache, do_sample=False)
    prefix_cache.flush()
    return prefix_cache, ids


def test_blocks_are_launched_while_those_before_are_not_checked(filled: Any) -> None:
    prefix_cache, ids = filled
    with separate_device() as notes:
        seeded(generate, shared("llama"), ids, prefix_cache=prefix_cache, do_sample=False)
    assert order(notes, "cg_decode") == "lllw" + "lw" * 7 + "ww", "a block is one launch"
    assert not any(name == "send" for name, _ in notes)
    same_as_stock(shared("llama"), prefix_cache, ids, do_sample=False)
    assert prefix_cache.stats().tokens_reused == 2 * 10 * WIDTH
    assert prefix_cache.stats().errors == prefix_cache.stats().blocks_damaged == 0


@pytest.mark.parametrize("damaged", [0, 4, 9])
def test_blocks_before_a_damaged_one_are_used(filled: Any, damaged: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its check fails when blocks behind it are launched."""
    prefix_cache, ids = filled
    launch, numbers = Coding.launch, itertools.count()

    def broken(self: Coding, block: Any, *arguments: Any) -> Any:
        if next(numbers) != damaged:
            return launch(self, block, *arguments)
        data = bytearray(block.parts[0])
        data[-9] ^= 64
        return launch(self, replace(block, parts=(bytes(data), *block.parts[1:])), *arguments)

    with separate_device(), monkeypatch.context() as patch:
        patch.setattr(Coding, "launch", broken)
        same_as_stock(shared("llama"), prefix_cache, ids, do_sample=False)
    stats = prefix_cache.stats()
    assert (stats.blocks_damaged, stats.errors) == (1, 0)
    assert stats.tokens_reused == damaged * WIDTH


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, torch.AcceleratorError], ids=["memory", "device"])
def test_a_device_that_fails_does_not_make_a_block_damaged(
    filled: Any, error: type[RuntimeError], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The block stays, and the call computes."""
    prefix_cache, ids = filled

    def failing(*_: Any) -> Any:
        raise error("the device failed")

    with monkeypatch.context() as patch:
        patch.setattr(Destination, "launch", failing)
        same_as_stock(shared("llama"), prefix_cache, ids, do_sample=False)
    assert prefix_cache.stats().blocks_damaged == 0
    same_as_stock(shared("llama"), prefix_cache, ids, do_sample=False)
    assert prefix_cache.stats().tokens_reused == 10 * WIDTH
