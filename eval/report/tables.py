"""Tables of a run: sizes and quality in the form of the paper's Table 1, and the parts of the time to the first token.

A table is made once, as text cells, and shown as Markdown, HTML or on a terminal.
"""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval import codecs
from eval.metrics import time_to_first_token
from eval.run_folder import ASKED, RunFolder
from eval.scorers import SCORE_TITLES

PAPER_GBPS = 3.0
"""The bandwidth of the paper's experiments, unless it says another."""
NOTHING = "–"


@dataclass(frozen=True)
class Table:
    """title, column heads, rows of cells; the first column names the row, the others are numbers."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        lines = ["| " + " | ".join(self.heads) + " |", "|---|" + "---:|" * (len(self.heads) - 1)]
        return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in self.rows)]) + "\n"

    def html(self) -> str:
        head = "".join(f"<th scope=col>{html.escape(text)}</th>" for text in self.heads)
        body = "".join(
            f"<tr><th scope=row>{html.escape(row[0])}</th>"
            + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:]) + "</tr>"
            for row in self.rows
        )  # fmt: skip
        label = html.escape(self.title, quote=True)
        return (
            f'<div class=wide tabindex=0 role=region aria-label="{label}"><table><caption>{html.escape(self.title)}'
            f"</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        )


def quality(name: str, metrics: dict[str, Any], scores: list[str]) -> Table:
    """Size and quality of every codec and level on one data set."""
    shown = [score for score in scores if any(score in v["scores"] for v in metrics["variants"])]
    losses = not scores
    heads = ["technique", "size", "of fp16", "bits per element"]
    for score in shown:
        heads += [SCORE_TITLES[score], "to exact, 95 %"] if score == shown[0] else [SCORE_TITLES[score]]
    heads += ["same answers"] if shown else []
    heads += ["perplexity", "to exact, %, 95 %"] if losses else []
    heads += ["greedy agreement", "KL, nats"]
    rows = []
    for v in metrics["variants"]:
        row = [codecs.title(v["codec"], v["level"]), size(v["bytes"]), ratio(v["ratio_to_fp16"])]
        row.append(f"{v['bits_per_element']:.2f}")
        for score in shown:
            found = v["scores"].get(score)
            row.append(percent(found))
            row += [difference(found, 100, 1)] if score == shown[0] else []
        row += [percent(v.get("same_answer"))] if shown else []
        if losses:
            found = v.get("perplexity")
            row += [NOTHING if found is None else f"{found['mean']:.4g}", difference(found, 100, 2)]
        row += [percent(v["agreement"]), f"{v['kl']['mean']:.4f}"]
        rows.append(tuple(row))
    return Table(f"{name}: size and quality", tuple(heads), tuple(rows))


def times(name: str, metrics: dict[str, Any], gbps: float = PAPER_GBPS) -> Table:
    """The parts of the time to the first token at one bandwidth: computed."""
    heads = ("technique", f"fetch at {gbps:g} Gbit/s", "decode", "prefill", "TTFT", "encode, once")
    rows = []
    for v in metrics["variants"]:
        parts = time_to_first_token(metrics, v, gbps)
        measured = NOTHING if v["decode_seconds"] is None else seconds(parts["decode"])
        cells = (seconds(parts["fetch"]), measured, seconds(parts["prefill"]), seconds(sum(parts.values())))
        rows.append((codecs.title(v["codec"], v["level"]), *cells, seconds(v["encode_seconds"])))
    return Table(f"{name}: time to the first token, computed", heads, tuple(rows))


def text_table(place: Path) -> str:
    """A finished run's quality table, for a terminal."""
    folder = RunFolder(place)
    asked = folder.config()[ASKED]["dataset"]
    table = quality(asked["name"], folder.metrics(), asked["scores"])
    widths = [max(len(row[i]) for row in (table.heads, *table.rows)) for i in range(len(table.heads))]
    lines = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (table.heads, *table.rows)
    ]
    return "\n".join([table.title, *lines])


def size(nbytes: float) -> str:
    """Bytes of a context, three digits, decimal units as the paper's."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= factor:
            return f"{digits(nbytes / factor)} {unit}"
    return f"{nbytes:.0f} B"


def seconds(value: float | None) -> str:
    """Seconds or milliseconds."""
    if value is None:
        return NOTHING
    return f"{digits(value)} s" if value >= 1 else f"{digits(1000 * value)} ms"


def ratio(value: float) -> str:
    """How many times smaller than fp16."""
    return f"{digits(value)}×"


def digits(value: float) -> str:
    """At most three digits, none of them behind the point from 100 on."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def percent(found: dict[str, float] | None) -> str:
    return NOTHING if found is None else f"{100 * found['mean']:.1f}%"


def difference(found: dict[str, float] | None, factor: float, decimals: int) -> str:
    """The difference to the exact cache and its interval: "-1.6 [-3.1, 0.0]"."""
    if found is None:
        return NOTHING
    mean, low, high = (factor * found[name] for name in ("difference", "difference_low", "difference_high"))
    return f"{mean:+.{decimals}f} [{low:+.{decimals}f}, {high:+.{decimals}f}]"
