"""The output of `inspect`: plain values for --json, tables for a terminal, and a plot.

All of it comes from a manifest, an untrusted file: numbers are checked before they are used, and text is printed
without the control characters that a terminal would obey.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from hf_cachegen.artifact import TEXT_FILE, Reader, TensorEntry, read_text
from hf_cachegen.cli.output import plain, size_text
from hf_cachegen.codec.geometry import Geometry
from hf_cachegen.errors import ManifestError

MAX_ROWS = 128
"""Number of layers in a table; --json has all."""
MAX_TEXT_BYTES = 1 << 20
"""Longest text whose beginning is shown: its checksum needs all of it."""
MAX_BEGINNING, MAX_SHOWN = 200, 80
"""Characters of a text in --json, and in a table."""
PLOT_SUFFIXES = (".png", ".pdf", ".svg")
PLOT_INCHES = (9.0, 6.0)
PLOT_DPI = 120


def describe(reader: Reader) -> dict[str, Any]:
    """Return the contents of the manifest, and the sizes and ratios that follow from them, as plain values."""
    manifest = reader.manifest
    geometry = Geometry.from_dict(manifest.geometry)
    kl = _numbers(manifest.report, "profile_kl", "report", manifest.levels)
    exact_bytes = geometry.nbytes + _state_bytes(manifest.states)
    levels: list[dict[str, float]] = []
    for level in range(1, manifest.levels + 1):
        size = reader.nbytes_at(level)
        levels.append({
            "level": level,
            "bytes": size,
            "ratio": exact_bytes / size,
            "bits_per_element": 8 * size / geometry.elements if geometry.elements else 0.0,
            **({"profile_kl": kl[level - 1]} if kl else {}),
        })  # fmt: skip
    return {
        "format_version": manifest.format_version,
        "writer": manifest.writer,
        "tokens": geometry.tokens,
        "batch": geometry.batch,
        "dtype": geometry.dtype,
        "exact_bytes": exact_bytes,
        "bytes": reader.nbytes_at(),
        "chunks": len(manifest.chunks),
        "levels": levels,
        **({"states": _states(manifest.states)} if manifest.states else {}),
        "files": dict(sorted(reader.sizes.items())),
        "layers": _layers(manifest.report, geometry, manifest.levels),
        "codec": manifest.codec,
        "profile": _profile(manifest.codec),
        "fingerprint": manifest.fingerprint,
        "extra": manifest.extra,
        "text": _text(reader),
    }


def _state_bytes(entries: Sequence[TensorEntry]) -> int:
    """Return the exact bytes of the states that a cache holds at one position: those of the last one."""
    last = max((entry.tokens for entry in entries), default=0)
    return sum(entry.nbytes for entry in entries if entry.tokens == last > 0)


def _states(entries: Sequence[TensorEntry]) -> dict[str, Any]:
    """Return the positions of the named tensors, their number, and their exact bytes."""
    return {
        "checkpoints": sorted({entry.tokens for entry in entries if entry.tokens}),
        "tensors": len(entries),
        "exact_bytes": sum(entry.nbytes for entry in entries),
    }


def _text(reader: Reader) -> dict[str, Any] | None:
    """Return kind, size and beginning of the stored text of the context; None where there is none."""
    entry = reader.manifest.files.get(TEXT_FILE)
    if entry is None:
        return None
    nbytes = sum(segment.length for segment in entry.segments)
    found = read_text(reader) if nbytes <= MAX_TEXT_BYTES else None
    begins = None if found is None else found.segment()[1].decode("utf-8")[:MAX_BEGINNING]
    return {"kind": ", ".join(segment.name for segment in entry.segments), "bytes": nbytes, "begins": begins}


def _profile(codec: dict[str, Any]) -> dict[str, str | None] | None:
    """Return digest, model and location of the profile that decoding needs; None where it needs none."""
    named = codec.get("profile")
    if not isinstance(named, dict):
        return None
    return {name: value if isinstance(value := named.get(name), str) else None for name in ("digest", "model", "place")}


def _layers(report: dict[str, Any], geometry: Geometry, levels: int) -> list[dict[str, Any]]:
    """Return for each layer its geometry and its measured bits and errors by level, for K and V."""
    rows = report.get("layers")
    if rows is None:
        return [layer.to_dict() for layer in geometry.layers]
    if not isinstance(rows, list) or len(rows) != len(geometry.layers):
        raise ManifestError(f"expected a list of {len(geometry.layers)} objects in report.layers, one for each layer")
    result = []
    for index, (layer, row) in enumerate(zip(geometry.layers, rows, strict=True)):
        where = f"report.layers[{index}]"
        measured = {name: _numbers(row, name, where, levels) for name in ("k_bits", "v_bits", "k_error", "v_error")}
        result.append({**layer.to_dict(), **{name: values for name, values in measured.items() if values is not None}})
    return result


def _numbers(row: Any, name: str, where: str, levels: int) -> list[float] | None:
    values = row.get(name) if isinstance(row, dict) else None
    if values is None:
        return None
    if not isinstance(values, list) or len(values) != levels or not all(_is_number(value) for value in values):
        raise ManifestError(f"expected a list of {levels} numbers in {where}.{name}, got {values!r:.80}")
    return [float(value) for value in values]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def tables(found: dict[str, Any], title: str) -> RenderableType:
    """Format the result of `describe` for a terminal."""
    return Group(_facts(found, title), _level_table(found), _layer_table(found), *_notes(found))


def _facts(found: dict[str, Any], title: str) -> Table:
    table = Table(title=plain(title), title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    rows = f" x {found['batch']} rows" if found["batch"] > 1 else ""
    table.add_row("context", f"{found['tokens']:,} tokens{rows}, {found['dtype']}, {found['chunks']} chunks")
    if states := found.get("states"):
        positions = ", ".join(f"{position:,}" for position in states["checkpoints"][:MAX_ROWS]) or "no number of"
        table.add_row("states", f"after {positions} tokens, {size_text(states['exact_bytes'])} before coding")
    table.add_row("exact cache", size_text(found["exact_bytes"]))
    table.add_row("artifact", f"{size_text(found['bytes'])} in {len(found['files'])} files")
    if (text := found["text"]) is not None:
        shown = "" if text["begins"] is None else f": {_short(text['begins'], MAX_SHOWN)}"
        table.add_row(plain(text["kind"]), plain(f"stored, {size_text(text['bytes'])}{shown}"))
    table.add_row("format", f"{found['format_version']}, written by {plain(found['writer'] or 'unknown')}")
    for name, value in sorted(found["codec"].items()):
        if name != "profile":
            table.add_row(f"codec {plain(name)}", plain(_short(value, 400)))
    if (profile := found["profile"]) is not None:
        shown = f"{profile['digest'] or 'no digest'}, of model {profile['model'] or 'unknown'}"
        table.add_row("profile", plain(_short(shown, 200)))
        if profile["place"]:
            table.add_row("profile location", plain(_short(profile["place"], 200)))
    for name, value in sorted((found["fingerprint"] or {"": "none"}).items()):
        if value:
            table.add_row(f"fingerprint {plain(name)}".strip(), plain(_short(value, 80)))
    return table


def _short(value: Any, most: int) -> str:
    text = ", ".join(f"{name}={inner}" for name, inner in value.items()) if isinstance(value, dict) else str(value)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _level_table(found: dict[str, Any]) -> Table:
    table = Table(title="bytes to load, by level", title_justify="left", box=box.SIMPLE_HEAD)
    measured = all("profile_kl" in row for row in found["levels"])
    for name in ("level", "bytes", "ratio", "bits per element", *(["KL of samples"] if measured else [])):
        table.add_column(name, justify="right")
    for row in found["levels"]:
        size, bits = size_text(row["bytes"]), row["bits_per_element"]
        kl = [f"{row['profile_kl']:.2g}"] if measured else []
        table.add_row(str(row["level"]), size, f"{row['ratio']:.1f}x", f"{bits:.2f}", *kl)
    return table


def _layer_table(found: dict[str, Any]) -> Table:
    layers = found["layers"]
    title = "bits per element and relative error by layer, at level 1 and at the finest level"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("layer", "kind", "K", "V", "K bits", "V bits", "K error %", "V error %"):
        table.add_column(name, justify="left" if name == "kind" else "right")
    for index, row in enumerate(layers[:MAX_ROWS]):
        kind = f"{row['kind']} {row['window']}" if row.get("window") else row["kind"]
        table.add_row(
            str(index), kind, f"{row['heads']}x{row['k_dim']}", f"{row['v_heads']}x{row['v_dim']}",
            _ends(row.get("k_bits"), "{:.2f}"), _ends(row.get("v_bits"), "{:.2f}"),
            _ends(row.get("k_error"), "{:.1f}", 100), _ends(row.get("v_error"), "{:.1f}", 100),
        )  # fmt: skip
    if len(layers) > MAX_ROWS:
        table.caption = f"and {len(layers) - MAX_ROWS} more (--json has all)"
    return table


def _ends(values: list[float] | None, form: str, unit: float = 1) -> str:
    if not values:
        return "-"
    shown = values if len(values) == 1 else (values[0], values[-1])
    return "/".join(form.format(value * unit) for value in shown)


def _notes(found: dict[str, Any]) -> list[str]:
    notes = ["errors were not measured while encoding (--no-measure)"]
    if all("k_error" in layer for layer in found["layers"]):
        notes = ["errors are relative L2 errors of the decoded keys and values, measured while encoding"]
    if found["profile"] is not None:
        notes.append("the profile is stored once for its model, and is not included in the sizes")
    if any("profile_kl" in row for row in found["levels"]):
        notes.append("KL is in nats per token, measured on held-out samples when the profile was learnt")
    return notes


def plot(found: dict[str, Any], target: Path) -> None:
    """Plot bits per element and relative errors by layer, in the format of the file's suffix.

    Raises:
        ManifestError: the artifact's report has neither.
    """
    layers = found["layers"]
    panels = [
        (label, name)
        for label, name in (("bits per element", "bits"), ("relative L2 error", "error"))
        if all(f"k_{name}" in layer and f"v_{name}" in layer for layer in layers)
    ]
    if not panels:
        raise ManifestError(
            "expected bits or errors by layer in the artifact's report, found none: encode with --measure to plot them"
        )
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=PLOT_INCHES, dpi=PLOT_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)
    for axes, (label, name) in zip(grid[:, 0], panels, strict=True):
        for level in found["levels"]:
            position = level["level"] - 1
            for side, style in (("k", "o-"), ("v", "s--")):
                values = [layer[f"{side}_{name}"][position] for layer in layers]
                label_text = f"{side.upper()}, level {position + 1}"
                axes.plot(values, style, color=f"C{position}", markersize=4, label=label_text)
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    axes.set_xlabel("layer")
    axes.xaxis.get_major_locator().set_params(integer=True)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper")
    figure.suptitle(f"{found['tokens']:,} tokens, {size_text(found['bytes'])} of {size_text(found['exact_bytes'])}")
    figure.savefig(target)
