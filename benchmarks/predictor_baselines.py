"""Compare results of `benchmarks.predictor` with published methods at equal divergence, on the same contexts.

    python -m eval.baselines.joint --model smollm2 --text first_half.txt --contexts 4 --tokens 1024 --out basis.st
    python -m benchmarks.predictor_baselines --model smollm2 --text wikitext2_valid.txt --basis basis.st \
        --results docs/results/predictor_smollm2 --contexts 3

CacheGen as its authors released it, at its three levels, and KVTC as published, at 8, 16 and 32 times before DEFLATE
(`eval.baselines`). Bits are read off the mean curve of the first contexts at the divergence, interpolated in log KL.
Where a method has no level that is as close, or as coarse, as the divergence, the nearest level stands for it and its
own divergence is stated.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.predictor import pieces
from benchmarks.rate_distortion import bits_at
from eval.baselines import kvtc, released
from eval.baselines.joint import Joint
from hf_cachegen.profiles.learning import Sample, continuation_logits, prefill


@torch.no_grad()
def baselines(model: Any, test: Sample, joint: Joint | None) -> dict[str, list[tuple[float, float]]]:
    """Return (bits per element, KL) of each level of each method, for one context."""
    context, continuation = test
    keys, values, _ = prefill(model, context)
    exact = continuation_logits(model, keys, values, continuation).log_softmax(-1)
    elements = sum(x.numel() for x in (*keys, *values))
    methods = {"CacheGen as released": released.cachegen(keys, values, None)}
    if joint is not None:
        methods["KVTC"] = kvtc.kvtc(keys, values, joint)
    found: dict[str, list[tuple[float, float]]] = {}
    for name, levels in methods.items():
        for stored in levels:
            lossy = continuation_logits(model, stored.keys, stored.values, continuation).log_softmax(-1)
            kl = float((exact.exp() * (exact - lossy)).sum(-1).mean())
            found.setdefault(name, []).append((stored.bits / elements, kl))
    return found


def read_off(contexts: list[list[tuple[float, float]]], kl: float) -> tuple[float, float]:
    """Return (bits, KL) of the mean curve at a divergence, or of its nearest point where it does not reach it."""
    curve: Tensor = torch.tensor(contexts, dtype=torch.float64).mean(0)
    bits = bits_at(curve.tolist(), kl)
    if bits == bits:
        return bits, kl
    nearest = curve[int((curve[:, 1].log() - torch.tensor(kl).log()).abs().argmin())]
    return float(nearest[0]), float(nearest[1])


@click.command()
@click.option("--model", "path", type=click.Path(path_type=Path), required=True, help="Folder of the model.")
@click.option("--text", type=click.Path(path_type=Path), required=True, help="Text file of the results.")
@click.option("--basis", type=click.Path(path_type=Path), help="The model's joint basis; without it KVTC is left out.")
@click.option("--results", type=click.Path(path_type=Path), required=True, help="Path of the results, without suffix.")
@click.option("--contexts", default=3, show_default=True, help="First contexts of the results to measure.")
@click.option("--divergence", default=0.016, show_default=True, help="Divergence to compare at, nats per token.")
def main(path: Path, text: Path, basis: Path | None, results: Path, contexts: int, divergence: float) -> None:
    """Measure published methods beside the results of benchmarks.predictor."""
    stored = json.loads(results.with_suffix(".json").read_text())
    of, curves = stored["of"], {name: curve[text.stem] for name, curve in stored["curves"].items()}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(path)
    _, tests = pieces(tokenizer, text.read_text("utf-8"), 1, of["contexts"], of["tokens"])
    joint, measured = None if basis is None else Joint.load(basis), dict[str, list[list[tuple[float, float]]]]()
    for test in tests[:contexts]:
        for name, points in baselines(model, test, joint).items():
            measured.setdefault(name, []).append(points)
            print(name, points, flush=True)
    lines = [f"| of {contexts} contexts | bits | at KL | to m = 2 |", "|---" * 4 + "|"]
    ours = {name: read_off(curve[:contexts], divergence) for name, curve in curves.items()}
    for name, (bits, kl) in {**ours, **{name: read_off(curve, divergence) for name, curve in measured.items()}}.items():
        lines.append(f"| {name} | {bits:.3f} | {kl:.4f} | {bits / ours['m = 2'][0]:.2f} |")
    out = results.with_name(results.name + "_baselines")
    out.with_suffix(".json").write_text(json.dumps({"contexts": contexts, "curves": measured}) + "\n")
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
