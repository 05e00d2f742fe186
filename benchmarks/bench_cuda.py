"""Measure the CUDA back-end on the KV cache of an 8B model, as ratios to a copy on the same device in the same run.

    python -m benchmarks.bench_cuda --out results.json
    python -m benchmarks.bench_cuda --device cpu --tokens 512 --layers 2     # the same by the CPU's coder, to try it

"kernels" is the time of the decoding kernels, by the profiler. "whole" is everything from coded bytes on the host to
values in the layers' tensors, the best of several rounds. "host" is the time of the calling thread for a chunk, without
waiting. Sweeps change the number of chunks of a launch (a warp each) and the shared memory that a block reserves. The
sections of one chunk serve for all, at rows of their own. Rates count the bf16 bytes of keys and values.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.bench_codec import machine, shown
from hf_cachegen import CacheGenConfig
from hf_cachegen.codec import abi, native
from hf_cachegen.codec.batch import Batches, serves
from hf_cachegen.codec.chunk import LossyCodec, Span
from hf_cachegen.codec.context import Encoder
from hf_cachegen.codec.into import Target
from hf_cachegen.codec.transforms.delta import Delta
from hf_cachegen.codec.transforms.identity import Identity

HEADS, DIM, CHUNK = 8, 128, 256
ROUNDS = 10


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of the best round."""
    best = float("inf")
    for _ in range(ROUNDS):
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize(device)
            best = min(best, begin.elapsed_time(end) / 1e3)
        else:
            start = time.perf_counter()
            run()
            best = min(best, time.perf_counter() - start)
    return best


def kernel_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of the library's kernels in one run."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize(device)
    events = [event for event in profile.key_averages() if "_kernel" in event.key and "cachegen" in event.key]
    return max(sum(event.self_device_time_total for event in events), 1e-9) / 1e6


