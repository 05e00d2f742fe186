"""Make a report of finished runs (`python -m eval report`): a page (index.html), tables (report.md), plots (SVG)."""

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
    """Write a report.

    Args:
        runs: folders of finished runs of one model.
        out: folder of the report.
        title: title of the page.
        adaptation: results of `python -m eval.adaptation`; None for none.

    Returns:
        The files.

    Raises:
        ConfigError: a run is not finished, runs are of several models, or the adaptation results are not valid.
    """
    sections = [_section(RunFolder(run), index) for index, run in enumerate(runs)]
    if len({section.config[ASKED]["model"] for section in sections}) > 1:
        raise ConfigError("expected runs of one model, found several")
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
    size = tables.profile_bytes_of(config)
    made = (tables.quality(name, metrics, scores, size), tables.times(name, metrics))
    return Section(key, config, metrics, drawn, made)


def _layers(sections: Sequence[Section]) -> list[plots.Plot]:
    """Return plots of the first data set: a codec spends its bits in the same way on others."""
    found = []
    for codec in ("delta", "identity", "klt"):
        variants = [v for v in sections[0].metrics["variants"] if v["codec"] == codec]
        found += [plots.layers("layers", codec, variants, what) for what in ("bits", "error")]
    return [plot for plot in found if plot is not None]
