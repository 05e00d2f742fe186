"""Measure the host's work for a chunk that a GPU decodes, on a machine without one.

    python -m benchmarks.host_time --out host_time.json

The device is a stand-in with memory of its own: copies to it and its kernels take no time, and all else is the
package's own code, from a chunk's coded bytes to the launches. "work" is the processor time of the calling thread for a
chunk, the best of several rounds, without the copy of the coded bytes into pinned memory. "copy" is that copy by one
thread: the machine's memory bounds it, and large batches are copied by several threads. "calls" counts torch's
operations, copies and the library's functions of a batch. On a GPU each takes a few microseconds more to launch: "with
launches" adds LAUNCH for each of them. What is done once for a context is left out.

For klt this is the work from coded bytes to coefficients. "klt, products" is what follows: the matrix products of a
batch with a profile whose layers are chained, and the copies to the layers. Its matrices are SCALE times smaller here,
and so are the limits that the number of calls depends on, since only the calls are counted and timed.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import click
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.bench_codec import machine, shown
from benchmarks.bench_cuda import CHUNK, DIM, HEADS, context
from hf_cachegen import CacheGenConfig, Profile
from hf_cachegen.codec import abi, anchors, basis, heads, native, operands, plan, transfer, upload
from hf_cachegen.codec.batch import Batches, serves
from hf_cachegen.codec.chain import sources
from hf_cachegen.codec.chunk import Channels, LossyCodec, Span
from hf_cachegen.codec.fit import Counts
from hf_cachegen.codec.geometry import Geometry, LayerGeometry
from hf_cachegen.codec.group import Group
from hf_cachegen.codec.into import Target
from hf_cachegen.codec.profile import Rotary
from hf_cachegen.codec.side import Side
from hf_cachegen.codec.transforms.klt import Klt

ROUNDS, CHUNKS = 25, 32
SCALE = 64
WIDTH, SUMMARY, REACH = 1024 // SCALE, 128 // SCALE, 3
"""Channels of a layer, width of a summary, and reach of the chain, of klt's products."""
LAUNCH = 5.0
"""Microseconds that torch takes to launch an operation on a GPU."""
COPIES, ANCHOR_CALLS = 2, 3
"""Calls that the stand-in does not make: the copies to and from the device; what makes values of anchors."""


