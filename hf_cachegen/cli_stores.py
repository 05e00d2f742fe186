"""The commands of places: push, pull, ls, serve-check, and what the local cache holds."""

from __future__ import annotations

import os
import time
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
from rich.table import Table

from hf_cachegen.artifact import PROFILE_FILE, Reader
from hf_cachegen.artifact.pin import Pin
from hf_cachegen.cli_options import (
    access_options,
    key_option,
    output_options,
    place_argument,
    pushing_profile_option,
)
from hf_cachegen.cli_output import bars, print_json, printable, step
from hf_cachegen.cli_views import plain, size_text
from hf_cachegen.errors import ProfileError
from hf_cachegen.stores import Access, LocalStore, SegmentCache
from hf_cachegen.stores.card import card, sealed_card
from hf_cachegen.stores.profiles import fetch
from hf_cachegen.stores.sealed import SUFFIX, sealed_names
from hf_cachegen.stores.survey import find, serve_check
from hf_cachegen.stores.survey import pull as copy_from

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


_access_options = access_options("dataset")


@click.command("push", short_help="Put an artifact on the Hub.")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("repo_id")
@_access_options
@click.option("--public", is_flag=True, help="Make the repository public: whoever has a cache can read its text.")
@click.option("--description", default="", help="What the context is, for the card.")
@click.option("--message", default="Upload a KV cache", show_default=True, help="Message of the commit.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing.")
@pushing_profile_option
@click.option("--key", help="For a sealed artifact: open it with this file of 32 bytes first, and check every byte.")
@output_options
def push(
    folder: Path, repo_id: str, revision: str | None, repo_type: str, subfolder: str | None, public: bool,
    description: str, message: str, create_pr: bool, profile: str, key: str | None, as_json: bool, debug: bool,
) -> None:  # fmt: skip
    """Put the artifact in FOLDER, sealed or not, into the repository REPO_ID ("user/name"), with a card, in one commit.

    The repository is made, private, if it is not there. The token is the one of "hf auth login", or of HF_TOKEN.
    """
    if sealed_names(folder) if folder.is_dir() else []:
        nbytes = sum(path.stat().st_size for path in folder.glob(f"*{SUFFIX}"))
        text, going_along = sealed_card(nbytes, repo_id, subfolder=subfolder, description=description), None
    else:
        reader = Reader(LocalStore(folder))
        text = card(reader, repo_id, subfolder=subfolder, description=description)
        going_along = _profile_of(folder, reader, profile)
    from hf_cachegen.stores import hub, pushing

    place = hub.HubPlace(repo_id, repo_type, subfolder, revision or hub.DEFAULT_REVISION)
    pushed = pushing.push(
        folder, place, text, profile=going_along, key=key, private=not public, commit_message=message,
        create_pr=create_pr, progress=bars(as_json),
    )  # fmt: skip
    if as_json:
        print_json({"artifact": str(folder), "repo_id": repo_id, "url": pushed.url, "commit": pushed.commit})
    else:
        click.echo(pushed.url)


def _profile_of(folder: Path, reader: Reader, choice: str) -> bytes | None:
    """The file that --profile means for this artifact. Raises ProfileError rather than let one go that none can read.
    """
    codec = reader.manifest.codec
    if "profile" not in codec:
        if choice not in ("auto", "none"):
            raise click.UsageError(f"{folder} needs no profile", click.get_current_context())
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
            f"nobody could read this artifact without {pin}, which is not in {folder}: give it with --profile, or none"
        )
    return data


@click.command("sign", short_help="Sign an artifact.")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--key", required=True, help="PEM file with an Ed25519 private key, without a password.")
@output_options
def sign(folder: Path, key: str, as_json: bool, debug: bool) -> None:
    """Sign the artifact in FOLDER, every byte of which is checked, and write cachegen.sig beside it.

    openssl genpkey -algorithm ed25519 -out key.pem makes a key, openssl pkey -in key.pem -pubout -out public.pem what
    readers need.
    """
    from hf_cachegen.stores.signed import sign as sign_artifact

    written = sign_artifact(folder, key)
    if as_json:
        print_json({"artifact": str(folder), "signature": str(written)})
    else:
        click.echo(f"{written}")


@click.command("seal", short_help="Encrypt an artifact.")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--key", required=True, help="File of 32 random bytes; keep it, or the artifact is lost.")
@output_options
def seal(folder: Path, out: Path, key: str, as_json: bool, debug: bool) -> None:
    """Encrypt the artifact in FOLDER into the folder OUT (AES-256-GCM). pull --key opens it again.

    head -c 32 /dev/urandom > secret.key makes a key.
    """
    from hf_cachegen.stores.sealed import seal as seal_artifact

    with step("sealing", as_json):
        count = seal_artifact(folder, out, key)
    if as_json:
        print_json({"artifact": str(folder), "sealed": str(out), "bytes": count})
    else:
        click.echo(f"{out}: {count:,} bytes")


