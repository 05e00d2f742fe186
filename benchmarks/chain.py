"""Measure what chained layers cost against joint bases: bits per element at equal divergence, bytes, multiply-adds.

    python -m benchmarks.chain --model smollm2 --profile smollm2-profile --text train.txt --test test.txt \
        --out docs/results/chain_smollm2 --layers 0,2
    python -m benchmarks.chain --out docs/results/chain --layers 0,1 --joint 6,2
    python -m benchmarks.chain --geometry

    python -m benchmarks.chain --model smollm2 --profile smollm2-profile --text train.txt --test test.txt \
        --out docs/results/chain_wide --wide 5 --joint 2

All variants are learnt from the same sums over the same contexts, with the sensitivities and the step of a given joint
profile: joint bases of some layers, and chains, without and with prediction from a hidden state (--layers). Table
entries are those of the first contexts. Test contexts are coded at two steps and all levels. Bits count everything that
is stored for a context; KL is in nats per token of the 128 tokens that follow. The given profile itself, learnt
elsewhere, is measured too. Without --model the reference model is measured on its three tasks.

`--wide` joins several layers of the model to one: layers l, l + n, l + 2n, ... of n wide ones, so that adjacent wide
layers consist of adjacent layers. (An orthogonal mixture of their channels would change no basis, so none is made.)
That is how bits at the width of a larger model are estimated, not measured. `--geometry` prints the size and the
multiply-adds for an 8B model (32 layers, 8 KV heads of 128), without prediction from a hidden state.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.rate_distortion import bits_at
from eval.reference import CALIBRATION_SEED, HELD_OUT_SEED, MODEL_PATH, TASKS, sample
from hf_cachegen import CacheGenConfig, Profile, decode_kv, encode_kv
from hf_cachegen.codec.chain import widths_read
from hf_cachegen.codec.chunk import Span
from hf_cachegen.codec.fit import Counts
from hf_cachegen.codec.geometry import Geometry
from hf_cachegen.codec.group import Group
from hf_cachegen.codec.predictor import Predictor
from hf_cachegen.codec.rows import gather
from hf_cachegen.codec.sinks import find_sinks
from hf_cachegen.codec.tables import shipped_codebooks
from hf_cachegen.codec.transforms.klt import Klt
from hf_cachegen.models.first_layers import first_layers, known_of
from hf_cachegen.profiles.learning import Sample, continuation_logits, prefill
from hf_cachegen.profiles.learning.chain import DEFAULT_REACH, DEFAULT_WIDTH, chained
from hf_cachegen.profiles.learning.chaining import chained_after, noise_of
from hf_cachegen.profiles.learning.moments import in_frame
from hf_cachegen.profiles.learning.predictor import DEFAULT_RANK, blank, targets_of
from hf_cachegen.profiles.learning.sums import FeatureSums, GroupSums

CONTINUATION = 128
STEP_CODES = (3, 0)
"""Added to the profile's step code, a quarter of an octave each."""
GOALS = (0.03, 0.016, 0.004)
"""Divergences to compare at."""
HELD_OUT_EVERY = 5
TABLE_CONTEXTS = 4
KV = tuple[list[Tensor], list[Tensor]]


def joined(kv: KV, layers: int) -> KV:
    """Return keys and values of so many wide layers; the layers themselves if they are as many."""
    keys, values = ([torch.cat(side[at::layers], 1) for at in range(layers)] for side in kv)
    return keys, values


