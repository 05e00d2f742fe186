"""Run a command of this folder: an error of the package is one line and exit code 2, not a traceback."""

from __future__ import annotations

import sys

import click

from hf_cachegen.errors import CacheGenError


def run_command(main: click.Command, module: str) -> None:
    """Run a click command as `python -m MODULE`.

    Args:
        main: the command.
        module: what follows `python -m`.
    """
    try:
        main(prog_name=f"python -m {module}")
    except CacheGenError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
