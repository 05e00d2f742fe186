"""How many samples a profile needs: bits and divergence of klt with profiles learnt from 8 to 128 of them.

    python -m eval.calibration --out docs/results/calibration
    python -m eval.calibration --model MODEL --text FILE --samples 8 --samples 32 --out PATH

Each profile is learnt from the first n of one list of samples, so a larger one has seen all that a smaller one has. The
tests are of the same kind and of other seeds, or of the other half of the text. Without --model the reference model and
its three tasks are taken in turn. Each profile keeps its own step, which meets the same targets on its held-out
samples, so the bits at one divergence are interpolated between the levels too.
"""

from __future__ import annotations

import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from eval import intervals, surroundings
from eval.command import run_command
from eval.divergence import kl, log_probabilities
from eval.models import load_model, load_tokenizer
from eval.reference import CALIBRATION_SEED, HELD_OUT_SEED, TASKS, sample
from hf_cachegen import CacheGenCache, CacheGenConfig, Profile, decode_kv, encode_kv, learn_profile

CONTINUATION = 128
"""Tokens after a context of a text."""
TARGET = 0.01
"""Divergence at which bits are compared, nats per token."""
Sample = tuple[Tensor, Tensor]
Row = dict[str, float]


def of_reference(tokenizer: Any, samples: int, tests: int, tokens: int) -> tuple[list[Sample], list[Sample]]:
    """Return samples and tests of the reference model's tasks in turn."""
    made = [
        [sample(tokenizer, TASKS[n % len(TASKS)], seed + n, tokens) for n in range(count)]
        for seed, count in ((CALIBRATION_SEED, samples), (HELD_OUT_SEED, tests))
    ]
    return made[0], made[1]


def of_text(tokenizer: Any, text: str, samples: int, tests: int, tokens: int) -> tuple[list[Sample], list[Sample]]:
    """Return samples of the first half of a text, and tests of the second; samples may overlap."""
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids
    half, whole = ids.shape[1] // 2, tokens + CONTINUATION
    starts = torch.linspace(0, half - whole, samples).long().tolist()
    others = torch.linspace(half, ids.shape[1] - whole, tests).long().tolist()
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(0)).tolist()
    cut = [(ids[:, at : at + tokens], ids[:, at + tokens : at + whole]) for at in [starts[n] for n in order] + others]
    return cut[:samples], cut[samples:]


def measured(model: Any, profile: Profile, test: Sample) -> Row:
    """Return bits per element and KL of each level on one context, and the bits at TARGET."""
    cache = CacheGenCache.from_context(model, test[0], profile=None)
    kv = (list(cache.kv.keys), list(cache.kv.values))
    exact = log_probabilities(model, *kv, test[1])
    config = CacheGenConfig(transform="klt", levels=profile.levels, predict_layers=None, measure=False)
    encoded, found = encode_kv(*kv, config, profile), {}
    for level in range(1, encoded.levels + 1):
        lossy = decode_kv(encoded, level)
        found[f"bits {level}"] = 8 * encoded.nbytes_at(level) / cache.kv.geometry.elements
        found[f"kl {level}"] = kl(exact, log_probabilities(model, *lossy, test[1]))
    found["bits at target"] = at_target([(found[f"bits {n}"], found[f"kl {n}"]) for n in range(1, encoded.levels + 1)])
    return found


def at_target(points: list[tuple[float, float]]) -> float:
    """Return the bits at TARGET: linear in the logarithm of the divergence, on through the ends.

    Args:
        points: (bits, KL) of the levels, the coarsest first.
    """
    for (low, most), (high, least) in pairwise(points):
        if least <= TARGET or (high, least) == points[-1]:
            share = np.log(most / TARGET) / np.log(most / least)
            return float(low + share * (high - low))
    return points[0][0]


def table(results: dict[int, list[Row]], seconds: dict[int, float]) -> str:
    """Format means over the tests as Markdown."""
    heads = ("samples", "level 1: bits, KL", "level 2", "level 3", f"bits at {TARGET} nats", "learning, CPU s")
    lines = [f"| {' | '.join(heads)} |", "|---:|" + "---|" * 3 + "---:|---:|"]
    for count, rows in results.items():
        means = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
        cells = [f"{means[f'bits {n}']:.2f}, {means[f'kl {n}']:.4f}" for n in (1, 2, 3)]
        bits = np.array([row["bits at target"] for row in rows])
        ends = intervals.interval(bits, np.ones(len(bits)))
        shown = "" if ends is None else f" [{ends[0]:.2f}, {ends[1]:.2f}]"
        lines.append(f"| {count} | {' | '.join(cells)} | {bits.mean():.2f}{shown} | {seconds[count]:.0f} |")
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--model", "name", default="eval/reference/model", show_default=True, help="Folder or Hub id.")
@click.option("--text", type=click.Path(path_type=Path, exists=True), help="Text file.  [default: reference tasks]")
@click.option("--samples", multiple=True, type=click.IntRange(min=5), default=(8, 16, 32, 64, 128), show_default=True,
              help="Number of samples, repeatable.")  # fmt: skip
@click.option("--tests", default=12, show_default=True, help="Number of test contexts.")
@click.option("--tokens", default=800, show_default=True, help="Length of a context in tokens.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Path of the results, without suffix.")
def main(name: str, text: Path | None, samples: tuple[int, ...], tests: int, tokens: int, out: Path) -> None:
    """Measure klt with profiles of several numbers of samples."""
    tokenizer, model = load_tokenizer(name), load_model(name, dtype="float32", device="cpu")
    if text is None:
        learning, testing = of_reference(tokenizer, max(samples), tests, tokens)
    else:
        learning, testing = of_text(tokenizer, text.read_text(encoding="utf-8"), max(samples), tests, tokens)
    results: dict[int, list[Row]] = {}
    seconds: dict[int, float] = {}
    out.parent.mkdir(parents=True, exist_ok=True)
    session = surroundings.session(1)
    for count in sorted(samples):
        start = time.process_time()
        profile = learn_profile(model, learning[:count])
        seconds[count] = time.process_time() - start
        results[count] = [measured(model, profile, test) for test in testing]
        shown = table(results, seconds)
        print(shown, flush=True)
        about = f"{name}, {tests} test contexts of about {tokens} tokens; brackets: 95 %, {intervals.METHOD}."
        out.with_suffix(".md").write_text(f"# Number of samples\n\n{about}\n\n{shown}")
        record = {"session": session, "tokens": tokens, "seconds": seconds, "rows": results}
        out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main, "eval.calibration")
