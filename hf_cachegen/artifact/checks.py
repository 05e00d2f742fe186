"""Checks of the untrusted JSON values of a manifest. Each returns the value, or raises ManifestError."""

from __future__ import annotations

import re
import reprlib
from typing import Any

from hf_cachegen.errors import ManifestError

MANIFEST_FILE = "cachegen.json"


def row(value: Any, length: int, where: str) -> list[Any]:
    """Return a list of exactly `length` values."""
    if type(value) is not list or len(value) != length:
        raise ManifestError(f"{MANIFEST_FILE}: expected a list of {length} at {where}, got {short(value)}")
    return value


def count(value: Any, where: str) -> int:
    """Return an integer of at least 0."""
    if type(value) is not int or value < 0:
        raise ManifestError(f"{MANIFEST_FILE}: expected an integer of at least 0 at {where}, got {short(value)}")
    return value


def text(value: Any, pattern: re.Pattern[str], where: str) -> str:
    """Return a string that matches `pattern`."""
    if type(value) is not str or not pattern.fullmatch(value):
        raise ManifestError(f"{MANIFEST_FILE}: expected {pattern.pattern} at {where}, got {short(value)}")
    return value


def short(value: Any) -> str:
    """Shorten an untrusted value for a message."""
    return ascii(reprlib.repr(value))[1:-1]
