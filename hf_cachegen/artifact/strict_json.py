"""JSON from strangers: one spelling per meaning, nothing that Python's parser would let pass in silence.

Python's `json` keeps the last of two equal keys, reads NaN and Infinity, guesses UTF-16, turns 1e999 into infinity,
and spends quadratic time on an integer of a million digits. Here each of these is refused.
"""

from __future__ import annotations

import json
import math
from typing import Any

MAX_INTEGER_DIGITS = 19
"""A signed 64-bit integer has at most 19 digits; no count of this format needs more."""
MAX_DEPTH = 32
"""Levels of nesting, far fewer than Python's stack takes, so that whatever was read can also be shown and written."""


def loads(data: bytes) -> Any:
    """Parses UTF-8 JSON; raises ValueError, with the reason, for anything that has two readings or none."""
    try:
        text = data.decode("utf-8")
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_number,
            parse_constant=_constant,
        )
        if "\\ud" in text.lower():  # half a surrogate pair parses, and fails only when somebody prints it
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("nested too deeply") from None
    _check_depth(value)
    return value


def dumps(value: Any) -> str:
    """The one spelling of `value`: sorted keys, no spaces. Raises TypeError or ValueError for what JSON cannot hold."""
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
        raise ValueError(f"the key {twice[:64]!r} stands twice in one object")
    return result


def _integer(digits: str) -> int:
    if len(digits.lstrip("-")) > MAX_INTEGER_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _number(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:32]} is beyond a double")
    return value


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
