"""Write the report as Markdown, for a repository: the same tables, the plots as files, and the commands."""

from __future__ import annotations

from collections.abc import Sequence

from eval.intervals import LEAST_CONTEXTS
from eval.report.adaptation import ABOUT, Adaptation
from eval.report.page import Section, command, interval_method
from eval.report.plots import Plot
from eval.run_folder import ASKED, SESSIONS


def markdown(title: str, sections: Sequence[Section], shared: Sequence[Plot], extra: Adaptation | None) -> str:
    """Return the text of the whole file."""
    session = sections[0].config[SESSIONS][-1]
    lines = [
        f"# {title}",
        "",
        f"Model {sections[0].config[ASKED]['model']}, {session['gpu'] or session['processor']} "
        f"({session['cores']} cores, {session['threads']} threads), {session['time'][:10]}, "
        f"revision {str(session['revision'])[:12]}. Intervals are 95 %, {interval_method(sections)}; differences "
        f"are paired with the exact cache, and fewer than {LEAST_CONTEXTS} contexts have no interval. Sizes count "
        "everything that is fetched; klt's profile is stated separately. TTFT is computed from measured bytes, decode "
        "and prefill seconds; a dash means that a part was not measured.",
        "",
    ]
    for section in sections:
        lines += [f"## {section.name}", "", f"{section.about()}.", ""]
        if warning := section.warning():
            lines += [f"**{warning}**", ""]
        for table in section.tables:
            lines += [f"{table.title}:", "", table.markdown()]
        lines += [*(f"![{plot.label}]({plot.name}.svg)" for plot in section.plots), ""]
        lines += [f"    {command(section.config)}", ""]
    if shared:
        lines += ["## Levels by layer", "", *(f"![{plot.label}]({plot.name}.svg)" for plot in shared), ""]
    if extra:
        lines += ["## Adaptation", "", f"{ABOUT}", ""]
        for table in extra.tables:
            lines += [f"{table.title}:", "", table.markdown()]
        lines += [*(f"![{plot.label}]({plot.name}.svg)" for plot in extra.plots), ""]
    return "\n".join(lines).rstrip() + "\n"
