"""What it is worth to code attention sinks finer (`hf_cachegen.codec.sinks`): bits at equal divergence.

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
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.klt_options import pieces
from benchmarks.rate_distortion import (
    KV,
    Point,
    Test,
    bits_at,
    by_profiles,
    by_steps,
    curves,
    learnt,
    no_sinks,
    test_of,
)
from eval.reference import CALIBRATION_SEED, HELD_OUT_SEED, MODEL_PATH, TASKS, sample
from hf_cachegen.calibration import prefill
from hf_cachegen.codec.sinks import find_sinks

KL = (0.02, 0.005)


def without(coder: Callable[[KV], list[Point]], kv: KV) -> list[Point]:
    """As the coder does where there are no sinks."""
    with no_sinks():
        return coder(kv)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="path of the results, without suffix")
@click.option("--model", "path", type=click.Path(path_type=Path), help="another model than the reference")
@click.option("--text", type=click.Path(path_type=Path), help="what the other model is measured on")
@click.option("--contexts", default=3, show_default=True, help="test contexts of each task")
@click.option("--tokens", default=1024, show_default=True, help="tokens of a context, about")
@click.option("--samples", default=10, show_default=True, help="samples of each task that the profile is learnt from")
def main(out: Path, path: Path | None, text: Path | None, contexts: int, tokens: int, samples: int) -> None:
    """Bits with sinks and without."""
    if (path is None) != (text is None):
        raise click.UsageError("--model and --text go together")
    model = AutoModelForCausalLM.from_pretrained(path or MODEL_PATH, dtype=torch.float32)
    model.requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(path or MODEL_PATH)
    tests: dict[str, list[Test]]
    if text is None:
        mixed = [sample(tokenizer, task, CALIBRATION_SEED + n, tokens) for n in range(samples) for task in TASKS]
        tests = {task: [test_of(tokenizer, task, HELD_OUT_SEED + n, tokens) for n in range(contexts)] for task in TASKS}
    else:
        mixed, some = pieces(tokenizer, text.read_text(encoding="utf-8"), samples, contexts, tokens)
        tests = {text.stem: some}
    coders = {"klt": by_profiles(learnt(model, mixed)), "identity": by_steps("identity")}
    coders |= {f"{name}, without": partial(without, coder) for name, coder in coders.items()}
    with torch.no_grad():
        sinks = {
            task: [len(find_sinks(prefill(model, test.context)[0])) for test in some] for task, some in tests.items()
        }
    found = curves(model, coders, tests)
    lines = [
        "| codec | text | sinks | KL, nats | bits without | bits with | to without |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in ("klt", "identity"):
        for task in tests:
            for kl in KL:
                a, b = (bits_at(found[which][task], kl) for which in (f"{name}, without", name))
                each = ", ".join(map(str, sinks[task]))
                lines.append(f"| {name} | {task} | {each} | {kl} | {a:.3f} | {b:.3f} | {b / a:.3f} |")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    out.with_suffix(".json").write_text(json.dumps({"sinks": sinks, "curves": found}), encoding="utf-8")
    click.echo("\n".join(lines))


if __name__ == "__main__":
    main()
