"""The command `convert`: convert caches that torch.save wrote to artifacts and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hf_cachegen import strict_json
from hf_cachegen.artifact import Reader
from hf_cachegen.cli.models import load_model
from hf_cachegen.cli.options import (
    OUTPUT_PATH,
    converting_profile_option,
    dtype_option,
    model_options,
    output_options,
    overwrite_option,
)
from hf_cachegen.cli.output import bars, print_json, size_text, step
from hf_cachegen.errors import ConfigError
from hf_cachegen.stores import LocalStore, open_store

if TYPE_CHECKING:
    from hf_cachegen.cache import CacheGenCache


@click.command("convert", short_help="Convert caches of other programs to artifacts and back.")
@click.argument("source")
@click.argument("out", type=OUTPUT_PATH)
@click.option(
    "--to", "form", type=click.Choice(["artifact", "legacy", "dynamic"]), default="artifact", show_default=True,
    help="Output format. legacy: a tuple of (key, value) pairs, dynamic: a DynamicCache, both for torch.load.",
)  # fmt: skip
@click.option("--level", type=click.IntRange(min=1), help="Level to decode; 1 is the coarsest.  [default: the finest]")
@click.option("--input-ids", "ids", type=click.File("rb"),
              help="JSON file with the list of the context's token ids; requires --model.")  # fmt: skip
@click.option("--model", help="Folder or Hub id of the model that filled the cache; requires --input-ids.")
@converting_profile_option
@model_options
@dtype_option
@overwrite_option("Replace an existing output.")
@output_options
@click.pass_context
def convert(
    context: click.Context, /, source: str, out: Path, form: str, level: int | None, ids: Any, model: str | None,
    profile: str, revision: str | None, device: str | None, dtype: str, overwrite: bool, as_json: bool, debug: bool,
) -> None:  # fmt: skip
    """Convert SOURCE to OUT: a cache that torch.save wrote (a tuple of (key, value) pairs, or a DynamicCache) to an
    artifact, or, with --to, an artifact to such a file.

    No code in a torch.save file is run. Without --model and --input-ids the artifact holds tensors only: it can be
    converted back, but not used for generation.
    """
    if (ids is None) != (model is None):
        raise click.UsageError("--model and --input-ids require each other", context)
    if form != "artifact" and ids is not None:
        raise click.UsageError(f"--model and --input-ids require --to artifact, got --to {form}", context)
    if form == "artifact" and level is not None:
        raise click.UsageError("--level requires --to legacy or --to dynamic", context)
    if form == "artifact" and model is None and profile != "auto":
        raise click.UsageError("--profile requires --model, --to legacy or --to dynamic", context)
    from hf_cachegen.artifact.artifact import write
    from hf_cachegen.models.convert import load_cache, save_cache
    from hf_cachegen.profiles.finding import open_with_profile

    chosen = None if profile == "none" else profile
    if form != "artifact":
        with step("decoding", as_json):
            artifact = open_with_profile(open_store(source), chosen)
            save_cache(artifact, out, form, level=level, overwrite=overwrite)  # type: ignore[arg-type]
        found = {"out": str(out), "form": form, "bytes": out.stat().st_size}
    else:
        keys, values = load_cache(source)
        if model is None:
            from hf_cachegen.codec.context import Encoder

            write(Encoder(keys, values, progress=bars(as_json)), out, overwrite=overwrite)
        else:
            options = {"name": model, "revision": revision, "dtype": dtype, "device": device}
            cache = _with_model(keys, values, _token_ids(ids), chosen, options, as_json)
            cache.save_pretrained(out, overwrite=overwrite, progress=bars(as_json))
        found = {"out": str(out), "form": form, "bytes": Reader(LocalStore(out)).nbytes_at()}
    if as_json:
        print_json(found)
    else:
        click.echo(f"{out}: {size_text(found['bytes'])}")  # type: ignore[arg-type]


def _with_model(
    keys: list[Any], values: list[Any], ids: list[int], profile: str | None, options: dict[str, Any], as_json: bool
) -> CacheGenCache:
    from transformers import DynamicCache

    from hf_cachegen.cache import CacheGenCache

    with step("loading the model", as_json):
        loaded, tokenizer = load_model(**options)
    past = DynamicCache()
    for index, (key, value) in enumerate(zip(keys, values, strict=True)):
        past.update(key.to(loaded.device), value.to(loaded.device), index)
    return CacheGenCache.from_cache(past, ids, loaded, profile=profile, tokenizer=tokenizer)


def _token_ids(file: Any) -> list[int]:
    try:
        ids = strict_json.loads(file.read())
    except ValueError as error:
        raise ConfigError(f"{file.name}: expected a JSON list of token ids: {error}") from error
    if not isinstance(ids, list) or not all(type(value) is int and 0 <= value < 1 << 40 for value in ids):
        raise ConfigError(f"{file.name}: expected a JSON list of token ids, such as [1, 15043]")
    return ids
