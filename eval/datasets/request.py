"""What every loader of a data set is given, and what several of them need."""

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
    """tokenizer: the model's, for lengths in tokens; limit: at most that many contexts (None: all that there are, or
    as many as the data set thinks enough where it could go on for ever); seed: of whatever is drawn.
    """

    tokenizer: Any
    limit: int | None = None
    seed: int = 0

    def count(self, default: int) -> int:
        """How many contexts a generator makes."""
        return default if self.limit is None else self.limit

    def tokens(self, text: str) -> int:
        """Its length."""
        return len(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def read_text(path: str) -> tuple[str, dict[str, Any]]:
    """(text, source) of a file; $NAME in its path is of the environment. Raises ConfigError where it is no UTF-8."""
    try:
        data = Path(os.path.expandvars(path)).expanduser().read_bytes()
        return data.decode("utf-8"), {"sha256": hashlib.sha256(data).hexdigest()}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path!r}: {error}") from error


def read_rows(path: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(rows, source) of a file with a JSON object in each line. Raises ConfigError."""
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
    """A field that must be there. Raises ConfigError."""
    if name not in row:
        raise ConfigError(f"{where}: no {name!r} among {sorted(row)}")
    return row[name]
