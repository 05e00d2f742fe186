"""Measure encoding and decoding with klt, as ratios to the matrix products that it cannot do without.

    python -m benchmarks.bench_klt --model runs/smollm2-135m --profile runs/smollm2-profile --text second_half.txt

One thread, processor time, and the best of some turns, since machines are shared and noisy: read the ratios. "encoding
products" multiply random rows by the profile's bases, in float32. "decoding products" multiply by all matrices that
decoding needs, and encoding too: the bases, and in a chain the predictions and summaries. A bfloat16 cache is decoded
with products in bfloat16 where the machine has them, and zeros are skipped, so decoding may take less than its
products.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import click
import torch
from torch import Tensor

from benchmarks.bench_codec import machine, shown
from benchmarks.bench_speed import Work, best
from hf_cachegen import CacheGenConfig, EncodedContext, Profile, decode_kv, encode_kv
from hf_cachegen.profiles.learning import prefill

CONFIG = CacheGenConfig(transform="klt", predict_layers=None, measure=False)


def encoded_context(path: str, profile: Profile, text: Path, tokens: int, dtype: str) -> EncodedContext:
    """Encode the first tokens of a text with klt, from a model in a dtype."""
    keys, values = computed(path, text, tokens, dtype)
    return encode_kv(keys, values, CONFIG, profile)


def computed(path: str, text: Path, tokens: int, dtype: str) -> tuple[list[Tensor], list[Tensor]]:
    """Return K and V of the first tokens of a text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(path)(text.read_text(), return_tensors="pt").input_ids[:, :tokens]
    return prefill(AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval(), ids)[:2]


def products(matrices: list[Tensor], tokens: int) -> Work:
    """Return what multiplies random rows by each matrix."""
    rows = [torch.randn(tokens, len(matrix)) for matrix in matrices]
    return lambda: [x @ matrix for x, matrix in zip(rows, matrices, strict=True)]


def decoding_products(profile: Profile, tokens: int) -> Work:
    """Return what multiplies random rows by matrices of the shapes that decoding needs."""
    matrices = []
    for group in profile.groups:
        read = 0 if group.prediction is None else len(group.prediction)
        width = 0 if group.summary is None else len(group.summary)
        shapes = (read + len(group.synthesis), group.synthesis.shape[1]), (read + len(group.synthesis), width)
        matrices += [torch.randn(shape) for shape in shapes if shape[1]]
    return products(matrices, tokens)


@click.command()
@click.option("--model", required=True, help="Folder or repository of the model.")
@click.option("--profile", required=True, help="Folder or repository of its profile.")
@click.option("--text", required=True, type=click.Path(path_type=Path, exists=True), help="Path of the context's text.")
@click.option("--tokens", default=1024, show_default=True)
@click.option("--dtype", default="float32", show_default=True)
@click.option("--rounds", default=4, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Path of the figures as JSON.")
def main(model: str, profile: str, text: Path, tokens: int, dtype: str, rounds: int, out: Path | None) -> None:
    """Measure encoding and decoding with klt."""
    torch.set_num_threads(1)
    keys, values = computed(model, text, tokens, dtype)
    learnt = Profile.from_pretrained(profile)
    measured = replace(CONFIG, measure=True)
    encoded = encode_kv(keys, values, CONFIG, learnt)
    work = {"encoding products": products([group.analysis for group in learnt.groups], tokens)}
    work["decoding products"] = decoding_products(learnt, tokens)
    work["encode"] = lambda: encode_kv(keys, values, CONFIG, learnt)
    work["encode, with errors"] = lambda: encode_kv(keys, values, measured, learnt)
    for level in range(1, encoded.levels + 1):
        work[f"decode, level {level}"] = lambda level=level: decode_kv(encoded, level)
    seconds = best(work, rounds)
    figures = {
        "machine": {**machine(), "load": os.getloadavg()[0]},
        "elements": encoded.geometry.elements,
        "seconds": {name: round(s, 4) for name, s in seconds.items()},
        "products": {
            name: round(s / seconds["decoding products" if "decod" in name else "encoding products"], 3)
            for name, s in seconds.items()
        },
    }
    shown(figures, out)


if __name__ == "__main__":
    main()
