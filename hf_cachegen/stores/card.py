"""The card of an artifact on the Hub: whose cache it is, what it costs, how to load it, and what it gives away."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from hf_cachegen.artifact import Manifest, Reader
from hf_cachegen.artifact.pin import Pin
from hf_cachegen.codec.geometry import Geometry

_REPO_ID = re.compile(r"[\w][\w.-]*/[\w.-]+")


def card(reader: Reader, repo_id: str, *, subfolder: str | None = None, description: str = "") -> str:
    """Markdown with the metadata that the Hub shows. description: what the context is, in the pusher's words.

    Raises what `Geometry.from_dict` raises for a manifest that is not sound.
    """
    manifest = reader.manifest
    geometry = Geometry.from_dict(manifest.geometry)
    fingerprint = manifest.fingerprint or {}
    model, commit = _model(fingerprint)
    tags = {"tags": ["kv-cache", "cachegen", "hf_cachegen"], "pretty_name": f"KV cache of {geometry.tokens} tokens"}
    metadata = {**tags, **({"base_model": [model]} if model else {}), "viewer": False}
    place = json.dumps(repo_id) + (f", subfolder={json.dumps(subfolder)}" if subfolder else "")
    layer = geometry.layers[0]
    kinds = ", ".join(sorted({layer.kind for layer in geometry.layers}))
    about = [
        ("context", f"{geometry.tokens:,} tokens" + (f": {_line(description)}" if description else "")),
        ("model", (model or "a local model") + (f" at commit `{commit}`" if commit else "")),
        ("cache", f"{len(geometry.layers)} layers ({kinds}), {layer.heads} x {layer.k_dim} keys and "
                  f"{layer.v_heads} x {layer.v_dim} values in the first, {geometry.dtype}"),
        ("exact size", f"{geometry.nbytes:,} bytes"),
        ("written by", _line(manifest.writer)),
    ]  # fmt: skip
    return "\n".join([
        "---",
        *(f"{name}: {json.dumps(value)}" for name, value in metadata.items()),
        "---",
        f"# A KV cache of {geometry.tokens:,} tokens",
        "",
        "The attention keys and values that a language model computed for one text, compressed with CacheGen. With it,",
        "`generate()` answers questions about the text without reading it again.",
        "",
        "> **This cache reveals its text.** The token ids are part of it, and keys and values can be turned back into",
        "> tokens. Share it only with those who may read the text itself.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in about),
        "",
        *_levels(reader, manifest, geometry),
        "",
        "```python",
        "from transformers import AutoModelForCausalLM",
        "from hf_cachegen import CacheGenCache, generate",
        "",
        f"model = AutoModelForCausalLM.from_pretrained({json.dumps(model or 'the model that made it')}, "
        f'dtype="{geometry.dtype}")',
        f"cache = CacheGenCache.from_pretrained({place}, model=model)",
        "generate(model, input_ids, cache=cache)  # input_ids: the context, then the question",
        "```",
        "",
        "Any other model, prompt or dtype is refused with an error.",
    ]) + "\n"  # fmt: skip


def sealed_card(nbytes: int, repo_id: str, *, subfolder: str | None = None, description: str = "") -> str:
    """Markdown for a sealed artifact, of which nothing but its size is known to those who have not its key."""
    place = json.dumps(repo_id) + (f", subfolder={json.dumps(subfolder)}" if subfolder else "")
    metadata = {"tags": ["kv-cache", "cachegen", "hf_cachegen"], "viewer": False}
    return "\n".join([
        "---",
        *(f"{name}: {json.dumps(value)}" for name, value in metadata.items()),
        "---",
        "# A sealed KV cache",
        "",
        f"The cache of one text, encrypted (AES-256-GCM), {nbytes:,} bytes"
        + (f": {_line(description)}" if description else "") + ".",
        "",
        "```python",
        "from hf_cachegen import CacheGenCache",
        "",
        f'cache = CacheGenCache.from_pretrained({place}, model=model, key="secret.key")  # what it was sealed with',
        "```",
    ]) + "\n"  # fmt: skip


def profile_card(about: Mapping[str, Any], pin: Pin, repo_id: str) -> str:
    """Markdown for the repository of a profile. about: what the profile says of itself."""
    fingerprint = about.get("fingerprint")
    model, commit = _model(fingerprint if isinstance(fingerprint, dict) else {})
    metadata = {
        "tags": ["cachegen-profile", "kv-cache", "cachegen", "hf_cachegen"],
        **({"base_model": [model]} if model else {}),
    }
    shown = [
        ("model", (model or "a local model") + (f" at commit `{commit}`" if commit else "")),
        ("learnt from", f"{about.get('samples', 'unknown')!s:.20} samples"),
        ("size", f"{pin.nbytes or 0:,} bytes"),
        ("digest (XXH3-128)", f"`{pin.digest}`"),
        ("SHA-256", f"`{pin.sha256}`"),
    ]
    name = json.dumps(model or "the model that it was learnt from")
    return "\n".join([
        "---",
        *(f"{name}: {json.dumps(value)}" for name, value in metadata.items()),
        "---",
        f"# A CacheGen profile{f' of {model}' if model else ''}",
        "",
        "What was learnt about one model so that its KV caches are stored in a fraction of the bits. Caches that were",
        "made with a profile can be read with that one alone; each that was in use here is kept under its digest.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {_line(value) if name == 'learnt from' else value} |" for name, value in shown),
        "",
        *_measured(about.get("measured")),
        "```python",
        "from transformers import AutoModelForCausalLM",
        "from hf_cachegen import CacheGenCache",
        "",
        f"model = AutoModelForCausalLM.from_pretrained({name})",
        f"cache = CacheGenCache.from_context(model, input_ids, profile={json.dumps(repo_id)})",
        "```",
    ]) + "\n"  # fmt: skip


def _measured(rows: Any) -> list[str]:
    """A table of what each level diverges and takes, as far as it was measured."""
    try:
        table = [
            f"| {level} | {float(row['kl']):.6f} | {float(row['bits_per_element']):.2f} |"
            for level, row in enumerate(rows, 1)
        ]
    except (KeyError, TypeError, ValueError):
        return []
    return ["| level | KL, nats per token | bits per element |", "|---:|---:|---:|", *table, ""]


def _model(fingerprint: dict[str, Any]) -> tuple[str | None, str | None]:
    """(repository, commit) of the model; a local folder's name is nobody's business."""
    model, commit = fingerprint.get("model_id"), fingerprint.get("commit")
    return (
        model if isinstance(model, str) and _REPO_ID.fullmatch(model) else None,
        commit if isinstance(commit, str) and re.fullmatch(r"[0-9a-f]{40}", commit) else None,
    )


def _levels(reader: Reader, manifest: Manifest, geometry: Geometry) -> list[str]:
    rows = ["| level | bytes to fetch | compression | bits per element | relative error of K | of V |",
            "|---:|---:|---:|---:|---:|---:|"]  # fmt: skip
    for level in range(1, manifest.levels + 1):
        size = reader.nbytes_at(level)
        errors = [_mean_error(manifest.report, name, level) for name in ("k_error", "v_error")]
        shown = " | ".join("not measured" if error is None else f"{100 * error:.2f} %" for error in errors)
        ratio, bits = geometry.nbytes / size, 8 * size / geometry.elements
        rows.append(f"| {level} | {size:,} | {ratio:.1f} x | {bits:.2f} | {shown} |")
    return [*rows, "", "Errors are relative L2 errors, averaged over the layers."]


def _mean_error(report: dict[str, Any], name: str, level: int) -> float | None:
    try:
        found = [float(row[name][level - 1]) for row in report["layers"]]
    except (KeyError, IndexError, TypeError, ValueError):
        return None
    return sum(found) / len(found) if found else None


def _line(text: str) -> str:
    """One line of a table: no line breaks, no control characters, nothing that Markdown or HTML would act on."""
    plain = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", plain)[:500]
