"""docs/models.md, generated from the results of the sweep."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

HEADER = """\
# Models

This page is generated: `python -m tests.architectures --write` examines every family of the causal-LM mapping and of
the image-text mapping of the installed Transformers, and writes `docs/results/architectures.json` and this page. It
holds for Transformers {release} with PyTorch {torch}; families of other releases work where they keep the same kinds of
layers.

Each family has a tiny random model, whose configuration one set of rules derives from the default one
(`tests/architectures/shrink.py`). An image-text model gets text alone, and carries a plus in this page. *Passes* means
all of:

- a lossless artifact, saved and loaded, gives the tokens of the stock `generate` for a question, for the context
  itself, for a shorter prompt, for a prompt that leaves the context in the middle, for a batch of two with left padding
  and for beams;
- the logits of the question are those of the stock forward pass over the same split, bit for bit where two stock runs
  agree; for models with recurrent states up to rounding;
- the logits of the finest lossy level are finite and close.

| outcome | families |
|---|---|
{counts}
"""
SECTIONS = {
    "fails": ("Fail", "The package gives another result than the stock model."),
    "refused": ("Refused", "The package refuses the model with a typed error."),
    "stock fails": (
        "Stock generation fails",
        "The stock `generate` itself fails for the tiny model with text alone: it needs other inputs, or Transformers "
        "has an error.",
    ),
    "not built": ("Not built", "Transformers cannot build the tiny model, mostly for a missing optional dependency."),
}
"""Outcomes other than "passes", each with its title and what it means."""


def render(results: dict[str, Any]) -> str:
    """Return the page.

    Args:
        results: the content of the JSON file: the releases, and an outcome for each family.
    """
    families: dict[str, dict[str, Any]] = results["families"]
    found = {
        status: [name for name, each in families.items() if each["status"] == status]
        for status in ("passes", *SECTIONS)
    }
    rows = [(status, str(len(names))) for status, names in found.items()]
    counts = "\n".join(_row(row) for row in [*rows, ("all", str(len(families)))])
    parts = [HEADER.format(release=results["transformers"], torch=results["torch"], counts=counts), _passing(families)]
    for status, (title, meaning) in SECTIONS.items():
        if found[status]:
            table = _table(
                ("family", "class", "reason"),
                ((name, families[name]["model_class"], families[name]["reason"]) for name in found[status]),
            )
            parts.append(f"## {title}\n\n{meaning}\n\n{table}")
    return "\n".join(parts)


def _passing(families: dict[str, dict[str, Any]]) -> str:
    rows = (
        (name, each["model_class"], ", ".join(each["layers"]), "; ".join(f"{k}: {v}" for k, v in each["notes"].items()))
        for name, each in families.items()
        if each["status"] == "passes"
    )
    meaning = "A note says what the stock model itself cannot do; the check is then left out."
    return f"## Pass\n\n{meaning}\n\n" + _table(("family", "class", "cache layers", "note"), rows)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    return "\n".join([_row(head), _row(tuple("---" for _ in head)), *map(_row, rows)]) + "\n"


def _row(cells: tuple[str, ...]) -> str:
    texts = [cell.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("[", "\\[") for cell in cells]
    return f"| {' | '.join(texts)} |"
