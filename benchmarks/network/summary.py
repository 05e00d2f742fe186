"""Summarise the measurements as Markdown: pure functions of a results file.

python -m benchmarks.network.summary RESULTS.json
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
NEVER = float("inf")
Table = tuple[Sequence[str], list[Sequence[str]]]


def contestant(record: Record) -> str:
    """Return the name of a contestant in the tables."""
    return record["how"] if record["slo"] is None else f"{record['how']}, SLO {record['slo']:g} s"


def ttft_table(records: Iterable[Record]) -> Table:
    """Return the median TTFT of each contestant on each steady link, and how often a given SLO was missed."""
    records = [record for record in records if "ttft" in record and "trace" not in record]
    rates = sorted({record["rate"] for record in records if "rate" in record})
    rows: list[Sequence[str]] = []
    for name in dict.fromkeys(map(contestant, records)):
        own = [record for record in records if contestant(record) == name]
        cells = []
        for rate in rates:
            # Text needs no network: it was measured once for all rates.
            here = [record for record in own if record.get("rate", rate) == rate]
            cells.append(_cell(here))
        rows.append([name, *cells])
    return ["contestant", *(f"{rate / 1e9:g} Gbps" for rate in rates)], rows


def _cell(records: Sequence[Record]) -> str:
    if not records:
        return "-"
    text = f"{statistics.median(record['ttft'] for record in records):.2f}"
    slo = records[0]["slo"]
    if slo is None:
        return text
    missed = sum(record["ttft"] > slo for record in records)
    return f"{text}{f', missed {missed} of {len(records)}' if missed else ''} ({_choices(records[-1])})"


def _choices(record: Record) -> str:
    """Return the number of chunks of each kind in a stream's choices."""
    names = [choice.replace("level ", "L") for choice in record.get("choices", [])]
    return " ".join(f"{names.count(name)}{name}" for name in sorted(set(names)))


def overhead_table(records: Iterable[Record]) -> Table:
    """Return the time of a load of one level above bytes / rate, and the allowance: 10 % and one chunk's decode."""
    rows: list[Sequence[str]] = []
    records = [r for r in records if r["slo"] is None and "rate" in r and "ready" in r and r["how"].startswith("level")]
    for how, rate in sorted({(record["how"], record["rate"]) for record in records}):
        own = [record for record in records if (record["how"], record["rate"]) == (how, rate)]
        ready = statistics.median(record["ready"] for record in own)
        transfer = 8 * own[0]["bytes"] / rate
        decode = statistics.median(record.get("chunk_decode", 0.0) for record in own)
        allowed = 1.1 * transfer + decode
        within = "yes" if ready <= allowed else "no"
        cells = (f"{value:.3f}" for value in (transfer, decode, ready, ready - transfer, allowed))
        rows.append([how, f"{rate / 1e9:g}", *cells, within])
    head = ["level", "Gbps", "bytes / rate, s", "a chunk's decode, s", "context ready, s", "over bytes / rate, s",
            "allowed, s", "within"]  # fmt: skip
    return head, rows


def trace_table(records: Iterable[Record]) -> Table:
    """Return the misses of each contestant by traces and SLO, and of adaptive where a fixed choice meets it."""
    records = list(records)
    text = [r["ttft"] for r in records if r["how"] == "text" and "ttft" in r]
    traced = [record for record in records if "trace" in record]
    rows: list[Sequence[str]] = []
    for family in dict.fromkeys(record["trace"].split(",")[0] for record in traced):
        own = [record for record in traced if record["trace"].split(",")[0] == family]
        for slo in sorted({record["slo"] for record in own if record["slo"] is not None}):
            names = sorted({record["trace"] for record in own})
            fixed = {name: [r for r in own if r["trace"] == name and r["slo"] is None] for name in names}
            adaptive = {name: [r for r in own if r["trace"] == name and r["slo"] == slo] for name in names}
            could = [
                name for name in names if any(_in_time(r, slo) for r in fixed[name]) or min(text, default=NEVER) <= slo
            ]
            kept = [name for name in could if all(_in_time(r, slo) for r in adaptive[name])]
            cells = [f"{family}, SLO {slo:g} s", str(len(names))]
            for how in ("level 1", "level 2", "level 3", "uniform 8-bit"):
                cells.append(_missed([r for name in names for r in fixed[name] if r["how"] == how], slo))
            cells.append(f"{sum(value > slo for value in text)}/{len(text)}")
            cells.append(_missed([r for name in names for r in adaptive[name]], slo))
            rows.append([*cells, f"{len(kept)}/{len(could)}"])
    head = [
        "traces",
        "number",
        "level 1",
        "level 2",
        "level 3",
        "8-bit",
        "text",
        "adaptive",
        "adaptive where any could",
    ]
    return head, rows


def with_typical_question(records: Sequence[Record]) -> list[Record]:
    """The same, as if reading the question had always taken its median time: it is the same work for all contestants,
    but on a machine that others use too it takes between once and five times as long.
    """
    took = [record["ttft"] - record["ready"] for record in records if "ready" in record and "ttft" in record]
    if not took:
        return list(records)
    typical = statistics.median(took)
    return [{**r, "ttft": r["ready"] + typical} if "ready" in r and "ttft" in r else r for r in records]


def _missed(records: Sequence[Record], slo: float) -> str:
    return f"{sum(not _in_time(record, slo) for record in records)}/{len(records)}"


def _in_time(record: Record, slo: float) -> bool:
    """Return the TTFT of a run in seconds, infinite for a run that failed."""
    return bool(record.get("ttft", NEVER) <= slo)


def render(table: Table) -> str:
    """Format rows as a Markdown table."""
    head, rows = table
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def markdown(found: dict[str, Any]) -> str:
    """Return all tables of a results file."""
    link = found["link"]
    lines = [
        "# Time to the first token over a real network path",
        "",
        f"Link: round trip {link['rtt_ms']:g} ms, loss {link['loss']:g}, {link['congestion']}, MTU {link['mtu']}. "
        f"{found['hardware']} {found['date']}.",
        "",
    ]
    for name, about in found["contexts"].items():
        records = [record for record in found["records"] if record["context"] == name]
        sizes = ", ".join(f"{what} {size / 1e6:.2f} MB" for what, size in about["bytes"].items())
        lines += [f"## {name}", "", f"{about['tokens']} tokens; {sizes}. Median seconds to the first token:", ""]
        lines += [render(ttft_table(records))]
        lines += ["Over the transfer's own time:", "", render(overhead_table(records))]
        traced = trace_table(records)
        if traced[1]:
            lines += ["Missed SLOs on traces:", "", render(traced)]
            lines += ["The same with the median time of reading the question in every run:", ""]
            lines += [render(trace_table(with_typical_question(records)))]
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text())))
