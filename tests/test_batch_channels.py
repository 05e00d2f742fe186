"""Batches of any number of channels, and of klt's coefficients: the values are those of the sections, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_cachegen import CacheGenConfig, decode_kv, encode_kv
from hf_cachegen.artifact.encoded import EncodedContext
from hf_cachegen.codec import batch, launching, native
from hf_cachegen.codec.chunk import Channels, LossyCodec, Span
from hf_cachegen.codec.into import Target
from hf_cachegen.codec.launching import launch
from hf_cachegen.codec.side import Side
from hf_cachegen.codec.wide import Wide
from hf_cachegen.errors import CorruptError, TruncatedError
from tests.klt_support import COMPONENTS, CONFIG, make_profile
from tests.lockstep import in_lockstep, needs_compiler

pytestmark = [
    needs_compiler,
    pytest.mark.skipif(not native.available(), reason="the package was installed without a C++ compiler"),
]
PROTECTED = CacheGenConfig(protect_first=3, protect_last=20)
CHUNKS = [Span(0, 50, 150), Span(50, 50, 150), Span(100, 50, 150)]
"""The first chunk and the last one have protected tokens."""


@contextmanager
def lookups_in_global_memory() -> Iterator[None]:
    """The kernels, on a device whose blocks have no shared memory for a base table."""
    with in_lockstep(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch, "TABLE_BYTES", 1 << 20)
        yield


LIBRARIES = {"cpu": nullcontext, "kernels": in_lockstep, "global": lookups_in_global_memory}


@contextmanager
def by_sections() -> Iterator[None]:
    """Decode section by section in this context."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launching, "serves", lambda *_: False)
        yield


def codec(channels: int) -> LossyCodec:
    """Return a codec without means, of random tables."""
    generator = torch.Generator().manual_seed(channels)
    entries = torch.randint(1, 85, (3, channels), dtype=torch.uint8, generator=generator)
    nothing = torch.zeros(channels, dtype=torch.uint8)
    side = Side(nothing + 100, nothing.to(torch.int16), nothing, entries[0], entries[1:])
    return LossyCodec(Channels(nothing.long(), nothing.long()), PROTECTED, side)


def parts_of(coder: LossyCodec, wide: bool) -> list[list[bytes]]:
    """Return the parts of each chunk, with exceptions, some of which no byte holds."""
    channels = len(coder.channels)
    rows = torch.randn(150, channels, generator=torch.Generator().manual_seed(1)) * coder.steps * 30
    for token, symbol in ((0, 4e3), (60, -9e3), (61, 5e4), (149, 7e3)) if wide else ():
        rows[token, token % channels] = symbol * coder.steps[0]
    return [coder.encode(rows[span.first : span.first + span.tokens], span) for span in CHUNKS]


def decoded(coder: LossyCodec, parts: list[list[bytes]], level: int) -> Tensor:
    """Return the values of all chunks, in a matrix with a row before and behind them."""
    rows = Target.memory(152, len(coder.channels), torch.device("cpu")).fill_(torch.nan)
    chunks = ((own[:level], span, 1 + span.first) for own, span in zip(parts, CHUNKS, strict=True))
    launch(coder, chunks, Target.matrix(rows))()
    assert rows[[0, -1]].isnan().all()
    return rows[1:-1]


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("channels", [1, 31, 96, 250, 256, 261, 550])
@pytest.mark.parametrize("library", LIBRARIES)
def test_any_number_of_channels(library: str, channels: int, level: int, calls: list[str]) -> None:
    coder = codec(channels)
    parts = parts_of(coder, wide=True)
    with by_sections():
        alone = decoded(coder, parts, level)
    assert "cg_decode_chunks" not in calls
    calls.clear()
    with LIBRARIES[library]():
        together = decoded(coder, parts, level)
    assert set(calls) == {"cg_read_parts", "cg_decode_chunks"}
    assert torch.equal(alone, together)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("library", LIBRARIES)
