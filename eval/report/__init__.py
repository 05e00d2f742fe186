"""`python -m eval report`: finished runs become one page (index.html), tables (report.md) and plots (SVG files)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from eval.report import adaptation as adaptation_part
from eval.report import findings, plots, tables
from eval.report.markdown import markdown
from eval.report.page import Section, page
from eval.run_folder import ASKED, RunFolder
from hf_cachegen.errors import ConfigError


def write(runs: Sequence[Path], out: Path, title: str, adaptation: Path | None) -> list[Path]:
    """Writes the report of these run folders into `out`; returns the files. Raises ConfigError for what is no finished
    run, or no result of the adaptation experiment.
    """
    sections = [_section(RunFolder(run), index) for index, run in enumerate(runs)]
    if len({section.config[ASKED]["model"] for section in sections}) > 1:
        raise ConfigError("a report is of one model; these runs are of several")
    shared = _layers(sections)
    extra = adaptation_part.load(adaptation) if adaptation else None
    out.mkdir(parents=True, exist_ok=True)
    drawn = [plot for section in sections for plot in section.plots] + list(shared)
    drawn += extra.plots if extra else ()
    written = []
    for plot in drawn:
        written.append(out / f"{plot.name}.svg")
        written[-1].write_text(plot.file(), encoding="utf-8")
    written.append(out / "report.md")
    written[-1].write_text(markdown(title, sections, shared, extra), encoding="utf-8")
    written.append(out / "index.html")
    written[-1].write_text(page(title, sections, shared, extra), encoding="utf-8")
    return written


def _section(folder: RunFolder, index: int) -> Section:
    config, metrics = folder.config(), folder.metrics()
    asked = config[ASKED]["dataset"]
    name, scores = asked["name"], asked["scores"]
    key = f"{index + 1}-{re.sub('[^a-z0-9]+', '-', name.lower())}"
    score = scores[0] if scores else None
    shown = findings.representatives(metrics, score)
    drawn = (
        plots.quality(key, name, metrics, score),
        plots.divergence(key, name, metrics),
        plots.first_token(key, name, metrics, shown),
    )
    return Section(key, config, metrics, drawn, (tables.quality(name, metrics, scores), tables.times(name, metrics)))


def _layers(sections: Sequence[Section]) -> list[plots.Plot]:
    """Of the first data set: the same codec spends alike on others."""
    found = []
    for codec in ("delta", "identity", "klt"):
        variants = [v for v in sections[0].metrics["variants"] if v["codec"] == codec]
        found += [plots.layers("layers", codec, variants, what) for what in ("bits", "error")]
    return [plot for plot in found if plot is not None]
