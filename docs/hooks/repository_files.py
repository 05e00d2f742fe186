"""Publish the repository's files that a page links to, so that one link works on the site and in the repository.

A page in docs/ links to `../benchmarks/results/a.json`, which lies outside of the site's folder. The file is copied to
the same path below `repository/` on the site, and the link is changed to lead there.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)#\s]+)")
FOLDER = "repository"


def outside(page: str, target: str) -> str | None:
    """Return the path from the repository's root of a link that leaves docs/; None where it stays inside."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
    return None if path.startswith(("docs/", "..")) else path


def on_files(files: Files, config: Any) -> Files:
    """Add the linked files to the site."""
    root = Path(config.config_file_path).parent
    for page in files.documentation_pages():
        for target in LINK.findall(page.content_string):
            path = outside(page.src_uri, target)
            name = f"{FOLDER}/{path}"
            if path is not None and (root / path).is_file() and files.get_file_from_path(name) is None:
                files.append(File.generated(config, name, content=(root / path).read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Lead links out of docs/ to the copies. A link to a file that does not exist stays, and fails the build."""
    here = posixpath.dirname(page.file.src_uri) or "."

    def replace(match: re.Match[str]) -> str:
        path = outside(page.file.src_uri, match[1])
        name = f"{FOLDER}/{path}"
        if path is None or files.get_file_from_path(name) is None:
            return match[1]
        return posixpath.relpath(name, here)

    return LINK.sub(replace, markdown)
