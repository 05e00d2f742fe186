"""docs/cli.md holds the help texts. After a change of the code: UPDATE_DOCS=1 pytest tests/test_cli_docs.py"""

from __future__ import annotations

import os
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from hf_cachegen.cli import main
from hf_cachegen.cli.errors import EXIT_CODES
from tests.cli_support import DOCUMENT, documented, run_json, write

WIDTH = 110
"""Characters in a line of the help texts."""


def exit_code_table() -> str:
    rows = [f"| {code} | {meaning} |" for code, meaning in EXIT_CODES.items()]
    return "\n".join(["| code | meaning |", "|---:|---|", *rows])


def command_section() -> str:
    parts = []
    for command, group in main.commands.items():
        inner = [f"{command} {name}" for name in sorted(group.commands)] if isinstance(group, click.Group) else []
        for name in (command, *inner):
            shown = CliRunner().invoke(main, [*name.split(), "--help"], terminal_width=WIDTH, max_content_width=WIDTH)
            parts.append(f"### {name}\n\n```text\n{shown.stdout}```\n")
    return "\n".join(parts)


def written() -> str:
    """Return the document with its two generated parts replaced."""
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


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_the_members_of_json_output(tmp_path: Path, command: str) -> None:
    found = run_json(command, write(tmp_path / "context"))
    assert documented(command, found)
