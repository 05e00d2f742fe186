"""The adaptation experiment (CacheGen, SIGCOMM 2024, section 7.4): bandwidth traces replayed against a real context.

    python -m eval.adaptation --out docs/results/adaptation

Time is simulated (`eval.simulation`). The policies and the bandwidth estimate are those of the package, and the bytes
of every chunk are real. Quality is measured: the mixture of levels at the end of a run is put together from decoded
chunks, and its divergence from the exact cache is measured over questions and right answers. The cache of the reference
model is small, so bytes are multiplied until the 8-bit cache has the size of the paper's (Table 1: Mistral-7B,
LongChat: 622 MB). Prefill and decoding take the times given by the options.

Contestants: adaptive, the paper's algorithm, each level alone, 8-bit quantisation, text. The results are a table
(Markdown), all figures (JSON), and plots (PNG, SVG) over the SLO and over the bandwidth.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import matplotlib
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval import traces, uniform
from eval.divergence import kl, log_probabilities
from eval.reference import HELD_OUT_SEED, MODEL_PATH, document
from eval.simulation import Chunk, Outcome, simulate
from eval.traces import Link
from hf_cachegen import CacheGenCache, CacheGenConfig, EncodedContext, decode_kv, encode_kv
from hf_cachegen.errors import ConfigError
from hf_cachegen.streaming import Adaptive, Fixed, Paper, Policy

matplotlib.use("Agg")
from matplotlib import pyplot

PAPER_UNIFORM_BYTES = 622e6
KV = tuple[list[Tensor], list[Tensor]]
UNIFORM, TEXT = "uniform 8-bit", "text"
Kept = tuple[int, int]
"""(traces in which both adaptive and a fixed choice meet the SLO, traces in which a fixed choice does)"""


@dataclass(frozen=True)
class Contestant:
    """A policy and its chunks: those of the encoded context, or, with one level, those of another coding."""

    name: str
    policy: Policy
    chunks: tuple[Chunk, ...]


@dataclass
class Row:
    """One contestant at one SLO over all traces.

    Attributes:
        contestant: its name.
        slo: seconds.
        violations: share of the traces that missed the SLO.
        ttft_mean: seconds.
        ttft_p95: seconds.
        kl: mean over the traces, nats per token.
        choices: shares of all chunks, as text.
    """

    contestant: str
    slo: float
    violations: float
    ttft_mean: float
    ttft_p95: float
    kl: float
    choices: str


class Judge:
    """Measures the divergence of a mixture of levels.

    Args:
        model: the model of the cache.
        encoded: the encoded context.
        cache: its exact cache.
        after: int64 [1, tokens], questions and right answers.
    """

    def __init__(self, model: Any, encoded: EncodedContext, cache: CacheGenCache, after: Tensor) -> None:
        self._spans = spans_of(encoded)
        exact = (list(cache.kv.keys), list(cache.kv.values))
        self._decoded: dict[int | None, KV] = {None: exact}
        for level in range(1, encoded.levels + 1):
            self._decoded[level] = decode_kv(encoded, level, model.device)
        self._ask: Callable[[KV], Tensor] = lambda kv: log_probabilities(model, *kv, after)
        self._exact = self._ask(exact)
        self._known: dict[tuple[int | None, ...], float] = {}
        coarse = ([uniform.quantise(x, 8) for x in exact[0]], [uniform.quantise(x, 8) for x in exact[1]])
        self.uniform = kl(self._exact, self._ask(coarse))

    def __call__(self, choices: tuple[int | None, ...]) -> float:
        """Return the divergence of a mixture in nats per token.

        Args:
            choices: a level for each chunk; None for one that was recomputed at the context's front, which is exact.
        """
        if choices not in self._known:
            mixed: KV = ([], [])
            for side in (0, 1):
                for layer in range(len(self._decoded[None][side])):
                    parts = [
                        self._decoded[choice][side][layer][:, :, first : first + tokens]
                        for choice, (first, tokens) in zip(choices, self._spans, strict=True)
                    ]
                    mixed[side].append(torch.cat(parts, 2))
            self._known[choices] = kl(self._exact, self._ask(mixed))
        return self._known[choices]


def spans_of(encoded: EncodedContext) -> list[tuple[int, int]]:
    """Return (first token, number of tokens) of every chunk of an encoded context."""
    tokens, step = encoded.geometry.tokens, encoded.config.chunk_tokens
    return [(first, min(step, tokens - first)) for first in range(0, tokens, step)]


def chunks_of(
    encoded: EncodedContext, scale: float, prefill_tokens_per_second: float, decode_tokens_per_second: float
) -> tuple[Chunk, ...]:
    """Return the chunks of an encoded context as the simulation takes them, their bytes multiplied by `scale`."""
    found = []
    for index, (_, tokens) in enumerate(spans_of(encoded)):
        parts = tuple(scale * len(part[index]) for part in encoded.parts)
        found.append(Chunk(parts, tokens / decode_tokens_per_second, tokens / prefill_tokens_per_second))
    return tuple(found)


def contestants(chunks: tuple[Chunk, ...], uniform_bytes: float) -> list[Contestant]:
    """Return all contestants; uniform_bytes: bytes of the whole context in 8 bits."""
    share = uniform_bytes / len(chunks)
    plain = tuple(Chunk((share,), chunk.decode_seconds, chunk.recompute_seconds) for chunk in chunks)
    levels = len(chunks[0].parts)
    return [
        Contestant("adaptive", Adaptive(), chunks),
        Contestant("paper", Paper(), chunks),
        *(Contestant(f"level {level}", Fixed(level), chunks) for level in range(1, levels + 1)),
        Contestant(UNIFORM, Fixed(1), plain),
        Contestant(TEXT, Fixed("text"), chunks),
    ]


def run(contestant: Contestant, link: Link, slo: float, question_seconds: float, round_trip: float) -> Outcome:
    """Simulate one context over one link; times in seconds."""
    return simulate(contestant.chunks, link, contestant.policy, slo, question_seconds, round_trip)


def quality(contestant: Contestant, outcome: Outcome, judge: Judge) -> float:
    """Return the divergence at the end of a run, nats per token."""
    return judge.uniform if contestant.name == UNIFORM else judge(outcome.choices)


def over_slo(
    who: Sequence[Contestant], links: Sequence[Link], slos: Sequence[float], judge: Judge, question: float, rtt: float
) -> tuple[list[Row], dict[str, Kept]]:
    """Return the rows, and for each SLO the number of traces in which adaptive and a fixed choice meet it."""
    rows: list[Row] = []
    kept: dict[str, Kept] = {}
    for slo in tqdm(slos, "SLOs"):
        found = {one.name: [run(one, link, slo, question, rtt) for link in links] for one in who}
        for one in who:
            outcomes = found[one.name]
            times = sorted(outcome.ttft for outcome in outcomes)
            names = [_word(one, choice) for outcome in outcomes for choice in outcome.choices]
            rows.append(
                Row(
                    one.name,
                    slo,
                    sum(t > slo for t in times) / len(times),
                    statistics.fmean(times),
                    times[math.ceil(0.95 * len(times)) - 1],
                    statistics.fmean(quality(one, outcome, judge) for outcome in outcomes),
                    ", ".join(f"{names.count(name) / len(names):.0%} {name}" for name in sorted(set(names))),
                )
            )
        fixed = [one.name for one in who if isinstance(one.policy, Fixed)]
        could = [any(found[name][n].ttft <= slo for name in fixed) for n in range(len(links))]
        meets = [outcome.ttft <= slo for outcome in found["adaptive"]]
        kept[f"{slo:g}"] = (sum(c and m for c, m in zip(could, meets, strict=True)), sum(could))
    return rows, kept


def _word(contestant: Contestant, choice: int | None) -> str:
    return "text" if choice is None else "8-bit" if contestant.name == UNIFORM else f"level {choice}"


def over_bandwidth(
    who: Sequence[Contestant], rates: Sequence[float], slo: float, judge: Judge, question: float, rtt: float
) -> list[dict[str, Any]]:
    """Return TTFT (seconds) and KL (nats per token) on steady links."""
    found = []
    for rate in rates:
        for one in who:
            outcome = run(one, traces.steady(rate), slo, question, rtt)
            found.append(
                {
                    "contestant": one.name,
                    "bits_per_second": rate,
                    "ttft": outcome.ttft,
                    "kl": quality(one, outcome, judge),
                }
            )
    return found


def table(rows: Sequence[Row], kept: dict[str, Kept]) -> str:
    """Format violations, TTFT and KL of each SLO and contestant as Markdown."""
    slos = sorted({row.slo for row in rows})
    names = list(dict.fromkeys(row.contestant for row in rows))
    found = {(row.contestant, row.slo): row for row in rows}
    lines = ["Share of traces whose SLO was missed / mean KL, nats per token:", ""]
    lines.append("| contestant | " + " | ".join(f"SLO {slo:g} s" for slo in slos) + " |")
    lines.append("|---|" + "---:|" * len(slos))
    for name in names:
        cells = (f"{found[name, slo].violations:.0%} / {found[name, slo].kl:.4f}" for slo in slos)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    cells = (f"{kept[f'{slo:g}'][0]} of {kept[f'{slo:g}'][1]}" for slo in slos)
    lines.append("| adaptive meets the SLO where a fixed choice does | " + " | ".join(cells) + " |")
    lines += ["", "Mean / 95th percentile of the time to the first token, seconds:", ""]
    lines.append("| contestant | " + " | ".join(f"SLO {slo:g} s" for slo in slos) + " |")
    lines.append("|---|" + "---:|" * len(slos))
    for name in names:
        cells = (f"{found[name, slo].ttft_mean:.2f} / {found[name, slo].ttft_p95:.2f}" for slo in slos)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[Row], steady: Sequence[dict[str, Any]], slo: float, out: Path) -> None:
    """Plot violations and KL over the SLO, TTFT and KL over the bandwidth; PNG and SVG."""
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7.5))
    names = list(dict.fromkeys(row.contestant for row in rows))
    for name in names:
        line = [row for row in rows if row.contestant == name]
        style = {"label": name, "marker": "o", "markersize": 3, "linewidth": 2 if name == "adaptive" else 1}
        slos = [row.slo for row in line]
        axes[0][0].plot(slos, [100 * row.violations for row in line], **style)
        axes[0][1].plot(slos, [max(row.kl, 1e-5) for row in line], **style)
        points = [point for point in steady if point["contestant"] == name]
        rates = [point["bits_per_second"] / traces.GBPS for point in points]
        axes[1][0].plot(rates, [point["ttft"] for point in points], **style)
        axes[1][1].plot(rates, [max(point["kl"], 1e-5) for point in points], **style)
    axes[0][0].set(xlabel="SLO, s", ylabel="traces that miss it, %")
    axes[0][1].set(xlabel="SLO, s", ylabel="KL, nats per token", yscale="log")
    axes[1][0].set(xlabel="bandwidth, Gbps", ylabel="time to first token, s", xscale="log", yscale="log")
    axes[1][1].set(xlabel="bandwidth, Gbps", ylabel=f"KL at SLO {slo:g} s", xscale="log", yscale="log")
    axes[1][0].axhline(slo, color="grey", linestyle="--", linewidth=1)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    for suffix in (".png", ".svg"):
        figure.savefig(out.with_suffix(suffix), dpi=110)
    pyplot.close(figure)


def links_of(count: int, seed: int, chunks: int, spread: str, files: Sequence[Path]) -> list[Link]:
    """Return the traces of the files, or `count` of the paper's. Raises ConfigError."""
    if files:
        return [traces.load(path) for path in files]
    if spread not in ("uniform", "log"):
        raise ConfigError(f"expected spread to be 'uniform' or 'log', got {spread!r}")
    return [
        traces.paper(seed + index, chunks, spread="log" if spread == "log" else "uniform") for index in range(count)
    ]


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Path of the results, without suffix.")
@click.option("--traces", "count", default=100, show_default=True, help="Number of traces as in the paper.")
@click.option("--seed", default=0, show_default=True, help="Random seed.")
@click.option(
    "--spread",
    default="log",
    show_default=True,
    type=click.Choice(["uniform", "log"]),
    help="Distribution of bandwidths.",
)
@click.option(
    "--trace-file",
    "files",
    multiple=True,
    type=click.Path(path_type=Path),
    help="File of a trace, instead of random ones; repeatable.",
)
@click.option("--slo", "slos", multiple=True, type=float, default=(0.5, 1, 1.5, 2, 3, 4, 6), show_default=True,
              help="SLO in seconds; repeatable.")  # fmt: skip
