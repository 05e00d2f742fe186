"""The adaptation experiment (CacheGen, SIGCOMM 2024, section 7.4): bandwidth traces replayed against a real context.

    python -m eval.adaptation --out docs/results/adaptation

Time is simulated (`eval.simulation`). The policies and the bandwidth estimate are those of the package, and the bytes
of every chunk are real. Quality is measured: the mixture of levels at the end of a run is put together from decoded
chunks, and its divergence from the exact cache is measured over questions and right answers. The cache of the reference
model is small, so bytes are multiplied until the 8-bit cache has the size of the paper's (Table 1: Mistral-7B,
LongChat: 622 MB). Prefill and decoding take the times given by the options.

Contestants: adaptive, the paper's algorithm, each level alone, 8-bit quantisation with its scales, text, and both
algorithms over the paper's own transform (delta). Everything is a mean over several contexts. The results are tables
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
from tqdm import tqdm

from eval import traces
from eval.command import run_command
from eval.contestants import UNIFORM, Contestant, Setting, contestants_of
from eval.simulation import Outcome, simulate
from eval.traces import Link
from hf_cachegen.errors import ConfigError
from hf_cachegen.streaming import Fixed

matplotlib.use("Agg")
from matplotlib import pyplot

PAPER_UNIFORM_BYTES = 622e6
"""Of the 8-bit cache in the paper's Table 1 (Mistral-7B, LongChat)."""
Kept = tuple[int, int]
"""(runs in which both adaptive and a fixed choice meet the SLO, runs in which a fixed choice does)"""
Field = Sequence[Sequence[Contestant]]
"""The contestants of each context, in the same order."""


@dataclass
class Row:
    """One contestant at one SLO over all contexts and traces.

    Attributes:
        spread: the distribution of the bandwidths.
        contestant: its name.
        slo: seconds.
        violations: share of the traces that missed the SLO.
        ttft_mean: seconds.
        ttft_p95: seconds.
        kl: mean, nats per token.
        choices: shares of all chunks, as text.
    """

    spread: str
    contestant: str
    slo: float
    violations: float
    ttft_mean: float
    ttft_p95: float
    kl: float
    choices: str


def run(contestant: Contestant, link: Link, slo: float, question_seconds: float, round_trip: float) -> Outcome:
    """Simulate one context over one link; times in seconds."""
    return simulate(contestant.chunks, link, contestant.policy, slo, question_seconds, round_trip)


def over_slo(
    field: Field, spread: str, links: Sequence[Link], slos: Sequence[float], question: float, rtt: float
) -> tuple[list[Row], dict[str, Kept]]:
    """Return the rows, and for each SLO the number of runs in which adaptive and a fixed choice meet it."""
    rows: list[Row] = []
    kept: dict[str, Kept] = {}
    for slo in tqdm(slos, f"SLOs, {spread}"):
        found: dict[str, list[Outcome]] = {}
        for same in zip(*field, strict=True):  # one contestant over all contexts
            outcomes = [run(one, link, slo, question, rtt) for one in same for link in links]
            found[same[0].name] = outcomes
            times = sorted(outcome.ttft for outcome in outcomes)
            losses = [one.kl(o.choices) for n, one in enumerate(same) for o in outcomes[n * len(links) :][: len(links)]]
            names = [_word(same[0], choice) for outcome in outcomes for choice in outcome.choices]
            rows.append(
                Row(
                    spread,
                    same[0].name,
                    slo,
                    sum(t > slo for t in times) / len(times),
                    statistics.fmean(times),
                    times[math.ceil(0.95 * len(times)) - 1],
                    statistics.fmean(losses),
                    ", ".join(f"{names.count(name) / len(names):.0%} {name}" for name in sorted(set(names))),
                )
            )
        fixed = [one.name for one in field[0] if isinstance(one.policy, Fixed)]
        meets = [outcome.ttft <= slo for outcome in found["adaptive"]]
        could = [any(found[name][n].ttft <= slo for name in fixed) for n in range(len(meets))]
        kept[f"{slo:g}"] = (sum(c and m for c, m in zip(could, meets, strict=True)), sum(could))
    return rows, kept


def _word(contestant: Contestant, choice: int | None) -> str:
    return "text" if choice is None else "8-bit" if contestant.name == UNIFORM else f"level {choice}"


def over_bandwidth(
    field: Field, rates: Sequence[float], slo: float, question: float, rtt: float
) -> list[dict[str, Any]]:
    """Return TTFT (seconds) and KL (nats per token) on steady links, means over the contexts."""
    found = []
    for rate in rates:
        for same in zip(*field, strict=True):
            outcomes = [run(one, traces.steady(rate), slo, question, rtt) for one in same]
            found.append(
                {
                    "contestant": same[0].name,
                    "bits_per_second": rate,
                    "ttft": statistics.fmean(outcome.ttft for outcome in outcomes),
                    "kl": statistics.fmean(one.kl(o.choices) for one, o in zip(same, outcomes, strict=True)),
                }
            )
    return found


