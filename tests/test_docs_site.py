"""The documentation as a site: every page has its place in mkdocs.yml, and the reference has every public name.

`make docs` builds it with warnings as errors; what is tested here needs no mkdocs.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import hf_cachegen

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
IDENTIFIER = re.compile(r"^::: ([\w.]+)$", re.MULTILINE)


def leaves(tree: Any) -> Iterator[str]:
    """The strings of nested lists and mappings."""
    if isinstance(tree, str):
        yield tree
    else:
        for each in tree.values() if isinstance(tree, dict) else tree:
            yield from leaves(each)


def site() -> Any:
    """mkdocs.yml."""
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def documented() -> list[str]:
    pages = sorted((DOCS / "reference").glob("*.md"))
    return [name for page in pages for name in IDENTIFIER.findall(page.read_text(encoding="utf-8"))]


def test_every_page_has_its_place_in_the_navigation() -> None:
    assert sorted(leaves(site()["nav"])) == [page for page in PAGES if "/runs/" not in page]


def test_every_public_name_is_in_the_reference_once() -> None:
    expected = {f"hf_cachegen.{name}" for name in hf_cachegen.__all__ if name != "__version__"}
    found = documented()
    assert len(found) == len(set(found))
    assert set(found) - expected == {"hf_cachegen.streaming"}
    assert expected <= set(found)


@pytest.mark.parametrize("name", documented())
def test_what_the_reference_shows_exists(name: str) -> None:
    home, _, attribute = name.rpartition(".")
    assert getattr(importlib.import_module(home), attribute, None) or importlib.import_module(name)


def test_the_members_that_the_reference_lists_exist() -> None:
    for page in (DOCS / "reference").glob("*.md"):
        for name, members in re.findall(
            r"^::: ([\w.]+)\n(?:    .*\n)*?      members: \[(.*)\]$", page.read_text(), re.M
        ):
            module = importlib.import_module(name)
            assert [each for each in members.split(", ") if not hasattr(module, each)] == []


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_somewhere(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text):
        assert (DOCS / page).parent.joinpath(target).exists(), target


def test_embedded_examples_exist() -> None:
    embedded = [name for page in PAGES for name in re.findall(r'^--8<-- "(.*)"$', (DOCS / page).read_text(), re.M)]
    assert sorted(embedded) == sorted(f"examples/{path.name}" for path in (ROOT / "examples").glob("*.py"))
