"""The argument of every loader of a data set, and helpers that several loaders share."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_cachegen.errors import ConfigError


@dataclass(frozen=True)
class Request:
    """What a loader is asked for.

    Attributes:
        tokenizer: the model's, for lengths in tokens.
        limit: most contexts; None for all, or for the default number of a generated data set.
        seed: random seed of generated data.
    """

    tokenizer: Any
    limit: int | None = None
    seed: int = 0

    def count(self, default: int) -> int:
        """Return the number of contexts to generate."""
        return default if self.limit is None else self.limit

    def tokens(self, text: str) -> int:
        """Return the length of a text in tokens."""
        return len(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def read_text(path: str) -> tuple[str, dict[str, Any]]:
    """Read a UTF-8 file.

    Args:
        path: its path; `$NAME` is replaced from the environment.

    Returns:
        (text, source); the source has the file's SHA-256.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        data = Path(os.path.expandvars(path)).expanduser().read_bytes()
        return data.decode("utf-8"), {"sha256": hashlib.sha256(data).hexdigest()}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path!r}: {error}") from error


def read_rows(path: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Read a file with a JSON object in each line, as (rows, source). Raises ConfigError for another form."""
    text, source = read_text(path)
    return list(_rows(text, path)), source


def _rows(text: str, path: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{path}, line {number}: {error}") from error
        if not isinstance(row, dict):
            raise ConfigError(f"{path}, line {number}: expected a JSON object, got {line[:80]!r}")
        yield row


def field(row: dict[str, Any], name: str, where: str) -> Any:
    """Return a required field of a row. Raises ConfigError where it is missing."""
    if name not in row:
        raise ConfigError(f"{where}: expected a field {name!r}, found {sorted(row)}")
    return row[name]
