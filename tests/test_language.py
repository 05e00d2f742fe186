"""The glossary of docs/design.md and the plain English of CONTRIBUTING.md hold in everything that a person reads."""

from __future__ import annotations

import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CODE = {".py", ".h", ".cpp", ".cu", ".cuh"}
TEXT = {".md", ".toml", ".sh"}
LEFT_OUT = ("docs/results/", "eval/reference/words.py", "tests/test_language.py", "docs/design.md")
"""Measured results, word lists of the reference corpus, and the two files that name the words."""

BANNED = {
    r"\banew\b": "again",
    r"\bwhoever\b": "the one that",
    r"\bnobody\b": "name the subject",
    r"\bstead\b": "instead",
    r"\btwists?\b": "the factor",
    r"\b(?:is|are|was|were|be|been) told\b": "reported",
    r"\btells? of\b": "reports",
    r"\bminds\b": "affects",
    r"\bso (?:many|much|long) (?:a|an)\b": "the number of",
    r"\bshall\b": "must, or the present tense",
    r"\bwhat is not\b": "name the subject",
}
"""Words and phrases, with what to write instead."""
GLOSSARY = {
    r"\b(?:a|the|this|that|its|another|each|every|other|of|first|local|remote) places?\b": "location, source or device",
    r"\bplaces (?:of|on|with|where|for|are|have)\b": "locations",
    r"(?<![\w.])(?:place|places)=": "location",
}
"""One word for one concept."""


def files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    names = [name for name in listed if Path(name).suffix in CODE | TEXT and not name.startswith(LEFT_OUT)]
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are prose: all of a document, comments and strings of code."""
    text = path.read_text(encoding="utf-8")
    if path.suffix in TEXT:
        yield from enumerate(text.splitlines(), 1)
    elif path.suffix == ".py":
        kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type in kinds:
                yield from ((token.start[0] + number, line) for number, line in enumerate(token.string.splitlines()))
    else:
        for number, line in enumerate(text.splitlines(), 1):
            if (comment := re.search(r"//.*|/\*.*|^\s*\*.*|\"[^\"]*\"", line)) is not None:
                yield number, comment[0]


def found(rules: dict[str, str]) -> list[str]:
    wrong = []
    for path in files():
        for number, line in prose(path):
            wrong += [
                f"{path.relative_to(ROOT)}:{number}: {match[0]!r}: write {instead}"
                for rule, instead in rules.items()
                for match in re.finditer(rule, line, re.IGNORECASE)
            ]
    return wrong


@pytest.mark.parametrize("rules", [BANNED, GLOSSARY], ids=["words", "glossary"])
def test_texts_use_the_words_of_the_field(rules: dict[str, str]) -> None:
    assert found(rules) == []
