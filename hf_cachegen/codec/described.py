"""Checks of the untrusted JSON values that describe a profile. Each returns the value, or raises TypeError."""

from __future__ import annotations

import reprlib
from typing import Any


def whole(value: Any) -> int:
    """Return an integer; a bool, a float or a text is none."""
    if type(value) is not int:
        raise TypeError(f"expected an integer, got {_short(value)}")
    return value


def number(value: Any) -> float:
    """Return a number as a float."""
    if type(value) not in (int, float):
        raise TypeError(f"expected a number, got {_short(value)}")
    return float(value)


def members(value: Any, most: int) -> list[Any]:
    """Return a list of at most `most` values."""
    if type(value) is not list or len(value) > most:
        raise TypeError(f"expected a list of at most {most} values, got {_short(value)}")
    return value


def mapping(value: Any) -> dict[str, Any]:
    """Return an object."""
    if type(value) is not dict:
        raise TypeError(f"expected an object, got {_short(value)}")
    return value


def _short(value: Any) -> str:
    return ascii(reprlib.repr(value))[1:-1]
