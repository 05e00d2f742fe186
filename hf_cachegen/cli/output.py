"""Output of the commands: results on stdout, progress on stderr; with --json one object on stdout and nothing else."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn


def printable(text: str) -> str:
    """Replace the control characters of an untrusted text, which a terminal would obey."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def plain(value: Any) -> str:
    """Format an untrusted value on one line, without control characters and without rich's markup."""
    return escape(printable(value if isinstance(value, str) else str(value)))


def size_text(count: float) -> str:
    """Format a number of bytes with a decimal unit: 1,234 bytes is 1.2 kB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def print_json(value: dict[str, Any]) -> None:
    """Print the result of a command with --json."""
    click.echo(json.dumps(value, indent=2))


def note(text: str) -> None:
    """Print a note on stderr."""
    click.echo(f"hf-cachegen: note: {text}", err=True)


@contextmanager
def step(what: str, as_json: bool) -> Iterator[None]:
    """Show on stderr which step is running, until it ends."""
    if as_json:
        yield
        return
    with Console(stderr=True).status(what):
        yield


def bars(as_json: bool) -> bool:
    """Report whether to draw progress bars: only on a terminal. (Not within a `step`, which draws there too.)"""
    return not as_json and Console(stderr=True).is_terminal


class _Notes(logging.Handler):
    """Print each message as a note."""

    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


@contextmanager
def logged(name: str, as_json: bool) -> Iterator[None]:
    """Print the messages of a logger, INFO and above, as notes on stderr, unless bars are drawn or --json is given."""
    if as_json or bars(as_json):
        yield
        return
    logger, handler = logging.getLogger(name), _Notes(logging.INFO)
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


@contextmanager
def byte_bar(what: str, as_json: bool) -> Iterator[Callable[[int, int], None]]:
    """Draw a progress bar of bytes; yield the function that updates it with (bytes done, bytes in all)."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not bars(as_json)) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
