"""The locations that a stream may read from, and how to reach each."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any
from urllib.parse import urlsplit

from hf_cachegen.artifact.store import location_name
from hf_cachegen.stores import Access, Patience
from hf_cachegen.streaming.options import Fallback, PathLike, StreamOptions

ATTEMPTS = 2
BACKOFF_SECONDS = 0.05
"""A stream rather asks another source than waits for this one."""
FIRST_HOST_ALONE = ("revision", "subfolder", "headers", "storage_options", "repo_type")
"""Options of the first location that a fallback does not get: credentials go only to the host they were given for."""


@dataclass(frozen=True)
class Location:
    """A path, a URL or a repository id, and the options to read it with."""

    path: PathLike
    access: Access

    def __str__(self) -> str:
        return str(self.path)

    @property
    def host(self) -> str:
        """Return the name under which streams from this location share a link."""
        parts = urlsplit(os.fspath(self.path))
        return f"{parts.scheme}://{parts.netloc}" if parts.scheme and parts.netloc else "elsewhere"


def locations_of(path: PathLike, options: StreamOptions) -> list[Location]:
    """Return the first location and its fallbacks, in the order in which they are asked."""
    location_name(path)  # raises for what is none
    patience = Patience(ATTEMPTS, options.stall, backoff=BACKOFF_SECONDS, max_wait=options.stall)
    access = replace(options.access, patience=options.access.patience or patience)
    common = {field.name: getattr(access, field.name) for field in fields(Access)}
    for name in FIRST_HOST_ALONE:
        del common[name]
    return [Location(path, access), *(_fallback(fallback, common) for fallback in options.fallback)]


def _fallback(fallback: Fallback, common: Mapping[str, Any]) -> Location:
    path, own = fallback if isinstance(fallback, tuple) else (fallback, {})
    return Location(path, Access.from_keywords({**common, **own}))
