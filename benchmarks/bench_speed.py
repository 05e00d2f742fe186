"""Measure encoding and decoding of a whole context as a user calls them, as ratios to a copy of the tensors.

    python -m benchmarks.bench_speed --out benchmarks/results/speed.json

The context has the geometry of an 8B model (32 layers of 8 heads of 128 dimensions, bfloat16) and 512 tokens: 33.5 M
elements. Contestants take turns, and the best turn of each counts, since machines are shared and noisy: read the
ratios. With one thread a turn is measured in seconds of the processor, which other programs affect less than those of
the clock. "clone" copies the same tensors into new memory, as decoding does. For lossless coding,
zstd -3 and lz4 code the same tensors as byte planes, and ZipNN codes them by itself, where they are installed
(`pip install zstandard lz4 zipnn`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from benchmarks.bench_codec import machine, shown
from hf_cachegen import CacheGenConfig, decode_kv, encode_kv
from hf_cachegen.codec.context import codec_of
from hf_cachegen.codec.into import Target
from hf_cachegen.codec.rows import spans_of
from hf_cachegen.codec.transforms.lossless import to_planes

LAYERS, HEADS, TOKENS, DIM = 32, 8, 512, 128
TRANSFORMS = ("delta", "identity", "auto", "lossless")
Work = Callable[[], object]


def context(tokens: int = TOKENS) -> list[Tensor]:
    """Return K and V of every layer: channels with a mean, and differences between tokens that are smaller than it."""
    torch.manual_seed(0)
    x = torch.randn(2 * LAYERS, 1, HEADS, tokens, DIM)
    return list((x + 2 * torch.randn(2 * LAYERS, 1, HEADS, 1, DIM)).bfloat16())


def best(contestants: dict[str, Work], rounds: int, threads: int = 1) -> dict[str, float]:
    """Return the seconds of the best turn of each. The result of a turn is freed outside of it."""
    clock = time.process_time if threads == 1 else time.perf_counter
    seconds = dict.fromkeys(contestants, float("inf"))
    for _ in range(rounds):
        for name, run in contestants.items():
            start = clock()
            result = run()
            seconds[name] = min(seconds[name], clock() - start)
            del result
    return seconds


def config_of(transform: str) -> CacheGenConfig:
    """Return the options; the transform may be "lossless"."""
    lossless = transform == "lossless"
    return CacheGenConfig(measure=False, transform="identity" if lossless else transform, lossless=lossless)  # type: ignore[arg-type]


def speed(tensors: list[Tensor], transform: str, threads: int, rounds: int) -> dict[str, float]:
    """Return M elements/s, and each decoder's speed relative to clone()."""
    torch.set_num_threads(threads)
    keys, values, config = tensors[::2], tensors[1::2], config_of(transform)
    encoded = encode_kv(keys, values, config)
    recycled = [torch.zeros_like(x) for x in tensors]
    codec = codec_of(encoded.geometry, encoded.config, encoded.side, encoded.profile)
    target, spans = Target.layers(recycled), spans_of(encoded.geometry.tokens, config.chunk_tokens)

    def decode_again(level: int) -> None:
        parts = [[part[c] for part in encoded.parts[:level]] for c in range(len(spans))]
        codec.decode_many(((own, span, span.first) for own, span in zip(parts, spans, strict=True)), target)

    work: dict[str, Work] = {"clone": lambda: [x.clone() for x in tensors]}
    work["encode"] = lambda: encode_kv(keys, values, config)
    for level in range(1, encoded.levels + 1):
        work[f"decode, level {level}"] = lambda level=level: decode_kv(encoded, level)
        work[f"decode, level {level}, recycled memory"] = lambda level=level: decode_again(level)
    seconds = best(work, rounds, threads)
    elements = sum(x.numel() for x in tensors) / 1e6
    found = {name: round(elements / s, 1) for name, s in seconds.items()}
    found |= {f"{name} / clone": round(seconds["clone"] / seconds[name], 3) for name in work if "decode" in name}
    torch.set_num_threads(1)
    return found


def planes_of(tensors: list[Tensor]) -> bytes:
    """Return the tensors as byte planes, all of plane 0 first."""
    rows = torch.cat([x.transpose(1, 2).reshape(TOKENS, -1) for x in tensors], 1)
    return to_planes(rows).reshape(TOKENS, rows.dtype.itemsize, -1).transpose(0, 1).contiguous().numpy().tobytes()


def general(tensors: list[Tensor], rounds: int) -> dict[str, dict[str, float]]:
    """Return bytes relative to the tensors, and M elements/s, of lossless coders; those not installed are left out."""
    keys, values, config = tensors[::2], tensors[1::2], config_of("lossless")
    data, raw = planes_of(tensors), sum(x.nbytes for x in tensors)
    own = encode_kv(keys, values, config)
    coders: dict[str, tuple[int, Work, Work]] = {
        "hf_cachegen": (own.nbytes, lambda: encode_kv(keys, values, config), lambda: decode_kv(own))
    }
    for name, add in (("zstandard", _zstd), ("lz4.frame", _lz4), ("zipnn", _zipnn)):
        if find_spec(name.split(".", maxsplit=1)[0]) is None:
            print(f"{name} is left out: it is not installed")
        else:
            coders[name] = add(import_module(name), data, tensors)
    encoders, decoders = ({name: coder[k] for name, coder in coders.items()} for k in (1, 2))
    elements = sum(x.numel() for x in tensors) / 1e6
    times = best(encoders, rounds), best(decoders, rounds)
    return {
        name: {
            "size": round(coders[name][0] / raw, 4),
            "encode": round(elements / times[0][name], 1),
            "decode": round(elements / times[1][name], 1),
        }
        for name in coders
    }


def _zstd(module: Any, data: bytes, tensors: list[Tensor]) -> tuple[int, Work, Work]:
    code, decode = module.ZstdCompressor(level=3), module.ZstdDecompressor()
    packed = code.compress(data)
    return len(packed), lambda: code.compress(data), lambda: decode.decompress(packed)


def _lz4(module: Any, data: bytes, tensors: list[Tensor]) -> tuple[int, Work, Work]:
    packed = module.compress(data)
    return len(packed), lambda: module.compress(data), lambda: module.decompress(packed)


def _zipnn(module: Any, data: bytes, tensors: list[Tensor]) -> tuple[int, Work, Work]:
    raw = torch.cat([x.flatten() for x in tensors]).view(torch.uint8).numpy().tobytes()
    code = module.ZipNN(bytearray_dtype="bfloat16", threads=1)
    packed = bytes(code.compress(bytearray(raw)))  # its input is overwritten
    return len(packed), lambda: code.compress(bytearray(raw)), lambda: code.decompress(bytearray(packed))


@click.command()
@click.option("--rounds", default=5, show_default=True)
@click.option("--note", help="What else ran on the machine.")
@click.option("--out", type=click.Path(path_type=Path), help="Path of the figures as JSON.")
def main(rounds: int, note: str | None, out: Path | None) -> None:
    """Measure encoding and decoding of a whole context."""
    torch.set_num_threads(1)
    tensors = context()
    figures: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": {**machine(), "load": os.getloadavg()[0], **({"note": note} if note else {})},
        "M_elements_per_s": {name: speed(tensors, name, 1, rounds) for name in TRANSFORMS},
        "two_threads_M_elements_per_s": {name: speed(tensors, name, 2, rounds) for name in TRANSFORMS},
        "lossless": general(tensors, rounds),
    }
    shown(figures, out)


if __name__ == "__main__":
    main()
