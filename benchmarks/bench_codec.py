"""Measure speed and overhead of the codec, as ratios of times taken in one run.

    python -m benchmarks.bench_codec --out results.json

Times are the best of several rounds, the contestants taking turns, since machines are shared and noisy: read the
ratios. Every contestant codes the same symbols under the same frequencies, and its decoder's result is compared; one
thread, unless it says otherwise. constriction (its ANS coder) and torchac take part where they are installed.

The package's coder returns a new matrix, whose pages are mapped while it is written; "in place" is the same into
memory that has its pages already: the coder alone.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hf_cachegen import CacheGenConfig, decode_kv, encode_kv
from hf_cachegen.codec import native, ops, rans
from hf_cachegen.codec.rans import Tables
from hf_cachegen.codec.tables import shipped_codebooks
from hf_cachegen.errors import MissingExtraError

COLUMNS, TOKENS, TABLES = 4096, 512, 32
MANY_TOKENS = 2048
Contestants = dict[str, Callable[[], object]]


def written(figures: dict[str, Any], out: Path) -> None:
    """Write figures as JSON."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(figures, indent=1) + "\n")


def shown(figures: dict[str, Any], out: Path | None) -> None:
    """Print figures as JSON, and write them where a path is given."""
    print(json.dumps(figures, indent=1))
    if out:
        written(figures, out)


