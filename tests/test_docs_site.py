"""The documentation as a site: mkdocs.yml lists every page, and the reference has every public name.

`make docs` builds the site with warnings as errors. These tests need no mkdocs.
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


FILE_NAME = re.compile(r"\b\w+\.(?:py|h|cpp|cu)\b")


def leaves(tree: Any) -> Iterator[str]:
    """Yield the strings of nested lists and mappings."""
    if isinstance(tree, str):
        yield tree
    else:
        for each in tree.values() if isinstance(tree, dict) else tree:
            yield from leaves(each)


def site() -> Any:
    """Return the content of mkdocs.yml."""
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def files_in_tree(tree: str) -> Iterator[Path]:
    """Yield the folders and files that an indented tree names: a folder ends in a slash, two spaces are one floor."""
    folders: list[str] = []
    for line in filter(None, tree.splitlines()):
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        del folders[depth:]
        if name.endswith("/"):
            folders.append(name)
        yield from (Path(*folders, found) for found in ("", *FILE_NAME.findall(line)))


def documented() -> list[str]:
    """Return the names that the pages of the reference document."""
    pages = sorted((DOCS / "reference").glob("*.md"))
    return [name for page in pages for name in IDENTIFIER.findall(page.read_text(encoding="utf-8"))]


def test_the_navigation_lists_every_page() -> None:
    assert sorted(leaves(site()["nav"])) == [page for page in PAGES if "/runs/" not in page]


def test_every_public_name_is_in_the_reference_once() -> None:
    expected = {f"hf_cachegen.{name}" for name in hf_cachegen.__all__ if name != "__version__"}
    found = documented()
    assert len(found) == len(set(found))
    assert set(found) - expected == {"hf_cachegen.streaming"}
    assert expected <= set(found)


@pytest.mark.parametrize("name", documented())
def test_every_name_in_the_reference_exists(name: str) -> None:
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


def test_every_file_in_the_tree_of_the_design_exists() -> None:
    trees = [tree for tree in re.findall(r"^```\n(.*?)^```$", (DOCS / "design.md").read_text(), re.M | re.S)
             if tree.startswith("hf_cachegen/")]  # fmt: skip
    assert len(trees) == 1
    files = list(files_in_tree(trees[0]))
    assert Path("hf_cachegen/codec/transforms/klt.py") in files
    assert Path("cuda_ext/include/cachegen.h") in files
    assert [str(file) for file in files if not (ROOT / file).exists()] == []
