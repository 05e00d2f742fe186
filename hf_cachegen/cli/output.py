"""How commands speak: results on stdout, what is going on on stderr; with --json one object, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console


def printable(text: str) -> str:
    """A stranger's text without the control characters that a terminal would obey."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def print_json(value: dict[str, Any]) -> None:
    """The result of a command with --json."""
    click.echo(json.dumps(value, indent=2))


@contextmanager
def step(what: str, as_json: bool) -> Iterator[None]:
    """Says on stderr what is going on, while it is."""
    if as_json:
        yield
        return
    with Console(stderr=True).status(what):
        yield


def bars(as_json: bool) -> bool:
    """Whether to draw progress bars: for people at a terminal. (Not within a `step`, which draws there too.)"""
    return not as_json and Console(stderr=True).is_terminal
