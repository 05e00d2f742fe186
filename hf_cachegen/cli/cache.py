"""The commands `cache ls` and `cache prune`: the local cache of segments from remote locations."""

from __future__ import annotations

import os
import time
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from hf_cachegen.cli.options import OUTPUT_PATH, output_options
from hf_cachegen.cli.output import plain, print_json, size_text
from hf_cachegen.prefix_cache.sizes import parse_size
from hf_cachegen.stores import SegmentCache


@click.group("cache", short_help="List or shrink the local cache of segments.")
def cache() -> None:
    """List or shrink the local cache of segments that were loaded from the Hub and from URLs."""


_cache_dir = click.option(
    "--cache-dir", type=OUTPUT_PATH, help="Folder of the cache.  [default: the one that loading uses]"
)


@cache.command("ls", short_help="List the cached segments by location.")
@_cache_dir
@output_options
def cache_ls(cache_dir: Path | None, as_json: bool, debug: bool) -> None:
    """List the cached segments by the location they were loaded from, the least recently used first."""
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


@cache.command("prune", short_help="Shrink the cache.")
@_cache_dir
@click.option("--to", "limit", metavar="SIZE",
              help="Size after pruning, in bytes, such as 500M, 20G or 0.  [default: the cache's limit]")  # fmt: skip
@output_options
def cache_prune(cache_dir: Path | None, limit: str | None, as_json: bool, debug: bool) -> None:
    """Remove the least recently used segments until the rest fits the size."""
    found = SegmentCache(cache_dir)
    removed, freed = found.prune(None if limit is None else parse_size(limit, "--to"))
    if as_json:
        print_json({"directory": str(found.directory), "removed": removed, "freed": freed})
    else:
        click.echo(f"removed {removed:,} files, {size_text(freed)}, from {os.fspath(found.directory)}")
