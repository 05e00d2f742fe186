"""The commands of the prefix cache: what a folder holds, and what to keep of it."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from hf_cachegen import strict_json
from hf_cachegen.cli.options import LOCAL_PATH, OUTPUT_PATH, output_options
from hf_cachegen.cli.output import plain, print_json, size_text, step
from hf_cachegen.errors import PrefixCacheError
from hf_cachegen.prefix_cache.cache import PrefixCache
from hf_cachegen.prefix_cache.sizes import parse_size
from hf_cachegen.prefix_cache.stats import stats_of

SHOWN_DIGITS = 16
"""Of a key: enough to name one of billions of blocks."""


@click.group("prefix-cache", short_help="Look at a prefix cache, or shrink it.")
def prefix_cache_commands() -> None:
    """Look at a prefix cache, or change what it keeps. FOLDER is the folder that hf_cachegen.PrefixCache was given."""


_folder = click.argument("folder", type=LOCAL_PATH)
_key_file = click.option("--key", "key_file", help="File of 32 bytes that opens sealed blocks.")


def opened(folder: Path, key: str | None = None, **options: Any) -> PrefixCache:
    """Return the prefix cache in a folder, without a budget. Raises PrefixCacheError where there is none."""
    if not os.path.isfile(folder / "index.sqlite"):
        raise PrefixCacheError(f"there is no prefix cache in {folder}: expected a folder with an index.sqlite")
    return PrefixCache(folder, None, key=key, **options)


def _fields(text: object) -> dict[str, Any]:
    """Return the fields of a family; none where the text is no such JSON."""
    try:
        fields = strict_json.loads(str(text).encode())
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {}


@prefix_cache_commands.command("ls", short_help="List the stored prefixes.")
@_folder
@output_options
def prefix_cache_ls(folder: Path, as_json: bool, debug: bool) -> None:
    """List the prefixes in FOLDER, one line for the end of each chain, the least recently used first."""
    index = opened(folder).local.index
    rows, families = index.rows(), {salt: _fields(text) for salt, text in index.families().items()}
    parents, by_key = {row.parent for row in rows if not row.is_checkpoint}, {row.key: row for row in rows}
    states = {row.parent: row.nbytes for row in rows if row.is_checkpoint}
    found: list[dict[str, Any]] = []
    for row in (row for row in rows if not (row.is_checkpoint or row.key in parents) or row.pinned):
        nbytes, at = 0, row
        while at is not None:
            nbytes += states.get(at.key, 0) + (0 if at.is_checkpoint else at.nbytes)
            at = by_key.get(at.parent)  # type: ignore[assignment]
        family = families.get(row.salt)
        if family is None or type(family.get("block_tokens")) is not int or type(family.get("model_id")) is not str:
            raise PrefixCacheError(
                f"expected the family of block {row.key.hex()[:16]} in the index of {folder}, found {family!r:.80}: "
                "the index is damaged; remove the folder, and it is filled again"
            )
        tokens = row.blocks * family["block_tokens"]
        found.append({"key": row.key.hex(), "tokens": tokens, "bytes": nbytes, "last_used": row.used,
                      "pinned": row.pinned, "model": family["model_id"]})  # fmt: skip
    if as_json:
        print_json({"folder": str(folder), "prefixes": found})
        return
    table = Table(box=None, pad_edge=False)
    for name, justify in (("key", "left"), ("tokens", "right"), ("size", "right"), ("last used", "left"),
                          ("", "left"), ("model", "left")):  # fmt: skip
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for entry in found:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry["last_used"]))
        pinned = "pinned" if entry["pinned"] else ""
        table.add_row(entry["key"][:SHOWN_DIGITS], f"{entry['tokens']:,}", size_text(entry["bytes"]), used, pinned,
                      plain(entry["model"]))  # fmt: skip
    Console().print(table)


@prefix_cache_commands.command("stats", short_help="Show what it holds and has done.")
@_folder
@output_options
def prefix_cache_stats(folder: Path, as_json: bool, debug: bool) -> None:
    """Show what FOLDER holds, and the sums of all processes that have used it."""
    index = opened(folder).local.index
    found = stats_of(index.counters(), blocks=index.count(), nbytes=index.nbytes()).to_dict()
    if as_json:
        print_json({"folder": str(folder), **found})
        return
    for name, value in found.items():
        text = f"{value:,.2f} s" if name.endswith("_seconds") else f"{value:,}"
        click.echo(f"{name.replace('_', ' '):>16}  {text}")


@prefix_cache_commands.command("prune", short_help="Shrink it.")
@_folder
@click.option("--to", "limit", metavar="SIZE", required=True, help="Size to keep, such as 500M, 20GB or 0.")
@output_options
def prefix_cache_prune(folder: Path, limit: str, as_json: bool, debug: bool) -> None:
    """Remove the least recently used blocks of FOLDER, from the ends of their chains; pinned prefixes stay."""
    removed, freed = opened(folder).prune(parse_size(limit, "--to"))
    if as_json:
        print_json({"folder": str(folder), "removed": removed, "freed": freed})
    else:
        click.echo(f"removed {removed:,} blocks, {size_text(freed)}, from {folder}")


@prefix_cache_commands.command("pin", short_help="Protect a prefix from removal.")
@_folder
@click.argument("key")
@click.option("--off", is_flag=True, help="End the protection.")
@output_options
def prefix_cache_pin(folder: Path, key: str, off: bool, as_json: bool, debug: bool) -> None:
    """Protect the prefix that ends with block KEY (as 'ls' shows it) from eviction and expiry."""
    from hf_cachegen.prefix_cache.transfer import find_one

    found = opened(folder)
    row = find_one(found, key)
    found.local.index.pin(row.key, not off)
    if as_json:
        print_json({"folder": str(folder), "key": row.key.hex(), "pinned": not off})
    else:
        click.echo(f"{row.key.hex()[:SHOWN_DIGITS]}: {'no longer pinned' if off else 'pinned'}")


@prefix_cache_commands.command("verify", short_help="Check every byte of every block.")
@_folder
@_key_file
@output_options
@click.pass_context
def prefix_cache_verify(
    context: click.Context, /, folder: Path, key_file: str | None, as_json: bool, debug: bool
) -> None:
    """Check every block of FOLDER; remove damaged ones, with what is chained with them. Ends with 1 if there were any.
    """
    with step("verifying", as_json):
        found = opened(folder, key_file).verify()
    damaged = [key.hex() for key in found.damaged]
    if as_json:
        print_json({"folder": str(folder), "blocks": found.blocks, "bytes": found.nbytes, "damaged": damaged,
                    "strays": found.strays})  # fmt: skip
    else:
        click.echo(f"{folder}: {found.blocks:,} sound blocks, {size_text(found.nbytes)}")
        for key in damaged:
            click.echo(f"removed: {key[:SHOWN_DIGITS]} was damaged")
        if found.strays:
            click.echo(f"removed: {found.strays:,} files that belong to no block")
    context.exit(1 if damaged else 0)


@prefix_cache_commands.command("import", short_help="Store an artifact's blocks.")
@_folder
@click.argument("artifact")
@click.option("--block-tokens", type=click.IntRange(1, 1 << 15), default=256, show_default=True,
              help="Tokens of a block, as the prefix cache is used with.")  # fmt: skip
@click.option("--max-bytes", metavar="SIZE", help="Budget of the folder.  [default: none]")
@_key_file
@output_options
def prefix_cache_import(
    folder: Path, artifact: str, block_tokens: int, max_bytes: str | None, key_file: str | None, as_json: bool,
    debug: bool,
) -> None:  # fmt: skip
    """Store the whole blocks of the lossless ARTIFACT (a folder, a repository, a URL) in FOLDER, made if need be."""
    from hf_cachegen.prefix_cache.transfer import import_artifact

    found = PrefixCache(folder, max_bytes, block_tokens=block_tokens, key=key_file)
    with step("importing", as_json):
        tokens = import_artifact(found, artifact)
    if as_json:
        print_json({"folder": str(folder), "artifact": artifact, "tokens": tokens})
    else:
        click.echo(f"{folder}: {tokens:,} tokens of {artifact}")


@prefix_cache_commands.command("export", short_help="Write a prefix as an artifact.")
@_folder
@click.argument("key")
@click.argument("out", type=OUTPUT_PATH)
@_key_file
@output_options
def prefix_cache_export(
    folder: Path, key: str, out: Path, key_file: str | None, as_json: bool, debug: bool
) -> None:
    """Write the prefix that ends with block KEY (as 'ls' shows it) of FOLDER as an artifact into the folder OUT."""
    from hf_cachegen.prefix_cache.transfer import export_artifact

    with step("exporting", as_json):
        tokens = export_artifact(opened(folder, key_file), key, out)
    if as_json:
        print_json({"folder": str(folder), "artifact": str(out), "tokens": tokens})
    else:
        click.echo(f"{out}: {tokens:,} tokens")
