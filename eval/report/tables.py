"""Make the tables of a run: size and quality, as in the paper's Table 1, and the parts of the time to the first token.

A table is made once, as text cells, and rendered as Markdown, HTML or terminal text.
"""

from __future__ import annotations

import html
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval import codecs
from eval.metrics import Estimate, time_to_first_token
from eval.run_folder import ASKED, RunFolder
from eval.scorers import SCORE_TITLES

PAPER_GBPS = 3.0
"""Gbit/s, the usual bandwidth of the paper's experiments."""
NOTHING = "–"


@dataclass(frozen=True)
class Table:
    """A table: its title, the heads of its fields, and rows of text cells. The first cell names the row."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """Render as a Markdown table."""
        lines = ["| " + " | ".join(self.heads) + " |", "|---|" + "---:|" * (len(self.heads) - 1)]
        return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in self.rows)]) + "\n"

    def html(self) -> str:
        """Render as an HTML table that scrolls sideways by itself."""
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


def quality(name: str, metrics: dict[str, Any], scores: list[str], profile_bytes: int | None = None) -> Table:
    """Make the table of size and quality of every codec and level on one data set.

    Args:
        name: the data set.
        metrics: the run's metrics.
        scores: names in eval.scorers.SCORERS; empty for perplexity.
        profile_bytes: size of the model's profile, which klt needs once for all contexts; None where there is none.
    """
    shown = [score for score in scores if any(score in v["scores"] for v in metrics["variants"])]
    losses = not scores
    heads = ["technique", "size", "of fp16", "bits per element"]
    heads += [] if profile_bytes is None else ["profile", "pays after, contexts"]
    for score in shown:
        heads += [SCORE_TITLES[score], "to exact, 95 %"] if score == shown[0] else [SCORE_TITLES[score]]
    heads += ["same answers, 95 %"] if shown else []
    heads += ["perplexity", "to exact, %, 95 %"] if losses else []
    heads += ["greedy agreement, 95 %", "KL, nats per token, 95 %"]
    rows = []
    for v in metrics["variants"]:
        row = [codecs.title(v["codec"], v["level"]), size(v["bytes"]), ratio(v["ratio_to_fp16"])]
        row.append(f"{v['bits_per_element']:.2f}")
        if profile_bytes is not None:
            needs = v["codec"] in codecs.PROFILED
            row += [size(profile_bytes), break_even(metrics, v, profile_bytes)] if needs else ["", ""]
        for score in shown:
            found = v["scores"].get(score)
            row.append(percent(found))
            row += [difference(found, 100, 1)] if score == shown[0] else []
        row += [percent(v.get("same_answer"))] if shown else []
        if losses:
            found = v.get("perplexity")
            row += [NOTHING if found is None else f"{found['mean']:.4g}", difference(found, 100, 2)]
        row += [percent(v["agreement"]), kl(v["kl"])]
        rows.append(tuple(row))
    return Table(f"{name}: size and quality", tuple(heads), tuple(rows))


RIVAL = "uniform-4"
"""What a user without a profile would store: the codec that a profile must pay against."""


def break_even(metrics: dict[str, Any], variant: dict[str, Any], profile_bytes: int) -> str:
    """Return after how many contexts a profile and its caches are smaller than caches of RIVAL.

    Args:
        metrics: the run's metrics.
        variant: klt at one level.
        profile_bytes: size of the profile.

    Returns:
        A whole number; "never" where a cache is no smaller; NOTHING where RIVAL was not measured.
    """
    rival = next((v["bytes"] for v in metrics["variants"] if v["codec"] == RIVAL), None)
    if rival is None:
        return NOTHING
    return str(math.ceil(profile_bytes / (rival - variant["bytes"]))) if rival > variant["bytes"] else "never"


def times(name: str, metrics: dict[str, Any], gbps: float = PAPER_GBPS) -> Table:
    """Make the table of the parts of the time to the first token.

    Args:
        name: the data set.
        metrics: the run's metrics.
        gbps: bandwidth, 1e9 bits a second.
    """
    heads = (
        "technique", f"fetch at {gbps:g} Gbit/s, computed", "decode, measured", "prefill, measured", "TTFT, computed",
        "encode once, measured",
    )  # fmt: skip
    rows = []
    for v in metrics["variants"]:
        parts = time_to_first_token(metrics, v, gbps)
        cells = [seconds(part) for part in (*parts.values(), total(parts))]
        rows.append((codecs.title(v["codec"], v["level"]), *cells, seconds(v["encode_seconds"])))
    return Table(f"{name}: time to the first token", heads, tuple(rows))


def total(parts: dict[str, float | None]) -> float | None:
    """Return the time to the first token in seconds, None where one of its parts was not measured."""
    known = [part for part in parts.values() if part is not None]
    return sum(known) if len(known) == len(parts) else None


def profile_bytes_of(config: dict[str, Any]) -> int | None:
    """Return the size of the profile that a run used, None where it used none."""
    profile = config[ASKED].get("profile")
    return profile["bytes"] if isinstance(profile, dict) else None


def text_table(path: Path) -> str:
    """Render the quality table of a finished run for a terminal."""
    folder = RunFolder(path)
    asked = folder.config()[ASKED]["dataset"]
    table = quality(asked["name"], folder.metrics(), asked["scores"], profile_bytes_of(folder.config()))
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
    """Format bytes with three digits and decimal units, as the paper does."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= factor:
            return f"{digits(nbytes / factor)} {unit}"
    return f"{nbytes:.0f} B"


def seconds(value: float | None) -> str:
    """Format seconds, as milliseconds below one second."""
    if value is None:
        return NOTHING
    return f"{digits(value)} s" if value >= 1 else f"{digits(1000 * value)} ms"


def ratio(value: float) -> str:
    """Format a compression ratio."""
    return f"{digits(value)}×"


def digits(value: float) -> str:
    """Format a number with three digits, and with no decimals from 100 on."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def percent(found: Estimate | None, *, interval: bool = True) -> str:
    """Format a share with its interval: "99.5% [97.5, 100.0]"."""
    if found is None:
        return NOTHING
    return f"{100 * found['mean']:.1f}%" + (_interval(found, "low", "high", 100, ".1f") if interval else "")


def kl(found: Estimate) -> str:
    """Format a divergence with its interval: "0.0300 [0.0100, 0.0400]"."""
    return f"{found['mean']:.4f}" + _interval(found, "low", "high", 1, ".4f")


def difference(found: Estimate | None, factor: float, decimals: int) -> str:
    """Format a difference to the exact cache with its interval: "-1.6 [-3.1, +0.0]"."""
    if found is None:
        return NOTHING
    style = f"+.{decimals}f"
    return f"{factor * found['difference']:{style}}" + _interval(
        found, "difference_low", "difference_high", factor, style
    )


def _interval(found: Estimate, low: str, high: str, factor: float, style: str) -> str:
    """Format an interval, as nothing where there were too few contexts for one."""
    if found[low] is None or found[high] is None:
        return ""
    return f" [{factor * found[low]:{style}}, {factor * found[high]:{style}}]"
