"""Measure the value of finer steps for attention sinks (`hf_cachegen.codec.sinks`): bits at equal divergence.

    python -m benchmarks.sinks --out runs/sinks
    python -m benchmarks.sinks --model runs/smollm2-135m --text wikitext2_valid.txt --samples 10 --out runs/sinks

One profile, learnt with them; the same contexts are coded with sinks and, as if there were none, without. Everything is
counted. Means over the contexts.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
import torch

from benchmarks.klt_options import bench_of, benched
from benchmarks.klt_tokens import DRAWS, sensitivity
from benchmarks.klt_variants import Bench
from benchmarks.rate_distortion import (
    KV,
    Curve,
    Point,
    Test,
    bits_at,
    by_profiles,
    by_steps,
    curves,
    no_sinks,
)
from hf_cachegen.codec.sinks import find_sinks
from hf_cachegen.profiles.learning import prefill

KL = (0.02, 0.005)


def without(coder: Callable[[KV], list[Point]], kv: KV) -> list[Point]:
    """Code as if there were no sinks."""
    with no_sinks():
        return coder(kv)


def share_of(bench: Bench, test: Test) -> tuple[int, float, float]:
    """Return the number of sinks of a context, and the shares of sensitivity of the first token and of all sinks."""
    with torch.no_grad():
        sinks = find_sinks(prefill(bench.model, test.context)[0])
    found = sensitivity(bench, test.context, [test.continuation], DRAWS).sum(1)
    return len(sinks), float(found[0] / found.sum()), float(found[sinks].sum() / found.sum())


def table(shares: dict[str, list[tuple[int, float, float]]], found: dict[str, Curve]) -> str:
    """Return the sinks of the contexts, and bits with and without them."""
    lines = ["| text | sinks of each context | of the sensitivity: the first token | all sinks |", "|---|---|---|---|"]
    for task, some in shares.items():
        counts, first, every = zip(*some, strict=True)
        cells = [", ".join(map(str, counts)), *(", ".join(f"{x:.0%}" for x in column) for column in (first, every))]
        lines.append(f"| {task} | {' | '.join(cells)} |")
    lines += ["", "| codec | text | KL, nats | bits without | bits with | to without |", "|---|---|---|---|---|---|"]
    for name in ("klt", "identity"):
        for task in shares:
            for kl in KL:
                a, b = (bits_at(found[which][task], kl) for which in (f"{name}, without", name))
                lines.append(f"| {name} | {task} | {kl} | {a:.3f} | {b:.3f} | {b / a:.3f} |")
    return "\n".join(lines) + "\n"


@click.command()
@benched
@click.option("--samples", default=10, show_default=True, help="Samples of each task to learn the profile from.")
def main(out: Path, path: Path | None, text: Path | None, contexts: int, tokens: int, samples: int) -> None:
    """Compare bits with and without sinks."""
    bench, _ = bench_of(path, text, samples, contexts, tokens)
    coders = {"klt": by_profiles(bench.profiles), "identity": by_steps("identity")}
    coders |= {f"{name}, without": partial(without, coder) for name, coder in coders.items()}
    shares = {task: [share_of(bench, test) for test in some] for task, some in bench.tests.items()}
    found = curves(bench.model, coders, bench.tests)
    shown = table(shares, found)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text(shown, encoding="utf-8")
    out.with_suffix(".json").write_text(json.dumps({"sinks": shares, "curves": found}), encoding="utf-8")
    click.echo(shown)


if __name__ == "__main__":
    main()
