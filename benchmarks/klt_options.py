"""What each choice of the klt transform is worth: bits per element at one divergence, on the reference model.

    python -m benchmarks.klt_options --out docs/results/klt_options

Each variant changes one option of `learn_profile` or of the encoder. Bits are read off the variant's curve at the
target divergence, by task and on average; the last column is the ratio to the default. "left out" rows learn from two
tasks, and are measured on all three.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.rate_distortion import KV, Point, bits_at, by_profiles, curves, learnt, levels_of
from eval.reference import CALIBRATION_SEED, HELD_OUT_SEED, MODEL_PATH, TASKS, sample
from hf_cachegen import CacheGenConfig, Profile

TARGETS = (0.001,)
"""One profile a variant: its three levels reach from 0.02 to 0.001 nats."""
BASE = CacheGenConfig(transform="klt", measure=False)
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "floor 0.1": {"floor": 0.1},
    "floor 0.3": {"floor": 0.3},
    "floor 1": {"floor": 1.0},
    "floor 3": {"floor": 3.0},
    "groups of 1 layer": {"group_layers": 1},
    "groups of 2 layers": {"group_layers": 2},
    "groups of 3 layers": {"group_layers": 3},
    "keys as cached": {"undo_rotation": False},
}
ENCODER: dict[str, dict[str, Any]] = {
    "no protected tokens": {"protect_first": 0, "protect_last": 0},
    "protect 4 + 16": {"protect_last": 16},
    "protect 4 + 32": {"protect_last": 32},
    "protect 4 + 128": {"protect_last": 128},
    "chunks of 128 tokens": {"chunk_tokens": 128},
    "chunks of 256 tokens": {"chunk_tokens": 256},
    "chunks of 1024 tokens": {"chunk_tokens": 1024},
}


def with_config(profiles: list[Profile], config: CacheGenConfig) -> Callable[[KV], list[Point]]:
    """The profiles, coded with other options of the encoder."""
    return lambda kv: [point for profile in profiles for point in levels_of(kv, config, profile)]


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="path of the results, without suffix")
@click.option("--contexts", default=3, show_default=True, help="test contexts of each task")
@click.option("--tokens", default=1024, show_default=True, help="tokens of a context, about")
@click.option("--samples", default=12, show_default=True, help="samples of each task that profiles are learnt from")
@click.option("--kl", default=0.005, show_default=True, help="divergence, nats per token, at which bits are compared")
def main(out: Path, contexts: int, tokens: int, samples: int, kl: float) -> None:
    """What each choice is worth."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(MODEL_PATH, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)

    def mix(tasks: tuple[str, ...]) -> list[Any]:
        return [sample(tokenizer, task, CALIBRATION_SEED + n, tokens) for n in range(samples) for task in tasks]

    tests = {task: [sample(tokenizer, task, HELD_OUT_SEED + n, tokens) for n in range(contexts)] for task in TASKS}
    codecs = {name: by_profiles(learnt(model, mix(TASKS), TARGETS, **options)) for name, options in OPTIONS.items()}
    default = learnt(model, mix(TASKS), TARGETS)
    codecs |= {name: with_config(default, replace(BASE, **options)) for name, options in ENCODER.items()}
    for task in TASKS:
        rest = tuple(other for other in TASKS if other != task)
        codecs[f"{task} left out"] = by_profiles(learnt(model, mix(rest), TARGETS))
    found = curves(model, codecs, tests)
    rows = {name: {task: bits_at(curve[task], kl) for task in TASKS} for name, curve in found.items()}
    lines = [f"| option | {' | '.join(TASKS)} | mean | to default |", "|---" * (len(TASKS) + 3) + "|"]
    usual = sum(rows["default"].values()) / len(TASKS)
    for name, bits in rows.items():
        mean = sum(bits.values()) / len(TASKS)
        lines.append(f"| {name} | {' | '.join(f'{b:.3f}' for b in bits.values())} | {mean:.3f} | {mean / usual:.2f} |")
    text = "\n".join(lines) + "\n"
    print(text)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text(text)
    out.with_suffix(".json").write_text(json.dumps({"kl": kl, "bits": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
