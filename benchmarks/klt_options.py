"""Measure the value of each choice of the klt transform: bits per element at one divergence.

    python -m benchmarks.klt_options --out docs/results/klt_options
    python -m benchmarks.klt_options --model MODEL --text TEXT --out docs/results/klt_options_other

Each variant changes one option of `learn_profile` or of the encoder, or replaces a step of the encoder.
Bits are read off the variant's curve at the target divergence, by task and on average; the last field is the ratio to
the default. On the reference model "left out" rows learn from the two other tasks, and are measured on the one that was
left out. Attention sinks are coded as all tokens are (`benchmarks.sinks` has what they are worth). Another model is
measured on a text of which it sees one part as samples and another as tests. Results are written after each option;
what the file of results has is not measured again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import klt_codebooks, klt_tokens, klt_variants
from benchmarks.klt_variants import BASE, Bench, Coder, with_config
from benchmarks.rate_distortion import (
    Curve,
    Test,
    as_released,
    bits_at,
    by_bits,
    by_steps,
    curves,
    learnt,
    learnt_pca,
    no_sinks,
    test_of,
)
from eval.reference import CALIBRATION_SEED, HELD_OUT_SEED, MODEL_PATH, TASKS, sample
from hf_cachegen.profiles.learning import Sample

OPTIONS: dict[str, dict[str, Any]] = {
    "floor 0.1": {"floor": 0.1},
    "floor 1": {"floor": 1.0},
    "floor 2": {"floor": 2.0},
    "groups of 1 layer": {"group_layers": 1},
    "groups of 2 layers": {"group_layers": 2},
    "groups of 4 layers": {"group_layers": 4},
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
KEPT_KL = (0.1, 0.02, 0.005, 0.001)
"""Divergences at which fewer components are compared."""


def pieces(tokenizer: Any, text: str, samples: int, tests: int, tokens: int) -> tuple[list[Sample], list[Test]]:
    """Cut samples from the first 80 % of a text and tests from the last 20 %: a context and the 128 tokens after it."""
    ids = tokenizer(text, return_tensors="pt").input_ids
    edge, whole = int(0.8 * ids.shape[1]), tokens + 128
    starts = torch.linspace(0, edge - whole, samples).long().tolist()
    others = torch.linspace(edge, ids.shape[1] - whole, tests).long().tolist()
    cut = [(ids[:, at : at + tokens], ids[:, at + tokens : at + whole]) for at in starts + others]
    return cut[:samples], [Test(context, continuation, []) for context, continuation in cut[samples:]]


def benched(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of a benchmark of one model and its texts, except samples."""
    path = click.Path(path_type=Path)
    options = (
        click.option("--out", type=path, required=True, help="Path of the results, without suffix."),
        click.option("--model", "path", type=path, help="Folder of another model than the reference."),
        click.option("--text", type=path, help="Text file for another model."),
        click.option("--contexts", default=3, show_default=True, help="Test contexts of each task."),
        click.option("--tokens", default=1024, show_default=True, help="Approximate length of a context in tokens."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def bench_of(
    path: Path | None, text: Path | None, samples: int, contexts: int, tokens: int
) -> tuple[Bench, Callable[[tuple[str, ...]], list[Sample]]]:
    """Return what the options select, and samples of some of the reference model's tasks. Raises UsageError."""
    if (path is None) != (text is None):
        raise click.UsageError("--model and --text go together")
    model = AutoModelForCausalLM.from_pretrained(path or MODEL_PATH, dtype=torch.float32)
    model.requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(path or MODEL_PATH)

    def mix(tasks: tuple[str, ...]) -> list[Sample]:
        return [sample(tokenizer, task, CALIBRATION_SEED + n, tokens) for n in range(samples) for task in tasks]

    if text is None:
        tests = {task: [test_of(tokenizer, task, HELD_OUT_SEED + n, tokens) for n in range(contexts)] for task in TASKS}
        return Bench(model, mix(TASKS), tests), mix
    mixed, some = pieces(tokenizer, text.read_text(encoding="utf-8"), samples, contexts, tokens)
    return Bench(model, mixed, {text.stem: some}), mix


@click.command()
@benched
@click.option("--samples", default=12, show_default=True, help="Samples of each task to learn profiles from.")
@click.option("--kl", default=0.005, show_default=True, help="Divergence to compare bits at, in nats per token.")
@click.option("--only", multiple=True, help="Option to measure beside the default; repeatable.")
@no_sinks()
def main(
    out: Path, path: Path | None, text: Path | None, contexts: int, tokens: int, samples: int, kl: float,
    only: tuple[str, ...],
) -> None:  # fmt: skip
    """Measure the value of each choice."""
    torch.manual_seed(0)
    bench, mix = bench_of(path, text, samples, contexts, tokens)
    model, mixed, tests = bench.model, bench.mixed, bench.tests
    coders: dict[str, Callable[[], Coder]] = {"default": lambda: with_config(bench.profiles)}
    for name, options in OPTIONS.items():
        coders[name] = lambda options=options: with_config(learnt(model, mixed, **options))  # type: ignore[misc]
    for name, options in ENCODER.items():
        config = replace(BASE, **options)
        coders[name] = lambda config=config: with_config(bench.profiles, config)  # type: ignore[misc]
    coders |= klt_variants.variants(bench)
    coders["PCA per layer"] = lambda: with_config(learnt_pca(model, mixed))
    coders |= {name: partial(by_steps, name) for name in ("identity", "delta")}
    coders |= {"uniform": lambda: by_bits, "CacheGen as released": lambda: as_released}
    coders |= klt_tokens.variants(bench)
    if text is None:
        for task in TASKS:
            rest = mix(tuple(other for other in TASKS if other != task))
            coders[f"{task} left out"] = lambda rest=rest: with_config(learnt(model, rest))  # type: ignore[misc]
            coders[f"{task} left out, PCA per layer"] = lambda rest=rest: with_config(  # type: ignore[misc]
                learnt_pca(model, rest)
            )

    def coded(name: str, coder: Callable[[], Coder]) -> Curve:
        shown = {name.split()[0]: tests[name.split()[0]]} if "left out" in name else tests
        return curves(model, {name: coder()}, shown)[name]

    of = {"model": str(path or MODEL_PATH.name), "contexts": contexts, "tokens": tokens, "samples": samples}
    found = Results(out, kl, list(tests), of)
    measured: dict[str, Callable[[], Curve]] = {name: partial(coded, name, coder) for name, coder in coders.items()}
    books = klt_codebooks.Codebooks(bench)
    for name in klt_codebooks.NAMES:
        measured[name] = lambda name=name: books.curve(name, found.curves["default"])  # type: ignore[misc]
    for name in klt_variants.KEPT:
        measured[name] = lambda name=name: coded(name, lambda: with_config(bench.kept(name)))  # type: ignore[misc]
    for name, curve in measured.items():
        if name not in found.curves and (not only or name == "default" or name in only):
            found.curves[name] = {
                task: [[round(bits, 5), round(nats, 7)] for bits, nats, *_ in points]
                for task, points in curve().items()
            }
            print(name, {task: bits_at(points, kl) for task, points in found.curves[name].items()}, flush=True)
            found.write()
    if fewer := [name for name in klt_variants.KEPT if name in found.curves and name not in found.prices]:
        found.prices |= klt_variants.prices(bench, fewer)
        found.write()


class Results:
    """Curves by option and task, [bits per element, KL] each point, and what fewer components cost; in two files, of
    which the JSON is read again. of: what they were measured on. Raises UsageError for a file of something else.
    """

    def __init__(self, out: Path, kl: float, tasks: list[str], of: dict[str, Any]):
        self.out, self.kl, self.tasks, self.of = out, kl, tasks, of
        known = json.loads(out.with_suffix(".json").read_text()) if out.with_suffix(".json").exists() else {"of": of}
        if known.get("of") != of:
            raise click.UsageError(f"{out}.json was measured on {known.get('of')}, not on {of}: remove it")
        self.curves: dict[str, Curve] = known.get("curves", {})
        self.prices: dict[str, list[float]] = known.get("prices", {})

    def write(self) -> None:
        rows = {
            name: {task: bits_at(points, self.kl) for task, points in curve.items()}
            for name, curve in self.curves.items()
            if name not in klt_variants.KEPT
        }
        lines = [f"| option | {' | '.join(self.tasks)} | mean | to default |", "|---" * (len(self.tasks) + 3) + "|"]
        for name, bits in rows.items():
            cells = " | ".join(f"{bits[task]:.3f}" if task in bits else "" for task in self.tasks)
            usual = sum(rows["default"][task] for task in bits)
            mean = sum(bits.values()) / len(bits)
            lines.append(f"| {name} | {cells} | {mean:.3f} | {sum(bits.values()) / usual:.3f} |")
        lines += ["", "Bits per element, means over the tasks, with these components of each group:", ""]
        lines.append(f"| components | of all | {' | '.join(f'KL {kl}' for kl in KEPT_KL)} | profile, MB | decoding |")
        lines.append("|---" * (len(KEPT_KL) + 4) + "|")
        for name, (share, size, time) in self.prices.items():
            curve = self.curves[name]
            means = [sum(bits_at(points, kl) for points in curve.values()) / len(curve) for kl in KEPT_KL]
            cells = " | ".join("-" if mean != mean else f"{mean:.3f}" for mean in means)
            lines.append(f"| {name} | {share:.0%} | {cells} | {size / 1e6:.2f} | {time:.2f} |")
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
        known = {"of": self.of, "kl": self.kl, "curves": self.curves, "prices": self.prices}
        self.out.with_suffix(".json").write_text(json.dumps(known) + "\n")


if __name__ == "__main__":
    main()
