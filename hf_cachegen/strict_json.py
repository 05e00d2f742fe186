"""Parse untrusted JSON strictly: one spelling per meaning, and an error where Python's parser would guess.

Python's `json` keeps the last of two equal keys, reads NaN and Infinity, guesses UTF-16, turns 1e999 into infinity,
and spends quadratic time on an integer of a million digits. This module refuses each of these.
"""

from __future__ import annotations

import json
import math
from typing import Any

MAX_INTEGER_DIGITS = 19
"""A signed 64-bit integer has at most 19 digits. No count of this format needs more."""
MAX_DEPTH = 32
"""Levels of nesting, far fewer than Python's stack allows, so that parsed values can also be printed and written."""


def loads(data: bytes) -> Any:
    """Parse UTF-8 JSON. Raises ValueError, with the reason, for text that is ambiguous or not JSON."""
    try:
        text = data.decode("utf-8")
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_number,
            parse_constant=_constant,
        )
        if "\\ud" in text.lower():  # half a surrogate pair parses, but cannot be printed
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("nested too deeply") from None
    _check_depth(value)
    return value


def dumps(value: Any) -> str:
    """Return the only spelling of `value`: sorted keys, no spaces. Raises TypeError or ValueError for other types."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        inner = [node.values() if isinstance(node, dict) else node for node in level if isinstance(node, (dict, list))]
        level = [child for children in inner for child in children]
        if not level:
            return
    raise ValueError(f"nested more than {MAX_DEPTH} levels deep")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:64]!r} occurs twice in one object")
    return result


def _integer(digits: str) -> int:
    if len(digits.lstrip("-")) > MAX_INTEGER_DIGITS:
        raise ValueError(f"an integer has {len(digits)} digits, more than {MAX_INTEGER_DIGITS}")
    return int(digits)


def _number(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:32]} is out of the range of a double")
    return value


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
