"""docs/cli.md says what the code says. After a change of the code: UPDATE_DOCS=1 pytest tests/test_cli_docs.py"""

from __future__ import annotations

import os
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from hf_cachegen.cli import main
from hf_cachegen.cli_errors import EXIT_CODES
from tests.cli_support import run_json
from tests.test_cli_artifacts import COMMANDS, write

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "cli.md"
WIDTH = 110
"""Columns of the help texts in the document."""


def exit_code_table() -> str:
    rows = [f"| {code} | {meaning} |" for code, meaning in EXIT_CODES.items()]
    return "\n".join(["| code | meaning |", "|---:|---|", *rows])


def command_section() -> str:
    parts = []
    for command in COMMANDS:
        group = main.commands[command]
        inner = [f"{command} {name}" for name in sorted(group.commands)] if isinstance(group, click.Group) else []
        for name in (command, *inner):
            shown = CliRunner().invoke(main, [*name.split(), "--help"], terminal_width=WIDTH, max_content_width=WIDTH)
            parts.append(f"### {name}\n\n```text\n{shown.stdout}```\n")
    return "\n".join(parts)


def written() -> str:
    """The document with its two parts that come from the code made anew."""
    text = DOCUMENT.read_text(encoding="utf-8")
    head, rest = text.split("## Exit codes\n", 1)
    notes = rest.split("\nAn error is one line", 1)[1].split("## Commands\n", 1)[0]
    table = exit_code_table()
    return f"{head}## Exit codes\n\n{table}\n\nAn error is one line{notes}## Commands\n\n{command_section()}"


def test_the_document_holds_the_help_texts_and_exit_codes() -> None:
    expected = written()
    if os.environ.get("UPDATE_DOCS"):
        DOCUMENT.write_text(expected, encoding="utf-8")
    assert DOCUMENT.read_text(encoding="utf-8") == expected


def test_the_commands_are_all_there() -> None:
    assert set(COMMANDS) == set(main.commands)


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_the_members_of_json_output(tmp_path: Path, command: str) -> None:
    found = run_json(command, write(tmp_path / "context"))
    row = f"| `{command}` | {', '.join(f'`{name}`' for name in found)} |"
    assert row in DOCUMENT.read_text(encoding="utf-8").splitlines()