def machine() -> dict[str, Any]:
    """Return the hardware and software of the figures."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    fields = dict(reversed([tuple(map(str.strip, line.split(":", 1))) for line in lines if ":" in line]))
    name = fields.get("model name", platform.processor() or platform.machine())
    family = [f"{key} {fields[key]}" for key in ("cpu family", "model", "stepping") if key in fields]
    return {
        "processor": ", ".join([name, *family]),
        "processors_used": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "back_ends": [isa.name.lower() for isa in native.available_isas()],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def best(contestants: Contestants, rounds: int) -> dict[str, float]:
    """Return the seconds of the best call of each; they take turns of at least 20 ms, so that caches are warm."""
    seconds: dict[str, float] = {}
    for _ in range(rounds):
        for name, run in contestants.items():
            if seconds.get(name, 0) > 1:
                continue  # slow ones have a single turn
            turn = time.perf_counter()
            while (start := time.perf_counter()) < turn + 0.02:
                run()
                seconds[name] = min(seconds.get(name, float("inf")), time.perf_counter() - start)
    return seconds


class Symbols:
    """Draw symbols uint8 [tokens, COLUMNS] from the TABLES tables of a codebook nearest to `bits` bits a symbol."""

    def __init__(self, bits: float, contexts: int, tokens: int = TOKENS):
        book = shipped_codebooks(11)[0 if contexts == 1 else 1]
        self.tables: Tables = book.tables
        p = self.tables.frequencies.double() / (1 << 11)
        entropy = -(p * p.clamp_min(1e-12).log2()).sum(1).reshape(-1, contexts).mean(1)
        entries = (entropy - bits).abs().argsort()[: TABLES // contexts]
        chosen = entries[torch.arange(COLUMNS) % len(entries)]
        self.ids = (chosen[:, None] * contexts + torch.arange(contexts)).to(torch.uint8)
        self.contexts = torch.randint(0, 3, (tokens, COLUMNS), dtype=torch.uint8) if contexts == 3 else None
        which = torch.zeros(tokens, COLUMNS, dtype=torch.long) if self.contexts is None else self.contexts.long()
        self.used = self.ids.long().T.gather(0, which) if contexts == 3 else self.ids[:, 0].long().expand(tokens, -1)
        symbol_of = torch.stack([torch.arange(len(f)).repeat_interleave(f) for f in self.tables.frequencies.long()])
        self.symbols = symbol_of[self.used, torch.randint(0, 1 << 11, (tokens, COLUMNS))].to(torch.uint8)
        frequency = self.tables.frequencies[self.used, self.symbols.long()]
        self.entropy_bytes = float((11 - frequency.double().log2()).sum()) / 8

    def coder(self, **options: str) -> tuple[list[bytes], Callable[[], object], Callable[[], Tensor]]:
        """Return (streams, encode, decode) by the package's public coder."""
        sections = (self.tables, self.ids, self.contexts)
        streams = rans.encode(self.symbols, *sections, **options)
        data, sizes = bytearray(b"".join(streams)), list(map(len, streams))
        return (
            streams,
            lambda: rans.encode(self.symbols, *sections, **options),
            lambda: rans.decode(data, sizes, len(self.symbols), *sections, **options),
        )

    def in_place(self, threads: int) -> Callable[[], None]:
        """Return a decode by the compiled coder into memory whose pages are mapped."""
        streams = rans.encode(self.symbols, self.tables, self.ids, self.contexts)
        packed = torch.frombuffer(bytearray(b"".join(streams)), dtype=torch.uint8)
        section = ops.Section(self.tables.native, self.ids, self.contexts, len(self.symbols))
        offsets = ops.offsets_of(torch.tensor([len(stream) for stream in streams]), section.tiles, packed)
        found, statuses = torch.zeros_like(self.symbols), torch.zeros(section.tiles, dtype=torch.int32)

        def decode() -> None:
            torch.set_num_threads(threads)
            native.call("cg_decode", section.view, packed, packed.numel(), offsets, found, statuses)
            torch.set_num_threads(1)

        decode()
        native.check_decoded(statuses.tolist())
        if not torch.equal(found, self.symbols):
            raise RuntimeError("decoding in place gave other symbols")
        return decode

    def constriction(self) -> tuple[Callable[[], object], Callable[[], object]]:
        """Return (encode, decode) by constriction, one call for all symbols of a table."""
        stream = import_module("constriction").stream
        order = self.used.flatten().argsort(stable=True)
        symbols = self.symbols.flatten()[order].int().numpy()
        counts = self.used.flatten().bincount().tolist()
        runs, at = [], 0
        for table, count in enumerate(counts):
            if count:
                p = (self.tables.frequencies[table].float() / (1 << 11)).clamp_min(1e-9).numpy()
                runs.append((symbols[at : at + count], stream.model.Categorical(p, perfect=False)))
                at += count

        def encode() -> Any:
            coder = stream.stack.AnsCoder()
            for part, model in reversed(runs):
                coder.encode_reverse(part, model)
            return coder.get_compressed()

        compressed = encode()

        def decode() -> list[Any]:
            coder = stream.stack.AnsCoder(compressed)
            return [coder.decode(model, len(part)) for part, model in runs]

        if not all((one == part).all() for one, (part, _) in zip(decode(), runs, strict=True)):
            raise RuntimeError("constriction decoded other symbols")
        return encode, decode


def speed(bits: float, contexts: int, rounds: int) -> dict[str, Any]:
    """Return M symbols/s of encoding and decoding, by contestant."""
    sample = Symbols(bits, contexts)
    encoders: Contestants = {}
    decoders: Contestants = {}
    own = [isa.name.lower() for isa in native.available_isas()]
    for name in [*reversed(own), "reference", "torchac"]:
        options = {"coder": "torchac"} if name == "torchac" else {"backend": name}
        try:
            streams, encoders[name], decode = sample.coder(**options)
        except MissingExtraError as error:
            print(f"torchac is left out: {error}")
            continue
        if not torch.equal(decode(), sample.symbols):
            raise RuntimeError(f"{name} decoded other symbols")
        decoders[name] = decode
        if name in own:
            size = sum(map(len, streams))
    try:
        encoders["constriction"], decoders["constriction"] = sample.constriction()
    except ImportError:
        print("constriction is left out: it is not installed")
    decoders["in place"] = sample.in_place(1)
    if machine()["processors_used"] > 1:
        decoders["in place, two threads"] = sample.in_place(2)
    count = sample.symbols.numel() / 1e6
    found: dict[str, Any] = {
        name: {who: round(count / s, 1) for who, s in best(contestants, rounds).items()}
        for name, contestants in (("encode", encoders), ("decode", decoders))
    }
    entropy = 8 * sample.entropy_bytes / sample.symbols.numel()
    overhead = round(100 * (size / sample.entropy_bytes - 1), 2)
    return {"entropy_bits": round(entropy, 3), "overhead_percent": overhead, **found}


