"""Measure the gain of a basis learnt from the context itself, for models without a profile, on the reference model.

    python -m benchmarks.context_basis

Each context is coded in four ways, all with the same coder's tables (chosen from the context, a byte a channel) and no
sensitivities: with a step for each channel (about what transform="identity" does), with one step for each head, and in
the principal components of each head, keys as cached and turned back to position zero. The basis counts at 8 bits a
number. Bits per element at three divergences, means over the tasks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.rate_distortion import KV, Test, bits_at, compare, test_of
from eval.reference import HELD_OUT_SEED, MODEL_PATH, TASKS
from hf_cachegen.codec.fit import Counts
from hf_cachegen.codec.passes import NONE_WIDE, Symbols
from hf_cachegen.codec.profile import Rotary
from hf_cachegen.codec.tables import VALUE_SYMBOLS, ZERO_INDEX, shipped_codebooks
from hf_cachegen.profiles.learning import continuation_logits, find_rotary, prefill

THIRDS = (0.5, 1.0, 1.5)
"""The paper's factors on the steps of the first, middle and last third of the layers."""
FACTORS = [2.0 ** (k / 2) for k in range(-7, 3)]
DIVERGENCES = (0.1, 0.02, 0.005)
WAYS = ("a step for each channel", "a step for each head", "basis of each head", "basis of each head, rope undone")
COLUMN_BITS = 24
"""A table entry and a mean of 16 bits; steps for each channel take a byte more."""


def coded(x: Tensor, way: str, factor: float) -> tuple[float, Tensor]:
    """Return (bits, decoded) of a head's rows [tokens, dim]."""
    mean = x.mean(0)
    z, bits = x - mean, float(COLUMN_BITS * x.shape[1])
    basis = torch.eye(x.shape[1])
    if way.startswith("basis"):
        basis = torch.linalg.eigh(z.mT @ z)[1]
        unit = basis.abs().max() / 127
        basis, bits = (basis / unit).round() * unit, bits + 8 * basis.numel()
    y = torch.linalg.solve(basis, z.mT).mT
    step = factor * z.square().mean().sqrt()
    if way.endswith("channel"):
        step, bits = factor * z.square().mean(0).sqrt().clamp_min(1e-9), bits + 8 * x.shape[1]
    symbols = (y / step).round()
    index = (symbols + ZERO_INDEX).clamp(0, VALUE_SYMBOLS - 1).to(torch.uint8)
    counts, nothing = Counts(x.shape[1], 1), index.new_empty(0, *index.shape)
    counts.add(Symbols(index, NONE_WIDE, nothing, nothing))
    _, found = shipped_codebooks(11)[0].choose(counts.base)
    return bits + float(found.sum()), (symbols * step) @ basis.mT + mean


def decoded(kv: KV, rotary: Rotary, way: str, factor: float) -> tuple[float, KV]:
    """Return (bits per element, keys and values) of a context."""
    bits, elements, sides = 0.0, 0, ([], [])  # type: tuple[float, int, tuple[list[Tensor], list[Tensor]]]
    turned = way.endswith("undone")
    for kind, side in enumerate(kv):
        for layer, x in enumerate(side):
            rows, positions = x[0].transpose(0, 1), torch.arange(x.shape[2])
            rows = rotary.apply(rows, positions, -1) if turned and kind == 0 else rows
            heads = [coded(rows[:, head], way, factor * THIRDS[3 * layer // len(side)]) for head in range(x.shape[1])]
            back = torch.stack([found for _, found in heads], 1)
            back = rotary.apply(back, positions, 1) if turned and kind == 0 else back
            sides[kind].append(back.transpose(0, 1)[None].contiguous())
            bits, elements = bits + sum(found for found, _ in heads), elements + x.numel()
    return bits / elements, sides


@torch.no_grad()
def curve(model: torch.nn.Module, tests: Sequence[Test], rotary: Rotary, way: str) -> list[list[float]]:
    """Return [bits per element, KL] at each factor."""
    points = [[0.0, 0.0] for _ in FACTORS]
    for test in tests:
        keys, values, _ = prefill(model, test.context)
        exact = continuation_logits(model, keys, values, test.continuation).log_softmax(-1)
        for point, factor in zip(points, FACTORS, strict=True):
            bits, kv = decoded((keys, values), rotary, way, factor)
            lossy = continuation_logits(model, *kv, test.continuation).log_softmax(-1)
            point[0] += bits / len(tests)
            point[1] += compare(exact, lossy, test)[0] / len(tests)
    return points


@click.command()
@click.option("--tokens", multiple=True, type=int, default=(1024, 2048, 3600), show_default=True)
@click.option("--contexts", default=1, show_default=True, help="Contexts of each task.")
def main(tokens: tuple[int, ...], contexts: int) -> None:
    """Compare bits per element with and without a basis of the context."""
    model = AutoModelForCausalLM.from_pretrained(MODEL_PATH, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    view, rotary = Table("tokens", "coded", *(f"at KL {kl}" for kl in DIVERGENCES)), find_rotary(model)
    for length in tokens:
        tests = {task: [test_of(tokenizer, task, HELD_OUT_SEED + n, length) for n in range(contexts)] for task in TASKS}
        for way in WAYS:
            curves = [curve(model, some, rotary, way) for some in tests.values()]
            means = [sum(bits_at(points, kl) for points in curves) / len(curves) for kl in DIVERGENCES]
            view.add_row(str(length), way, *("-" if math.isnan(bits) else f"{bits:.2f}" for bits in means))
    Console(width=110).print(view)


if __name__ == "__main__":
    main()
