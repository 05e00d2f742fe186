"""Measure bits per element against divergence, for every codec, on the reference model.

    python -m benchmarks.rate_distortion --out docs/results/rate_distortion

Every codec codes the same contexts of three tasks at several rates. Bits count everything a user would store (for klt
the profile, which is one file for a model whatever the number of contexts, is stated beside and not added). Divergence
is KL, exact against decoded cache, in nats per token of the questions and right answers that follow; "same token" is
how often both caches' likeliest token is the same; "answers" is the share of answers whose every token is the likeliest
one after those before it. The profile is learnt from documents that the test does not contain; `--leave-out TASK` keeps
a whole task from it. Writes two tables (Markdown), the points (JSON) and the plot (PNG, SVG).
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import click
import matplotlib
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval import uniform
from eval.baselines import released
from eval.reference import CALIBRATION_SEED, HELD_OUT_SEED, MODEL_PATH, TASKS, document, sample
from hf_cachegen import CacheGenConfig, Profile, decode_kv, encode_kv, learn_profile
from hf_cachegen.codec import rows
from hf_cachegen.profiles.learning import Sample, continuation_logits, measuring, moments, prefill

matplotlib.use("Agg")
from matplotlib import pyplot

KV = tuple[Sequence[Tensor], Sequence[Tensor]]
Point = tuple[float, KV]
"""(bits per element, decoded keys and values)."""
SCALES = (0.35, 0.6, 1.0, 1.7, 3.0)
"""Factors on the steps of the transforms that need no profile."""
LEVELS = {2: "level 3", 1: "level 2", 0: "level 1"}
SHOWN = {
    "uniform": {"exact": 0, "float16": 1, "uniform 8-bit": 2, "uniform 4-bit": 5, "uniform 3-bit": 6},
    "CacheGen as released": {"CacheGen as released": 1},
    **{
        name: {f"{name}, {level}": index + offset for index, level in LEVELS.items()}
        for name, offset in (("delta", 6), ("identity", 6), ("PCA per layer", 0), ("klt", 0))
    },
}
"""Points by codec: defaults are the third of SCALES; a profile's own step is the first."""
PCA_FLOOR = 99.0
"""Lower bound on sensitivities, in units of their mean, that makes them equal, so that klt is plain PCA."""


STEP_CODES = (8, 3, -2, -8)
"""Added to a profile's step code (a quarter of an octave each), for a curve: tables are then each context's own."""


class Test(NamedTuple):
    """A context and its continuation, int64 [1, tokens], and the positions of each answer's tokens in it."""

    context: Tensor
    continuation: Tensor
    answers: list[list[int]]


@contextmanager
def no_sinks() -> Iterator[None]:
    """Disable the detection of sinks in learning and encoding."""
    none = {"return_value": torch.empty(0, dtype=torch.int64)}
    with mock.patch.object(measuring, "find_sinks", **none), mock.patch.object(rows, "find_sinks", **none):
        yield


def test_of(tokenizer: Any, task: str, seed: int, tokens: int) -> Test:
    """Return a sample as `eval.reference.sample` does, with the positions of the answers."""
    made, after, spans = document(task, seed, tokens), "", []
    for question in made.questions:
        start = len(after) + len(question.prompt) + question.completion.rindex(question.answer)
        spans.append((start, start + len(question.answer)))
        after += question.prompt + question.completion
    found = tokenizer(after, return_offsets_mapping=True)
    answers = [
        [index for index, (first, last) in enumerate(found.offset_mapping) if first < end and last > begin]
        for begin, end in spans
    ]
    context = tokenizer(made.text, return_tensors="pt").input_ids
    return Test(context, torch.tensor([found.input_ids]), answers)


def learnt(model: Any, samples: Sequence[Sample], **options: Any) -> list[Profile]:
    """Return a profile, and the same at other steps, for a longer curve."""
    profile = learn_profile(model, samples, **options)
    return [profile, *(replace(profile, step_code=profile.step_code + more) for more in STEP_CODES)]


def learnt_pca(model: Any, samples: Sequence[Sample]) -> list[Profile]:
    """Learn plain principal components of each layer's keys (as cached) and values."""
    with mock.patch.object(moments, "LEAST_SENSITIVITY", PCA_FLOOR):
        return learnt(model, samples, floor=1e-3, group_layers=1, undo_rotation=False)


