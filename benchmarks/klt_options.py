"""What each choice of the klt transform is worth: bits per element at one divergence.

    python -m benchmarks.klt_options --out docs/results/klt_options
    python -m benchmarks.klt_options --model MODEL --text TEXT --out docs/results/klt_options_other

Each variant changes one option of `learn_profile` or of the encoder, or does in its place what the encoder does not.
Bits are read off the variant's curve at the target divergence, by task and on average; the last column is the ratio to
the default. On the reference model "left out" rows learn from the two other tasks, and are measured on the one that was
left out. Another model is measured on a text of which it sees one part as samples and another as tests.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import click
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.rate_distortion import (
    KV,
    Point,
    Test,
    as_released,
    bits_at,
    by_bits,
    by_steps,
    curves,
    learnt,
    learnt_pca,
    levels_of,
    test_of,
)
from eval.reference import CALIBRATION_SEED, HELD_OUT_SEED, MODEL_PATH, TASKS, sample
from hf_cachegen import CacheGenConfig, Profile
from hf_cachegen.calibration import Sample, learning, moments
from hf_cachegen.codec import fit
from hf_cachegen.codec.klt import KltCodec
from hf_cachegen.codec.tables import Codebook, shipped_codebooks

BASE = CacheGenConfig(transform="klt", measure=False)
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
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
DEAD_ZONES = (0.05, 0.1)
"""Parts of the finest step by which a coefficient is moved towards zero before it is rounded."""
LAMBDAS = (0.05, 0.1)
"""Of rate-distortion optimised rounding: squared steps a bit is worth; at a high rate 0.115."""
TABLES = (16, 32, 64)
"""Entries of a codebook that is a part of the shipped one."""

Coder = Callable[[KV], list[Point]]


def with_config(profiles: list[Profile], config: CacheGenConfig = BASE) -> Coder:
    """The profiles, coded with these options of the encoder."""
    return lambda kv: [point for profile in profiles for point in levels_of(kv, config, profile)]


def within(context: Callable[[], Any], coder: Coder) -> Coder:
    """The coder, with something in it replaced."""

    def coded(kv: KV) -> list[Point]:
        with context():
            return coder(kv)

    return coded


@contextmanager
def heads_apart() -> Iterator[None]:
    """Learning sees no correlation between heads, and so finds a basis for each."""
    groups = moments.Moments.groups

    def masked(self: moments.Moments, floor: float) -> Any:
        kept = self.squares
        self.squares = []
        for square, (kind, first, count) in zip(kept, self.places, strict=True):
            layers = range(first, first + count)
            mean = torch.cat([self.sums[kind][layer] for layer in layers]) / self.count
            outer = torch.outer(mean, mean) * self.count
            blocks = [torch.ones(d, d) for layer in layers for h, d in [self.shapes[kind][layer]] for _ in range(h)]
            self.squares.append((square - outer) * torch.block_diag(*blocks) + outer)
        try:
            return groups(self, floor)
        finally:
            self.squares = kept

    with mock.patch.object(moments.Moments, "groups", masked):
        yield


@contextmanager
def coefficients_changed(change: Callable[[KltCodec, Tensor], Tensor]) -> Iterator[None]:
    """Coefficients are changed before they are rounded."""
    checked = KltCodec.checked
    with mock.patch.object(KltCodec, "checked", lambda self, rows, span: change(self, checked(self, rows, span))):
        yield


def dead_zone(width: float, codec: KltCodec, y: Tensor) -> Tensor:
    """Coefficients that much of a step nearer to zero."""
    return y.sign() * (y.abs() - width * codec.inner.steps).clamp_min(0)


def optimised(worth: float, codec: KltCodec, y: Tensor) -> Tensor:
    """The multiple of the step, nearest to y or next to that towards zero, of the least squared error and worth x bits
    (those of the base and its digits together, estimated from the base's table at the finest step).
    """
    x = y / codec.inner.steps
    near = x.round()
    less = near - near.sign()
    scale = 3.0 ** (codec.config.levels - 1)
    cost = codec.inner.values.cost.float()[codec.entries[0].long()] / 256

    def bits(symbols: Tensor) -> Tensor:  # between the base's symbols, straight
        coarse = (symbols / scale).clamp(-127, 126)
        low = coarse.floor()
        share, index = coarse - low, (low + 128).long().mT
        return torch.lerp(cost.gather(1, index), cost.gather(1, index + 1), share.mT).mT

    better = (x - less).square() + worth * bits(less) < (x - near).square() + worth * bits(near)
    return torch.where(better, less, near) * codec.inner.steps


@contextmanager
def fewer_tables(count: int) -> Iterator[None]:
    """Contexts choose among `count` tables, evenly from the shipped ones."""
    choose = Codebook.choose

    def some(self: Codebook, histograms: Tensor) -> tuple[Tensor, Tensor]:
        kept = torch.linspace(1, self.entries - 1, count - 1).round().long()
        allowed = torch.zeros(self.entries, dtype=torch.bool)
        allowed[0] = allowed[kept] = True
        cost = self.cost
        self.__dict__["cost"] = cost.masked_fill(~allowed[:, None], 1e12)
        try:
            return choose(self, histograms)
        finally:
            self.__dict__["cost"] = cost

    with mock.patch.object(Codebook, "choose", some):
        yield


def retabled(model: Any, samples: list[Sample], profile: Profile) -> Profile:
    """The profile's basis and step with tables chosen anew."""
    values, digits = shipped_codebooks(BASE.prob_bits)
    counts = fit.Counts(len(profile.base_entries), profile.levels)
    for context, _ in samples:
        rows, codec = learning._coded(model, profile, context, BASE)
        y = codec.basis.coefficients(rows, learning.Span(0, len(rows), len(rows)))
        counts.add(codec.inner.symbols(y)[0])
    entries, _ = counts.choose(values, digits)
    return replace(profile, base_entries=entries[0], refine_entries=entries[1:])


def pieces(tokenizer: Any, text: str, samples: int, tests: int, tokens: int) -> tuple[list[Sample], list[Test]]:
    """Samples from the text's first 80 %, tests from its last 20 %, each a context and the 128 tokens after it."""
    ids = tokenizer(text, return_tensors="pt").input_ids
    edge, whole = int(0.8 * ids.shape[1]), tokens + 128
    starts = torch.linspace(0, edge - whole, samples).long().tolist()
    others = torch.linspace(edge, ids.shape[1] - whole, tests).long().tolist()
    cut = [(ids[:, at : at + tokens], ids[:, at + tokens : at + whole]) for at in starts + others]
    return cut[:samples], [Test(context, continuation, []) for context, continuation in cut[samples:]]


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="path of the results, without suffix")
@click.option("--model", "path", type=click.Path(path_type=Path), help="another model than the reference")
@click.option("--text", type=click.Path(path_type=Path), help="what the other model is measured on")
@click.option("--contexts", default=3, show_default=True, help="test contexts of each task")
@click.option("--tokens", default=1024, show_default=True, help="tokens of a context, about")
@click.option("--samples", default=12, show_default=True, help="samples of each task that profiles are learnt from")
@click.option("--kl", default=0.005, show_default=True, help="divergence, nats per token, at which bits are compared")
@click.option("--only", multiple=True, help="these options alone, and the default")
def main(
    out: Path, path: Path | None, text: Path | None, contexts: int, tokens: int, samples: int, kl: float,
    only: tuple[str, ...],
) -> None:  # fmt: skip
    """What each choice is worth."""
    torch.manual_seed(0)
    if (path is None) != (text is None):
        raise click.UsageError("--model and --text go together")
    model = AutoModelForCausalLM.from_pretrained(path or MODEL_PATH, dtype=torch.float32)
    model.requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(path or MODEL_PATH)

    def mix(tasks: tuple[str, ...]) -> list[Sample]:
        return [sample(tokenizer, task, CALIBRATION_SEED + n, tokens) for n in range(samples) for task in tasks]

    if text is None:
        mixed = mix(TASKS)
        tests = {task: [test_of(tokenizer, task, HELD_OUT_SEED + n, tokens) for n in range(contexts)] for task in TASKS}
    else:
        mixed, some = pieces(tokenizer, text.read_text(encoding="utf-8"), samples, contexts, tokens)
        tests = {text.stem: some}
    learners: dict[str, Callable[[], Coder]] = {
        name: lambda options=options: with_config(learnt(model, mixed, **options))  # type: ignore[misc]
        for name, options in OPTIONS.items()
    }
    default: list[Profile] = []

    def usual() -> list[Profile]:
        default[:] = default or learnt(model, mixed)
        return default

    learners["default"] = lambda: with_config(usual())
    for name, options in ENCODER.items():
        learners[name] = lambda options=options: with_config(usual(), replace(BASE, **options))  # type: ignore[misc]
    for width in DEAD_ZONES:
        change = partial(coefficients_changed, partial(dead_zone, width))
        learners[f"dead zone {width}"] = lambda change=change: within(change, with_config(usual()))  # type: ignore[misc]
    for worth in LAMBDAS:
        change = partial(coefficients_changed, partial(optimised, worth))
        learners[f"optimised rounding {worth}"] = lambda change=change: within(  # type: ignore[misc]
            change, with_config(usual())
        )

    def apart() -> Coder:
        with heads_apart():
            return with_config(learnt(model, mixed))

    def few(count: int) -> Coder:
        with fewer_tables(count):
            profiles = [retabled(model, mixed, profile) for profile in usual()]
        return within(partial(fewer_tables, count), with_config(profiles))

    learners["a basis for each head"] = apart
    learners |= {name: partial(by_steps, name) for name in ("identity", "delta")}
    learners |= {"uniform": lambda: by_bits, "CacheGen as released": lambda: as_released}
    learners["PCA per layer"] = lambda: with_config(learnt_pca(model, mixed))
    for count in TABLES:
        learners[f"{count} tables"] = partial(few, count)
    if text is None:
        for task in TASKS:
            rest = mix(tuple(other for other in TASKS if other != task))
            learners[f"{task} left out"] = lambda rest=rest: with_config(learnt(model, rest))  # type: ignore[misc]
            learners[f"{task} left out, PCA per layer"] = lambda rest=rest: with_config(  # type: ignore[misc]
                learnt_pca(model, rest)
            )
    wanted = [name for name in learners if not only or name == "default" or name in only]
    rows: dict[str, dict[str, float]] = {}
    for name in wanted:
        shown = {name.split()[0]: tests[name.split()[0]]} if "left out" in name else tests
        curve = curves(model, {name: learners[name]()}, shown)[name]
        rows[name] = {task: bits_at(points, kl) for task, points in curve.items()}
        print(name, rows[name], flush=True)
    write(out, rows, list(tests), kl)


def write(out: Path, rows: dict[str, dict[str, float]], tasks: list[str], kl: float) -> None:
    """The table, and the numbers as JSON."""
    lines = [f"| option | {' | '.join(tasks)} | mean | to default |", "|---" * (len(tasks) + 3) + "|"]
    for name, bits in rows.items():
        cells = " | ".join(f"{bits[task]:.3f}" if task in bits else "" for task in tasks)
        usual = sum(rows["default"][task] for task in bits)
        lines.append(f"| {name} | {cells} | {sum(bits.values()) / len(bits):.3f} | {sum(bits.values()) / usual:.2f} |")
    text = "\n".join(lines) + "\n"
    print(text)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text(text)
    out.with_suffix(".json").write_text(json.dumps({"kl": kl, "bits": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
