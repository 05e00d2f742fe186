"""Run the Python blocks of the tutorial, page after page and in order, and compare their output with what is shown."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.http_server import Server
from tests.hub_server import hub_of_profiles
from tests.small_artifact import contents

ROOT = Path(__file__).resolve().parent.parent
TUTORIAL = ROOT / "docs" / "tutorial"
PAGES = re.findall(r"\]\(([\w-]+\.md)\)", (TUTORIAL / "index.md").read_text(encoding="utf-8"))
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:```\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)
HOST = "https://host/"
"""The server in the pages; the tests replace it by a server of their own."""


def shown_as(printed: str, shown: str) -> bool:
    """Compare an output with the one in the page, where `...` stands for text that differs from run to run."""
    pattern = ".*".join(re.escape(part) for part in shown.strip().split("..."))
    return re.fullmatch(pattern, printed.strip(), re.DOTALL) is not None


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in that has the model and the documents of the repository."""
    for name in ("eval", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with hub_of_profiles(monkeypatch, tmp_path / "segments"):
        yield


def test_every_page_of_the_tutorial_is_run() -> None:
    assert sorted(PAGES) == sorted(path.name for path in TUTORIAL.glob("*.md") if path.name != "index.md")


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of huggingface_hub's own client
@pytest.mark.parametrize("page", PAGES)
def test_the_code_prints_what_the_page_shows(page: str, checkout: Path, hub: None, server: Server) -> None:
    text = (TUTORIAL / page).read_text(encoding="utf-8")
    blocks = BLOCK.findall(text)
    assert len(blocks) == text.count("```python") > 3
    names: dict[str, object] = {}
    for code, shown in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code.replace(HOST, f"{server.url}/"), str(TUTORIAL / page), "exec"), names)
        output = printed.getvalue().replace(f"{server.url}/", HOST)
        assert shown_as(output, shown), f"{code}\nprints\n{output}\nnot\n{shown}"
        for artifact in checkout.glob("*.cachegen"):  # files that the reader copies to a server
            server.files |= {f"{artifact.name}/{name}": data for name, data in contents(artifact).items()}


def test_an_output_is_compared() -> None:
    assert shown_as("8 samples\n", "8 samples")
    assert shown_as("took 3.1 s, in time: True\n", "took ... s, in time: True")
    assert not shown_as("took 3.1 s, in time: False\n", "took ... s, in time: True")
    assert not shown_as("a line too many\n", "")
