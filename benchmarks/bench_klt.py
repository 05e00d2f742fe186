"""Measure encoding and decoding with klt, as ratios to the matrix product that it cannot do without.

    python -m benchmarks.bench_klt --model runs/smollm2-135m --profile runs/smollm2-profile --text second_half.txt

One thread, processor time, and the best of some turns, since machines are shared and noisy: read the ratios. "product"
multiplies random rows by the profile's matrices, in float32.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import click
import torch

from benchmarks.bench_codec import machine
from benchmarks.bench_speed import Work, best
from hf_cachegen import CacheGenConfig, Profile, decode_kv, encode_kv
from hf_cachegen.profiles.learning import prefill


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
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    ids = AutoTokenizer.from_pretrained(model)(text.read_text(), return_tensors="pt").input_ids[:, :tokens]
    own = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
    keys, values, _ = prefill(own, ids)
    learnt = Profile.from_pretrained(profile)
    config = CacheGenConfig(transform="klt", predict_layers=None, measure=False)
    measured = replace(config, measure=True)
    encoded = encode_kv(keys, values, config, learnt)
    matrices = [group.analysis for group in learnt.groups]
    rows = [torch.randn(ids.shape[1], len(matrix)) for matrix in matrices]
    work: dict[str, Work] = {"product": lambda: [x @ matrix for x, matrix in zip(rows, matrices, strict=True)]}
    work["encode"] = lambda: encode_kv(keys, values, config, learnt)
    work["encode, with errors"] = lambda: encode_kv(keys, values, measured, learnt)
    for level in range(1, encoded.levels + 1):
        work[f"decode, level {level}"] = lambda level=level: decode_kv(encoded, level)
    seconds = best(work, rounds)
    figures = {
        "machine": {**machine(), "load": os.getloadavg()[0]},
        "elements": encoded.geometry.elements,
        "seconds": {name: round(s, 4) for name, s in seconds.items()},
        "products": {name: round(s / seconds["product"], 3) for name, s in seconds.items()},
    }
    print(json.dumps(figures, indent=1))
    if out:
        out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