def second_thread(bits: float, contexts: int, rounds: int) -> dict[str, float]:
    """Return the speed of two threads relative to one, decoding into mapped memory, by the tokens of a section."""
    found = {}
    for tokens in (TOKENS, MANY_TOKENS):
        sample = Symbols(bits, contexts, tokens)
        times = best({str(n): sample.in_place(n) for n in (1, 2)}, 3 * rounds)
        found[f"{tokens} tokens"] = round(times["1"] / times["2"], 2)
    return found


def nesting(tokens: int = 4096) -> dict[str, float]:
    """Return bits per element of three nested levels, and of the finest coded alone."""
    x = torch.randn(4, 1, 4, tokens, 64).cumsum(3) % 7 + torch.randn(4, 1, 4, tokens, 64)
    config = CacheGenConfig(transform="identity", measure=False)
    sizes = {levels: encode_kv(list(x[:2]), list(x[2:]), replace(config, levels=levels)).nbytes for levels in (3, 1)}
    found = {"nested": 8 * sizes[3] / x.numel(), "alone": 8 * sizes[1] / x.numel(), "ratio": sizes[3] / sizes[1]}
    return {name: round(value, 4) for name, value in found.items()}


def whole_context(transform: Any, rounds: int, tokens: int = 2048) -> dict[str, float]:
    """GB/s of bf16 decoded and encoded, everything included, 8 layers of 8 heads of 64; one thread, but where it says
    two.
    """
    x = torch.randn(16, 1, 8, tokens, 64).bfloat16()
    keys, values = list(x[:8]), list(x[8:])
    lossless = transform == "lossless"
    config = CacheGenConfig(measure=False, transform="identity" if lossless else transform, lossless=lossless)
    encoded = encode_kv(keys, values, config)
    copied = torch.empty_like(x)

    def two_threads() -> None:
        torch.set_num_threads(2)
        decode_kv(encoded)
        torch.set_num_threads(1)

    contestants: Contestants = {
        "encode": lambda: encode_kv(keys, values, config),
        **{f"decode, level {n}": lambda n=n: decode_kv(encoded, n) for n in range(encoded.levels, 0, -1)},
        "decode, two threads": two_threads,
        "copy": lambda: copied.copy_(x),
    }
    return {name: round(x.nbytes / s / 1e9, 3) for name, s in best(contestants, rounds).items()}


@click.command()
@click.option("--rounds", default=5, show_default=True)
@click.option("--hardware", help="Name of this machine, where its processor reports none.")
@click.option("--out", type=click.Path(path_type=Path), help="Path of the figures as JSON.")
def main(rounds: int, hardware: str | None, out: Path | None) -> None:
    """Measure speed and overhead of the codec."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    samples = {"2 bits, 32 tables": (2.0, 1), "0.3 bits, 32 tables": (0.3, 1)}
    samples["digits, 30 tables in 3 contexts"] = (1.2, 3)
    several = machine()["processors_used"] > 1
    figures = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": {**({"hardware": hardware} if hardware else {}), **machine()},
        "M_symbols_per_s": {name: speed(*sample, rounds) for name, sample in samples.items()},
        "two_threads_over_one": {name: second_thread(*sample, rounds) for name, sample in samples.items() if several},
        "nesting_bits_per_element": nesting(),
        "whole_context_GB_per_s": {name: whole_context(name, rounds) for name in ("delta", "identity", "lossless")},
    }
    view = Table("what", "figure")
    for group, values in figures.items():
        for name, value in values.items() if isinstance(values, dict) else [("", values)]:
            view.add_row(f"{group} {name}".strip(), json.dumps(value))
    Console(width=120).print(view)
    if out:
        written(figures, out)


if __name__ == "__main__":
    main()
