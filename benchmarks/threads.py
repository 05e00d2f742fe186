"""Measure how much faster several threads decode a whole context than one.

    python -m benchmarks.threads --model smollm2 --profile chained --text second_half.txt

Delta, identity and lossless decode a context with the geometry of an 8B model (`benchmarks.bench_speed`), klt one of
the model and its profile, all to bfloat16. The numbers of threads take turns. The least wall time of each counts, since
machines are shared and noisy: where other work takes the processors, several threads gain less than they could.
"products" are the float32 products that klt needs (`benchmarks.bench_klt`): what the machine gives to torch itself.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import click
import torch

from benchmarks.bench_klt import decoding_products, encoded_context
from benchmarks.bench_speed import Work, config_of, context
from hf_cachegen import Profile, decode_kv, encode_kv

TRANSFORMS = ("delta", "identity", "lossless")


def speedup(run: Work, threads: int, rounds: int) -> tuple[float, float]:
    """Return the least seconds of one thread, and how many times as fast several threads are."""
    seconds = {1: float("inf"), threads: float("inf")}
    for _ in range(rounds):
        for count in seconds:
            torch.set_num_threads(count)
            start = time.perf_counter()
            result = run()
            seconds[count] = min(seconds[count], time.perf_counter() - start)
            del result
    torch.set_num_threads(1)
    return seconds[1], seconds[1] / seconds[threads]


@click.command()
@click.option("--model", required=True, help="Folder or repository of the model.")
@click.option("--profile", required=True, help="Folder or repository of its profile.")
@click.option("--text", required=True, type=click.Path(path_type=Path, exists=True), help="Path of the context's text.")
@click.option("--tokens", default=2048, show_default=True, help="Tokens of klt's context.")
@click.option("--threads", default=2, show_default=True, help="Threads to compare with one.")
@click.option("--rounds", default=8, show_default=True, help="Rounds.")
def main(model: str, profile: str, text: Path, tokens: int, threads: int, rounds: int) -> None:
    """Print a table of seconds and of the gain of several threads."""
    torch.set_num_threads(1)
    learnt = Profile.from_pretrained(profile)
    work: dict[str, Work] = {}
    tensors = context()
    for transform in TRANSFORMS:
        encoded = encode_kv(tensors[::2], tensors[1::2], config_of(transform))
        for level in range(1, encoded.levels + 1):
            work[f"{transform}, level {level}"] = lambda encoded=encoded, level=level: decode_kv(encoded, level)
    klt = encoded_context(model, learnt, text, tokens, "bfloat16")
    for level in range(1, klt.levels + 1):
        work[f"klt, level {level}"] = lambda level=level: decode_kv(klt, level)
    work["products"] = decoding_products(learnt, tokens)
    print(f"load {os.getloadavg()[0]:.1f}\n\n| | one thread | {threads} threads |\n|---|---|---|")
    for name, run in work.items():
        seconds, gain = speedup(run, threads, rounds)
        print(f"| {name} | {seconds:.3f} s | {gain:.2f} |", flush=True)
    print(f"\nload {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
