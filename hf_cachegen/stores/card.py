"""The card of an artifact or a profile on the Hub: its model, its sizes, how to load it, and what it reveals."""

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
    """Return the card of an artifact: Markdown with the metadata that the Hub shows.

    Args:
        reader: the artifact.
        repo_id: "user/name".
        subfolder: folder within the repository.
        description: what the context is, in the user's words.

    Raises:
        ManifestError: the geometry in the manifest is not valid.
    """
    manifest = reader.manifest
    geometry = Geometry.from_dict(manifest.geometry)
    fingerprint = manifest.fingerprint or {}
    model, commit = _model(fingerprint)
    tags = {"tags": ["kv-cache", "cachegen", "hf_cachegen"], "pretty_name": f"KV cache of {geometry.tokens} tokens"}
    metadata = {**tags, **({"base_model": [model]} if model else {}), "viewer": False}
    location = json.dumps(repo_id) + (f", subfolder={json.dumps(subfolder)}" if subfolder else "")
    about = [
        ("context", f"{geometry.tokens:,} tokens" + (f": {_line(description)}" if description else "")),
        ("model", (model or "a local model") + (f" at commit `{commit}`" if commit else "")),
        ("cache", _cache(geometry)),
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
        f"cache = CacheGenCache.from_pretrained({location}, model=model)",
        "generate(model, input_ids, cache=cache)  # input_ids: the context, then the question",
        "```",
        "",
        "Any other model, prompt or dtype is refused with an error.",
    ]) + "\n"  # fmt: skip


def sealed_card(nbytes: int, repo_id: str, *, subfolder: str | None = None, description: str = "") -> str:
    """Return the card of a sealed artifact, which reveals its size in bytes and nothing else."""
    location = json.dumps(repo_id) + (f", subfolder={json.dumps(subfolder)}" if subfolder else "")
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
        f'cache = CacheGenCache.from_pretrained({location}, model=model, key="secret.key")  # the key that sealed it',
        "```",
    ]) + "\n"  # fmt: skip


def profile_card(about: Mapping[str, Any], pin: Pin, repo_id: str) -> str:
    """Return the card of a profile's repository.

    Args:
        about: the description in the profile's file.
        pin: its hashes and its size.
        repo_id: "user/name".
    """
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
        "Learnt from one model, so that its KV caches take a fraction of the bits. A cache that was made with a",
        "profile can be read with that profile alone. Every profile that was pushed here is kept under its digest.",
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
    """Return a table of the measured divergence and bits of each level; nothing where they were not measured."""
    try:
        table = [
            f"| {level} | {float(row['kl']):.6f} | {float(row['bits_per_element']):.2f} |"
            for level, row in enumerate(rows, 1)
        ]
    except (KeyError, TypeError, ValueError):
        return []
    return ["| level | KL, nats per token | bits per element |", "|---:|---:|---:|", *table, ""]


def _cache(geometry: Geometry) -> str:
    if not geometry.layers:
        return f"states of recurrent layers alone, {geometry.dtype}"
    layer = geometry.layers[0]
    kinds = ", ".join(sorted({layer.kind for layer in geometry.layers}))
    return (
        f"{len(geometry.layers)} layers ({kinds}), {layer.heads} x {layer.k_dim} keys and "
        f"{layer.v_heads} x {layer.v_dim} values in the first, {geometry.dtype}"
    )


def _model(fingerprint: dict[str, Any]) -> tuple[str | None, str | None]:
    """Return (repository, commit) of the model; a local folder's name stays private."""
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
    """Return text for one line of a table, without line breaks, control characters, Markdown and HTML."""
    plain = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", plain)[:500]
