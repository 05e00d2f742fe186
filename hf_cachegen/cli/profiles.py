"""The commands `profile`, `push-profile` and `pull-profile`: learn the profile of a model, and copy it to the Hub and
back.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import click

from hf_cachegen.artifact import Limits
from hf_cachegen.cli.models import load_model
from hf_cachegen.cli.options import (
    LOCAL_PATH,
    OUTPUT_PATH,
    access_options,
    learning_dtype_option,
    learning_options,
    location_argument,
    model_options,
    output_options,
    overwrite_option,
    pushing_options,
    read_text,
    require_writable,
    source_model_option,
)
from hf_cachegen.cli.output import bars, logged, print_json, size_text, step
from hf_cachegen.cli.samples import draw, from_rows, from_text
from hf_cachegen.errors import ArtifactExistsError
from hf_cachegen.stores import Access
from hf_cachegen.stores.profiles import REPO_TYPE, fetch


@click.command("profile", short_help="Learn the profile of a model.")
@source_model_option
@click.option(
    "--text", "texts", multiple=True, type=click.File("r", encoding="utf-8"),
    help="Text file like the ones to be cached; - reads stdin; repeatable.",
)  # fmt: skip
@click.option(
    "--samples-jsonl", "rows", type=click.File("r", encoding="utf-8"),
    help='File with a sample in each line: {"context": ..., "continuation": ...}.',
)  # fmt: skip
@click.option("--out", type=OUTPUT_PATH, help="Output folder or file.  [default: the model's folder]")
@overwrite_option("Replace an existing profile, and discard the progress of an interrupted run.")
@click.option("--context-tokens", type=click.IntRange(min=2), default=1024, show_default=True,
              help="Length of the contexts that a text is cut into, in tokens.")  # fmt: skip
@click.option("--continuation-tokens", type=click.IntRange(min=1), default=128, show_default=True,
              help="Length of the text after each context by which its errors are weighted, in tokens.")  # fmt: skip
@click.option("--samples", "most", type=click.IntRange(min=1), default=30, show_default=True,
              help="Maximum number of samples, drawn evenly from the files.")  # fmt: skip
@learning_options
@model_options
@learning_dtype_option
@output_options
def learn(
    model: str, texts: tuple[Any, ...], rows: Any, out: Path | None, overwrite: bool, context_tokens: int,
    continuation_tokens: int, most: int, revision: str | None, device: str | None, dtype: str, as_json: bool,
    debug: bool, **options: Any,
) -> None:  # fmt: skip
    """Learn the profile of a model from texts, for encode --transform klt.

    Choose texts that represent every use of the caches. Keep the profile: artifacts that were encoded with it cannot
    be read without it. An interrupted run continues when the same command is run again (its progress is kept in a file
    .learning next to the profile); --overwrite starts from the beginning.
    """
    if not texts and rows is None:
        raise click.UsageError("expected --text, --samples-jsonl or both", click.get_current_context())
    path = _output_file(model, out, overwrite)
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
    journal = path.with_name(path.name + ".learning")
    if overwrite:
        journal.unlink(missing_ok=True)
    with logged("hf_cachegen.profiles.learning", as_json):
        profile = learn_profile(loaded, samples, **options, progress=bars(as_json), journal=journal)
    path = profile.save(path, overwrite=overwrite)
    journal.unlink(missing_ok=True)
    found: dict[str, Any] = {
        "profile": str(path),
        "bytes": path.stat().st_size,
        "digest": profile.digest,
        "samples": len(samples),
        "components": sum(len(group.synthesis) for group in profile.groups),
        "channels": sum(group.synthesis.shape[1] for group in profile.groups),
        "rotation": profile.rotary.style,
        "across_layers": "chained" if profile.reach else "joint",
        "levels": [{"level": level, **row} for level, row in enumerate(profile.about["measured"], 1)],
        "predictors": [
            {"layers": one.layer, "rank": one.rank, "ridge": one.about["ridge"], "levels": one.about["measured"]}
            for one in profile.predictors
        ],
        "seconds": time.perf_counter() - start,
    }
    if as_json:
        print_json(found)
        return
    click.echo(f"{path}: {size_text(found['bytes'])}, learnt from {len(samples)} samples in {found['seconds']:.1f} s")
    click.echo(f"  digest {profile.digest}")
    click.echo(f"  {found['components']:,} components kept of {found['channels']:,}, {found['across_layers']} layers")
    for row in found["levels"]:
        bits = row["bits_per_element"]
        click.echo(f"  level {row['level']}: KL {row['kl']:.6f} nats per token, {bits:.2f} bits per element")
    for one in found["predictors"]:
        bits = ", ".join(f"{row['bits_per_element']:.2f} at KL {row['kl']:.6f}" for row in one["levels"])
        click.echo(f"  predicted from {one['layers']} layers: bits per element {bits}")
    click.echo("(measured on held-out samples)")


def _output_file(model: str, out: Path | None, overwrite: bool) -> Path:
    """Return the file to write the profile to. Raises ArtifactExistsError, ConfigError and UsageError, before
    anything slow.
    """
    from hf_cachegen.profiles.files import PROFILE_FILE

    model = os.path.expanduser(model)
    if out is None and not os.path.isdir(model):
        raise click.UsageError(
            f"expected --out, since the model {model!r} is not a local folder", click.get_current_context()
        )
    folder = Path(model) if out is None else out
    path = folder if folder.suffix == ".safetensors" else folder / PROFILE_FILE
    if path.exists() and not overwrite:
        raise ArtifactExistsError(
            f"{path} already exists, and artifacts may need it: choose another folder with --out, or use --overwrite"
        )
    require_writable(path.parent)
    return path


@click.command("push-profile", short_help="Push the profile of a model to the Hub.")
@click.argument("profile", type=LOCAL_PATH)
@click.argument("repo_id", required=False)
@click.option("--revision", help="Branch of the repository.  [default: main]")
@pushing_options("Upload a profile", "Make the repository public.")
@output_options
def push_profile(
    profile: Path, repo_id: str | None, revision: str | None, public: bool, message: str, create_pr: bool,
    as_json: bool, debug: bool,
) -> None:  # fmt: skip
    """Push PROFILE (a file, or a folder that holds one) to the repository REPO_ID, with a card, in one commit.

    REPO_ID defaults to <you>/<model>-cachegen-profile, which is searched automatically by readers of your artifacts
    and, if the model is yours, by its users. An earlier profile stays available under its digest.
    """
    data, _ = fetch(profile, Access(), Limits())
    from hf_cachegen.profiles.files import Profile
    from hf_cachegen.stores.publishing import publish_profile
    from hf_cachegen.stores.pushing import own_repository

    found = Profile.from_bytes(data)
    repo_id = repo_id or own_repository(found.pin.model)
    pushed = publish_profile(
        data, found.pin, found.about, repo_id, private=not public, revision=revision, commit_message=message,
        create_pr=create_pr, progress=bars(as_json),
    )  # fmt: skip
    if as_json:
        print_json({
            "profile": str(profile), "digest": found.digest, "repo_id": repo_id, "url": pushed.url,
            "commit": pushed.commit, "place": pushed.location,
        })  # fmt: skip
    else:
        click.echo(pushed.url)


@click.command("pull-profile", short_help="Copy a profile into a folder.")
@location_argument
@click.argument("out", type=OUTPUT_PATH)
@click.option("--digest", help="Digest of the profile, if the repository has several.")
@overwrite_option("Replace a different existing profile.")
@access_options(REPO_TYPE)
@output_options
def pull_profile(
    location: str, out: Path, digest: str | None, overwrite: bool, revision: str | None, repo_type: str,
    subfolder: str | None, as_json: bool, debug: bool,
) -> None:  # fmt: skip
    """Copy the profile at LOCATION (a repository "user/name", a URL or a folder) into the folder OUT, for example the
    model's folder.
    """
    with step(f"fetching {location}", as_json):
        access = Access(revision=revision, repo_type=repo_type, subfolder=subfolder)
        data, where = fetch(location, access, Limits(), digest)
    from hf_cachegen.profiles.files import Profile, write_file

    found = Profile.from_bytes(data)
    path = write_file(out, data, overwrite=overwrite)
    if as_json:
        print_json({"place": where or location, "profile": str(path), "digest": found.digest, "bytes": len(data)})
    else:
        click.echo(f"{path}: {size_text(len(data))}, digest {found.digest}")
