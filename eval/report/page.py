"""Write the page: one self-contained HTML file without scripts, for phones and wide screens."""

from __future__ import annotations

import html
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval import codecs
from eval.intervals import LEAST_CONTEXTS
from eval.report import findings
from eval.report.adaptation import ABOUT, Adaptation
from eval.report.plots import SERIES, Plot, series, series_of
from eval.report.tables import Table, percent, ratio, size
from eval.run_folder import ASKED, SESSIONS
from eval.scorers import SCORE_TITLES

STYLE = Path(__file__).with_name("page.css")


@dataclass(frozen=True)
class Section:
    """One data set of the report: the configuration and metrics of its run, its plots and tables."""

    key: str
    config: dict[str, Any]
    metrics: dict[str, Any]
    plots: tuple[Plot, ...]
    tables: tuple[Table, ...]

    @property
    def name(self) -> str:
        """Title of the data set."""
        return str(self.config[ASKED]["dataset"]["name"])

    @property
    def score(self) -> str | None:
        """The first score; None for perplexity."""
        scores = self.config[ASKED]["dataset"]["scores"]
        return str(scores[0]) if scores else None

    def about(self) -> str:
        """Describe the measurement in one line."""
        m, asked = self.metrics, self.config[ASKED]
        parts = [f"{m['examples']} contexts of {m['context_tokens']:,.0f} tokens", f"{m['questions']} questions"]
        if not self.score:
            parts[1] = "the text that follows each"
        if left_out := len(asked["dataset"]["too_long"]):
            parts.append(f"{left_out} longer than the model's {asked['max_tokens']:,} tokens left out")
        return ", ".join(parts)

    def warning(self) -> str | None:
        """Explain what the numbers mean where the model cannot do the task; None where it can."""
        if findings.able(self.metrics, self.score):
            return None
        exact = self.metrics["variants"][0]
        reached = (
            percent(exact["scores"][self.score], interval=False)
            if self.score
            else f"a perplexity of {exact['perplexity']['mean']:.3g}"
        )
        return (
            f"The model reaches {reached} from the exact cache: it cannot do this task, so its score does not compare "
            "codecs. Divergence, agreement and sizes do."
        )


def page(title: str, sections: Sequence[Section], shared: Sequence[Plot], extra: Adaptation | None) -> str:
    """Return the whole document; shared: plots that belong to no data set."""
    links = "".join(f'<a href="#{s.key}">{_text(s.name)}</a>' for s in sections)
    links += '<a href="#layers">Levels by layer</a>' if shared else ""
    links += '<a href="#adaptation">Adaptation</a>' if extra else ""
    first = sections[0].config
    session = first[SESSIONS][-1]
    where = ", ".join((first[ASKED]["model"], session["gpu"] or session["processor"], session["time"][:10]))
    body = "".join(map(_section, sections))
    if shared:
        body += (
            "<section><h2 id=layers>Levels by layer</h2><p class=muted>From the artifacts’ own reports: bits where a "
            "codec spends them layer by layer, and the remaining relative error. A joint basis (klt over several "
            f"layers) has no bits of a single layer.</p>{_plots(shared)}</section>"
        )
    if extra:
        tables = "".join(table.html() for table in extra.tables)
        body += (
            f"<section><h2 id=adaptation>Adaptation</h2><p class=muted>{_text(ABOUT)}</p>{_plots(extra.plots)}{tables}"
            "</section>"
        )
    return f"""<!doctype html>
<html lang=en>
<head>
<meta charset=utf-8>
<meta name=viewport content="width=device-width, initial-scale=1">
<meta name=color-scheme content="light dark">
<title>{_text(title)}</title>
<style>
{STYLE.read_text(encoding="utf-8")}</style>
</head>
<body>
<header>
<h1>{_text(title)}</h1>
<p class=muted>{_text(where)}</p>
<div class=cards>{"".join(_card(s) for s in sections if findings.able(s.metrics, s.score))}</div>
{_unable(sections)}
<p class="small muted">Each card shows the smallest cache without loss: at most one point (for perplexity, one per cent)
worse than the exact cache in the mean, with a paired 95 % interval that includes zero where there are enough contexts
for one. Sizes count everything that is fetched{_profile(sections)}.</p>
<nav aria-label=Contents>{links}<a href="#method">Method</a></nav>
</header>
<main>
{body}
{_method(sections)}
<footer>Written by <code>python -m eval report</code>; {_intervals(sections)}.</footer>
</main>
</body>
</html>
"""


def _intervals(sections: Sequence[Section]) -> str:
    return f"intervals are 95 %, {interval_method(sections)}; fewer than {LEAST_CONTEXTS} contexts have none"


def interval_method(sections: Sequence[Section]) -> str:
    """Return how the intervals of these runs were computed; runs that do not say are older and were bootstrapped."""
    return " and ".join(sorted({s.metrics.get("intervals", "percentile bootstrap over contexts") for s in sections}))