@contextmanager
def instead(owner: object, name: str, value: object) -> Iterator[None]:
    """Give an attribute of a module or object another value inside this context."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def context(layers: int, transform: Any) -> Encoder:
    """Return a chunk from the middle of a context: neighbouring tokens similar, channels of very different size."""
    scale = torch.exp(torch.randn(2 * layers, 1, HEADS, 1, DIM))
    noise = torch.randn(2 * layers, 1, HEADS, CHUNK, DIM)
    for token in range(1, CHUNK):
        noise[:, :, :, token] = 0.7 * noise[:, :, :, token - 1] + 0.7 * noise[:, :, :, token]
    x = (noise * scale).bfloat16()
    config = CacheGenConfig(transform=transform, chunk_tokens=CHUNK, protect_first=0, protect_last=0, measure=False)
    return Encoder(list(x[::2]), list(x[1::2]), config)


def decoding(made: Encoder, layers: int, tokens: int, device: torch.device) -> dict[str, Any]:
    """Return GB/s, and microseconds of one chunk and of the host, by level."""
    transform, parts = made.codec, next(made.chunks())
    assert isinstance(transform, (Delta, Identity))
    codec = transform.inner
    tensors = [torch.empty(1, HEADS, tokens, DIM, dtype=torch.bfloat16, device=device) for _ in range(2 * layers)]
    target, span, found = Target.layers(tensors), Span(0, CHUNK, CHUNK), {}
    total, rows = sum(x.nbytes for x in tensors), range(0, tokens, CHUNK)
    for level in (1, codec.config.levels):
        coded: list[bytes] = parts[:level]
        figures: dict[str, float] = {}
        many = partial(lambda coded: transform.launch(((coded, span, row) for row in rows), target)(), coded)
        one = partial(transform.decode_into, coded, span, target, 0)
        figures["whole, GB/s"] = total / seconds(many, device) / 1e9
        if device.type == "cuda":  # what the bus allows
            pinned = torch.empty(sum(map(len, coded)) * len(rows), dtype=torch.uint8, pin_memory=True)
            copied = partial(pinned.to, device, non_blocking=True)
            figures["copy of the coded bytes, GB/s of values"] = total / seconds(copied, device) / 1e9
        figures["one chunk, us"] = 1e6 * seconds(one, device)
        figures["coded bytes of a chunk"] = sum(map(len, coded))
        if serves(codec, target):
            figures["host, us a chunk"] = 1e6 * host_seconds(codec, level, target, coded, rows) / len(rows)
        if device.type == "cuda":
            figures["kernels, GB/s"] = total / kernel_seconds(many, device) / 1e9
            figures["kernels of one chunk, us"] = 1e6 * kernel_seconds(one, device)
            for chunks in (1, 2, 4):
                with instead(abi, "MAX_BATCH", chunks):
                    figures[f"kernels, {chunks} chunks a launch, GB/s"] = total / kernel_seconds(many, device) / 1e9
            base = codec.assignments[1]
            for tables in (12, 24):  # blocks of more shared memory: fewer fit
                with instead(base, "tables_per_tile", max(tables, base.tables_per_tile)):
                    figures[f"kernels, {tables} tables staged, GB/s"] = total / kernel_seconds(many, device) / 1e9
        found[f"level {level}"] = figures
    return found


def host_seconds(codec: LossyCodec, level: int, target: Target, coded: list[bytes], rows: range) -> float:
    """Return the seconds of the calling thread until all is launched."""
    best = float("inf")
    for _ in range(ROUNDS):
        batches, start = Batches(codec, level, target), time.perf_counter()
        for row in rows:
            batches.add(coded, Span(0, CHUNK, CHUNK), row)
        batches.flush()
        best = min(best, time.perf_counter() - start)
        batches.finish()
    return best


def encoding(made: Encoder, device: torch.device) -> dict[str, float]:
    """Return GB/s of one chunk, from rows on the device to bytes on the host, in all and for its kernels alone."""
    rows, span = next(made.rows.chunks())
    rows, codec = rows.to(device), made.codec
    result = {"whole, GB/s": rows.nbytes / seconds(lambda: codec.encode(rows, span), device) / 1e9}
    if device.type == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            codec.encode(rows, span)
            torch.cuda.synchronize(device)
        events = [event for event in profile.key_averages() if "_kernel" in event.key and "cachegen" in event.key]
        kernels = sum(event.self_device_time_total for event in events)
        result["kernels, GB/s"] = rows.nbytes / max(kernels, 1e-9) / 1e3
    return result


@click.command()
@click.option("--device", default="cuda", show_default=True)
@click.option("--tokens", default=8192, show_default=True, help="Length of the context in tokens, a multiple of 256.")
@click.option("--layers", default=32, show_default=True)
@click.option("--hardware", help="Name of this machine.")
@click.option("--out", type=click.Path(path_type=Path), help="Path of the figures as JSON.")
def main(device: str, tokens: int, layers: int, hardware: str | None, out: Path | None) -> None:
    """Measure the speed of the CUDA back-end."""
    where = torch.device(device)
    if not native.available(where) or (where.type == "cuda" and not torch.cuda.is_available()):
        raise click.ClickException(f"no compiled coder, or no device, for {device}")
    torch.manual_seed(0)
    size = 2 * layers * HEADS * tokens * DIM
    one, two = (torch.empty(size, dtype=torch.bfloat16, device=where) for _ in range(2))
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu"
    copy = 2 * size / seconds(partial(two.copy_, one), where) / 1e9
    figures: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": {**({"hardware": hardware} if hardware else {}), "device": name, **machine()},
        "geometry": f"{layers} layers, {HEADS} KV heads, {DIM} channels, {tokens} tokens, chunks of {CHUNK}",
        "copy_GB_per_s": copy,
    }
    del one, two
    for transform in ("identity", "delta"):
        made = context(layers, transform)
        figures[transform] = {
            "decode": decoding(made, layers, tokens, where),
            "encode, one chunk": encoding(made, where),
        }
    shown(figures, out)


if __name__ == "__main__":
    main()
