"""Speed and overhead of the coder, as ratios of things timed in one run.

    python benchmarks/bench_codec.py --out results.json

Times are the best of several rounds, the contestants taking turns, since machines are shared and noisy: read the ratios. Every
contestant codes the same symbols under the same tables; one thread, unless it says otherwise.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table

from hf_cachegen import CacheGenConfig, decode_kv, encode_kv
from hf_cachegen.codec import rans
from hf_cachegen.codec.tables import shipped_codebooks
from hf_cachegen.errors import MissingExtraError

COLUMNS, TOKENS = 4096, 512


def symbols_of(bits: float, tokens: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(symbols uint8 [tokens, columns], table ids uint8 [columns, 1]) at about so many bits a symbol, 32 tables."""
    values, _ = shipped_codebooks(11)
    frequencies = values.tables.frequencies.double() / (1 << 11)
    entropy = -(frequencies * frequencies.clamp_min(1e-12).log2()).sum(1)
    nearest = (entropy - bits).abs().argsort()[:32]
    ids = nearest[torch.arange(columns) % 32].to(torch.uint8)
    drawn = [torch.multinomial(frequencies[i], tokens, replacement=True) for i in ids.tolist()]
    return torch.stack(drawn, 1).to(torch.uint8), ids[:, None]


def best(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of the best round of each; they take turns."""
    seconds = dict.fromkeys(contestants, float("inf"))
    for _ in range(rounds):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def speed(bits: float, rounds: int) -> dict[str, dict[str, float]]:
    """M symbols/s of encoding and decoding, by contestant."""
    symbols, ids = symbols_of(bits, TOKENS, COLUMNS)
    tables = shipped_codebooks(11)[0].tables
    streams = rans.encode(symbols, tables, ids)
    data, sizes = b"".join(streams), list(map(len, streams))
    encoders: dict[str, Callable[[], object]] = {"native": lambda: rans.encode(symbols, tables, ids)}
    decoders: dict[str, Callable[[], object]] = {"native": lambda: rans.decode(data, sizes, TOKENS, tables, ids)}

    def two_threads() -> None:
        torch.set_num_threads(2)
        rans.decode(data, sizes, TOKENS, tables, ids)
        torch.set_num_threads(1)

    decoders["native, two threads"] = two_threads
    decoders["numpy reference"] = lambda: rans.decode(data, sizes, TOKENS, tables, ids, backend="reference")
    try:
        slow = rans.encode(symbols, tables, ids, coder="torchac")
    except MissingExtraError as error:
        print(f"torchac is left out: {error}")
    else:
        slow_data, slow_sizes = b"".join(slow), list(map(len, slow))
        encoders["torchac"] = lambda: rans.encode(symbols, tables, ids, coder="torchac")
        decoders["torchac"] = lambda: rans.decode(slow_data, slow_sizes, TOKENS, tables, ids, coder="torchac")
    count = symbols.numel() / 1e6
    timed = {"encode": best(encoders, rounds), "decode": best(decoders, rounds)}
    return {name: {who: round(count / s, 1) for who, s in times.items()} for name, times in timed.items()}


def nesting(tokens: int = 4096) -> dict[str, float]:
    """Bits per element of three nested levels, and of their finest coded alone."""
    x = torch.randn(4, 1, 4, tokens, 64).cumsum(3)[:, :, :, :, :] % 7 + torch.randn(4, 1, 4, tokens, 64)
    config = CacheGenConfig(transform="identity", measure=False)
    sizes = {levels: encode_kv(list(x[:2]), list(x[2:]), replace(config, levels=levels)).nbytes for levels in (3, 1)}
    return {"nested": 8 * sizes[3] / x.numel(), "alone": 8 * sizes[1] / x.numel(), "ratio": sizes[3] / sizes[1]}


def whole_context(rounds: int, tokens: int = 2048) -> dict[str, float]:
    """GB/s of bf16 decoded and encoded, everything included, 8 layers of 8 heads of 64; one thread."""
    x = torch.randn(16, 1, 8, tokens, 64).bfloat16()
    keys, values = list(x[:8]), list(x[8:])
    config = CacheGenConfig(measure=False)
    encoded = encode_kv(keys, values, config)
    copied = torch.empty_like(x)
    seconds = best(
        {
            "encode": lambda: encode_kv(keys, values, config),
            "decode, level 3": lambda: decode_kv(encoded),
            "decode, level 1": lambda: decode_kv(encoded, 1),
            "copy": lambda: copied.copy_(x),
        },
        rounds,
    )
    return {name: round(x.nbytes / s / 1e9, 3) for name, s in seconds.items()}


@click.command()
@click.option("--rounds", default=3, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="write the figures as JSON")
def main(rounds: int, out: Path | None) -> None:
    """Speed and overhead of the coder."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    figures = {
        "machine": {"processor": platform.processor() or platform.machine(), "capability": torch.backends.cpu.get_cpu_capability()},
        "date": time.strftime("%Y-%m-%d"),
        "speed_2_bits": speed(2.0, rounds),
        "speed_0.3_bits": speed(0.3, rounds),
        "nesting": nesting(),
        "whole_context_GB_per_s": whole_context(rounds),
    }
    view = Table("what", "figure")
    for group, values in figures.items():
        view.add_row(group, json.dumps(values))
    Console(width=120).print(view)
    if out:
        out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
