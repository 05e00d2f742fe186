"""Measure what predicting from the model's first layers saves: bits per element against divergence, and decode time.

    python -m benchmarks.predictor --model smollm2 --text wikitext2_valid.txt --out docs/results/predictor_smollm2
    python -m benchmarks.predictor --out docs/results/predictor --layers 0,1 --samples 20 --tokens 1024

A profile is learnt from the first half of a text, with a predictor for each of --layers. Contexts of the second half
are coded at several steps and all levels: without prediction, and from the hidden state that enters each of these
layers. Bits count everything that is stored for a context: files, headers and manifest. The model computes in float32,
the caches are bfloat16. Divergence is KL in nats per token of the 128 tokens that follow, against the float32 cache.
The loader's own computation (the first layers) is stated as a share of a prefill.
Decode times are of level 2, in bfloat16, the least of several runs; the ratio is to decoding without prediction.
Results are means over the contexts, with 95 % intervals of the ratios from resampled contexts. Without --model the
reference model is measured on its three tasks, at the divergence of the paper's released code on each.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.rate_distortion import bits_at
from eval.reference import CALIBRATION_SEED, HELD_OUT_SEED, MODEL_PATH, TASKS, sample
from hf_cachegen import CacheGenConfig, Profile, decode_kv, encode_kv, learn_profile
from hf_cachegen.models.first_layers import known_of
from hf_cachegen.profiles.learning import Sample, continuation_logits, prefill

CONTINUATION = 128
"""Tokens after a context whose divergence is measured."""
OFFSETS = "18,12,8,4,0,-4"
"""Values of `step_offset`, a quarter of an octave each."""
TARGETS = (0.06, 0.016, 0.004)
"""Divergences to compare at, nats per token, on a text."""
RELEASED = {"lines": 0.0257, "topics": 0.0219, "stories": 0.019}
"""Divergence of the released code on the reference model's tasks (docs/rate_distortion.md)."""
GAP = 50
"""One part of so many between samples and tests is not used: a profile may be of the first half of the characters."""
DRAWS = 2000
"""Resamplings of the contexts for an interval."""
Curves = dict[str, dict[str, list[list[tuple[float, float]]]]]
"""By variant and task, for each context: (bits per element, KL) of each point."""
Goal = dict[str, float]
"""A divergence for each task, nats per token."""