SPREADS = {
    "uniform": "Bandwidths uniform from 0.1 to 10 Gbit/s, as in the paper",
    "log": "Bandwidths uniform in the logarithm, so that slow links are as frequent",
    "files": "Traces from files",
}


def tables(rows: Sequence[Row], kept: dict[str, dict[str, Kept]]) -> str:
    """Format violations, KL and TTFT of each distribution of bandwidths, SLO and contestant as Markdown."""
    lines: list[str] = []
    for spread in dict.fromkeys(row.spread for row in rows):
        mine = [row for row in rows if row.spread == spread]
        slos = sorted({row.slo for row in mine})
        lines += [f"## {SPREADS[spread]}", "", "Share of runs whose SLO was missed / mean KL, nats per token:", ""]
        lines += _pivot(mine, slos, lambda row: f"{row.violations:.1%} / {row.kl:.4f}")
        cells = (f"{kept[spread][f'{slo:g}'][0]} of {kept[spread][f'{slo:g}'][1]}" for slo in slos)
        lines.append("| adaptive meets the SLO where a fixed choice does | " + " | ".join(cells) + " |")
        lines += ["", "Mean / 95th percentile of the time to the first token, seconds:", ""]
        lines += [*_pivot(mine, slos, lambda row: f"{row.ttft_mean:.2f} / {row.ttft_p95:.2f}"), ""]
    return "\n".join(lines)


def _pivot(rows: Sequence[Row], slos: Sequence[float], cell: Callable[[Row], str]) -> list[str]:
    found = {(row.contestant, row.slo): cell(row) for row in rows}
    heads = [
        "| contestant | " + " | ".join(f"SLO {slo:g} s" for slo in slos) + " |", "|---|" + "---:|" * len(slos)
    ]  # fmt: skip
    names = dict.fromkeys(row.contestant for row in rows)
    return heads + [f"| {name} | " + " | ".join(found[name, slo] for slo in slos) + " |" for name in names]


def plot(rows: Sequence[Row], steady: Sequence[dict[str, Any]], slo: float, out: Path) -> None:
    """Plot violations and KL over the SLO, TTFT and KL over the bandwidth; PNG and SVG."""
    rows = [row for row in rows if row.spread == rows[0].spread]
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
    axes[0][0].set(xlabel="SLO, s", ylabel=f"runs that miss it, % ({rows[0].spread})")
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
    "spreads",
    multiple=True,
    default=("uniform", "log"),
    show_default=True,
    type=click.Choice(["uniform", "log"]),
    help="Distribution of bandwidths; repeatable.",
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
@click.option("--contexts", default=3, show_default=True, help="Number of contexts.")
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
    out: Path, count: int, seed: int, spreads: tuple[str, ...], files: tuple[Path, ...], slos: tuple[float, ...],
    plot_slo: float, contexts: int, tokens: int, chunk_tokens: int, uniform_bytes: float, prefill_seconds: float,
    decode_seconds: float, question_seconds: float, round_trip: float,
) -> None:  # fmt: skip
    """Run the adaptation experiment."""
    options = {**click.get_current_context().params, "out": out.name, "files": [path.name for path in files]}
    setting = Setting(tokens, chunk_tokens, uniform_bytes, prefill_seconds, decode_seconds)
    made = [contestants_of(seed + index, setting) for index in tqdm(range(contexts), "contexts")]
    field, most = [who for who, _ in made], max(about["chunks"] for _, about in made)
    rows: list[Row] = []
    kept: dict[str, dict[str, Kept]] = {}
    for spread in ("files",) if files else spreads:
        links = links_of(count, seed, most, spread, files)
        some, kept[spread] = over_slo(field, spread, links, sorted(slos), question_seconds, round_trip)
        rows += some
    rates = [traces.GBPS * 10 ** (exponent / 4) for exponent in range(-4, 5)]
    steady = over_bandwidth(field, rates, plot_slo, question_seconds, round_trip)
    out.parent.mkdir(parents=True, exist_ok=True)
    text = tables(rows, kept)
    print(text)
    out.with_suffix(".md").write_text(text)
    found = {
        "options": options,
        "contexts": [about for _, about in made],
        "kept": kept,
        "rows": [asdict(row) for row in rows],
        "steady": steady,
    }
    out.with_suffix(".json").write_text(json.dumps(found, indent=1, default=str) + "\n")
    plot(rows, steady, plot_slo, out)


if __name__ == "__main__":
    run_command(main, "eval.adaptation")
