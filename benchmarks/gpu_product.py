"""Time to the first token on a GPU from a compressed cache, against prefill and against a bf16 copy from the host.

    python -m benchmarks.gpu_product --out product.json
    python -m benchmarks.gpu_product --device cpu --hidden 256 --layers 2 --tokens 512 --rounds 1     # to try it

The model has the geometry of an 8B one and random weights: its answers mean nothing, its speed is that of a real one.
Times are seconds, the best of several rounds.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hf_cachegen
from benchmarks.bench_codec import machine, shown
from hf_cachegen import CacheGenCache, CacheGenConfig
from hf_cachegen.models.checksum import checksums

QUESTION = 32
"""Tokens that follow the context."""
LOSSLESS_PART = 8
"""Share of the context that is stored without loss: the CPU encodes it."""


def random_model(hidden: int, layers: int, tokens: int, device: torch.device) -> LlamaForCausalLM:
    """A Llama of 32 heads, 8 of keys and values, made on its device."""
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=7 * hidden // 2, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, head_dim=max(hidden // 32, 32), vocab_size=32000, max_position_embeddings=2 * tokens,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def best(run: Callable[[], object], rounds: int, device: torch.device) -> float:
    """Seconds of the fastest round, the device waited for."""
    found = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found = min(found, time.perf_counter() - start)
    return found


def measure(model: LlamaForCausalLM, tokens: int, rounds: int, device: torch.device, folder: Path) -> dict[str, Any]:
    """Seconds to the first token, by how the context's keys and values come to be on the device."""
    ids = torch.randint(5, 32000, (1, tokens + QUESTION), device=device)
    options: dict[str, Any] = {"max_new_tokens": 1, "do_sample": False}
    figures: dict[str, Any] = {"prefill": best(lambda: model.generate(ids, **options), rounds, device)}
    weights = list(model.parameters())
    figures["weights, bytes"] = sum(x.nbytes for x in weights)
    figures["checksum of the weights"] = best(lambda: checksums(weights), rounds, device)
    config = CacheGenConfig(transform="identity", measure=False)
    cache = CacheGenCache.from_context(model, ids[:, :tokens], config, profile=None)
    start = time.perf_counter()
    cache.save_pretrained(folder)
    figures["save"] = time.perf_counter() - start
    kept = [x.cpu() for x in (*cache.kv.keys, *cache.kv.values)]
    if device.type == "cuda":
        kept = [x.pin_memory() for x in kept]
    figures["cache, bytes"] = sum(x.nbytes for x in kept)
    copied = best(lambda: [x.to(device, non_blocking=True) for x in kept], rounds, device)
    figures["copy of bf16 from the host"] = copied
    for level in (1, 3):

        def loaded(level: int = level) -> None:
            there = CacheGenCache.from_pretrained(folder, model=model, level=level, profile=None)
            hf_cachegen.generate(model, ids, cache=there, **options)

        figures[f"load and first token, level {level}"] = best(loaded, rounds, device)
    for refine in ("off", "while_generating"):

        def streamed(refine: Any = refine) -> None:
            hf_cachegen.generate(model, ids, cache=str(folder), slo=10.0, refine=refine, **options)

        figures[f"stream and first token, refine={refine}"] = best(streamed, rounds, device)
    short = tokens // LOSSLESS_PART
    config = CacheGenConfig(lossless=True, measure=False)
    CacheGenCache.from_context(model, ids[:, :short], config, profile=None).save_pretrained(folder / "lossless")

    def exact() -> None:
        CacheGenCache.from_pretrained(folder / "lossless", model=model, profile=None)

    figures[f"load {short} tokens, lossless"] = best(exact, rounds, device)
    return figures


@click.command()
@click.option("--device", default="cuda", show_default=True)
@click.option("--hidden", default=4096, show_default=True, help="Width of the model.")
@click.option("--layers", default=32, show_default=True)
@click.option("--tokens", default=4096, show_default=True, help="Tokens of the context.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="File for the figures, JSON.")
def main(device: str, hidden: int, layers: int, tokens: int, rounds: int, out: Path | None) -> None:
    """Time to the first token from a compressed cache."""
    where = torch.device(device)
    torch.manual_seed(0)
    model = random_model(hidden, layers, tokens, where)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu"
    figures: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "machine": {"device": name, **machine()}}
    figures["geometry"] = f"hidden {hidden}, {layers} layers, 8 KV heads, {tokens} tokens"
    with tempfile.TemporaryDirectory() as folder:
        figures["seconds"] = measure(model, tokens, rounds, where, Path(folder) / "cache")
    shown(figures, out)


if __name__ == "__main__":
    main()