def parted(kv: KV, layers: int) -> KV:
    """Return what `joined` took, of so many layers."""
    found = []
    for side in kv:
        parts = [x.chunk(layers // len(side), 1) for x in side]
        found.append([parts[at % len(side)][at // len(side)] for at in range(layers)])
    return found[0], found[1]


def widened(given: Profile, layers: int) -> Profile:
    """Return a profile of so many wide layers, with their means and sensitivities."""
    count, own = len(given.layers) // layers, given.sensitivities
    narrow = given.layers[0]
    wide = replace(narrow, heads=narrow.heads * count, v_heads=narrow.v_heads * count)
    width = (narrow.k_channels, narrow.v_channels) * len(given.layers)
    means = given.means.split(width)
    order = [(at, kind) for at in range(layers) for kind in (0, 1)]
    groups = tuple(
        Group(kind, at, 1, torch.cat([own[kind, i] for i in range(at, len(given.layers), layers)]), torch.empty(0, 0))
        for at, kind in order
    )
    parts = [means[2 * i + kind] for at, kind in order for i in range(at, len(given.layers), layers)]
    return replace(given, layers=(wide,) * layers, means=torch.cat(parts), groups=groups, predictors=())


class Learnt:
    """Sums over contexts, and the variants that are made of them."""

    def __init__(self, model: Any, given: Profile, contexts: Sequence[Tensor], layers: Sequence[int], reach: int):
        self.model, self.given, self.layers = model, given, layers
        pairs = [(kind, layer, 1) for layer in range(len(given.layers)) for kind in (0, 1)]
        own = given.sensitivities
        empty = torch.empty(0, 0)
        self.groups = [Group(*pair, own[pair[:2]].clone(), empty) for pair in pairs]
        widths = [own[pair[:2]].shape[0] * own[pair[:2]].shape[1] for pair in pairs]
        self.sums = [GroupSums(pairs, widths, reach) for _ in range(2)]
        token = torch.zeros(1, 1, dtype=torch.int64)
        counts = {layer: first_layers(model, token, layer).hidden.shape[1] for layer in layers}
        self.features = [[FeatureSums(layer, count, widths) for layer, count in counts.items()] for _ in range(2)]
        self.kept: list[tuple[Tensor, KV]] = []
        for index, context in enumerate(contexts):
            keys, values = joined(prefill(model, context)[:2], len(given.layers))
            rows = [in_frame((keys, values)[kind][layer], kind, given.rotary).flatten(1) for kind, layer, _ in pairs]
            unseen = index % HELD_OUT_EVERY == 0
            self.sums[unseen].add(rows)
            for features in self.features[unseen]:
                features.add(first_layers(model, context, features.layer).hidden, rows)
            if not unseen and len(self.kept) < TABLE_CONTEXTS:
                self.kept.append((context, (keys, values)))
            print(f"context {index + 1} of {len(contexts)}", flush=True)

    @property
    def noise(self) -> float:
        return noise_of(self.given, self.given.levels)

    def joint(self, layers: int) -> Profile:
        """Return a profile with joint bases of that many layers."""
        sums, found = self.sums[0], []
        means = sums.means()
        for kind in (0, 1):
            for first in range(0, len(self.given.layers), layers):
                mine = range(first, first + layers)
                which = [i for i, (own, layer, _) in enumerate(sums.order) if own == kind and layer in mine]
                covariance = torch.cat([torch.cat([sums.product(a, b, means) for b in which], 1) for a in which])
                sensitivity = torch.cat([self.groups[i].sensitivity for i in which])
                values, vectors = torch.linalg.eigh(sensitivity.double())
                root = torch.block_diag(*((vectors * values.sqrt()[:, None]) @ vectors.mT))
                inverse = torch.block_diag(*((vectors * values.rsqrt()[:, None]) @ vectors.mT))
                basis = torch.linalg.eigh(root @ covariance @ root)[1]
                synthesis = (basis.flip(1).mT @ inverse).half().float()
                found.append(Group(kind, first, len(which), sensitivity, synthesis))
        return self.tabled(replace(self.given, groups=tuple(found), predictors=(), reach=0))

    def near(self) -> list[GroupSums]:
        """Return the sums with the reach of a chain, of the training contexts and of the held-out ones."""
        found = []
        for sums in self.sums:
            one = GroupSums(sums.order, [len(row) for row in sums.rows], 0)
            one.reach, one.count, one.rows, one.products = DEFAULT_REACH, sums.count, sums.rows, sums.products
            found.append(one)
        return found

    def chain(self, width: int) -> Profile:
        """Return a chained profile with a predictor for each of the layers."""
        training, held_out = self.near()
        groups, about = chained(training, held_out, self.groups, self.noise, width)
        print(about, flush=True)
        profile = self.tabled(replace(self.given, groups=groups, predictors=(), reach=DEFAULT_REACH))
        predictors, means = [], training.means()
        shapes = [[tuple(self.groups[2 * i + k].sensitivity.shape[:2]) for i in range(len(self.given.layers))]
                  for k in (0, 1)]  # fmt: skip
        covariances = [training.product(i, i, means) for i in range(len(self.groups))]
        for seen, unseen in zip(*self.features, strict=True):
            targets = targets_of(self.groups, shapes, means, covariances, seen, unseen)
            found = chained_after((training, held_out), (seen, unseen), targets, DEFAULT_RANK, self.noise, width)
            predictor = blank(seen.layer, found, profile.step_code, profile.levels, DEFAULT_REACH)
            whole = self.tabled(replace(profile, predictors=(predictor,)), seen.layer)
            predictors.append(whole.predictors[0])
        return replace(profile, predictors=tuple(predictors))

    def tabled(self, profile: Profile, layer: int | None = None) -> Profile:
        """Return the profile with the table entries of the kept contexts, for what codes at `layer`."""
        components = sum(len(group.synthesis) for group in profile.at(layer).groups)
        entries = torch.zeros(profile.levels, components, dtype=torch.uint8)
        profile = with_entries(profile, layer, entries)
        counts, config = Counts(components, profile.levels), CacheGenConfig(transform="klt", predict_layers=layer)
        for context, (keys, values) in self.kept:
            geometry = Geometry(profile.layers, tokens=context.shape[1], batch=1, dtype="float32")
            known = None if layer is None else known_of(self.model, context, profile, layer)
            codec = Klt(geometry, config, profile, sinks=find_sinks(keys), known=known)
            span = Span(0, context.shape[1], context.shape[1])
            counts.add(codec.inner.symbols(codec.coefficients(gather(keys, values, span).float(), span))[0])
        return with_entries(profile, layer, counts.choose(*shipped_codebooks(11))[0])


def with_entries(profile: Profile, layer: int | None, entries: Tensor) -> Profile:
    """Return the profile with these table entries of what codes at `layer`."""
    named = {"base_entries": entries[0], "refine_entries": entries[1:]}
    if layer is None:
        return replace(profile, **named)
    changed = [replace(one, **named) if one.layer == layer else one for one in profile.predictors]
    return replace(profile, predictors=tuple(changed))


class Exact(NamedTuple):
    """A test context: its tokens, the tokens that follow, its exact cache, and the exact log-probabilities."""

    context: Tensor
    continuation: Tensor
    kv: KV
    expected: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, test: Sample) -> Exact:
        """Compute it."""
        kv = prefill(model, test[0])[:2]
        return cls(*test, kv, continuation_logits(model, *kv, test[1]).log_softmax(-1))


@torch.no_grad()
def curve(model: Any, profile: Profile, layer: int | None, tests: Sequence[Exact], last: int) -> list[list[float]]:
    """Return the mean (bits per element, KL) of each step and level."""
    found = []
    for more in STEP_CODES:
        config = CacheGenConfig(
            transform="klt", measure=False, predict_layers=layer, protect_last=last, step_offset=more
        )
        totals = torch.zeros(profile.levels, 2)
        for test in tests:
            keys, values = joined(test.kv, len(profile.layers))
            known = None if layer is None else known_of(model, test.context, profile, layer)
            encoded = encode_kv(keys, values, config, profile, known=known)
            for level in range(1, encoded.levels + 1):
                decoded = parted(decode_kv(encoded, level, known=known), len(test.kv[0]))
                lossy = continuation_logits(model, *decoded, test.continuation).log_softmax(-1)
                kl = float((test.expected.exp() * (test.expected - lossy)).sum(-1).mean())
                bits = 8 * encoded.nbytes_at(level) / encoded.geometry.elements
                totals[level - 1] += torch.tensor([bits, kl]) / len(tests)
        found += totals.tolist()
    return found


def multiplications(learnt: Profile | Predictor, rank: int = 0) -> int:
    """Return the multiply-adds of decoding one token, summaries included."""
    found = 0
    for group, width in zip(learnt.groups, widths_read(learnt.groups, learnt.reach), strict=True):
        found += (len(group.synthesis) + width + rank) * group.synthesis.shape[1]
        if group.summary is not None:
            found += (len(group.synthesis) + width + rank) * len(group.summary)
    return found


def geometry(layers: int, channels: int, dim: int, width: int) -> dict[str, dict[str, float]]:
    """Return megabytes and millions of multiply-adds a token of joint bases of two layers and of a chain."""
    heads = 4 * 2 * layers * channels * dim
    pairs = 2 * layers // 2 * (2 * channels) ** 2
    found = {"joint, 2 layers": {"megabytes": (2 * pairs + heads) / 1e6, "multiply-adds": pairs / 1e6}}
    read = sum(width * (2 * min(layer, DEFAULT_REACH) + kind) for layer in range(layers) for kind in (0, 1))
    bases, summaries = 2 * layers * channels**2, 2 * layers * channels * width
    work = bases + read * (channels + width) + summaries
    found[f"chain of {width}"] = {
        "megabytes": (bases + read * channels + summaries + heads / 4) / 1e6, "multiply-adds": work / 1e6
    }  # fmt: skip
    return found


def cut(tokenizer: Any, path: Path, count: int, tokens: int) -> list[Sample]:
    """Cut contexts with continuations out of a text, at equal distances."""
    ids = tokenizer(path.read_text("utf-8"), return_tensors="pt").input_ids
    starts = torch.linspace(0, ids.shape[1] - tokens - CONTINUATION, count).long().tolist()
    return [(ids[:, at : at + tokens], ids[:, at + tokens : at + tokens + CONTINUATION]) for at in starts]


def table(curves: dict[str, Any], sizes: dict[str, Any], usual: str) -> str:
    """Return the results in Markdown."""
    lines = ["| variant | " + " | ".join(f"bits at {kl} nats | to {usual}" for kl in GOALS)
             + " | profile, MB | M multiply-adds |", "|---" * (3 + 2 * len(GOALS)) + "|"]  # fmt: skip
    for name, points in curves.items():
        cells = []
        for kl in GOALS:
            least, other = min(points), bits_at(curves[usual], kl)
            within = least[1] <= kl  # even the coarsest point: an upper bound
            bits = least[0] if within else bits_at(points, kl)
            cells.append(f"{'<= ' * within}{bits:.3f} | {bits / other:.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} | {sizes[name][0] / 1e6:.1f} | {sizes[name][1] / 1e6:.1f} |")
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--model", "path", type=click.Path(path_type=Path), help="Folder of another model than the reference.")
@click.option("--profile", "given", type=click.Path(path_type=Path), help="A joint profile, else in the folder.")
@click.option("--text", type=click.Path(path_type=Path), help="Text to learn from.")
@click.option("--test", type=click.Path(path_type=Path), help="Text to test on.")
@click.option("--out", type=click.Path(path_type=Path), help="Path of the results, without suffix.")
@click.option("--layers", default="", help="Values of predict_layers of the chain, separated by commas.")
@click.option("--joint", default="10,2", show_default=True, help="Numbers of layers with a joint basis.")
@click.option("--widths", default=str(DEFAULT_WIDTH), show_default=True, help="Widths of summaries.")
@click.option("--samples", default=12, show_default=True, help="Contexts to learn from.")
@click.option("--contexts", default=2, show_default=True, help="Test contexts.")
@click.option("--tokens", default=768, show_default=True, help="Tokens of a context.")
@click.option("--protect-last", default=64, show_default=True, help="Tokens at the end at the finest step.")
@click.option("--wide", default=1, show_default=True, help="Layers that are joined to a wide one.")
@click.option("--geometry", "sized", is_flag=True, help="Print the sizes for an 8B model, and measure nothing.")
def main(
    path: Path | None, given: Path | None, text: Path, test: Path, out: Path, layers: str, joint: str, widths: str,
    samples: int, contexts: int, tokens: int, protect_last: int, wide: int, sized: bool,
) -> None:  # fmt: skip
    """Measure bits per element at equal divergence of joint bases and of chains."""
    if sized:
        for width in (64, 96, DEFAULT_WIDTH):
            for name, row in geometry(32, 1024, 128, width).items():
                print(f"{name}: {row['megabytes']:.0f} MB, {row['multiply-adds']:.1f} M multiply-adds a token")
        return
    folder = path or MODEL_PATH
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
    tokenizer, profile = AutoTokenizer.from_pretrained(folder), Profile.load(given or folder)
    if path is None:
        training, tests = (
            [sample(tokenizer, task, seed + n, tokens) for n in range(-(-count // len(TASKS))) for task in TASKS]
            for seed, count in ((CALIBRATION_SEED, samples), (HELD_OUT_SEED, contexts))
        )
    else:
        training, tests = cut(tokenizer, text, samples, tokens), cut(tokenizer, test, contexts, tokens)
    if wide > 1:
        profile = widened(profile, len(profile.layers) // wide)
    chosen_layers = [int(layer) for layer in layers.split(",") if layer]
    learnt = Learnt(
        model, profile, [context for context, _ in training], chosen_layers,
        max([int(one) - 1 for one in joint.split(",")] + [DEFAULT_REACH]),
    )  # fmt: skip
    exact = [Exact.of(model, test) for test in tests]
    variants: dict[str, tuple[Profile, int | None]] = {}
    for count in joint.split(","):
        variants[f"joint, {count} layers"] = learnt.joint(int(count)), None
    for width in widths.split(","):
        one = learnt.chain(int(width))
        for layer in (None, *chosen_layers):
            variants[f"chain of {width}" + ("" if layer is None else f", m = {layer}")] = one, layer
    for layer in () if wide > 1 else (None, *(one.layer for one in profile.predictors if one.layer in chosen_layers)):
        variants["the given profile" + ("" if layer is None else f", m = {layer}")] = profile, layer
    curves, sizes = {}, {}
    for name, (one, layer) in variants.items():
        curves[name] = curve(model, one, layer, exact, protect_last)
        alone = replace(one, predictors=tuple(p for p in one.predictors if p.layer == layer))
        at = one.at(layer)
        rank = at.rank if isinstance(at, Predictor) else 0
        sizes[name] = len(alone.to_bytes()), multiplications(at, rank)
        print(name, curves[name], sizes[name], flush=True)
    usual = next(iter(variants))
    results = {
        "of": {"model": folder.name, "samples": samples, "contexts": contexts, "tokens": tokens,
               "protect_last": protect_last, "wide": wide, "reach": DEFAULT_REACH},
        "curves": curves, "sizes": sizes,
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(results) + "\n")
    out.with_suffix(".md").write_text(table(curves, sizes, usual))
    print(table(curves, sizes, usual))


if __name__ == "__main__":
    main()