@click.command("pull", short_help="Copy an artifact into a folder.")
@place_argument
@click.argument("out", type=click.Path(path_type=Path))
@_access_options
@click.option("--overwrite", is_flag=True, help="Replace an artifact that is there.")
@key_option
@output_options
def pull(
    place: str, out: Path, revision: str | None, repo_type: str, subfolder: str | None, overwrite: bool,
    key: str | None, as_json: bool, debug: bool,
) -> None:  # fmt: skip
    """Copy the artifact at PLACE (a repository "user/name", a URL, a folder) into the folder OUT, verified."""
    access = Access(revision=revision, repo_type=repo_type, subfolder=subfolder, key=key)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not bars(as_json)) as progress:
        task = progress.add_task("pulling", total=None)
        count = copy_from(
            place, out, access, overwrite=overwrite,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )  # fmt: skip
    if as_json:
        print_json({"place": place, "artifact": str(out), "bytes": count})
    else:
        click.echo(f"{out}: {count:,} bytes")


@click.command("ls", short_help="List the artifacts and profiles at a place.")
@place_argument
@_access_options
@output_options
def ls(
    place: str, revision: str | None, repo_type: str, subfolder: str | None, as_json: bool, debug: bool
) -> None:
    """List the artifacts and profiles at or below PLACE (a repository "user/name", an s3:// or like URL, a folder).

    hf://user lists those in all repositories of a user or an organisation.
    """
    found = find(place, Access(revision=revision, repo_type=repo_type, subfolder=subfolder))
    if as_json:
        artifacts = [{"folder": row.folder, "bytes": row.nbytes} for row in found if not row.profile]
        profiles = [{"folder": row.folder, "bytes": row.nbytes, "kept": row.kept} for row in found if row.profile]
        print_json({"place": place, "artifacts": artifacts, "profiles": profiles})
        return
    for row in found:
        older = f", {row.kept} older" if row.kept else ""
        mark = f"  (profile{older})" if row.profile else ""
        click.echo(f"{size_text(row.nbytes):>10}  {printable(row.folder) or '.'}{mark}")


@click.command("serve-check", short_help="Check that a server serves artifacts rightly.")
@place_argument
@_access_options
@key_option
@output_options
@click.pass_context
def check(
    context: click.Context, /, place: str, revision: str | None, repo_type: str, subfolder: str | None, key: str | None,
    as_json: bool, debug: bool,
) -> None:  # fmt: skip
    """Check that the server of the artifact at PLACE does what loading needs: byte ranges, marks, sound bytes; and
    measure how fast it is.
    """
    with step(f"asking {place}", as_json):
        checks = serve_check(place, Access(revision=revision, repo_type=repo_type, subfolder=subfolder, key=key))
    passed = all(row.passed is not False for row in checks)
    if as_json:
        rows = [{"check": row.name, "passed": row.passed, "detail": row.detail} for row in checks]
        print_json({"place": place, "passed": passed, "checks": rows})
    else:
        for row in checks:
            mark = {True: "ok", False: "FAILED", None: "-"}[row.passed]
            click.echo(f"{mark:>6}  {row.name}: {printable(row.detail)}")
    context.exit(0 if passed else 1)


@click.group("cache", short_help="What the local cache of segments holds.")
def cache_commands() -> None:
    """Look at, or shrink, the local cache of segments that were loaded from the Hub and from URLs."""


_cache_dir = click.option("--cache-dir", type=click.Path(path_type=Path), help="Another cache than the default one.")


@cache_commands.command("ls", short_help="List what is cached.")
@_cache_dir
@output_options
def cache_ls(cache_dir: Path | None, as_json: bool, debug: bool) -> None:
    """List what is cached, by where it came from, the least recently used first."""
    found = SegmentCache(cache_dir)
    entries = found.origins()
    total = sum(entry.nbytes for entry in entries)
    if as_json:
        rows = [{"origin": e.origin, "files": e.files, "bytes": e.nbytes, "last_used": e.used} for e in entries]
        print_json({"directory": str(found.directory), "bytes": total, "limit": found.limit, "origins": rows})
        return
    table = Table(box=None, pad_edge=False)
    for name, justify in (("size", "right"), ("files", "right"), ("last used", "left"), ("from", "left")):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for entry in entries:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        table.add_row(size_text(entry.nbytes), f"{entry.files:,}", used, plain(entry.origin))
    Console().print(table)
    click.echo(f"{size_text(total)} of at most {size_text(found.limit)} in {found.directory}")


@cache_commands.command("prune", short_help="Shrink the cache.")
@_cache_dir
@click.option("--to", "limit", metavar="SIZE", help="Bytes to keep, as 500M, 20G or 0.  [default: the cache's limit]")
@output_options
def cache_prune(cache_dir: Path | None, limit: str | None, as_json: bool, debug: bool) -> None:
    """Remove what was not used for longest until the rest fits."""
    found = SegmentCache(cache_dir)
    removed, freed = found.prune(None if limit is None else _bytes(limit))
    if as_json:
        print_json({"directory": str(found.directory), "removed": removed, "freed": freed})
    else:
        click.echo(f"removed {removed:,} files, {size_text(freed)}, from {os.fspath(found.directory)}")


def _bytes(text: str) -> int:
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    if not number.isdecimal() or unit not in _UNITS:
        raise click.BadParameter(f"expected a size such as 500M, 20G or 0, got {text!r}", param_hint="'--to'")
    return int(number) * _UNITS[unit]
