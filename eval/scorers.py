"""Scores of one answer: pure functions of the model's output and what was expected."""

from __future__ import annotations

import re


def last_integer(output: str) -> str | None:
    """The last run of digits in the output, as LongChat's line retrieval scores it; None where there is none."""
    found = re.findall(r"\d+", output)
    return found[-1] if found else None


def line_retrieval(output: str, expected: str) -> bool:
    """LongChat lines (LongEval): right when the last integer of the output is the register's content."""
    return last_integer(output) == expected
