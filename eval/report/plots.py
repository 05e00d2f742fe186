"""Draw the plots with matplotlib.

Inside the page every colour is a CSS variable, so a plot follows the reader's light or dark scheme; as a file it has
the colours of the light scheme. matplotlib draws with unique colours (`_MARK`), which are replaced in its output. A
plot is as wide as a phone (one unit for each pixel); larger screens show several side by side.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np

from eval import codecs
from eval.metrics import time_to_first_token
from eval.report.tables import total
from eval.scorers import SCORE_TITLES

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

SIZE = (5.0, 3.7)
"""Width and height in inches of 72 units: 360 x 266."""
GBPS = (0.1, 10.0)
"""Range of bandwidths in the paper's experiments, Gbit/s."""
LEAST_KL = 1e-5
"""Smaller divergences are drawn at this value, because a logarithm has no zero."""
PLAIN = {
    "text": "#1c1e26", "muted": "#6b7080", "grid": "#d9dce3",
    "exact": "#6b7080", "prefill": "#2b2f3a", "uniform": "#c27a12", "quanto": "#a8632f", "hqq": "#8a7d1c",
    "fp8": "#7a8f2a", "released": "#c0392b",
    "artifact": "#c0392c", "lmcache": "#e67e22", "default": "#9c6b4f", "kivi": "#b03a73", "turboquant": "#5b4fbf",
    "kvtc": "#0f7f8f", "pca": "#4a7a2c", "lossless": "#2c8a6b", "delta": "#8e44ad", "identity": "#2471c8",
    "klt": "#0b8457", "predict0": "#3aa17a", "predict1": "#14635a", "predict2": "#14635b", "predict5": "#0c4038",
}  # fmt: skip
"""Colours of the light scheme by their names in the page's style sheet."""
MARKERS = {
    "exact": "D", "prefill": "*", "uniform": "s", "quanto": "v", "hqq": "^", "fp8": "P", "released": "X",
    "artifact": "X", "lmcache": "x", "default": "+", "kivi": "<", "turboquant": ">", "kvtc": "H", "pca": "1",
    "lossless": "h", "delta": "p", "identity": "d", "klt": "o",
    "predict0": "2", "predict1": "3", "predict2": "4", "predict5": "8",
}  # fmt: skip
SERIES = {
    "prefill": codecs.TITLES[codecs.TEXT], "uniform": "uniform", "quanto": "QuantizedCache quanto",
    "hqq": "QuantizedCache hqq", "default": "CacheGen's default quantization", "kivi": "KIVI",
    "turboquant": "TurboQuant",
}  # fmt: skip
"""Title of a line that joins several codecs."""
Curves = dict[str, list[tuple[float, float]]]
"""Name to its points."""
_MARK = {name: f"#0{index:02x}0e5" for index, name in enumerate(PLAIN)}


@dataclass(frozen=True)
class Plot:
    """A plot: the name of its file, the data set, a title, a text below it, and the SVG."""

    name: str
    of: str
    title: str
    text: str
    svg: str

    @property
    def label(self) -> str:
        """Description for screen readers."""
        return f"{self.of}: {self.title}" if self.of else self.title

    def inline(self) -> str:
        """Return the SVG for the page, with its colours as CSS variables."""
        found = self.svg[self.svg.index("<svg") :]
        for name, mark in _MARK.items():
            found = found.replace(mark, f"var(--{name})")
        return found

    def file(self) -> str:
        """Return the SVG as a file: light colours on white."""
        found = self.svg
        for name, mark in _MARK.items():
            found = found.replace(mark, PLAIN[name])
        return re.sub(r"(<svg [^>]*>)", r'\1<rect width="100%" height="100%" fill="#ffffff"/>', found, count=1)


def series_of(codec: str) -> str:
    """Return the line of a codec: codecs that differ only in bits share a line and a colour."""
    return "prefill" if codec == codecs.TEXT else codec.split("-")[0]