def pieces(tokenizer: Any, text: str, samples: int, tests: int, tokens: int) -> tuple[list[Sample], list[Sample]]:
    """Cut contexts with continuations: samples from the first half of a text, tests from the second half, with a gap.
    """
    ids = tokenizer(text, return_tensors="pt").input_ids
    half, whole = ids.shape[1] // 2, tokens + CONTINUATION
    starts = torch.linspace(0, half - whole, samples).long().tolist()
    others = torch.linspace(half + ids.shape[1] // GAP, ids.shape[1] - whole, tests).long().tolist()
    cut = [(ids[:, at : at + tokens], ids[:, at + tokens : at + whole]) for at in starts + others]
    return cut[:samples], cut[samples:]


def name_of(layer: int | None) -> str:
    """Return the name of a variant."""
    return "klt" if layer is None else f"m = {layer}"


@torch.no_grad()
def points(
    model: Any, profile: Profile, test: Sample, config: CacheGenConfig, offsets: list[int], levels: int
) -> list[tuple[float, float]]:
    """Return (bits per element, KL) of each step, at levels 1 to `levels`, for one context."""
    context, continuation = test
    keys, values, _ = prefill(model, context)
    exact = continuation_logits(model, keys, values, continuation).log_softmax(-1)
    layer, found = config.predict_layers, list[tuple[float, float]]()
    known = None if layer is None else known_of(model, context, profile, layer)
    for offset in offsets:
        stepped = replace(config, step_offset=offset)
        encoded = encode_kv(in_bfloat16(keys), in_bfloat16(values), stepped, profile, known=known)
        for level in range(1, levels + 1):
            k, v = ([x.float() for x in side] for side in decode_kv(encoded, level, known=known))
            lossy = continuation_logits(model, k, v, continuation).log_softmax(-1)
            kl = float((exact.exp() * (exact - lossy)).sum(-1).mean())
            found.append((8 * encoded.nbytes_at(level) / encoded.geometry.elements, kl))
    return found


def bits_of(curve: dict[str, list[list[tuple[float, float]]]], goal: Goal, drawn: dict[str, list[int]]) -> float:
    """Return the bits at a divergence: means over the drawn contexts of each task, then over the tasks.

    If even the coarsest point is within the divergence, its bits are an upper bound.
    """
    found = []
    for task, kl in goal.items():
        points_ = torch.tensor([curve[task][index] for index in drawn[task]], dtype=torch.float64).mean(0)
        coarsest = float(points_[:, 0].min())
        within = bool((points_[:, 1] <= kl).all())
        found.append(coarsest if within else bits_at(points_.tolist(), kl))
    return sum(found) / len(found)


def compared(curves: Curves, goal: Goal) -> dict[str, Any]:
    """Return each variant's bits at a divergence, its ratio to klt, and the 95 % interval of the ratio."""
    counts = {task: len(contexts) for task, contexts in curves["klt"].items()}
    generator = torch.Generator().manual_seed(0)
    draws = [
        {task: torch.randint(count, (count,), generator=generator).tolist() for task, count in counts.items()}
        for _ in range(DRAWS)
    ]
    whole = {task: list(range(count)) for task, count in counts.items()}
    usual, found = [bits_of(curves["klt"], goal, drawn) for drawn in draws], {}
    for name, curve in curves.items():
        ratios = [bits_of(curve, goal, drawn) / to for drawn, to in zip(draws, usual, strict=True)]
        low, high = torch.tensor(ratios).nanquantile(torch.tensor([0.025, 0.975])).tolist()
        bits = bits_of(curve, goal, whole)
        ratio = bits / bits_of(curves["klt"], goal, whole)
        found[name] = {"bits": bits, "ratio": ratio, "interval": [low, high]}
    return found


@torch.no_grad()
def times(model: Any, profile: Profile, context: Tensor, layers: list[int | None], rounds: int) -> dict[str, Any]:
    """Return the least seconds to decode level 2 and to run the first layers, by variant, and those of a prefill."""
    keys, values, _ = prefill(model, context)
    kv = in_bfloat16(keys), in_bfloat16(values)
    coded = {}
    for layer in layers:
        known = None if layer is None else known_of(model, context, profile, layer)
        config = CacheGenConfig(transform="klt", measure=False, predict_layers=layer)
        coded[layer] = encode_kv(*kv, config, profile, known=known), known
    found: dict[str, Any] = {"prefill": float("inf")}
    for _ in range(rounds):
        found["prefill"] = min(found["prefill"], seconds(lambda: prefill(model, context)))
        for layer, (encoded, known) in coded.items():
            row = found.setdefault(name_of(layer), {"decode": float("inf"), "first layers": float("inf")})
            row["decode"] = min(row["decode"], seconds(lambda: decode_kv(encoded, 2, known=known)))  # noqa: B023
            if layer is not None:
                spent = seconds(lambda: known_of(model, context, profile, layer))  # noqa: B023
                row["first layers"] = min(row["first layers"], spent)
    return found


def in_bfloat16(tensors: list[Tensor]) -> list[Tensor]:
    """Return the tensors in bfloat16."""
    return [x.bfloat16() for x in tensors]


def log(out: Path, curves: Curves) -> None:
    """Write the curves measured up to now beside the results: a long run may be interrupted."""
    out.with_suffix(".part.json").write_text(json.dumps(curves) + "\n")


def seconds(work: Callable[[], Any]) -> float:
    """Return how long a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def table(results: dict[str, Any]) -> str:
    """Return the results in Markdown."""
    goals = results["bits"]
    lines = ["| variant | " + " | ".join(f"bits at {goal} | to klt" for goal in goals) + " |"]
    lines.append("|---" * (1 + 2 * len(goals)) + "|")
    for name in results["curves"]:
        cells = []
        for goal in goals.values():
            row = goal[name]
            low, high = row["interval"]
            cells.append(f"{row['bits']:.3f} | {row['ratio']:.2f} ({low:.2f}-{high:.2f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    spent = results["times"]
    lines += ["", "| variant | decode, to klt | first layers, of a prefill | bytes of the profile |", "|---" * 4 + "|"]
    for name in results["curves"]:
        row, first = spent[name], spent[name]["first layers"]
        share = "" if first == float("inf") else f"{first / spent['prefill']:.1%}"
        ratio = row["decode"] / spent["klt"]["decode"]
        lines.append(f"| {name} | {ratio:.2f} | {share} | {results['profile_bytes'][name]:,} |")
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--model", "path", type=click.Path(path_type=Path), help="Folder of another model than the reference.")
@click.option("--text", type=click.Path(path_type=Path), help="Text file for another model.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Path of the results, without suffix.")
@click.option("--layers", default="0", show_default=True, help="Values of predict_layers, separated by commas.")
@click.option("--rank", default=256, show_default=True, help="Largest rank of a predictor.")
@click.option("--samples", default=32, show_default=True, help="Samples (of each task) to learn the profile from.")
@click.option("--contexts", default=4, show_default=True, help="Test contexts (of each task).")
@click.option("--tokens", default=768, show_default=True, help="Tokens of a context.")
@click.option("--protect-last", default=CacheGenConfig.protect_last, show_default=True,
              help="Tokens at the end at the finest step.")
@click.option("--offsets", default=OFFSETS, show_default=True, help="Values of step_offset, separated by commas.")
@click.option("--levels", default=3, show_default=True, help="Finest level that is measured.")
@click.option("--rounds", default=5, show_default=True, help="Runs of each timed call.")
@click.option("--quick", is_flag=True, help="Learn in bfloat16, several times as fast on some machines.")
@click.option("--profile", "stored", type=click.Path(path_type=Path), help="Profile; learnt and written if new.")
def main(
    path: Path | None, text: Path | None, out: Path, layers: str, rank: int, samples: int, contexts: int, tokens: int,
    protect_last: int, offsets: str, levels: int, rounds: int, quick: bool, stored: Path | None,
) -> None:  # fmt: skip
    """Measure bits per element at equal divergence, and decode time, with and without prediction."""
    torch.manual_seed(0)
    if (path is None) != (text is None):
        raise click.UsageError("--model and --text go together")
    model = AutoModelForCausalLM.from_pretrained(path or MODEL_PATH, dtype=torch.float32).requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(path or MODEL_PATH)
    goals: dict[str, Goal] = {"the released code's KL": RELEASED}
    if text is None:
        given = [sample(tokenizer, task, CALIBRATION_SEED + n, tokens) for n in range(samples) for task in TASKS]
        tests = {task: [sample(tokenizer, task, HELD_OUT_SEED + n, tokens) for n in range(contexts)] for task in TASKS}
    else:
        given, cut = pieces(tokenizer, text.read_text("utf-8"), samples, contexts, tokens)
        goals, tests = {f"{kl} nats": {text.stem: kl} for kl in TARGETS}, {text.stem: cut}
    chosen = [int(layer) for layer in layers.split(",")]
    if stored is not None and stored.exists():
        profile = Profile.load(stored)
    else:
        start = time.perf_counter()
        model = model.bfloat16() if quick else model
        profile = learn_profile(
            model, given, predict_layers=chosen, predict_rank=rank, progress=True,
            journal=None if stored is None else stored.with_suffix(".journal"),
        )  # fmt: skip
        model = model.float()
        print(f"learnt in {time.perf_counter() - start:.0f} s", flush=True)
        if stored is not None:
            profile.save(stored)
    variants: list[int | None] = [None, *chosen]
    curves: Curves = {name_of(layer): {task: [] for task in tests} for layer in variants}
    for task, test in tqdm([(task, test) for task, cut in tests.items() for test in cut], "contexts"):
        for layer in variants:
            config = CacheGenConfig(transform="klt", measure=False, predict_layers=layer, protect_last=protect_last)
            steps = [int(offset) for offset in offsets.split(",")]
            curves[name_of(layer)][task].append(points(model, profile, test, config, steps, levels))
            log(out, curves)
    plain = replace(profile, predictors=())
    sizes = {"klt": len(plain.to_bytes())}
    for one in profile.predictors:
        sizes[name_of(one.layer)] = len(replace(plain, predictors=(one,)).to_bytes())
    results = {
        "of": {"model": (path or MODEL_PATH).name, "tests": list(tests), "samples": samples,
               "contexts": contexts, "tokens": tokens, "rank": rank, "protect_last": protect_last, "offsets": offsets},
        "bits": {name: compared(curves, goal) for name, goal in goals.items()},
        "times": times(model, profile, next(iter(tests.values()))[0][0], variants, rounds),
        "profile_bytes": sizes,
        "about": {str(one.layer): one.about for one in profile.predictors},
        "curves": curves,
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(results, allow_nan=True) + "\n")
    out.with_suffix(".md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
