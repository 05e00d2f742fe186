"""Measure the time to the first token over a real network path, and whether it meets the SLO.

    sudo python -m benchmarks.network --out benchmarks/results/network.json

Contestants take turns on the same link: adaptive (CacheGenCache.stream with an SLO), each level alone, 8-bit
quantisation fetched through the same store, and text (the model's own prefill, no network). First on steady links,
then on traces of the paper's kind. Where no lab can be built (it needs root, ip, tc and nginx) it says why, and ends
with exit code 77.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from benchmarks.network import contexts
from benchmarks.network.client import ADAPTIVE, TEXT, UNIFORM, Client
from benchmarks.network.lab import MTU, URL, Lab, default_congestion, why_not
from benchmarks.network.summary import markdown
from eval import traces

SKIPPED = 77
"""Exit code that test runners read as "skipped"."""
LEVELS = ("level 1", "level 2", "level 3")
SLOS = {"reference": (0.25, 0.5), "larger": (1.0, 2.0, 4.0)}
"""SLOs in seconds, for each context some that only a part of the contestants can meet."""


class Bench:
    """One lab, one context, one client; `records` gets every measurement."""

    def __init__(self, lab: Lab, client: Client, context: str, records: list[dict[str, Any]], console: Console) -> None:
        self.lab, self.client, self.context, self.records, self.console = lab, client, context, records, console

    def measure(self, how: str, slo: float | None, **about: Any) -> dict[str, Any]:
        """Take one measurement on the link as it is."""
        found = {"context": self.context, **about, **self.client.ask(how, slo), "load": round(os.getloadavg()[0], 2)}
        self.records.append(found)
        if "error" in found:
            self.console.print(f"[red]{self.context} {about} {how}: {found['error']}")
        return found

    def steady(self, rate: float, slos: Sequence[float], rounds: int) -> None:
        """Measure all contestants on a steady link, in turns."""
        self.lab.set_rate(rate)
        for _ in range(rounds):
            for how, slo in turns(slos):
                self.measure(how, slo, rate=rate)

    def trace(self, name: str, trace: traces.Trace, slos: Sequence[float]) -> None:
        """Measure all contestants on the same trace, which starts again for each."""
        for how, slo in turns(slos):
            with self.lab.replay(trace):
                self.measure(how, slo, trace=name)


def turns(slos: Sequence[float]) -> Iterator[tuple[str, float | None]]:
    """Return the contestants of a round; a fixed choice is as fast as it can be, whatever the SLO."""
    yield from ((how, None) for how in (*LEVELS, UNIFORM))
    yield from ((ADAPTIVE, slo) for slo in slos)


@contextmanager
def bench(
    lab: Lab, context: contexts.Context, threads: int, records: list[dict[str, Any]], console: Console
) -> Iterator[Bench]:
    """Start a client and warm it up: everything that a process does once is done."""
    client = Client(lab, context, URL, threads)
    lab.set_rate(1e10)
    for how, slo in [*turns([60.0]), (TEXT, None)]:
        client.ask(how, slo)
    yield Bench(lab, client, context.name, records, console)
    client.close()


def trace_set(count: int, seed: int, scale: float, seconds_each: float) -> Iterator[tuple[str, traces.Trace]]:
    """Return traces like the paper's that links can replay: 64 rates that hold for `seconds` each."""
    for index in range(count):
        rates = traces.paper(seed + index, 64, spread="log").in_time(seconds_each)
        yield f"paper x {scale:g}, seed {seed + index}", rates.scaled(scale)


@click.command()
@click.option("--context", "names", multiple=True, type=click.Choice(contexts.NAMES), default=contexts.NAMES)
@click.option("--gbps", "rates", multiple=True, type=float, default=(0.1, 0.5, 1, 3, 10), show_default=True)
@click.option("--rounds", default=3, show_default=True, help="Rounds of each contestant on each steady link.")
@click.option("--traces", "count", default=20, show_default=True, help="Number of traces at each scale.")
@click.option("--scale", "scales", multiple=True, type=float, default=(1.0, 0.1), show_default=True,
              help="Factor on the traces' 0.1 to 10 Gbps.")  # fmt: skip
@click.option("--seed", default=0, show_default=True)
@click.option("--seconds-each", default=0.1, show_default=True, help="Duration of each rate of a trace, in seconds.")
@click.option("--trace-slo", type=float, multiple=True, default=(1.0, 2.0), show_default=True)
@click.option("--rtt-ms", default=1.0, show_default=True, help="Round trip of a small packet, in milliseconds.")
@click.option("--loss", default=0.0, show_default=True, help="Share of packets that are lost.")
@click.option("--congestion", help="Congestion control of the server.  [default: the kernel's]")
@click.option("--tokens", default=8192, show_default=True, help="Context of the larger model, in tokens.")
@click.option("--threads", default=2, show_default=True, help="Threads of the client.")
@click.option("--text-rounds", default=2, show_default=True)
@click.option("--work", type=click.Path(path_type=Path), default=Path("/var/tmp/cachegen-network"), show_default=True,
              help="Folder of models and artifacts.")  # fmt: skip
@click.option("--hardware", default="", help="Name of this machine.")
@click.option("--out", type=click.Path(path_type=Path), help="Path of the results as JSON.")
def main(
    names: Sequence[str], rates: Sequence[float], rounds: int, count: int, scales: Sequence[float], seed: int,
    seconds_each: float, trace_slo: Sequence[float], rtt_ms: float, loss: float, congestion: str | None, tokens: int,
    threads: int, text_rounds: int, work: Path, hardware: str, out: Path | None,
) -> None:  # fmt: skip
    """Measure the time to the first token over a real network path."""
    if (reason := why_not()) is not None:
        print(f"SKIPPED: no network lab can be built here: {reason}", file=sys.stderr)
        sys.exit(SKIPPED)
    console = Console(width=120)
    work.mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    made = {name: contexts.make(name, work, tokens) for name in names}
    link = {"rtt_ms": rtt_ms, "loss": loss, "congestion": congestion or default_congestion(), "mtu": MTU}
    with Lab(work, delay=rtt_ms / 1000, loss=loss, congestion=congestion) as lab:
        for name, context in made.items():
            with bench(lab, context, threads, records, console) as one:
                for _ in range(text_rounds):
                    one.measure(TEXT, None)
                for gbps in rates:
                    console.print(f"{name}, {gbps:g} Gbps")
                    one.steady(gbps * traces.GBPS, SLOS[name], rounds)
                for scale in scales if name == "larger" else ():
                    console.print(f"{name}, {count} traces x {scale:g}")
                    for title, trace in trace_set(count, seed, scale, seconds_each):
                        one.trace(title, trace, trace_slo)
    found = {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "hardware": hardware,
        "cores": os.cpu_count(),
        "link": link,
        "contexts": {name: {"tokens": context.tokens, "bytes": context.sizes} for name, context in made.items()},
        "records": records,
    }
    print(markdown(found))
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