def by_steps(transform: str) -> Callable[[KV], list[Point]]:
    """Return a codec of delta or identity at several steps, every level of each."""

    def codec(kv: KV) -> list[Point]:
        points = []
        for scale in SCALES:
            steps = tuple(scale * step for step in (0.5, 1.0, 1.5))
            config = CacheGenConfig(transform=transform, steps=steps, measure=False)  # type: ignore[arg-type]
            points += levels_of(kv, config, None)
        return points

    return codec


def by_profiles(profiles: Sequence[Profile]) -> Callable[[KV], list[Point]]:
    """Return a codec of klt with each of these profiles, every level of each."""
    config = CacheGenConfig(transform="klt", measure=False)
    return lambda kv: [point for profile in profiles for point in levels_of(kv, config, profile)]


def levels_of(kv: KV, config: CacheGenConfig, profile: Profile | None) -> list[Point]:
    """Return the points of every level of one encoding."""
    encoded = encode_kv(*kv, config, profile)
    elements = encoded.geometry.elements
    return [
        (8 * encoded.nbytes_at(level) / elements, decode_kv(encoded, level)) for level in range(1, encoded.levels + 1)
    ]


def by_bits(kv: KV) -> list[Point]:
    """Return the points of uniform quantisation at several widths."""
    width = kv[0][0].shape[-1]
    return [(8.0 * kv[0][0].dtype.itemsize, kv), (16.0, half(kv))] + [
        (
            uniform.bits_per_element(bits, width),
            ([uniform.quantise(x, bits) for x in kv[0]], [uniform.quantise(x, bits) for x in kv[1]]),
        )
        for bits in (8, 6, 5, 4, 3, 2)
    ]


def half(kv: KV) -> KV:
    """Return a cache after rounding to float16."""
    keys, values = ([x.half().to(x.dtype) for x in side] for side in kv)
    return keys, values


def as_released(kv: KV) -> list[Point]:
    """Return the paper's artifact at its three quantisation levels, the finest first; the second is its default."""
    elements = sum(x.numel() for side in kv for x in side)
    return [
        (stored.bits / elements, (stored.keys, stored.values)) for stored in released.cachegen(*kv, table_tokens=None)
    ]


Curve = dict[str, list[list[float]]]
"""Task to points [bits per element, KL, same token, answers], means over the contexts, in the order of the codec."""


@torch.no_grad()
def curves(
    model: Any, codecs: dict[str, Callable[[KV], list[Point]]], tests: dict[str, list[Test]]
) -> dict[str, Curve]:
    """Measure every codec on every test context."""
    found: dict[str, Curve] = {name: defaultdict(list) for name in codecs}
    work = [(task, s) for task, samples in tests.items() for s in samples]
    for task, test in tqdm(work, "contexts"):
        keys, values, _ = prefill(model, test.context)
        exact = continuation_logits(model, keys, values, test.continuation).log_softmax(-1)
        for name, codec in codecs.items():
            for index, (bits, kv) in enumerate(codec((keys, values))):
                lossy = continuation_logits(model, *kv, test.continuation).log_softmax(-1)
                points = found[name][task]
                if index == len(points):
                    points.append([0.0] * 4)
                for field, value in enumerate((bits, *compare(exact, lossy, test))):
                    points[index][field] += value / len(tests[task])
    return found


def compare(exact: Tensor, lossy: Tensor, test: Test) -> tuple[float, float, float]:
    """Return (KL, share of same likeliest tokens, share of right answers) of log-probabilities [tokens, vocabulary]."""
    kl = float((exact.exp() * (exact - lossy)).sum(-1).mean())
    likeliest = lossy.argmax(-1)
    right = likeliest[:-1] == test.continuation[0, 1:]  # token i + 1 is what follows token i
    answers = [bool(right[[position - 1 for position in positions]].all()) for positions in test.answers]
    return kl, float((likeliest == exact.argmax(-1)).float().mean()), sum(answers) / max(1, len(answers))


def bits_at(points: Sequence[Sequence[float]], kl: float) -> float:
    """Return the bits at a divergence, interpolated in log KL between points of the lower hull; NaN beyond them."""
    hull: list[Sequence[float]] = []
    for bits, found, *_ in sorted(map(list, points)):
        if not hull or found < hull[-1][1]:
            hull.append((bits, found))
    for (low, more), (high, less) in pairwise(hull):
        if less <= kl <= more:
            share = (math.log(more) - math.log(kl)) / (math.log(more) - math.log(less))
            return low + share * (high - low)
    return math.nan


