"""Measure the CUDA back-end on the KV cache of an 8B model, as ratios to a copy on the same device in the same run.

    python -m benchmarks.bench_cuda --out results.json
    python -m benchmarks.bench_cuda --device cpu --tokens 512 --layers 2     # the same by the CPU's coder, to try it

Kernels are timed alone, replayed as a graph over all chunks of the context on several streams, everything else (reading
headers, copying streams to the device, checking) once before; "whole" is `decode_kv` with everything. The sections of
one chunk serve for all, at addresses of their own. Rates count the bf16 bytes of keys and values.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.bench_codec import machine
from hf_cachegen import CacheGenConfig, decode_kv
from hf_cachegen.artifact.encoded import EncodedContext
from hf_cachegen.codec import chunk, into, native
from hf_cachegen.codec.chunk import Span
from hf_cachegen.codec.context import Encoder
from hf_cachegen.codec.into import Target

HEADS, DIM, CHUNK = 8, 128, 256
ROUNDS, STREAMS = 10, 8
Call = tuple[tuple[Any, ...], dict[str, Any]]


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


@contextmanager
def recorded() -> Iterator[list[Call]]:
    """Record the calls of the compiled library; the memory that they point to is kept."""
    calls: list[Call] = []
    real, sections = native.call, chunk.Sections

    class Kept(into.Sections):
        def finish(self) -> None:
            native.check_decoded(torch.cat(self._statuses).tolist() if self._statuses else [])
            calls.append(((self,), {}))

    def call(*arguments: Any, **options: Any) -> None:
        calls.append((arguments, options))
        real(*arguments, **options)

    native.call, chunk.Sections, into.Sections = call, Kept, Kept  # type: ignore[misc]
    try:
        yield calls
    finally:
        native.call, chunk.Sections, into.Sections = real, sections, sections  # type: ignore[misc]


def replay(groups: list[list[Call]], device: torch.device) -> Callable[[], object]:
    """Make the calls of each group in turn, groups side by side."""
    native_calls = [[call for call in group if isinstance(call[0][0], str)] for group in groups]
    if device.type == "cpu":
        return lambda: [native.call(*a, **k) for group in native_calls for a, k in group]
    streams = [torch.cuda.Stream(device) for _ in range(STREAMS)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        main = torch.cuda.current_stream(device)
        for stream in streams:
            stream.wait_stream(main)
        for index, group in enumerate(native_calls):
            with torch.cuda.stream(streams[index % STREAMS]):
                for arguments, options in group:
                    native.call(*arguments, **options)
        for stream in streams:
            main.wait_stream(stream)
    return graph.replay


def context(layers: int, transform: Any) -> Encoder:
    """Return a chunk from the middle of a context: neighbouring tokens similar, channels of very different size."""
    scale = torch.exp(torch.randn(2 * layers, 1, HEADS, 1, DIM))
    noise = torch.randn(2 * layers, 1, HEADS, CHUNK, DIM)
    for token in range(1, CHUNK):
        noise[:, :, :, token] = 0.7 * noise[:, :, :, token - 1] + 0.7 * noise[:, :, :, token]
    x = (noise * scale).bfloat16()
    config = CacheGenConfig(transform=transform, chunk_tokens=CHUNK, protect_first=0, protect_last=0, measure=False)
    return Encoder(list(x[::2]), list(x[1::2]), config)


def decoding(made: Encoder, layers: int, tokens: int, device: torch.device) -> dict[str, float]:
    """Return GB/s, and microseconds for one chunk, by level."""
    codec, parts = made.codec, next(made.chunks())
    tensors = [torch.empty(1, HEADS, tokens, DIM, dtype=torch.bfloat16, device=device) for _ in range(2 * layers)]
    target, span, found = Target.layers(tensors), Span(0, CHUNK, CHUNK), {}
    total = sum(x.nbytes for x in tensors)
    for level in range(made.config.levels, 0, -1):
        groups = []
        for row in range(0, tokens, CHUNK):
            with recorded() as calls:
                codec.decode_into(parts[:level], span, target, row)
            groups.append(calls)
        found[f"level {level}, GB/s"] = total / seconds(replay(groups, device), device) / 1e9
        found[f"level {level}, one chunk, us"] = 1e6 * seconds(replay(groups[:1], device), device)
    return found


def encoding(made: Encoder, device: torch.device) -> dict[str, float]:
    """Return GB/s of one chunk, from rows on the device to bytes on the host, in all and for its kernels alone."""
    rows, span = next(made.rows.chunks())
    rows, codec = rows.to(device), made.codec
    result = {"whole, GB/s": rows.nbytes / seconds(lambda: codec.encode(rows, span), device) / 1e9}
    if device.type == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            codec.encode(rows, span)
            torch.cuda.synchronize(device)
        kernels = sum(event.self_device_time_total for event in profile.key_averages() if "_kernel" in event.key)
        result["kernels, GB/s"] = rows.nbytes / max(kernels, 1e-9) / 1e3
    return result


def whole(made: Encoder, tokens: int, device: torch.device) -> dict[str, float]:
    """Return GB/s of decode_kv by level, for a context of `tokens` tokens made of repeated chunks."""
    count = tokens // CHUNK
    keys, values = ([x.repeat(1, 1, count, 1) for x in part] for part in (made.rows.keys, made.rows.values))
    encoder = Encoder(keys, values, made.config)
    chunks = list(encoder.chunks())
    parts = tuple(zip(*chunks, strict=True))
    encoded = EncodedContext(encoder.geometry, encoder.config, encoder.codec.side_bytes(), parts)
    found = {}
    for level in (3, 2, 1):
        taken = seconds(partial(decode_kv, encoded, level, device=device), device)
        found[f"level {level}, GB/s"] = encoder.geometry.nbytes / taken / 1e9
    return found


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
            "decode, kernels": decoding(made, layers, tokens, where),
            "decode, whole": whole(made, tokens, where),
            "encode, one chunk": encoding(made, where),
        }
    text = json.dumps(figures, indent=1)
    print(text)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")


if __name__ == "__main__":
    main()
