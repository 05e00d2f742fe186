"""The commands of remote locations: push, pull, ls, sign, seal, serve-check."""

from __future__ import annotations

import os
from pathlib import Path

import click

from hf_cachegen.artifact import PROFILE_FILE, Pin, Reader
from hf_cachegen.cli.options import (
    LOCAL_PATH,
    OUTPUT_PATH,
    access_options,
    key_option,
    location_argument,
    output_options,
    overwrite_option,
    pushing_options,
    pushing_profile_option,
)
from hf_cachegen.cli.output import bars, byte_bar, note, print_json, printable, size_text, step
from hf_cachegen.errors import ProfileError
from hf_cachegen.stores import Access
from hf_cachegen.stores.local import open_folder
from hf_cachegen.stores.profiles import fetch
from hf_cachegen.stores.sealed import sealed_names
from hf_cachegen.stores.survey import find, serve_check
from hf_cachegen.stores.survey import pull as copy_from

_access_options = access_options("dataset")


@click.command("push", short_help="Push an artifact to the Hub.")
@click.argument("folder", type=LOCAL_PATH)
@click.argument("repo_id")
@_access_options
@click.option("--description", default="", help="Description of the context, for the card.")
@pushing_options("Upload a KV cache", "Make the repository public: the text can be recovered from a cache.")
@pushing_profile_option
@click.option("--key", help="Key file (32 bytes) of a sealed artifact, to check every byte before pushing.")
@output_options
def push(
    folder: Path, repo_id: str, revision: str | None, repo_type: str, subfolder: str | None, public: bool,
    description: str, message: str, create_pr: bool, profile: str, key: str | None, as_json: bool, debug: bool,
) -> None:  # fmt: skip
    """Push the artifact in FOLDER, sealed or not, to the repository REPO_ID ("user/name"), with a card, in one commit.

    A missing repository is created, private by default. The access token is that of "hf auth login" or HF_TOKEN.
    """
    sealed = os.path.isdir(folder) and sealed_names(folder)
    profile_file = None if sealed else _profile_of(folder, Reader(open_folder(folder)), profile)
    from hf_cachegen.stores.publishing import publish_artifact

    pushed = publish_artifact(
        folder, repo_id, profile=profile_file, key=key, description=description, private=not public,
        revision=revision, subfolder=subfolder, repo_type=repo_type, commit_message=message, create_pr=create_pr,
        progress=bars(as_json),
    )  # fmt: skip
    if as_json:
        print_json({"artifact": str(folder), "repo_id": repo_id, "url": pushed.url, "commit": pushed.commit})
    else:
        click.echo(pushed.url)


def _profile_of(folder: Path, reader: Reader, choice: str) -> bytes | None:
    """Return the profile file to push with an artifact, None for no file; `choice` is the value of --profile.

    Raises:
        ProfileError: without its profile, the artifact could not be read.
        click.UsageError: the artifact needs no profile, but --profile names one.
    """
    codec = reader.manifest.codec
    if "profile" not in codec:
        if choice not in ("auto", "none"):
            raise click.UsageError(f"{folder} needs no profile; leave out --profile", click.get_current_context())
        return None
    pin = Pin.from_codec(codec)
    if choice == "none" or (choice == "auto" and pin.place is not None):
        return None
    if choice != "auto":
        data: bytes | None = fetch(choice, Access(repo_type="model"), reader.limits, pin.digest)[0]
    else:
        data = pin.in_file(folder / PROFILE_FILE, reader.limits)
    if data is None or not pin.fits(data):
        raise ProfileError(
            f"expected {pin} in {folder}, without which the artifact cannot be read: pass it with --profile LOCATION, "
            "or use --profile none"
        )
    return data


@click.command("sign", short_help="Sign an artifact.")
@click.argument("folder", type=LOCAL_PATH)
@click.option("--key", required=True, help="PEM file of an Ed25519 private key, without a password.")
@output_options
def sign(folder: Path, key: str, as_json: bool, debug: bool) -> None:
    """Check every byte of the artifact in FOLDER, sign it, and write cachegen.sig next to it.

    To create a key: openssl genpkey -algorithm ed25519 -out key.pem. To extract its public key, which readers need:
    openssl pkey -in key.pem -pubout -out public.pem.
    """
    from hf_cachegen.stores.signed import sign as sign_artifact

    written = sign_artifact(folder, key)
    if as_json:
        print_json({"artifact": str(folder), "signature": str(written)})
    else:
        click.echo(f"{written}")


