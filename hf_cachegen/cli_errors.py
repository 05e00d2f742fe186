"""How the command line ends: exit codes, one line per error, the same as a JSON object with --json.

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
from hf_cachegen.cli_output import printable

PROGRAM = "hf-cachegen"
MAX_CHARACTERS = 4000
"""Of a message: what an artifact's manifest says may be in it, as long as the manifest."""
UNEXPECTED, USAGE, ARTIFACT, MISMATCH, UNSUPPORTED, PROFILE, STORE, INTERRUPTED = 1, 2, 3, 4, 5, 6, 7, 130

EXIT_CODES = {
    0: "done",
    UNEXPECTED: "any other failure",
    USAGE: (
        "a wrong option, options that do not go together, a model that cannot be loaded, a level that is not there, "
        "an output that exists"
    ),
    ARTIFACT: "the artifact or prefix cache is not there, damaged or above the limits",
    MISMATCH: "a sound artifact of another model, dtype, tokenizer or prompt",
    UNSUPPORTED: "a kind of model or layer or a format that this version does not support, a missing package",
    PROFILE: "the profile that is needed is not there, damaged or another one, or cannot be learnt",
    STORE: "a place on the network that cannot be reached, refuses, fails or serves wrongly",
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
    (errors.PrefixCacheError, ARTIFACT),
    (errors.StoreError, STORE),
    (errors.MismatchError, MISMATCH),
    (click.UsageError, USAGE),
)
"""The first class that fits decides; all other errors are UNEXPECTED."""


_OPTIONS = {
    "pass overwrite=True": "give --overwrite",
    "pass it as profile=": "give it with --profile",
    "hf_cachegen.learn_profile": f"'{PROGRAM} profile'",
}
"""What the package's messages say to do from Python, and the same from the command line."""


class _EndOfFile(Exception):
    """Carries an EOFError past click."""

    def __init__(self, error: EOFError) -> None:
        super().__init__(str(error))
        self.error = error


def exit_code(error: Exception) -> int:
    """The exit code that this error ends with."""
    return next((code for kind, code in _CODE_OF if isinstance(error, kind)), UNEXPECTED)


class ErrorGroup(click.Group):
    """A group of commands whose every error ends in one line, or one JSON object, and a documented exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """As click's, which would take a TruncatedError (an EOFError) for the end of the user's input."""
        try:
            return super().invoke(ctx)
        except EOFError as error:
            raise _EndOfFile(error) from error

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, *rest: Any, **options: Any) -> Any:
        """As click's; the process always ends with one of EXIT_CODES."""
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
    """Says what happened, as `arguments` ask for it (--json, --debug), and returns the exit code.

    The arguments are looked at unparsed, since the error may be that they cannot be parsed. A message may quote a
    stranger's file: it is cut to MAX_CHARACTERS and shown without the control characters that a terminal would obey.
    """
    code = exit_code(error)
    if "--debug" in arguments:
        traceback.print_exception(error)
    text = error.format_message() if isinstance(error, click.ClickException) else str(error)
    message = " ".join(text.split()) or type(error).__name__
    if isinstance(error, errors.CacheGenError):
        for python, option in _OPTIONS.items():
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
        hint = " (--debug shows where)"
    click.echo(f"{PROGRAM}: error: {message}{hint}", err=True)
    return code
