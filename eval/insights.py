"""The observations that CacheGen rests on (SIGCOMM 2024, section 5.1), and what each part of its encoder adds.

    python -m eval.insights --model MODEL --dataset wikitext:path=FILE,prefix=1024,suffix=128 --limit 10 --out PATH

- Token locality (figure 3): the variance of a channel's values, and of the differences of neighbouring tokens.
- Layer sensitivity (figure 4): the divergence after coarse rounding of one sixth of the layers.
- Entropy by grouping (figure 5): bits of a symbol where symbols that share a token, a layer, a channel, or a channel of
  a layer have a distribution of their own.
- The ladder (figure 15): quantisation alone, with entropy coding, with differences of tokens, with steps by layer.

Everything is computed from the exact caches of a model and a data set. The results are tables (Markdown) and all
figures (JSON). Means and intervals are over contexts (`eval.intervals`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from eval import datasets, intervals, surroundings
from eval.command import run_command
from eval.datasets.request import Request
from eval.divergence import kl, log_probabilities
from eval.examples import Example
from eval.models import load_model, load_tokenizer, token_ids
from hf_cachegen import CacheGenCache, CacheGenConfig, decode_kv, encode_kv

KV = tuple[list[Tensor], list[Tensor]]
Figures = dict[str, float]
SIXTHS = 6
SYMBOL_STEP = 0.5
"""Step of the symbols whose entropy is measured, in standard deviations of all values."""
LOSS_STEP = 2.0
"""Step of the rounding of a sixth of the layers, in standard deviations of each channel."""
PLAIN, BY_LAYER = (1.0, 1.0, 1.0), (0.5, 1.0, 1.5)


def matrices(kv: KV) -> list[list[Tensor]]:
    """Return K and V of all layers as float32 [tokens, channels]."""
    return [[x[0].float().permute(1, 0, 2).flatten(1) for x in side] for side in kv]


def locality(kv: KV) -> Figures:
    """Return, for K and V, the variance of values over that of differences of neighbouring tokens."""
    found = {}
    for name, side in zip(("K", "V"), matrices(kv), strict=True):
        values = sum(float(x.var(0).sum()) for x in side)
        differences = sum(float(x.diff(dim=0).square().mean(0).sum()) for x in side)
        found[name] = values / differences
    return found


def entropy(symbols: Tensor, groups: Tensor) -> float:
    """Return the bits of a symbol when each group has its own distribution, with the correction of Miller and Madow.

    Args:
        symbols: int64 [n].
        groups: int64 [n], the group of each symbol.
    """
    symbols = symbols - symbols.min()
    width = int(symbols.max()) + 1
    counts = torch.bincount(groups * width + symbols, minlength=int(groups.max() + 1) * width).view(-1, width).double()
    total = counts.sum(1, keepdim=True).clamp_min(1)
    share = counts / total
    bits = -(share * share.clamp_min(1e-300).log2()).sum(1)
    seen = (counts > 0).sum(1)
    bits += (seen - 1).clamp_min(0) / (2 * math.log(2) * total[:, 0])
    return float((bits * total[:, 0]).sum() / counts.sum())


def entropies(kv: KV) -> Figures:
    """Return the bits of a symbol for each way to group the symbols."""
    sums: dict[str, list[float]] = {}
    for side in matrices(kv):
        x = torch.stack(side)  # [layers, tokens, channels]
        layers, tokens, channels = x.shape
        symbols = (x / (SYMBOL_STEP * x.std())).round().long().flatten()
        layer = torch.arange(layers)[:, None, None].expand_as(x)
        token = torch.arange(tokens)[:, None].expand_as(x)
        channel = torch.arange(channels).expand_as(x)
        groups = {
            "one distribution": torch.zeros_like(layer),
            "by token": token,
            "by layer": layer,
            "by channel": channel,
            "by layer and channel": layer * channels + channel,
        }
        for name, group in groups.items():
            sums.setdefault(name, []).append(entropy(symbols, group.flatten()))
    return {name: sum(bits) / len(bits) for name, bits in sums.items()}


def sensitivities(kv: KV, judge: Callable[[KV], float]) -> Figures:
    """Return the divergence after rounding each sixth of the layers, nats per token."""
    layers = len(kv[0])
    found = {}
    for part in range(SIXTHS):
        first, last = part * layers // SIXTHS, (part + 1) * layers // SIXTHS
        lossy = tuple([_rounded(x) if first <= i < last else x for i, x in enumerate(side)] for side in kv)
        found[f"layers {first} to {last - 1}"] = judge((lossy[0], lossy[1]))
    return found


def _rounded(x: Tensor) -> Tensor:
    exact = x.float()
    mean, step = exact.mean(2, keepdim=True), LOSS_STEP * exact.std(2, keepdim=True).clamp_min(1e-9)
    return (((exact - mean) / step).round() * step + mean).to(x.dtype)


def ladder(kv: KV, judge: Callable[[KV], float]) -> Figures:
    """Return bits per element and divergence of each stage of the encoder."""
    found = {}
    elements = sum(x.numel() for side in kv for x in side)
    for name, transform, steps in (
        ("entropy coding", "identity", PLAIN),
        ("differences of tokens", "delta", PLAIN),
        ("steps by layer", "delta", BY_LAYER),
    ):
        config = CacheGenConfig(transform=transform, steps=steps, levels=2, protect_first=0, protect_last=0)
        encoded = encode_kv(*kv, config)
        decoded = decode_kv(encoded, 1)
        loss = judge((list(decoded[0]), list(decoded[1])))
        if name == "entropy coding":
            found["quantisation alone: bits"] = _fixed_bits(kv)
            found["quantisation alone: KL"] = loss
        found[f"{name}: bits"] = 8 * encoded.nbytes_at(1) / elements
        found[f"{name}: KL"] = loss
    return found


def _fixed_bits(kv: KV) -> float:
    """Return the bits of symbols of fixed length, where a step is a deviation: those that each channel needs."""
    bits = [
        (((x - x.mean(0)) / x.std(0).clamp_min(1e-9)).round().aminmax(dim=0)) for side in matrices(kv) for x in side
    ]
    return float(torch.cat([(most - least + 1).log2().ceil() for least, most in bits]).mean())


def measured(model: Any, tokenizer: Any, example: Example) -> Figures:
    """Return all figures of one context."""
    context = token_ids(tokenizer, example.context, start=True)
    cache = CacheGenCache.from_context(model, context, profile=None)
    kv = (list(cache.kv.keys), list(cache.kv.values))
    question = example.questions[0]
    after = torch.tensor([token_ids(tokenizer, question.text + (question.completion or ""), start=False)])
    exact = log_probabilities(model, *kv, after)

    def judge(lossy: KV) -> float:
        return kl(exact, log_probabilities(model, *lossy, after))

    parts = {
        "locality": locality(kv),
        "entropy": entropies(kv),
        "sensitivity": sensitivities(kv, judge),
        "ladder": ladder(kv, judge),
    }
    return {f"{part}/{name}": value for part, found in parts.items() for name, value in found.items()}


TITLES = {
    "locality": "Variance of values / of differences of neighbouring tokens (figure 3; the paper: 2.4 to 2.9)",
    "sensitivity": f"KL in nats per token after rounding to {LOSS_STEP:g} deviations (figure 4)",
    "entropy": f"Bits of a symbol of {SYMBOL_STEP:g} deviations by grouping (figure 5)",
    "ladder": "What each part of the encoder adds (figure 15)",
}


def tables(found: Sequence[Figures]) -> str:
    """Format means and intervals as Markdown."""
    lines: list[str] = []
    for part, title in TITLES.items():
        lines += [f"{title}:", "", "| | mean |", "|---|---:|"]
        for key in (key for key in found[0] if key.startswith(f"{part}/")):
            values = np.array([figures[key] for figures in found])
            ends = intervals.interval(values, np.ones(len(values)))
            shown = "" if ends is None else f" [{ends[0]:.3g}, {ends[1]:.3g}]"
            lines.append(f"| {key.partition('/')[2]} | {values.mean():.3g}{shown} |")
        lines.append("")
    return "\n".join(lines)


@click.command()
@click.option("--model", "name", required=True, help="Folder or Hub id of the model.")
@click.option("--dataset", required=True, help="Data set as for `python -m eval run`; its first question is judged.")
@click.option("--limit", default=10, show_default=True, help="Number of contexts.")
@click.option("--dtype", default="auto", show_default=True, help="Dtype of the model.")
@click.option("--device", help="Device of the model.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Path of the results, without suffix.")
def main(name: str, dataset: str, limit: int, dtype: str, device: str | None, out: Path) -> None:
    """Measure the observations of section 5.1 of the paper."""
    tokenizer = load_tokenizer(name)
    data = datasets.load(dataset, Request(tokenizer, limit))
    model = load_model(name, dtype=dtype, device=device)
    found = [measured(model, tokenizer, example) for example in tqdm(data.examples, "contexts")]
    text = tables(found)
    print(text)
    out.parent.mkdir(parents=True, exist_ok=True)
    session = surroundings.session(1)
    about = f"{name}, {data.name}, {len(found)} contexts; {session['processor']}; brackets: 95 %, {intervals.METHOD}."
    out.with_suffix(".md").write_text(f"# Observations\n\n{about}\n\n{text}")
    record = {"dataset": {"name": data.name, "source": data.source}, "session": session, "contexts": found}
    out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main, "eval.insights")