def _profile(sections: Sequence[Section]) -> str:
    sizes = {s.config[ASKED]["profile"]["bytes"] for s in sections if s.config[ASKED]["profile"]}
    return f"; klt’s profile is separate (one file of {size(max(sizes))} for the model)" if sizes else ""


def _card(section: Section) -> str:
    best = findings.smallest(findings.caches(section.metrics), section.score)
    exact = section.metrics["variants"][0]
    if best is None:
        number, label, what = "–", "no codec keeps the quality", ""
    else:
        number, label = ratio(best["ratio_to_fp16"]), f"smaller than fp16: {codecs.title(best['codec'], best['level'])}"
        if section.score:
            pair = [percent(v["scores"][section.score], interval=False) for v in (best, exact)]
            what = f": {SCORE_TITLES[section.score]} {pair[0]}, exact cache {pair[1]}"
        else:
            what = f": perplexity {best['perplexity']['mean']:.4g}, exact cache {exact['perplexity']['mean']:.4g}"
    return (
        f'<a class=card href="#{section.key}"><b>{number}</b><span>{_text(label)}</span>'
        f"<span class=of>{_text(section.name + what)}</span></a>"
    )


def _unable(sections: Sequence[Section]) -> str:
    names = ", ".join(s.name for s in sections if not findings.able(s.metrics, s.score))
    return f"<p class=note>The model cannot do the tasks of these data sets: {_text(names)}.</p>" if names else ""


def _section(section: Section) -> str:
    warning = f"<p class=note>{_text(section.warning())}</p>" if section.warning() else ""
    chosen = {series_of(v["codec"]): v for v in findings.representatives(section.metrics, section.score)}
    names = []
    for line, variants in series(section.metrics["variants"]).items():
        label = SERIES.get(line) or codecs.TITLES[line]
        if len(variants) > 1 and line in chosen:
            exactly = codecs.title(chosen[line]["codec"], chosen[line]["level"])
            label += f" (times: {exactly.removeprefix(label).lstrip(' ,')})"
        names.append(f'<li><i style="background:var(--{line})"></i>{_text(label)}</li>')
    return (
        f"<section><h2 id={section.key}>{_text(section.name)}</h2><p class=muted>{_text(section.about())}.</p>{warning}"
        f"<ul class=legend>{''.join(names)}</ul>"
        f"{_plots(section.plots)}"
        f"{''.join(table.html() for table in section.tables)}</section>"
    )


def _plots(plots: Sequence[Plot]) -> str:
    return f"<div class=plots>{''.join(map(_figure, plots))}</div>"


def _figure(plot: Plot) -> str:
    svg = plot.inline().replace("<svg ", f'<svg role=img aria-label="{html.escape(plot.label, quote=True)}" ', 1)
    return f"<figure><h3>{_text(plot.title)}</h3>{svg}<figcaption>{_text(plot.text)}</figcaption></figure>"


def _method(sections: Sequence[Section]) -> str:
    session = sections[0].config[SESSIONS][-1]
    where = {
        "processor": f"{session['processor']}, {session['cores']} cores, {session['threads']} threads",
        "device": session["gpu"] or "CPU",
        "dtype": sections[0].config[ASKED]["dtype"],
        "revision": ", ".join(sorted({str(s["revision"])[:12] for x in sections for s in x.config[SESSIONS]})),
        "versions": ", ".join(f"{name} {version}" for name, version in session["versions"].items()),
    }
    commands = "\n".join(command(section.config) for section in sections)
    rows = "".join(f"<dt>{_text(name)}</dt><dd>{_text(str(value))}</dd>" for name, value in where.items())
    skipped = {name: why for s in sections for name, why in s.config[ASKED]["unavailable"].items()}
    left = "; ".join(f"{codecs.TITLES[name]}: {why}" for name, why in skipped.items())
    return (
        "<section><h2 id=method>Method</h2>"
        "<p>Every codec answers the same questions from the same contexts as the exact cache, greedily. The cache "
        "holds only the context, unless a section says otherwise. Divergence (KL) and greedy agreement are "
        "teacher-forced over question and right completion, or the exact cache’s own answer. The package’s codecs are "
        "saved and loaded as artifacts: their sizes are those of all files, and their decode seconds are the time to "
        "load from a local disk. The other techniques are computed in memory, in their favour: token ids and reading "
        "from disk are not charged to them, and uniform levels are unpacked from whole bytes. Where decoding was not "
        "measured, times are missing. Time to the first token is computed: bytes over bandwidth, without latency, plus "
        "measured decode and prefill seconds (medians).</p>"
        f"<dl>{rows}</dl>{f'<p class=small>Not measured: {_text(left)}.</p>' if left else ''}"
        f"<details><summary>Commands</summary><pre><code>{_text(commands)}</code></pre></details></section>"
    )


def command(config: dict[str, Any]) -> str:
    """The command that began a run."""
    return " ".join(map(_quoted, config[SESSIONS][0]["command"]))


def _quoted(word: str) -> str:
    return f'"{word}"' if "$" in word and '"' not in word else shlex.quote(word)


def _text(value: Any) -> str:
    return html.escape(str(value), quote=False)
