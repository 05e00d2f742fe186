"""The command `profile`: learns what makes one model's caches small from texts like those that it will cache."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import click

from hf_cachegen.cli_models import load_model
from hf_cachegen.cli_options import learning_dtype_option, learning_options, model_options, output_options, read_text
from hf_cachegen.cli_output import bars, print_json, step
from hf_cachegen.cli_samples import draw, from_rows, from_text
from hf_cachegen.cli_views import size_text
from hf_cachegen.errors import ArtifactExistsError


@click.command("profile", short_help="Learn what makes a model's caches small.")
@click.option("--model", required=True, help="Folder or Hub id of a causal language model.")
@click.option(
    "--text", "texts", multiple=True, type=click.File("r", encoding="utf-8"),
    help="A text like those to be cached (- for stdin); may be repeated.",
)  # fmt: skip
@click.option(
    "--samples-jsonl", "rows", type=click.File("r", encoding="utf-8"),
    help='Samples of a task: in each line {"context": ..., "continuation": ...}.',
)  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write it into.  [default: the model's folder]")
@click.option("--overwrite", is_flag=True, help="Replace a profile that is there, and what a killed run has left.")
@click.option("--context-tokens", type=click.IntRange(min=2), default=1024, show_default=True,
              help="Tokens of each context that a text is cut into.")  # fmt: skip
@click.option("--continuation-tokens", type=click.IntRange(min=1), default=128, show_default=True,
              help="Tokens that follow each context, by which errors in it are weighed.")  # fmt: skip
@click.option("--samples", "most", type=click.IntRange(min=1), default=128, show_default=True,
              help="At most so many samples, drawn evenly from the files.")  # fmt: skip
@learning_options
@model_options
@learning_dtype_option
@output_options
def learn(
    model: str, texts: tuple[Any, ...], rows: Any, out: Path | None, overwrite: bool, context_tokens: int,
    continuation_tokens: int, most: int, revision: str | None, device: str | None, dtype: str, as_json: bool,
    debug: bool, **options: Any,
) -> None:  # fmt: skip
    """Learn a model's profile from texts, for encode --transform klt.

    Take texts of every use that the caches are meant for. Artifacts made with a profile can be read with that one
    alone: keep it. Killed, the same command goes on where it was (it keeps a file .learning beside the profile, as long
    as it takes); --overwrite begins anew.
    """
    if not texts and rows is None:
        raise click.UsageError("give --text or --samples-jsonl, or both", click.get_current_context())
    place = _place(model, out, overwrite)
    with step("loading the model", as_json):
        loaded, tokenizer = load_model(model, revision=revision, dtype=dtype, device=device)
        loaded.requires_grad_(False)
    with step("reading the texts", as_json):
        sources = [from_text(tokenizer, read_text(text), context_tokens, continuation_tokens) for text in texts]
        if rows is not None:
            sources.append(from_rows(tokenizer, read_text(rows).split("\n"), rows.name))
        drawn = draw(sources, most, options["seed"])
    import torch

    from hf_cachegen.profiles.learning import learn_profile

    samples = [(torch.tensor([context]), torch.tensor([continuation])) for context, continuation in drawn]
    start = time.perf_counter()
    journal = place.with_name(place.name + ".learning")
    if overwrite:
        journal.unlink(missing_ok=True)
    profile = learn_profile(loaded, samples, **options, progress=bars(as_json), journal=journal)
    path = profile.save(place, overwrite=overwrite)
    journal.unlink(missing_ok=True)
    found: dict[str, Any] = {
        "profile": str(path),
        "bytes": path.stat().st_size,
        "digest": profile.digest,
        "samples": len(samples),
        "components": sum(len(group.synthesis) for group in profile.groups),
        "channels": sum(group.synthesis.shape[1] for group in profile.groups),
        "rotation": profile.rotary.style,
        "levels": [{"level": level, **row} for level, row in enumerate(profile.about["measured"], 1)],
        "seconds": time.perf_counter() - start,
    }
    if as_json:
        print_json(found)
        return
    click.echo(f"{path}: {size_text(found['bytes'])}, learnt from {len(samples)} samples in {found['seconds']:.1f} s")
    click.echo(f"  digest {profile.digest}")
    click.echo(f"  {found['components']:,} components kept of {found['channels']:,}")
    for row in found["levels"]:
        bits = row["bits_per_element"]
        click.echo(f"  level {row['level']}: KL {row['kl']:.6f} nats per token, {bits:.2f} bits per element")
    click.echo("(measured on samples that were held out of the learning)")


def _place(model: str, out: Path | None, overwrite: bool) -> Path:
    """Where the profile goes, found before anything slow begins."""
    from hf_cachegen.artifact import PROFILE_FILE

    model = os.path.expanduser(model)
    if out is None and not Path(model).is_dir():
        raise click.UsageError(f"give --out: {model!r} is not a folder", click.get_current_context())
    folder = Path(model) if out is None else out
    path = folder if folder.suffix == ".safetensors" else folder / PROFILE_FILE
    if path.exists() and not overwrite:
        raise ArtifactExistsError(
            f"there is a profile at {path}, which artifacts may need: write elsewhere with --out, or give --overwrite"
        )
    return path
