"""Where the divergence of a codec lies: in the question or in the answer, in all tokens or in few.

    python -m eval.positions measure --model MODEL --dataset NAME --codec artifact --codec klt --limit 12 --out PATH
    python -m eval.positions pool ONE.json OTHER.json --out PATH

A mean divergence over the tokens after a context hides which of them it comes from. Two codecs of the same mean can
keep answers differently well: an answer needs its own tokens alone. So this command splits the mean into the question
and the right completion, states how much of it the worst tokens carry, and counts the answers that stay the same:
those of the exact cache's own greedy answer in which every token remains the likeliest one. That is decided mostly by
tokens whose two likeliest successors are nearly alike, so their share and their divergence are stated too.

Means and intervals are over contexts (`eval.intervals`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from eval import codecs, datasets, intervals, surroundings
from eval.answers import answers, first_line
from eval.baselines.joint import Joint
from eval.command import run_command
from eval.datasets.request import Request
from eval.examples import Dataset, Example
from eval.measure import continuation, encode
from eval.models import find_profile, load_model, load_tokenizer, token_ids
from hf_cachegen import CacheGenCache

WORST = 0.05
"""Share of the tokens that count as the worst."""
CLOSE = 1.0
"""Nats between the two likeliest successors, below which a token counts as undecided."""
CHUNK_TOKENS = 512
"""Tokens per chunk of an artifact, as in `python -m eval run`."""


@dataclass(frozen=True)
class Measured:
    """One context under one codec and level.

    Attributes:
        codec: name in `eval.codecs.NAMES`.
        level: its level.
        bits: bits per element.
        question: KL in nats of each token of the questions, the last token of the context included.
        answer: likewise, of the right completions.
        own: likewise, of the exact cache's own answers.
        gap: nats between the two likeliest successors of each token of these, from the exact cache.
        same: for each question 1 where every token of the exact cache's own answer stays the likeliest.
    """

    codec: str
    level: int | None
    bits: float
    question: list[float]
    answer: list[float]
    own: list[float]
    gap: list[float]
    same: list[int]


def measured(kit: codecs.Kit, dataset: Dataset, example: Example, names: tuple[str, ...]) -> Iterator[Measured]:
    """Measure one context under every codec.

    Args:
        kit: model, tokenizer and the needs of codecs.
        dataset: how answers are generated.
        example: the context and its questions.
        names: codecs, the exact cache first.
    """
    found = encode(kit.tokenizer, example)
    exact = CacheGenCache.from_context(kit.model, found.context, profile=kit.profile, tokenizer=kit.tokenizer)
    outputs = answers(kit.model, kit.tokenizer, exact, found.prompts, dataset.new_tokens)
    if dataset.first_line:
        outputs = [first_line(text) for text in outputs]
    right = [question.completion or output for question, output in zip(example.questions, outputs, strict=True)]
    pairs = list(zip(right, outputs, strict=True))
    completions = [[token_ids(kit.tokenizer, text, start=False) for text in pair] for pair in pairs]
    reference: list[list[Tensor]] = []
    for name in names:
        for kept in codecs.keep(name, kit, exact, example.context):
            logs = []
            for question, pair in zip(found.questions, completions, strict=True):
                after = [torch.tensor([found.context[-1:] + question + ids], device=kit.model.device) for ids in pair]
                logs.append([continuation(kit.model, kept.cache, ids) for ids in after])
            if name == codecs.EXACT:
                reference = logs
                continue
            bits = 8 * kept.nbytes / exact.kv.geometry.elements
            lengths = [len(question) for question in found.questions]
            yield _split(kept, bits, reference, logs, lengths)


def _split(
    kept: codecs.Kept, bits: float, reference: list[list[Tensor]], logs: list[list[Tensor]], lengths: list[int]
) -> Measured:
    made = Measured(kept.codec, kept.level, bits, [], [], [], [], [])
    for (exact, exact_own), (lossy, lossy_own), question in zip(reference, logs, lengths, strict=True):
        divergence = (exact.exp() * (exact - lossy)).sum(-1)
        made.question.extend(divergence[:question].tolist())
        made.answer.extend(divergence[question:].tolist())
        own, changed = exact_own[question:], lossy_own[question:]
        made.own.extend((own.exp() * (own - changed)).sum(-1).tolist())
        likeliest = own.topk(2, -1).values
        made.gap.extend((likeliest[:, 0] - likeliest[:, 1]).tolist())
        made.same.append(int(bool((own.argmax(-1) == changed.argmax(-1)).all())))
    return made


def summary(rows: list[Measured]) -> dict[str, float]:
    """Return the figures of one codec and level over all its contexts."""
    every = np.sort(np.concatenate([[*row.question, *row.answer] for row in rows]))[::-1]
    own, gap = (np.concatenate([getattr(row, name) for row in rows]) for name in ("own", "gap"))
    close = gap < CLOSE
    return {
        "bits": float(np.mean([row.bits for row in rows])),
        "kl": float(every.mean()),
        "question": float(np.concatenate([row.question for row in rows]).mean()),
        "answer": float(np.concatenate([row.answer for row in rows]).mean()),
        "own": float(own.mean()),
        "median": float(np.median(every)),
        "worst": float(every[: max(1, round(WORST * len(every)))].sum() / max(every.sum(), 1e-12)),
        "undecided": float(close.mean()) if len(close) else 0.0,
        "undecided kl": float(own[close].mean()) if close.any() else 0.0,
    }


def table(rows: list[Measured]) -> str:
    """Format the results as a Markdown table, codecs in the order measured."""
    groups: dict[tuple[str, int | None], list[Measured]] = {}
    for row in rows:
        groups.setdefault((row.codec, row.level), []).append(row)
    lines = [
        f"| technique | bits | KL, all tokens | of the question | of the right answer | of the own answer | median | "
        f"worst {WORST:.0%} of the tokens carry | own answers, undecided tokens | same answers, 95 % |",
        "|---|" + "---:|" * 9,
    ]
    for (codec, level), found in groups.items():
        s = summary(found)
        sums, counts = _numbers(found, sum), _numbers(found, len)
        ends = intervals.clipped(intervals.interval(sums, counts, share=True), 0.0, 1.0)
        shown = "" if ends is None else f" [{100 * ends[0]:.0f}, {100 * ends[1]:.0f}]"
        lines.append(
            f"| {codecs.title(codec, level)} | {s['bits']:.2f} | {s['kl']:.4f} | {s['question']:.4f} | "
            f"{s['answer']:.4f} | {s['own']:.4f} | {s['median']:.5f} | {s['worst']:.0%} | KL {s['undecided kl']:.4f}, "
            f"{s['undecided']:.0%} of all | {100 * intervals.ratio(sums, counts):.0f}%{shown} |"
        )
    return "\n".join(lines) + "\n"


def _numbers(rows: list[Measured], count: Callable[[list[int]], int]) -> intervals.Numbers:
    return np.array([count(row.same) for row in rows], dtype=np.float64)


@click.group()
def main() -> None:
    """Where the divergence of a codec lies."""


@main.command()
@click.argument("results", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Path of the table, without suffix.")
def pool(results: tuple[Path, ...], out: Path) -> None:
    """Make one table of several results, of different contexts and the same codecs."""
    rows = [Measured(**row) for path in results for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]
    names = ", ".join(path.name for path in results)
    contexts = len(rows) // len({(row.codec, row.level) for row in rows})
    _write(out, f"{names}: {contexts} contexts", rows)


def _write(out: Path, about: str, rows: list[Measured]) -> None:
    text = table(rows)
    print(text)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text(
        f"# Divergence by position\n\n{about}; brackets: 95 %, {intervals.METHOD}.\n\n{text}"
    )


@main.command()
@click.option("--model", "name", required=True, help="Folder or Hub id of the model.")
@click.option("--dataset", required=True, help="Data set as for `python -m eval run`.")
@click.option("--codec", "chosen", multiple=True, default=("artifact", "klt"), show_default=True, help="Codec.")
@click.option("--level", "levels", multiple=True, type=int, help="Level of codecs that have several.  [default: all]")
@click.option("--limit", default=12, show_default=True, help="Number of contexts.")
@click.option("--seed", default=0, show_default=True, help="Random seed of generated data.")
@click.option("--dtype", default="auto", show_default=True, help="Dtype of the model.")
@click.option("--device", help="Device of the model.")
@click.option("--profile", default="auto", show_default=True, metavar="auto|none|LOCATION", help="Profile for klt.")
@click.option("--basis", type=click.Path(path_type=Path), help="Joint basis for kvtc and pca.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Path of the results, without suffix.")
def measure(
    name: str, dataset: str, chosen: tuple[str, ...], levels: tuple[int, ...], limit: int, seed: int, dtype: str,
    device: str | None, profile: str, basis: Path | None, out: Path,
) -> None:  # fmt: skip
    """Split divergences by position, and count the answers that stay the same."""
    tokenizer = load_tokenizer(name)
    data = datasets.load(dataset, Request(tokenizer, limit, seed))
    found, joint = find_profile(profile, name), None if basis is None else Joint.load(basis)
    names, _ = codecs.choose(chosen, found, joint)
    model = load_model(name, dtype=dtype, device=device)
    kit = codecs.Kit(model, tokenizer, found, CHUNK_TOKENS, levels or None, joint)
    rows: list[Measured] = []
    for example in tqdm(data.examples, "contexts"):
        rows += measured(kit, data, example, names)
    _write(out, f"{name}, {data.name}, {len(data.examples)} contexts", rows)
    record = {"dataset": {"name": data.name, "source": data.source}, "session": surroundings.session(1),
              "rows": _plain(rows)}  # fmt: skip
    out.with_suffix(".json").write_text(json.dumps(record) + "\n")


def _plain(rows: list[Measured]) -> list[dict[str, Any]]:
    """Return the rows as plain values, floats with three digits."""
    return [
        {key: [_short(x) for x in value] if isinstance(value, list) else value for key, value in asdict(row).items()}
        for row in rows
    ]


def _short(value: float) -> float:
    return float(f"{value:.3g}")


if __name__ == "__main__":
    run_command(main, "eval.positions")
