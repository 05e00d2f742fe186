"""The adaptation experiment (`python -m eval.adaptation`) as a part of the report: its results file, made a table."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.report.tables import Table
from hf_cachegen.errors import ConfigError


@dataclass(frozen=True)
class Adaptation:
    """Rows of {"policy", ...numbers} as one table."""

    table: Table

    def html(self) -> str:
        return (
            "<section><h2 id=adaptation>Adaptation</h2><p class=muted>Traces of bandwidth replayed against an "
            f"artifact’s real sizes with the product’s own policy (virtual clock).</p>{self.table.html()}</section>"
        )


def load(path: Path) -> Adaptation:
    """Raises ConfigError for a file of another form: {"rows": [{name: text or number}]}."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        heads = tuple(rows[0])
        cells = tuple(tuple(_cell(row[head]) for head in heads) for row in rows)
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ConfigError(f"{path} holds no results of eval.adaptation: {error!r}") from error
    return Adaptation(Table("Adaptation: time to the first token, violations of the SLO, quality", heads, cells))


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
