"""Errors of the command line: exit codes, one line for each error, and the same as a JSON object with --json.

The codes are few and stable, so that a script can branch on them; docs/cli.md shows the table, `EXIT_CODES`.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import click
from click.exceptions import NoArgsIsHelpError

from hf_cachegen import errors
from hf_cachegen.cli.output import printable

PROGRAM = "hf-cachegen"
MAX_CHARACTERS = 4000
"""Length limit of a message, which may quote an artifact's manifest of any length."""
UNEXPECTED, USAGE, ARTIFACT, MISMATCH, UNSUPPORTED, PROFILE, STORE, INTERRUPTED = 1, 2, 3, 4, 5, 6, 7, 130

EXIT_CODES = {
    0: "success",
    UNEXPECTED: "any other failure",
    USAGE: (
        "an invalid option, options that conflict, a model that cannot be loaded, a level that does not exist, an "
        "output that already exists"
    ),
    ARTIFACT: (
        "the artifact or prefix cache does not exist, is damaged, or exceeds the limits; or the tensors of a cache "
        "cannot be encoded"
    ),
    MISMATCH: "a valid artifact of another model, dtype, tokenizer or prompt",
    UNSUPPORTED: "a model, layer type or format that this version does not support, or a missing package",
    PROFILE: "the required profile is missing, damaged or a different one, or cannot be learnt",
    STORE: "a remote location that cannot be reached, denies access, fails, or serves wrong bytes",
    INTERRUPTED: "interrupted from the keyboard",
}

_CODE_OF: tuple[tuple[type[Exception], int], ...] = (
    (errors.UnsupportedFormatError, UNSUPPORTED),
    (errors.UnsupportedLayerError, UNSUPPORTED),
    (errors.UnsupportedModelError, UNSUPPORTED),
    (errors.MissingExtraError, UNSUPPORTED),
    (errors.LevelError, USAGE),
    (errors.ArtifactExistsError, USAGE),
    (errors.ConfigError, USAGE),
    (errors.ProfileError, PROFILE),
    (errors.ArtifactError, ARTIFACT),
    (errors.TensorError, ARTIFACT),
    (errors.PrefixCacheError, ARTIFACT),
    (errors.StoreError, STORE),
    (errors.MismatchError, MISMATCH),
    (click.UsageError, USAGE),
)
"""The first class that fits decides; all other errors are UNEXPECTED."""


ADVICE = {
    "pass overwrite=True": "use --overwrite",
    "pass it as profile=": "pass it with --profile",
    "pass its key as key=": "pass its key with --key",
    "or None to use none": "or use --profile none",
    "hf_cachegen.learn_profile": f"'{PROGRAM} profile'",
}
"""Advice for Python in the package's messages, and the same advice for the command line."""


class _EndOfFile(Exception):
    """Carries an EOFError past click."""

    def __init__(self, error: EOFError) -> None:
        super().__init__(str(error))
        self.error = error


def exit_code(error: Exception) -> int:
    """Return the exit code of an error."""
    return next((code for kind, code in _CODE_OF if isinstance(error, kind)), UNEXPECTED)


class ErrorGroup(click.Group):
    """A group of commands in which every error becomes one line, or one JSON object, and a documented exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; carry its EOFErrors past click, which would take them for the end of the user's input."""
        try:
            return super().invoke(ctx)
        except EOFError as error:
            raise _EndOfFile(error) from error

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, *rest: Any, **options: Any) -> Any:
        """Run the program and exit with one of EXIT_CODES."""
        arguments = list(sys.argv[1:] if args is None else args)
        options["standalone_mode"] = False
        try:
            code = super().main(arguments, prog_name or PROGRAM, *rest, **options)
        except NoArgsIsHelpError as error:
            error.show()
            code = USAGE
        except _EndOfFile as error:
            code = report(error.error, arguments)
        except (click.Abort, KeyboardInterrupt):
            click.echo(f"{PROGRAM}: interrupted", err=True)
            code = INTERRUPTED
        except Exception as error:
            code = report(error, arguments)
        sys.exit(code if isinstance(code, int) else 0)


def report(error: Exception, arguments: Sequence[str]) -> int:
    """Print an error in the form that `arguments` ask for (--json, --debug), and return its exit code.

    The arguments are searched unparsed, since the error may be that they cannot be parsed. A message may quote an
    untrusted file: it is cut to MAX_CHARACTERS, and its control characters are replaced.
    """
    code = exit_code(error)
    if "--debug" in arguments:
        traceback.print_exception(error)
    text = error.format_message() if isinstance(error, click.ClickException) else str(error)
    message = " ".join(text.split()) or type(error).__name__
    if isinstance(error, errors.CacheGenError):
        for python, option in ADVICE.items():
            message = message.replace(python, option)
    if code == UNEXPECTED and not isinstance(error, errors.CacheGenError):
        message = f"{type(error).__name__}: {message}"
    message = printable(message if len(message) <= MAX_CHARACTERS else f"{message[: MAX_CHARACTERS - 1]}…")
    if "--json" in arguments:
        click.echo(json.dumps({"error": {"type": type(error).__name__, "message": message, "exit_code": code}}))
        return code
    hint = ""
    if isinstance(error, click.UsageError) and error.ctx is not None:
        hint = f" (see '{error.ctx.command_path} --help')"
    elif code == UNEXPECTED and "--debug" not in arguments:
        hint = " (use --debug for the traceback)"
    click.echo(f"{PROGRAM}: error: {message}{hint}", err=True)
    return code
