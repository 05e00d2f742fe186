"""Where the time of learning a profile goes, beside a prefill of the same tokens in the same run.

    python -m benchmarks.learning --model MODEL --text FILE [--samples 40] [--layers 0,2,5] \
        [--out benchmarks/results/learning.json]

Times are CPU seconds of all threads, which other programs on the machine change less than the time on a clock. The
ratio is that of all learning to a prefill of the contexts of all samples. Stages: `prefill` (of samples, whichever
stage asks), `gradients`, `sums` (of products), `bases` (of the profile without a chain), `step` (the search), `chain`
(maps and bases of a chain, those of the predictors too), `regression` (on hidden states), `tables`, `measure`,
`journal`; each without the stages inside it.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_cachegen import learn_profile
from hf_cachegen.cli.samples import draw, from_text
from hf_cachegen.profiles.learning import chaining, exact, journal, learning, moments, predictor

CONTINUATION_TOKENS = 128
TIMED = (
    ("prefill", exact, "prefill"),
    ("gradients", moments, "gradients"),
    ("sums", moments.Sums, "add"),
    ("bases", moments.Moments, "groups"),
    ("step", learning._Learning, "_step"),
    ("chain", chaining, "chained"),
    ("regression", predictor, "regressions"),
    ("tables", learning._Learning, "_entries"),
    ("measure", learning.Measured, "of"),
    ("journal", journal.Journal, "_write"),
)
"""(stage, owner, name) of the functions whose time is measured."""


class Clock:
    """CPU seconds and calls of each stage, without the stages inside it."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys([stage for stage, _, _ in TIMED], 0.0)
        self.calls = dict.fromkeys(self.seconds, 0)
        self._inner = [0.0]

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function of a stage."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            start = time.process_time()
            found = function(*args, **kwargs)
            found = list(found) if stage == "gradients" else found  # a generator: compute all of it here
            spent = time.process_time() - start
            self.seconds[stage] += spent - self._inner.pop()
            self._inner[-1] += spent
            self.calls[stage] += 1
            return found

        return wrapped


def main() -> None:
    """Learn a profile and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--context-tokens", type=int, default=1024)
    parser.add_argument("--layers", default="", help="Values of predict_layers, separated by commas.")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    cut = from_text(tokenizer, args.text.read_text(encoding="utf-8"), args.context_tokens, CONTINUATION_TOKENS)
    samples = [tuple(torch.tensor([ids]) for ids in sample) for sample in draw([cut], args.samples, 0)]
    start = time.process_time()
    for context, _ in samples[:2]:
        exact.prefill(model, context)
    one = (time.process_time() - start) / 2
    clock, layers = Clock(), [int(layer) for layer in args.layers.split(",") if layer]
    with ExitStack() as stack:
        folder = stack.enter_context(TemporaryDirectory())
        for stage, owner, name in TIMED:
            stack.enter_context(mock.patch.object(owner, name, clock.timed(stage, getattr(owner, name))))
        start, wall = time.process_time(), time.perf_counter()
        profile = learn_profile(model, samples, predict_layers=layers, journal=Path(folder) / "journal")
        total, wall = time.process_time() - start, time.perf_counter() - wall
    found = {
        "model": args.model, "samples": len(samples), "context_tokens": args.context_tokens, "predict_layers": layers,
        "hardware": _hardware(), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "cpu_seconds": round(total, 1), "seconds": round(wall, 1),
        "prefill_seconds": round(one, 2), "ratio": round(total / (one * len(samples)), 2),
        "stages": {stage: {"cpu_seconds": round(spent, 1), "calls": clock.calls[stage]}
                   for stage, spent in clock.seconds.items()},
        "measured": profile.about["measured"],
    }  # fmt: skip
    print(f"{len(samples)} samples: {total:.1f} CPU s, {wall:.1f} s; one prefill {one:.2f} CPU s")
    for stage, spent in clock.seconds.items():
        print(f"  {stage:10} {spent:8.1f} CPU s  {100 * spent / total:5.1f} %  {clock.calls[stage]:4} calls")
    print(f"  {found['ratio']} times a prefill of all contexts")
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def _hardware() -> str:
    """Return the name of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] \
        if cpuinfo.exists() else []
    return f"{len(names)} x {names[0]}" if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