def series(variants: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Group variants by line, the smallest first."""
    found: dict[str, list[dict[str, Any]]] = {}
    for variant in sorted(variants, key=lambda v: v["bytes"]):
        found.setdefault(series_of(variant["codec"]), []).append(variant)
    return {name: found[name] for name in MARKERS if name in found}


def quality(key: str, name: str, metrics: dict[str, Any], score: str | None) -> Plot:
    """Plot the first score (or perplexity) against bits per element, with intervals of the difference."""
    figure, axis = _axes()
    stored = [v for v in metrics["variants"] if v["codec"] != codecs.TEXT]
    factor, base = (100 if score else 1), metrics["variants"][0]
    level = factor * (base["scores"][score] if score else base["perplexity"])["mean"]
    unit = factor if score else level  # differences of perplexities are relative
    for line, variants in series(stored).items():
        found = [v["scores"][score] if score else v["perplexity"] for v in variants]
        x, y = [v["bits_per_element"] for v in variants], [factor * f["mean"] for f in found]
        spread = [
            [max(0.0, f["difference"] - f["difference_low"]) * unit for f in found if f["difference_low"] is not None],
            [max(0.0, f["difference_high"] - f["difference"]) * unit for f in found if f["difference_low"] is not None],
        ]
        if len(spread[0]) == len(y):  # too few contexts have no intervals
            axis.errorbar(x, y, yerr=spread, fmt="none", ecolor=_MARK[line], elinewidth=1, alpha=0.45)
        _line(axis, line, x, y)
    axis.axhline(level, color=_MARK["muted"], linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    _bits_axis(axis, stored)
    what = f"{SCORE_TITLES[score]}, %" if score else "perplexity"
    axis.set_ylabel(what)
    if not score:
        worst = max((v["perplexity"]["mean"] for v in stored if v["perplexity"]["mean"] < 3 * level), default=level)
        axis.set_ylim(level * 0.97, max(worst * 1.05, level * 1.1))
    else:
        low, high = axis.get_ylim()
        axis.set_ylim(max(low, -4), min(high, 104))
    title = f"{what.removesuffix(', %').capitalize()} against size"
    text = "Against bits per element, side information included, with paired 95 % intervals. Dashed: the exact cache."
    return _finish(figure, f"{key}-quality", name, title, text)


def divergence(key: str, name: str, metrics: dict[str, Any]) -> Plot:
    """Plot KL against bits per element."""
    figure, axis = _axes()
    lossy = [v for v in metrics["variants"] if v["codec"] not in (codecs.TEXT, codecs.EXACT)]
    for line, variants in series(lossy).items():
        _line(axis, line, [v["bits_per_element"] for v in variants], [max(v["kl"]["mean"], LEAST_KL) for v in variants])
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}" if y > LEAST_KL * 1.01 else f"≤{LEAST_KL:g}"))
    axis.yaxis.set_minor_locator(NullLocator())
    _bits_axis(axis, lossy)
    axis.set_ylabel("KL, nats per token")
    text = "Divergence of the next token, exact against decoded cache, against bits per element."
    return _finish(figure, f"{key}-kl", name, "Divergence against size", text)


def first_token(key: str, name: str, metrics: dict[str, Any], variants: Sequence[dict[str, Any]]) -> Plot:
    """Plot the computed time to the first token against bandwidth."""
    figure, axis = _axes()
    speeds = np.geomspace(*GBPS, 41)
    for variant in variants:
        line = series_of(variant["codec"])
        y = [total(time_to_first_token(metrics, variant, gbps)) for gbps in speeds]
        width, dash = (2.4 if line == "klt" else 1.5), ("--" if line == "prefill" else "-")
        axis.plot(speeds, y, dash, color=_MARK[line], linewidth=width, marker=MARKERS[line], markersize=5, markevery=10)
    axis.set(xscale="log", yscale="log", xlabel="bandwidth, Gbit/s")
    axis.set_ylabel("seconds to the first token")
    for part in (axis.xaxis, axis.yaxis):
        part.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        part.set_minor_locator(NullLocator())
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    text = "Computed from measured bytes, decode and prefill seconds; each codec at the level that the legend names."
    return _finish(figure, f"{key}-ttft", name, "Time to the first token (computed)", text)


def layers(key: str, codec: str, variants: Sequence[dict[str, Any]], what: str) -> Plot | None:
    """Plot "bits" or relative "error" of each layer's K and V at each level; None where there are none."""
    figure, axis = _axes()
    drawn = False
    for variant in variants:
        rows = variant["layers"]
        if not rows or f"k_{what}" not in rows[0]:
            continue
        drawn = True
        strength = (
            1.0 if variant["level"] is None else (0.35 + 0.65 * variant["level"] / max(v["level"] for v in variants))
        )
        for kind, style in (("k", "-"), ("v", ":")):
            y = [row[f"{kind}_{what}"] for row in rows]
            axis.plot(
                range(len(y)), y, style, color=_MARK[codec], alpha=strength, marker="o", markersize=3, linewidth=1.6
            )
            where, text = (len(y) - 1, y[-1]), f"{kind.upper()}{variant['level'] or ''}"
            axis.annotate(text, where, (5, -3), textcoords="offset points", color=_MARK["muted"], fontsize=8)
    if not drawn:
        pyplot.close(figure)
        return None
    axis.set_xlabel("layer")
    axis.set_ylabel("bits per element" if what == "bits" else "relative error")
    axis.set_ylim(bottom=0)
    axis.xaxis.get_major_locator().set_params(integer=True)
    title = f"{codecs.TITLES[codec]}: {'bits' if what == 'bits' else 'relative error'} by layer"
    text = "Solid: K, dotted: V; the number at each line is its level."
    return _finish(figure, f"{key}-{codec}-{what}", "", title, text)


def contest(name: str, title: str, text: str, curves: Curves, labels: tuple[str, str], scale: str) -> Plot:
    """Plot the contestants of the adaptation experiment; labels: x and y; scale: both axes."""
    figure, axis = _axes()
    for contestant, points in curves.items():
        line, dash = _contestant(contestant)
        axis.plot(
            [x for x, _ in points], [y for _, y in points], dash, color=_MARK[line], label=contestant,
            linewidth=2.4 if contestant == "adaptive" else 1.4, zorder=4 if contestant == "adaptive" else 3,
        )  # fmt: skip
    axis.set(xscale=scale, yscale=scale, xlabel=labels[0], ylabel=labels[1])
    if scale == "log":
        for part in (axis.xaxis, axis.yaxis):
            part.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            part.set_minor_locator(NullLocator())
    axis.legend(fontsize=8, frameon=False, labelcolor=_MARK["text"])
    return _finish(figure, name, "", title, text)


def _contestant(name: str) -> tuple[str, str]:
    """Return (colour, dash); levels share a colour."""
    if name.startswith("level "):
        return "delta", ("-", "--", ":")[int(name.removeprefix("level ")) % 3]
    known = {"adaptive": "klt", "paper": "identity", "text": "prefill", "uniform 8-bit": "uniform"}
    return known.get(name, "exact"), "-"


def _axes() -> tuple[Any, Any]:
    style = {
        "svg.fonttype": "none", "font.size": 10, "axes.edgecolor": _MARK["muted"], "axes.labelcolor": _MARK["muted"],
        "xtick.color": _MARK["muted"], "ytick.color": _MARK["muted"], "text.color": _MARK["text"],
        "grid.color": _MARK["grid"], "axes.spines.top": False, "axes.spines.right": False,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure, axis = pyplot.subplots(figsize=SIZE)
    axis.grid(True, linewidth=0.7)
    axis.set_axisbelow(True)
    return figure, axis


def _line(axis: Any, line: str, x: Sequence[float], y: Sequence[float]) -> None:
    size, width, order = (7, 2.4, 4) if line == "klt" else (6, 1.5, 3)
    axis.plot(x, y, color=_MARK[line], marker=MARKERS[line], markersize=size, linewidth=width, zorder=order)


def _bits_axis(axis: Any, variants: Sequence[dict[str, Any]]) -> None:
    bits = [v["bits_per_element"] for v in variants]
    axis.set_xscale("log", base=2)
    axis.set_xlim(min(bits) / 1.25, max(*bits, 8.0) * 1.25)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_xlabel("bits per element")


def _finish(figure: Any, name: str, of: str, title: str, text: str) -> Plot:
    figure.tight_layout(pad=0.6)
    written = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    return Plot(name, of, title, text, _distinct(written.getvalue(), name))


def _distinct(svg: str, name: str) -> str:
    """Make the ids of a plot unique within a page."""
    found = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    found = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', found)
    return re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", found)