def test_narrow_tiles_of_every_dtype(library: str, dtype: torch.dtype, calls: list[str]) -> None:
    """Layers whose heads are vectors of eight, and anchors."""
    keys, values = (
        [torch.randn(1, 3, 90, 24, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (first, first + 1)]
        for first in (0, 2)
    )
    for transform in ("identity", "delta"):
        context = encode_kv(keys, values, CacheGenConfig(transform=transform, chunk_tokens=40))  # type: ignore[arg-type]
        with by_sections():
            alone = decode_kv(context, 2)
        calls.clear()
        with LIBRARIES[library]():
            together = decode_kv(context, 2)
        assert "cg_decode_chunks" in calls
        assert all(torch.equal(x, y) for x, y in zip((*alone[0], *alone[1]), (*together[0], *together[1]), strict=True))


def test_channels_that_are_left_out_are_decoded_by_sections(calls: list[str]) -> None:
    coder = codec(300)
    coder.side.refine_entries[1, 17] = 0
    left_out = LossyCodec(coder.channels, PROTECTED, coder.side)
    parts = parts_of(left_out, wide=False)
    calls.clear()
    found = decoded(left_out, parts, 3)
    assert "cg_decode_chunks" not in calls
    rows = torch.empty(len(found), len(coder.channels))
    for own, span in zip(parts, CHUNKS, strict=True):
        launch(left_out, [(own, span, span.first)], Target.matrix(rows))()
    assert torch.equal(found, rows)


def context_of(tokens: int = 600) -> EncodedContext:
    """Return klt's coding of random values, with sinks."""
    generator = torch.Generator().manual_seed(5)
    keys, values = ([torch.randn(1, 2, tokens, 8, generator=generator) for _ in range(3)] for _ in range(2))
    for x in keys:
        x[:, :, [0, 70]] /= 50
    for x in values:
        x[:, :, 70] *= 40
    return encode_kv(keys, values, CONFIG, make_profile())


def values_of(context: EncodedContext, level: int) -> list[Tensor]:
    keys, values = decode_kv(context, level)
    return [*keys, *values]


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("library", LIBRARIES)
def test_klt_decodes_in_batches(library: str, level: int, calls: list[str]) -> None:
    context = context_of()
    with by_sections():
        alone = values_of(context, level)
    calls.clear()
    with LIBRARIES[library]():
        together = values_of(context, level)
    assert all(torch.equal(x, y) for x, y in zip(alone, together, strict=True))
    coder = [name for name in calls if name not in ("cg_read_parts", "cg_write_heads", "cg_multiply_sparse")]
    assert set(coder) == {"cg_decode_chunks"}
    # 19 chunks are ten groups. Chunks with protected tokens have a call of their own.
    assert len(coder) <= 12


DAMAGE = {
    "cut": lambda data: data[:-2],
    "changed": lambda data: data[:-9] + bytes([data[-9] ^ 64]) + data[-8:],
    "empty": lambda _: b"",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_has_the_errors_of_the_sections(damage: Callable[[bytes], bytes]) -> None:
    context = context_of(300)
    for part in range(3):
        parts = [list(chunks) for chunks in context.parts]
        parts[part][4] = damage(parts[part][4])
        damaged = replace(context, parts=tuple(map(tuple, parts)))
        errors: list[type] = []
        for way in (by_sections, *LIBRARIES.values()):
            with way(), pytest.raises((CorruptError, TruncatedError)) as caught:
                decode_kv(damaged, 3)
            errors.append(caught.type)
        assert len(set(errors)) == 1


def test_wide_symbols_of_a_batch_are_corrected_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for the protected tokens and once for the others: every correction is a copy to the device."""
    coder, found = codec(COMPONENTS), list[int]()
    parts = parts_of(coder, wide=True)
    real = LossyCodec.correct

    def correct(self: LossyCodec, chunks: list[tuple[Wide, slice, int]], *arguments: Any) -> None:
        found.append(len(chunks))
        real(self, chunks, *arguments)

    monkeypatch.setattr(LossyCodec, "correct", correct)
    decoded(coder, parts, 2)
    assert found == [3]
