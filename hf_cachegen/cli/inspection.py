"""The commands `inspect` and `verify`: show an artifact, and check it. Neither needs a model."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console

from hf_cachegen.artifact import Reader
from hf_cachegen.cli.models import load_for, required_profile
from hf_cachegen.cli.options import (
    OUTPUT_PATH,
    artifact_argument,
    decoding_profile_option,
    key_option,
    model_options,
    output_options,
    trust_options,
)
from hf_cachegen.cli.output import byte_bar, print_json
from hf_cachegen.cli.views import PLOT_SUFFIXES, describe, plot, tables
from hf_cachegen.codec.geometry import Geometry
from hf_cachegen.errors import WrongModelError
from hf_cachegen.stores import Access, open_store


@click.command("inspect", short_help="Show the contents of an artifact.")
@artifact_argument
@click.option("--plot", "target", type=OUTPUT_PATH,
              help="Output file for a plot of bits and errors by layer (.png, .pdf or .svg).")  # fmt: skip
@key_option
@output_options
def inspect(artifact: str, target: Path | None, key: str | None, as_json: bool, debug: bool) -> None:
    """Show the contents of ARTIFACT: geometry, levels, sizes, bits and errors by layer, fingerprint."""
    found = describe(Reader(open_store(artifact, Access(key=key))))
    if target is not None:
        if target.suffix.lower() not in PLOT_SUFFIXES:
            raise click.BadParameter(f"expected a .png, .pdf or .svg file, got {target}", param_hint="'--plot'")
        plot(found, target)
    if as_json:
        print_json({"artifact": str(artifact), **found, "plot": None if target is None else str(target)})
    else:
        Console().print(tables(found, str(artifact)))


@click.command("verify", short_help="Check every byte of an artifact.")
@artifact_argument
@click.option("--model", help="Model (folder or Hub id) to compare the fingerprint with, and its tokenizer.")
@decoding_profile_option
@trust_options
@model_options
@output_options
def verify(
    artifact: str, model: str | None, profile: str, public_key: str | None, key: str | None, revision: str | None,
    device: str | None, as_json: bool, debug: bool,
) -> None:  # fmt: skip
    """Check every byte of ARTIFACT against its checksums. With --model, also check that it belongs to that model.

    With --model or --profile LOCATION, also check that the required profile is available.
    """
    access = Access(public_key=public_key, key=key)
    reader = Reader(open_store(artifact, access))
    with byte_bar("verifying", as_json) as progress:
        checked = reader.verify(progress=progress)
    required = None
    if model is None and profile not in ("auto", "none"):
        required = required_profile(artifact, profile, "", access)
    if model is not None:
        loaded, tokenizer, required = load_for(
            artifact, access, model, profile, revision=revision, device=device, as_json=as_json
        )
        from hf_cachegen.models.fingerprint import Fingerprint
        from hf_cachegen.models.requirements import require_geometry

        if reader.manifest.fingerprint is None:
            raise WrongModelError(
                f"{artifact} has no fingerprint, so it cannot be compared with a model: verify it without --model, or "
                "encode it again with its model"
            )
        Fingerprint.from_dict(reader.manifest.fingerprint).check(loaded, tokenizer)
        require_geometry(loaded.config, Geometry.from_dict(reader.manifest.geometry))
    digest = None if required is None else required.digest
    if as_json:
        print_json({"artifact": str(artifact), "sound": True, "bytes": checked, "model": model, "profile": digest})
    else:
        belongs = "" if model is None else f", made with {model}"
        needs = "" if digest is None else f", with profile {digest}"
        click.echo(f"{artifact}: sound, {checked:,} bytes in {len(reader.sizes)} files{belongs}{needs}")
