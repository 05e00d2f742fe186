"""Measure klt's products on a GPU, for a random profile of the size of an 8B model whose layers are chained.

    python -m benchmarks.gpu_klt --out klt.json
    python -m benchmarks.gpu_klt --device cpu --layers 2 --width 64 --chunk 16     # to try it, in torch alone

Times are microseconds of a chunk, the best of several rounds, for batches of eight chunks. "host" is the time of the
calling thread until all is launched, "device" that of the device, and "parts" what its kernels take: name, [launches of
a batch, time].
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.bench_codec import machine, shown
from benchmarks.bench_cuda import seconds
from benchmarks.host_time import SCALE, SUMMARY, chained_codec
from hf_cachegen.codec import abi
from hf_cachegen.codec.chunk import Span
from hf_cachegen.codec.into import Target

ROUNDS, KERNELS, NAME = 10, 12, 60
"""Rounds; kernels that are listed, and characters of their names."""


def measure(layers: int, width: int, chunk: int, device: torch.device) -> dict[str, Any]:
    """Return the times by level."""
    tokens = abi.MAX_BATCH * chunk
    codec, span = chained_codec(layers, width, SUMMARY * SCALE, 2 * tokens), Span(0, tokens, 2 * tokens)
    tensors = [torch.empty(1, 1, tokens, width, dtype=torch.bfloat16, device=device) for _ in range(2 * layers)]
    target, y = Target.layers(tensors), torch.randn(tokens, codec.entries.shape[1], device=device)
    figures: dict[str, Any] = {}
    for level in (1, 3):

        def run(level: int = level) -> None:
            codec.products.restore(y, span, level, target, 0, None)

        run()
        host = float("inf")
        for _ in range(ROUNDS):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            run()
            host = min(host, time.perf_counter() - start)
        found = {"host": 1e6 * host / abi.MAX_BATCH, "device": 1e6 * seconds(run, device) / abi.MAX_BATCH}
        if device.type == "cuda":
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                run()
                torch.cuda.synchronize(device)
            events = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
            found["parts"] = {
                event.key[:NAME]: [event.count, round(event.self_device_time_total / abi.MAX_BATCH, 2)]
                for event in events[:KERNELS]
            }
        figures[f"level {level}"] = found
    return figures


@click.command()
@click.option("--device", default="cuda", show_default=True)
@click.option("--layers", default=32, show_default=True)
@click.option("--width", default=1024, show_default=True, help="Channels of a layer's keys.")
@click.option("--chunk", default=256, show_default=True, help="Tokens of a chunk.")
@click.option("--out", type=click.Path(path_type=Path), help="File for the figures, JSON.")
def main(device: str, layers: int, width: int, chunk: int, out: Path | None) -> None:
    """Measure klt's products."""
    where = torch.device(device)
    torch.manual_seed(0)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu"
    figures: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "machine": {"device": name, **machine()}}
    figures["geometry"] = f"{layers} layers, {width} channels, chunks of {chunk} tokens"
    figures["us a chunk"] = measure(layers, width, chunk, where)
    shown(figures, out)


if __name__ == "__main__":
    main()