@click.option("--plot-slo", default=2.0, show_default=True, help="SLO of the plots over the bandwidth, in seconds.")
@click.option("--tokens", default=1100, show_default=True, help="Approximate length of the context in tokens.")
@click.option("--chunk-tokens", default=128, show_default=True, help="Tokens per chunk.")
@click.option(
    "--uniform-bytes",
    default=PAPER_UNIFORM_BYTES,
    show_default=True,
    help="Size in bytes that the 8-bit cache is scaled to.",
)
@click.option("--prefill-seconds", default=3.0, show_default=True, help="Prefill of the whole context, in seconds.")
@click.option("--decode-seconds", default=0.1, show_default=True, help="Decoding of the whole context, in seconds.")
@click.option("--question-seconds", default=0.05, show_default=True, help="Prefill of the question, in seconds.")
@click.option("--round-trip", default=0.001, show_default=True, help="Round trip of a request, in seconds.")
def main(
    out: Path, count: int, seed: int, spread: str, files: tuple[Path, ...], slos: tuple[float, ...], plot_slo: float,
    tokens: int, chunk_tokens: int, uniform_bytes: float, prefill_seconds: float, decode_seconds: float,
    question_seconds: float, round_trip: float,
) -> None:  # fmt: skip
    """Run the adaptation experiment."""
    options = {**click.get_current_context().params, "out": out.name, "files": [path.name for path in files]}
    model = AutoModelForCausalLM.from_pretrained(MODEL_PATH, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    made = document("lines", HELD_OUT_SEED + seed, tokens)
    ids = tokenizer(made.text, return_tensors="pt").input_ids
    cache = CacheGenCache.from_context(model, ids)
    encoded = encode_kv(cache.kv.keys, cache.kv.values, CacheGenConfig(chunk_tokens=chunk_tokens), cache.profile)
    after = "".join(question.prompt + question.completion for question in made.questions)
    judge = Judge(model, encoded, cache, tokenizer(after, return_tensors="pt").input_ids)
    width = cache.kv.keys[0].shape[-1]
    real = cache.kv.geometry.elements * uniform.bits_per_element(8, width) / 8
    total = ids.shape[1]
    chunks = chunks_of(encoded, uniform_bytes / real, total / prefill_seconds, total / decode_seconds)
    who = contestants(chunks, uniform_bytes)
    links = links_of(count, seed, len(chunks), spread, files)
    rows, kept = over_slo(who, links, sorted(slos), judge, question_seconds, round_trip)
    rates = [traces.GBPS * 10 ** (exponent / 4) for exponent in range(-4, 5)]
    steady = over_bandwidth(who, rates, plot_slo, judge, question_seconds, round_trip)
    out.parent.mkdir(parents=True, exist_ok=True)
    text = table(rows, kept)
    print(text)
    out.with_suffix(".md").write_text(text)
    sizes = {one.name: sum(sum(chunk.parts) for chunk in one.chunks) for one in who if one.name in ("level 3", UNIFORM)}
    found = {
        "options": options,
        "context_tokens": total,
        "chunks": len(chunks),
        "bytes": sizes,
        "kept": kept,
        "rows": [asdict(row) for row in rows],
        "steady": steady,
    }
    out.with_suffix(".json").write_text(json.dumps(found, indent=1, default=str) + "\n")
    plot(rows, steady, plot_slo, out)


if __name__ == "__main__":
    main()
