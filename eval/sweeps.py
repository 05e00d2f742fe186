"""Time to the first token over bandwidths, lengths and concurrent requests (figures 11, 12, 19 and 20 of the paper).

    python -m eval.sweeps docs/results/end_to_end_smollm2.json --elements-per-token 11520 --out docs/results/sweeps

Computed, not measured: from the bytes, the load times and the prefill times that `python -m benchmarks.end_to_end`
measured. Concurrent requests share the link and the processor in equal parts and finish together, so both parts of the
time grow in proportion to their number; fetching and loading do not overlap, as they do in a stream. Latency is not
counted. The prefill of the question ("first") counts for every way that loads a cache.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from eval.command import run_command
from hf_cachegen.errors import ConfigError

BANDWIDTHS = (0.01, 0.1, 1.0, 3.0, 10.0)
"""Gbit/s. The paper has 0.4 to 400, for models whose caches are 10 to 50 times larger per token."""
REQUESTS = (1, 2, 4, 8)
PREFILL = "prefill"
WAYS = (PREFILL, "safetensors", "lossless", "delta, level 3", "klt, level 3", "klt, level 1")
"""The measured ways that are shown; safetensors is the exact cache."""


@dataclass(frozen=True)
class Measured:
    """One way to have the cache of one length: its size in bits, and measured seconds.

    Attributes:
        bits: everything that is fetched.
        load: seconds from a local disk to a cache in memory.
        first: seconds from there to the first token; of the prefill, the whole.
    """

    bits: float
    load: float
    first: float


def read(path: Path, per_token: int) -> dict[int, dict[str, Measured]]:
    """Read results of `benchmarks.end_to_end`: tokens to way to its figures.

    Args:
        path: the JSON file.
        per_token: elements of the cache for each token.

    Raises:
        ConfigError: the file has another form.
    """
    try:
        found: dict[int, dict[str, Measured]] = {}
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
            bits = row["bits"] * per_token * row["tokens"]
            found.setdefault(row["tokens"], {})[row["way"]] = Measured(bits, row["load"], row["first"])
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not a result of benchmarks.end_to_end: {error!r}") from error


def seconds(one: Measured, gbps: float, requests: int = 1) -> float:
    """Return the time to the first token.

    Args:
        one: the way.
        gbps: bandwidth of the link, 1e9 bits a second.
        requests: concurrent requests of the same kind.
    """
    return requests * (one.bits / (gbps * 1e9) + one.load + one.first)


def table(title: str, heads: Sequence[str], rows: Sequence[tuple[str, Sequence[float]]]) -> str:
    """Format seconds as Markdown; the least of each column is bold."""
    least = [min(row[1][index] for row in rows) for index in range(len(heads))]
    lines = [f"{title}:", "", f"| | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for name, values in rows:
        cells = [f"**{x:.3g}**" if x == best else f"{x:.3g}" for x, best in zip(values, least, strict=True)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def tables(found: dict[int, dict[str, Measured]], gbps: float) -> str:
    """Return the tables over bandwidths for each length, and over concurrent requests at one bandwidth."""
    parts = []
    for tokens, ways in found.items():
        shown = [(way, ways[way]) for way in WAYS if way in ways]
        rows = [(way, [seconds(one, rate) for rate in BANDWIDTHS]) for way, one in shown]
        heads = [f"{rate:g} Gbit/s" for rate in BANDWIDTHS]
        parts.append(table(f"Seconds to the first token, {tokens:,} tokens", heads, rows))
        rows = [(way, [seconds(one, gbps, count) for count in REQUESTS]) for way, one in shown]
        heads = [f"{count} requests" if count > 1 else "1 request" for count in REQUESTS]
        parts.append(table(f"Seconds to the first token at {gbps:g} Gbit/s, {tokens:,} tokens", heads, rows))
    return "\n".join(parts)


@click.command()
@click.argument("results", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--elements-per-token", "per_token", type=click.IntRange(min=1), required=True,
              help="Elements of the cache for each token: layers x KV heads x head_dim x 2.")  # fmt: skip
@click.option("--gbps", default=0.1, show_default=True, help="Gbit/s of the link that concurrent requests share.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Path of the results, without suffix.")
def main(results: Path, per_token: int, gbps: float, out: Path) -> None:
    """Compute times to the first token from measured sizes and times."""
    text = tables(read(results, per_token), gbps)
    click.echo(text)
    about = (
        f"**Computed** from {results.name}: bytes over bandwidth, measured load and prefill times. Concurrent requests "
        "share the link and the processor. Bold: the least."
    )
    out.with_suffix(".md").write_text(f"# Bandwidths, lengths and concurrent requests\n\n{about}\n\n{text}")


if __name__ == "__main__":
    run_command(main, "eval.sweeps")