def table(found: dict[str, Curve], targets: dict[str, float]) -> str:
    """Return bits per element of each codec at each task's target divergence."""
    lines = ["| codec | " + " | ".join(f"{task}, KL {kl:.4f}" for task, kl in targets.items()) + " | mean | to klt |"]
    lines.append("|---" * (len(targets) + 3) + "|")
    rows = {name: [bits_at(curve[task], kl) for task, kl in targets.items()] for name, curve in found.items()}
    best = sum(rows["klt"]) / len(targets)
    for name, bits in rows.items():
        mean = sum(bits) / len(bits)
        cells = " | ".join("-" if math.isnan(b) else f"{b:.2f}" for b in (*bits, mean))
        lines.append(f"| {name} | {cells} | {'-' if math.isnan(mean) else f'{mean / best:.1f}'} |")
    return "\n".join(lines) + "\n"


def operating_points(found: dict[str, Curve]) -> str:
    """Return each codec at its authors' or default settings: means over the tasks."""
    lines = ["| codec | bits per element | KL, nats per token | same token | answers |", "|---|---:|---:|---:|---:|"]
    for name, points in SHOWN.items():
        for label, index in points.items():
            rows = [curve[index] for curve in found[name].values()]
            bits, kl, same, answers = (sum(values) / len(rows) for values in zip(*rows, strict=True))
            lines.append(f"| {label} | {bits:.2f} | {kl:.4f} | {same:.1%} | {answers:.1%} |")
    return "\n".join(lines) + "\n"


def plot(found: dict[str, Curve], out: Path) -> None:
    """Plot one panel for each task; PNG and SVG."""
    tasks = list(next(iter(found.values())))
    figure, axes = pyplot.subplots(1, len(tasks), figsize=(4.2 * len(tasks), 4), sharey=True)
    for axis, task in zip(axes, tasks, strict=True):
        for name, curve in found.items():
            points = sorted(curve[task])
            axis.plot([p[0] for p in points], [max(p[1], 1e-7) for p in points], marker="o", markersize=3, label=name)
        axis.set(title=task, xlabel="bits per element, everything counted", yscale="log", xlim=(0, 9), ylim=(1e-5, 10))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("KL, nats per token")
    axes[-1].legend(fontsize=8)
    figure.tight_layout()
    for suffix in (".png", ".svg"):
        figure.savefig(out.with_suffix(suffix), dpi=110)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Path of the results, without suffix.")
@click.option("--contexts", default=4, show_default=True, help="Test contexts of each task.")
@click.option("--tokens", default=1024, show_default=True, help="Approximate length of a context in tokens.")
@click.option("--samples", default=20, show_default=True, help="Samples of each task to learn the profile from.")
@click.option("--leave-out", type=click.Choice(TASKS), help="Task that the profile does not see.")
def main(out: Path, contexts: int, tokens: int, samples: int, leave_out: str | None) -> None:
    """Measure bits per element against divergence."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(MODEL_PATH, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    seen = [task for task in TASKS if task != leave_out]
    mix = [sample(tokenizer, task, CALIBRATION_SEED + n, tokens) for n in range(samples) for task in seen]
    tests = {task: [test_of(tokenizer, task, HELD_OUT_SEED + n, tokens) for n in range(contexts)] for task in TASKS}
    codecs = {
        "uniform": by_bits,
        "CacheGen as released": as_released,
        "delta": by_steps("delta"),
        "identity": by_steps("identity"),
        "PCA per layer": by_profiles(learnt_pca(model, mix)),
        "klt per layer, keys as cached": by_profiles(learnt(model, mix, group_layers=1, undo_rotation=False)),
        "klt per layer": by_profiles(learnt(model, mix, group_layers=1)),
        "klt": by_profiles(learnt(model, mix)),
    }
    found = curves(model, codecs, tests)
    targets = {task: found["CacheGen as released"][task][1][1] for task in TASKS}
    text = table(found, targets) + "\n" + operating_points(found)
    print(text)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text(text)
    out.with_suffix(".json").write_text(json.dumps({"targets": targets, "curves": found}, indent=1) + "\n")
    plot(found, out)


if __name__ == "__main__":
    main()
