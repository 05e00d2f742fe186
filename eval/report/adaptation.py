"""Show the results of the adaptation experiment (`python -m eval.adaptation`) in the report."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.report import plots
from eval.report.plots import Plot
from eval.report.tables import Table
from hf_cachegen.errors import ConfigError

ABOUT = (
    "Traces of bandwidth replayed against an artifact’s real sizes with the package’s own policies, in simulated time: "
    "the share of the traces in which the first token was late, and the divergence of the mixture of levels."
)


@dataclass(frozen=True)
class Adaptation:
    """Plots and tables of the experiment; a table has a row for each contestant and a field for each SLO."""

    plots: tuple[Plot, ...]
    tables: tuple[Table, ...]


def load(path: Path) -> Adaptation:
    """Read a results file and draw it.

    Args:
        path: JSON with "rows" of {"spread" (optional), "contestant", "slo", "violations", "kl", "ttft_mean",
            "ttft_p95"} and "steady" of {"contestant", "bits_per_second", "ttft"}.

    Raises:
        ConfigError: the file has another form.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return _adaptation(found["rows"], found["steady"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: expected results of eval.adaptation: {error!r}") from error


def _adaptation(rows: list[dict[str, Any]], steady: list[dict[str, Any]]) -> Adaptation:
    spreads = list(dict.fromkeys(row.get("spread", "log") for row in rows))
    parts = {spread: [row for row in rows if row.get("spread", "log") == spread] for spread in spreads}
    late = _curves(parts[spreads[0]], lambda row: (float(row["slo"]), 100 * row["violations"]))
    times = _curves(steady, lambda row: (row["bits_per_second"] / 1e9, float(row["ttft"])))
    drawn = (
        plots.contest("adaptation-slo", "Late first tokens against the SLO",
                      f"Share of the runs that missed the SLO ({_named(spreads[0])}).",
                      late, ("SLO, seconds", "late, %"), "linear"),
        plots.contest("adaptation-steady", "Time to the first token on steady links", "Simulated.", times,
                      ("bandwidth, Gbit/s", "seconds to the first token"), "log"),
    )  # fmt: skip
    tables = [
        _pivot(part, f"{title}, {_named(spread)}", cell)
        for spread, part in parts.items()
        for title, cell in (
            ("late first tokens / KL, nats per token", lambda r: f"{r['violations']:.1%} / {r['kl']:.4f}"),
            ("TTFT in seconds: mean / 95th percentile", lambda r: f"{r['ttft_mean']:.2f} / {r['ttft_p95']:.2f}"),
        )
    ]
    return Adaptation(drawn, tuple(tables))


def _named(spread: str) -> str:
    """Return the words for a distribution of bandwidths."""
    return {"uniform": "bandwidths as in the paper", "log": "bandwidths uniform in the logarithm"}.get(spread, spread)


def _curves(rows: list[dict[str, Any]], point: Callable[[dict[str, Any]], tuple[float, float]]) -> plots.Curves:
    curves: plots.Curves = {}
    for row in rows:
        curves.setdefault(str(row["contestant"]), []).append(point(row))
    return {name: sorted(points) for name, points in curves.items()}


def _pivot(rows: list[dict[str, Any]], title: str, cell: Callable[[dict[str, Any]], str]) -> Table:
    slos = sorted({row["slo"] for row in rows})
    cells = {(row["contestant"], row["slo"]): cell(row) for row in rows}
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    heads = ("contestant", *(f"SLO {slo:g} s" for slo in slos))
    return Table(f"Adaptation: {title}", heads, tuple((name, *(cells[name, slo] for slo in slos)) for name in names))