class Stand:
    """A device that takes no time. `copied` is the seconds that copies into pinned memory took."""

    def __init__(self) -> None:
        self.copies, self.copied, self.calls = False, 0.0, Counter[str]()
        self._buffers: dict[tuple[int, ...], Tensor] = {}
        self._call, self._gather = native.call, upload._gather

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype, _: torch.device) -> Tensor:
        """Return the same memory again, as torch does for pinned memory."""
        if shape not in self._buffers:
            self._buffers[shape] = torch.zeros(shape, dtype=dtype)
        return self._buffers[shape]

    def memory(self, size: int, device: torch.device) -> Tensor:
        """Return the same memory again, as torch does for a device's."""
        return self.pinned((size,), torch.uint8, device)

    def gather(self, *arguments: Any) -> None:
        """Copy, and take the time, where `copies` is set."""
        if self.copies:
            start = time.thread_time()
            self._gather(*arguments)
            self.copied += time.thread_time() - start

    def bmm(self, x: Tensor, y: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Launch a product of matrices, which are too large for the host."""
        self.calls["bmm"] += 1
        return x.new_empty(len(x), x.shape[1], y.shape[2]) if out is None else out

    def call(self, name: str, *arguments: Any, **options: Any) -> None:
        """Call a function of the library, unless a device would run it: that is counted."""
        if name in (abi.BATCH, heads.WRITE, operands.GATHER):
            self.calls[name] += 1
        else:
            self._call(name, *arguments, **options)


@contextmanager
def stand() -> Iterator[Stand]:
    """Let the CPU stand in for a device with memory of its own inside this context."""
    made = Stand()
    matrix, once = Target.matrix, dict[torch.Size, Target]()
    with ExitStack() as patches:
        for owner, name, value in (
            (transfer, "is_host", lambda _: False), (transfer, "pinned", made.pinned),
            (transfer, "upload", lambda host, *_: host), (transfer, "memory", made.memory),
            (native, "call", made.call), (upload, "_gather", made.gather),
            (native, "offers", lambda *_: True), (torch, "bmm", made.bmm),
            (anchors.Anchors, "values", lambda self, _: self.symbols),
            (Target, "matrix", lambda rows: once.get(rows.shape) or once.setdefault(rows.shape, matrix(rows))),
        ):  # fmt: skip
            patches.enter_context(mock.patch.object(owner, name, value))
        yield made


class Operations(TorchDispatchMode):
    """Counts torch's operations that a device would run; views and allocations are none."""

    def __init__(self, calls: Counter[str]):
        super().__init__()
        self._calls = calls

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one operation."""
        if not function.is_view and "empty" not in function.name() and "_to_copy" not in function.name():
            self._calls[function.name()] += 1
        return function(*args, **(kwargs or {}))


def coded(transform: str, layers: int) -> tuple[LossyCodec, list[bytes], Target]:
    """Return a codec, the parts of a chunk, and a target. All layers share memory, for nothing is written."""
    if transform != "klt":
        made = context(layers, transform)
        pair = [torch.empty(1, HEADS, CHUNK * CHUNKS, DIM, dtype=torch.bfloat16) for _ in range(2)]
        return made.codec.inner, next(made.chunks()), Target.layers(pair * layers)  # type: ignore[attr-defined]
    width, config = HEADS * DIM, CacheGenConfig(protect_first=0, protect_last=0)
    nothing = torch.zeros(2 * layers * width, dtype=torch.uint8)
    channels, entries = Channels(nothing.long(), nothing.long()), nothing.expand(config.levels, -1)

    def codec() -> LossyCodec:
        side = Side(nothing + 160, nothing.to(torch.int16), nothing, entries[0], entries[1:])
        return LossyCodec(channels, config, side)

    y = torch.randn(CHUNK, len(nothing)) * torch.logspace(2, -2, width).repeat(2 * layers)
    counts, first = Counts(len(nothing), config.levels), codec()
    counts.add(first.symbols(y)[0])
    entries, _ = counts.choose(first.values, first.digits)
    own, memory = codec(), Target.memory(1, len(nothing), torch.device("cpu"))
    return own, own.encode(y, Span(0, CHUNK, CHUNK)), Target.matrix(memory)


@contextmanager
def scaled() -> Iterator[None]:
    """Divide the limits of klt's products by SCALE inside this context."""
    with ExitStack() as patches:
        for owner, name in ((plan, "PART_BYTES"), (plan, "BLOCK_NUMBERS"), (basis, "LEADING")):
            patches.enter_context(mock.patch.object(owner, name, getattr(owner, name) // SCALE))
        yield


def chained_codec(layers: int, width: int, summary: int, tokens: int) -> Klt:
    """Return the klt codec of a profile whose layers are chained, with random matrices.

    Args:
        layers: Number of layers.
        width: Channels of a layer.
        summary: Width of a summary.
        tokens: Of the cache.
    """
    shape = LayerGeometry("full", 1, width, 1, width)
    order = [(kind, layer, 1) for layer in range(layers) for kind in (0, 1)]
    groups = [
        Group(kind, layer, 1, torch.eye(width)[None], torch.randn(width, width) / width**0.5,
              torch.randn(summary * len(read), width) / width if (read := sources(order, index, REACH)) else None,
              torch.randn(summary, width) / width**0.5)
        for index, (kind, layer, _) in enumerate(order)
    ]  # fmt: skip
    entries = torch.full((3, 2 * layers * width), 60, dtype=torch.uint8)
    rotary = Rotary("half", 1e-4 ** (torch.arange(width // 2, dtype=torch.float64) / (width // 2)))
    profile = Profile(
        (shape,) * layers, rotary, torch.zeros(2 * layers * width), tuple(groups), 160, entries[0], entries[1:], {},
        reach=REACH,
    )  # fmt: skip
    config = CacheGenConfig(transform="klt", protect_first=0, protect_last=0)
    return Klt(Geometry(profile.layers, tokens, 1, "bfloat16"), config, profile)


def products(layers: int) -> dict[str, Any]:
    """Return the microseconds of a chunk, by level, for what follows klt's coder."""
    tokens = abi.MAX_BATCH
    codec = chained_codec(layers, WIDTH, SUMMARY, 2 * tokens)
    target = Target.layers([torch.empty(1, 1, tokens, WIDTH, dtype=torch.bfloat16) for _ in range(2 * layers)])
    y, span, found = torch.randn(tokens, codec.entries.shape[1]), Span(0, tokens, 2 * tokens), {}
    for level in (1, 3):
        seconds = []
        with stand() as device, scaled():
            for _ in range(ROUNDS):
                start = time.thread_time()
                codec.products.restore(y, span, level, target, 0, None)
                seconds.append(time.thread_time() - start)
            device.calls.clear()
            with Operations(device.calls):
                codec.products.restore(y, span, level, target, 0, None)
        own, calls = 1e6 * min(seconds) / abi.MAX_BATCH, device.calls.total()
        found[f"level {level}"] = {
            "work, us": round(own, 1), "calls of a batch": calls,
            "with launches, us": round(own + LAUNCH * calls / abi.MAX_BATCH, 1),
        }  # fmt: skip
    return found


def measure(transform: str, layers: int) -> dict[str, Any]:
    """Return the microseconds of a chunk, by level."""
    codec, parts, target = coded(transform, layers)
    found, rows = {}, range(0, CHUNK * CHUNKS, CHUNK)
    for level in range(1, codec.config.levels + 1):
        own_parts = parts[:level]
        assert serves(codec, target)
        with stand() as device:
            decode(codec, level, target, own_parts, rows)  # copies the tables
            work = [decode(codec, level, target, own_parts, rows) for _ in range(ROUNDS)]
            device.copies = True
            decode(codec, level, target, own_parts, rows)
            device.copied = 0.0
            decode(codec, level, target, own_parts, rows)
            batches, device.copies, device.calls = Batches(codec, level, target), False, Counter()
            with Operations(device.calls):
                for row in [*rows][: abi.MAX_BATCH]:
                    batches.add(own_parts, Span(0, CHUNK, CHUNK), row)
            batches.finish()
        calls = device.calls.total() + COPIES + (ANCHOR_CALLS if transform == "delta" else 0)
        own, copied = 1e6 * min(work) / len(rows), 1e6 * device.copied / len(rows)
        found[f"level {level}"] = {
            "coded bytes": sum(map(len, own_parts)), "work, us": round(own, 1), "calls of a batch": calls,
            "with launches, us": round(own + LAUNCH * calls / abi.MAX_BATCH, 1), "copy, us": round(copied, 1),
            "copy, GB/s": round(sum(map(len, own_parts)) / copied / 1e3, 1),
        }  # fmt: skip
    return found


def decode(codec: LossyCodec, level: int, target: Target, coded: list[bytes], rows: range) -> float:
    """Decode as many chunks as there are rows. Return the seconds of the calling thread."""
    start, batches = time.thread_time(), Batches(codec, level, target)
    for row in rows:
        batches.add(coded, Span(0, CHUNK, CHUNK), row)
    batches.flush()
    batches.finish()
    return time.thread_time() - start


@click.command()
@click.option("--layers", default=32, show_default=True, help="Layers of 8 KV heads of 128.")
@click.option("--out", type=click.Path(path_type=Path), help="Path of the figures as JSON.")
def main(layers: int, out: Path | None) -> None:
    """Measure the host's work for a chunk that a GPU decodes."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    figures: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"), "machine": machine(),
        "geometry": f"{layers} layers, {HEADS} KV heads, {DIM} channels, chunks of {CHUNK} tokens",
    }  # fmt: skip
    for transform in ("identity", "delta", "klt"):
        figures[transform] = measure(transform, layers)
    figures["klt, products"] = products(layers)
    shown(figures, out)


if __name__ == "__main__":
    main()
