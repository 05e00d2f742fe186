"""Token dropping, alone and together with coding (figures 10 and 18 of the paper).

    python -m eval.dropping --model MODEL --dataset NAME --limit 6 --out PATH

Two ways choose the tokens that a cache keeps, after H2O (arXiv 2306.14048) and SnapKV (arXiv 2404.14469):

- h2o: half of the kept tokens received the most attention from all tokens after them, half are the most recent ones;
- snapkv: those that the last WINDOW tokens of the context attend to most, smoothed over POOL neighbours, and these.

Both papers choose tokens for each layer and head. Here all layers keep the same tokens, by the mean of their scores, so
that a transform over several layers still finds them together. Kept keys stay at their positions. For a codec whose
basis is without rotation they are moved to consecutive positions, coded, and moved back.

Bits are per element of the *whole* cache, so rows compare at equal size. A position costs 16 bits. Means and intervals
are over contexts (`eval.intervals`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d
from tqdm import tqdm
from transformers import DynamicCache

from eval import datasets, intervals, surroundings
from eval.baselines.joint import find_rotation, rotated
from eval.baselines.released import cachegen
from eval.command import run_command
from eval.datasets.request import Request
from eval.divergence import kl
from eval.examples import Example
from eval.models import CACHE_ARGUMENT, find_profile, load_model, load_tokenizer, token_ids
from hf_cachegen import CacheGenConfig, Profile, decode_kv, encode_kv

WAYS = ("h2o", "snapkv")
SHARES = (1.0, 0.5, 0.25, 0.125)
"""Shares of the tokens that are kept."""
WINDOW, POOL = 32, 7
"""SnapKV's observation window and kernel, in tokens."""
POSITION_BITS = 16
EXACT_BITS = 16
RELEASED_LEVEL = 2
KV = tuple[list[Tensor], list[Tensor]]
Row = dict[str, Any]


@torch.no_grad()
def attention(model: Any, ids: Tensor) -> tuple[KV, Tensor]:
    """Return the cache of a context, and how much each token attends to each, float32 [tokens, tokens], rows sum to 1.

    Args:
        model: a causal language model with eager attention.
        ids: int64 [1, tokens].
    """
    past = DynamicCache()
    found = model(input_ids=ids, output_attentions=True, return_dict=True, **{CACHE_ARGUMENT: past}).attentions
    mean = sum(part[0].float().mean(0) for part in found) / len(found)
    return ([layer.keys for layer in past.layers], [layer.values for layer in past.layers]), mean


