"""A run is a folder: what was asked and where it ran (config.json, written before anything is measured), a line for
each finished example (predictions*.jsonl), and at the end metrics.json.

Twists: several processes write, each into a file of its own, and a finished run has one, predictions.jsonl, in the
order of the examples. A process that is killed leaves at most half a line, at the end of its own file: it is cut off by
the next start. Which process does which example depends on its position alone, never on what is done already, so no two
processes meet.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_cachegen.errors import ConfigError

CONFIG, PREDICTIONS, METRICS = "config.json", "predictions.jsonl", "metrics.json"
ASKED = "asked"
"""The part of the configuration that two sessions of one run must have in common."""
SESSIONS = "sessions"
"""When, where and with which revision the run was begun and taken up again."""


class RunFolder:
    """The files of one run."""

    def __init__(self, place: Path):
        self.place = place

    def begin(self, asked: dict[str, Any], session: dict[str, Any]) -> None:
        """Writes the configuration, or adds a session to that of the same run. Raises ConfigError for another run's
        folder, and for one that holds something else.
        """
        asked = json.loads(json.dumps(asked))
        config: dict[str, Any] = {ASKED: asked, SESSIONS: []}
        if (self.place / CONFIG).exists():
            config = self.config()
            before = config[ASKED]
            different = sorted(key for key in {*before, *asked} if before.get(key) != asked.get(key))
            if different:
                told = "; ".join(f"{key}: {_short(before.get(key))}, now {_short(asked.get(key))}" for key in different)
                raise ConfigError(f"{self.place} is another run ({told}): choose another --out")
        elif self.place.is_dir() and any(self.place.iterdir()):
            raise ConfigError(f"{self.place} holds something else than a run: choose another --out")
        self.place.mkdir(parents=True, exist_ok=True)
        config[SESSIONS].append(session)
        self._write(CONFIG, config)

    def config(self) -> dict[str, Any]:
        """Raises ConfigError where this is no run."""
        return self._read(CONFIG)

    def metrics(self) -> dict[str, Any]:
        """Raises ConfigError where the run is not finished."""
        return self._read(METRICS)

    def done(self) -> dict[str, dict[str, Any]]:
        """The records of finished examples by their id; half a line at an end is somebody else's, still writing."""
        paths = sorted(self.place.glob("predictions*.jsonl"))
        return {record["example"]: record for path in paths for record in _records(path)}

    def writer(self, rank: int) -> Shard:
        """Where process `rank` adds its records."""
        return Shard(self.place / f"predictions-{rank:03}.jsonl")

    def merge(self, ids: Sequence[str]) -> list[dict[str, Any]]:
        """All records in this order, in one file. Raises ConfigError where one is missing."""
        found = self.done()
        if missing := [id_ for id_ in ids if id_ not in found]:
            raise ConfigError(f"{self.place}: {len(missing)} examples are missing, {missing[0]!r} first: run it again")
        records = [found[id_] for id_ in ids]
        temporary = self.place / f".{PREDICTIONS}"
        temporary.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        os.replace(temporary, self.place / PREDICTIONS)
        for path in self.place.glob("predictions-*.jsonl"):
            path.unlink()
        return records

    def finish(self, metrics: dict[str, Any]) -> None:
        self._write(METRICS, metrics)

    def _write(self, name: str, value: dict[str, Any]) -> None:
        temporary = self.place / f".{name}"
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, self.place / name)

    def _read(self, name: str) -> dict[str, Any]:
        try:
            value: dict[str, Any] = json.loads((self.place / name).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ConfigError(f"{self.place} has no {name}: it is no finished run") from error
        except ValueError as error:
            raise ConfigError(f"{self.place / name} is damaged: {error}") from error
        return value


class Shard:
    """One process's file of records, a line each, on disk before the next example begins."""

    def __init__(self, path: Path):
        data = path.read_bytes() if path.exists() else b""
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(path, whole)
        self._file = path.open("ab")

    def add(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Shard:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


def _records(path: Path) -> list[dict[str, Any]]:
    try:
        found = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    except ValueError as error:
        raise ConfigError(f"{path} is damaged: {error}; remove it, and run again") from error
    if not all(isinstance(record, dict) and "example" in record for record in found):
        raise ConfigError(f"{path} is damaged: a line is no record; remove it, and run again")
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