@click.command("seal", short_help="Encrypt an artifact.")
@click.argument("folder", type=LOCAL_PATH)
@click.argument("out", type=OUTPUT_PATH)
@click.option("--key", required=True, help="File of 32 random bytes; without it, the sealed artifact cannot be read.")
@output_options
def seal(folder: Path, out: Path, key: str, as_json: bool, debug: bool) -> None:
    """Encrypt the artifact in FOLDER into the folder OUT (AES-256-GCM). To decrypt it, use pull --key.

    To create a key: head -c 32 /dev/urandom > secret.key.
    """
    from hf_cachegen.stores.sealed import seal as seal_artifact

    with step("encrypting", as_json):
        count = seal_artifact(folder, out, key)
    if as_json:
        print_json({"artifact": str(folder), "sealed": str(out), "bytes": count})
    else:
        click.echo(f"{out}: {count:,} bytes")


@click.command("pull", short_help="Copy an artifact into a folder.")
@location_argument
@click.argument("out", type=OUTPUT_PATH)
@_access_options
@overwrite_option("Replace an existing artifact.")
@key_option
@output_options
def pull(
    location: str, out: Path, revision: str | None, repo_type: str, subfolder: str | None, overwrite: bool,
    key: str | None, as_json: bool, debug: bool,
) -> None:  # fmt: skip
    """Copy the artifact at LOCATION (a repository "user/name", a URL or a folder) into the folder OUT, verified."""
    access = Access(revision=revision, repo_type=repo_type, subfolder=subfolder, key=key)
    with byte_bar("pulling", as_json) as progress:
        count = copy_from(location, out, access, overwrite=overwrite, progress=progress)
    if as_json:
        print_json({"place": location, "artifact": str(out), "bytes": count})
    else:
        click.echo(f"{out}: {count:,} bytes")


@click.command("ls", short_help="List the artifacts and profiles at a location.")
@location_argument
@_access_options
@output_options
def ls(
    location: str, revision: str | None, repo_type: str, subfolder: str | None, as_json: bool, debug: bool
) -> None:
    """List the artifacts and profiles at or below LOCATION (a repository "user/name", an s3:// or similar URL, or a
    folder).

    hf://user lists the artifacts and profiles in all repositories of a user or an organisation.
    """
    found = find(location, Access(revision=revision, repo_type=repo_type, subfolder=subfolder))
    if as_json:
        artifacts = [{"folder": row.folder, "bytes": row.nbytes} for row in found if not row.profile]
        profiles = [{"folder": row.folder, "bytes": row.nbytes, "kept": row.kept} for row in found if row.profile]
        print_json({"place": location, "artifacts": artifacts, "profiles": profiles})
        return
    if not found:
        note(f"{location} holds neither an artifact nor a profile")
    for row in found:
        older = f", {row.kept} older" if row.kept else ""
        mark = f"  (profile{older})" if row.profile else ""
        click.echo(f"{size_text(row.nbytes):>10}  {printable(row.folder) or '.'}{mark}")


@click.command("serve-check", short_help="Check that a server serves artifacts correctly.")
@location_argument
@_access_options
@key_option
@output_options
@click.pass_context
def check(
    context: click.Context, /, location: str, revision: str | None, repo_type: str, subfolder: str | None,
    key: str | None, as_json: bool, debug: bool,
) -> None:  # fmt: skip
    """Check that the server of the artifact at LOCATION supports loading: byte ranges, validators (ETag), correct
    bytes. Measure its throughput.
    """
    with step(f"checking {location}", as_json):
        checks = serve_check(location, Access(revision=revision, repo_type=repo_type, subfolder=subfolder, key=key))
    passed = all(row.passed is not False for row in checks)
    if as_json:
        rows = [{"check": row.name, "passed": row.passed, "detail": row.detail} for row in checks]
        print_json({"place": location, "passed": passed, "checks": rows})
    else:
        for row in checks:
            mark = {True: "ok", False: "FAILED", None: "-"}[row.passed]
            click.echo(f"{mark:>6}  {row.name}: {printable(row.detail)}")
    context.exit(0 if passed else 1)