def kept(weights: Tensor, way: str, share: float) -> Tensor:
    """Return the positions of the tokens to keep, ascending.

    Args:
        weights: float32 [tokens, tokens], the attention of each token (rows) to each.
        way: one of WAYS.
        share: share of the tokens.
    """
    tokens = len(weights)
    count = max(1, round(share * tokens))
    if way == "h2o":
        recent, scores = count - count // 2, weights.sum(0)
    else:
        recent = min(count, WINDOW)
        scores = avg_pool1d(weights[-WINDOW:].mean(0)[None], POOL, 1, POOL // 2, count_include_pad=False)[0]
    scores = scores.clone()
    scores[tokens - recent :] = torch.inf
    return scores.topk(count).indices.sort().values


def coded(part: KV, where: Tensor, inv_freq: Tensor, profile: Profile | None) -> Iterator[tuple[str, KV, float]]:
    """Yield (name, decoded keys and values, bits) of the kept tokens under each codec.

    Args:
        part: per layer [1, heads, kept tokens, head_dim].
        where: [kept tokens], their positions.
        inv_freq: the model's rotation.
        profile: the model's profile; None leaves klt out.
    """
    yield "exact", part, float(EXACT_BITS * sum(x.numel() for side in part for x in side))
    keys, values = ([x.float() for x in side] for side in part)
    for stored in cachegen(keys, values, None):
        if stored.level == RELEASED_LEVEL:
            yield f"CacheGen artifact, level {stored.level}", (stored.keys, stored.values), stored.bits
    if profile is None:
        return
    moved = [rotated(rotated(x, inv_freq, -1, where), inv_freq, 1) for x in keys]
    config = CacheGenConfig(transform="klt", levels=profile.levels, predict_layers=None, measure=False)
    encoded = encode_kv(moved, values, config, profile)
    for level in range(encoded.levels, 0, -1):
        k, v = decode_kv(encoded, level)
        back = [rotated(rotated(x.float(), inv_freq, -1), inv_freq, 1, where) for x in k]
        yield f"klt, level {level}", (back, list(v)), 8.0 * encoded.nbytes_at(level)


@torch.no_grad()
def log_probabilities(model: Any, kv: KV, ids: Tensor, first: int) -> Tensor:
    """Return the log-probabilities after each of `ids`, which start at position `first`, float32 [n, vocabulary]."""
    past = DynamicCache()
    for layer, (k, v) in enumerate(zip(*kv, strict=True)):
        past.update(k.to(model.dtype), v.to(model.dtype), layer)
    positions = torch.arange(first, first + ids.shape[1])[None]
    logits: Tensor = model(input_ids=ids, position_ids=positions, **{CACHE_ARGUMENT: past}).logits[0]
    return logits.float().log_softmax(-1)


def measured(model: Any, tokenizer: Any, example: Example, inv_freq: Tensor, profile: Profile | None) -> list[Row]:
    """Return one row for each way, share and codec: way, share, codec, bits per element of the whole cache, kl."""
    context = token_ids(tokenizer, example.context, start=True)
    whole, weights = attention(model, torch.tensor([context]))
    tokens, elements = len(context), sum(x.numel() for side in whole for x in side)
    question = [(q.text, q.completion or "") for q in example.questions]
    after = [torch.tensor([token_ids(tokenizer, text + rest, start=False)]) for text, rest in question]
    exact = [log_probabilities(model, whole, ids, tokens) for ids in after]
    rows: list[Row] = []
    for way in WAYS:
        for share in SHARES:
            if share == 1.0 and way != WAYS[0]:
                continue
            where = kept(weights, way, share)
            part: KV = ([x[:, :, where] for x in whole[0]], [x[:, :, where] for x in whole[1]])
            side_bits = POSITION_BITS * len(where) if share < 1 else 0
            for codec, lossy, bits in coded(part, where, inv_freq, profile):
                found = [log_probabilities(model, lossy, ids, tokens) for ids in after]
                loss = float(np.mean([kl(a, b) for a, b in zip(exact, found, strict=True)]))
                pairs = zip(exact, found, strict=True)
                same = float(np.mean([float((a.argmax(-1) == b.argmax(-1)).float().mean()) for a, b in pairs]))
                name, size = way if share < 1 else "all tokens", (bits + side_bits) / elements
                rows.append({"way": name, "share": share, "codec": codec, "bits": size, "kl": loss, "same": same})
    return rows


def table(contexts: list[list[Row]]) -> str:
    """Format means and intervals as Markdown, the largest first."""
    heads = ("tokens kept", "codec", "bits per element of the whole cache", "KL, nats per token", "same next token")
    lines = [f"| {' | '.join(heads)} |", "|---|---|---:|---:|---:|"]
    for index, row in enumerate(contexts[0]):
        values = {key: np.array([rows[index][key] for rows in contexts]) for key in ("bits", "kl", "same")}
        ends = intervals.clipped(intervals.interval(values["kl"], np.ones(len(contexts))), 0.0)
        shown = "" if ends is None else f" [{ends[0]:.3f}, {ends[1]:.3f}]"
        name = row["way"] if row["share"] == 1 else f"{row['way']}, {row['share']:.1%}"
        lines.append(f"| {name} | {row['codec']} | {values['bits'].mean():.2f} | {values['kl'].mean():.4f}{shown} | "
                     f"{values['same'].mean():.1%} |")  # fmt: skip
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--model", "name", required=True, help="Folder or Hub id of the model.")
@click.option("--dataset", required=True, help="Data set as for `python -m eval run`.")
@click.option("--limit", default=10, show_default=True, help="Number of contexts.")
@click.option("--dtype", default="auto", show_default=True, help="Dtype of the model.")
@click.option("--profile", default="auto", show_default=True, metavar="auto|none|LOCATION", help="Profile for klt.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Path of the results, without suffix.")
def main(name: str, dataset: str, limit: int, dtype: str, profile: str, out: Path) -> None:
    """Measure caches of fewer tokens, coded and not."""
    tokenizer = load_tokenizer(name)
    data = datasets.load(dataset, Request(tokenizer, limit))
    model = load_model(name, dtype=dtype, device="cpu")
    model.set_attn_implementation("eager")
    inv_freq, found = find_rotation(model), find_profile(profile, name)
    rows = [measured(model, tokenizer, example, inv_freq, found) for example in tqdm(data.examples, "contexts")]
    text = table(rows)
    print(text)
    out.parent.mkdir(parents=True, exist_ok=True)
    about = f"{name}, {data.name}, {len(rows)} contexts; brackets: 95 %, {intervals.METHOD}."
    out.with_suffix(".md").write_text(f"# Token dropping\n\n{about}\n\n{text}")
    session = surroundings.session(1)
    record = {"dataset": {"name": data.name, "source": data.source}, "session": session, "contexts": rows}
    out.with_suffix(".json").write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    run_command(main, "eval.dropping")
