"""Read and write the folder of a run.

config.json states what was asked and where it ran; it is written before anything is measured. predictions*.jsonl has
one line for each finished example. metrics.json is written at the end.

Several processes write, each to its own file. A finished run has one file, predictions.jsonl, in the order of the
examples; `gzip -n` may compress it to predictions.jsonl.gz for a repository. A killed process leaves at most an
incomplete line at the end of its own file, which the next start removes. Which process measures which example depends
on the example's position alone, so no two processes measure the same one.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_cachegen.errors import ConfigError

CONFIG, PREDICTIONS, METRICS = "config.json", "predictions.jsonl", "metrics.json"
COMPRESSED = f"{PREDICTIONS}.gz"
ASKED = "asked"
"""Key of the part of the configuration that all sessions of one run share."""
SESSIONS = "sessions"
"""Key of the list of sessions: when, where and at which revision the run was started and continued."""


class RunFolder:
    """The files of one run.

    Args:
        path: the folder; it need not exist.
    """

    def __init__(self, path: Path):
        self.path = path

    def begin(self, asked: dict[str, Any], session: dict[str, Any]) -> None:
        """Write the configuration, or add a session to that of the same run.

        Args:
            asked: what the run measures; plain values.
            session: when and where this session runs; plain values.

        Raises:
            ConfigError: the folder holds another run, or other files.
        """
        asked = json.loads(json.dumps(asked))
        config: dict[str, Any] = {ASKED: asked, SESSIONS: []}
        if (self.path / CONFIG).exists():
            config = self.config()
            before = config[ASKED]
            different = sorted(key for key in {*before, *asked} if before.get(key) != asked.get(key))
            if different:
                changes = [f"{key}: {_short(before.get(key))}, now {_short(asked.get(key))}" for key in different]
                raise ConfigError(f"{self.path} is another run ({'; '.join(changes)}): choose another --out")
        elif self.path.is_dir() and any(self.path.iterdir()):
            raise ConfigError(f"{self.path} holds other files than a run's: choose another --out")
        self.path.mkdir(parents=True, exist_ok=True)
        config[SESSIONS].append(session)
        self._write(CONFIG, config)

    def config(self) -> dict[str, Any]:
        """Return the configuration. Raises ConfigError where there is none."""
        return self._read(CONFIG)

    def metrics(self) -> dict[str, Any]:
        """Return the metrics. Raises ConfigError where the run is not finished."""
        return self._read(METRICS)

    def done(self) -> dict[str, dict[str, Any]]:
        """Return the records of the finished examples by their id.

        An incomplete last line is ignored: another process is still writing it.

        Raises:
            ConfigError: a file is damaged.
        """
        paths = sorted(self.path.glob("predictions*.jsonl")) + sorted(self.path.glob(COMPRESSED))
        return {record["example"]: record for path in paths for record in _records(path)}

    def writer(self, rank: int) -> Shard:
        """Return the file to which process `rank` appends its records."""
        return Shard(self.path / f"predictions-{rank:03}.jsonl")

    def merge(self, ids: Sequence[str]) -> list[dict[str, Any]]:
        """Write all records to one file, and return them.

        Args:
            ids: the ids of all examples, in order.

        Raises:
            ConfigError: a record is missing.
        """
        found = self.done()
        if missing := [id_ for id_ in ids if id_ not in found]:
            raise ConfigError(f"{self.path}: {len(missing)} examples are missing, {missing[0]!r} first: run it again")
        records = [found[id_] for id_ in ids]
        if not (self.path / COMPRESSED).exists():
            temporary = self.path / f".{PREDICTIONS}"
            temporary.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
            os.replace(temporary, self.path / PREDICTIONS)
        for path in self.path.glob("predictions-*.jsonl"):
            path.unlink()
        return records

    def finish(self, metrics: dict[str, Any]) -> None:
        """Write the metrics; the run is finished."""
        self._write(METRICS, metrics)

    def finished(self) -> bool:
        """Report whether the run has its metrics."""
        return (self.path / METRICS).is_file()

    def compress(self) -> None:
        """Replace the predictions by their compressed form, whose bytes depend on the records alone."""
        plain = self.path / PREDICTIONS
        if plain.is_file():
            (self.path / COMPRESSED).write_bytes(gzip.compress(plain.read_bytes(), mtime=0))
            plain.unlink()

    def _write(self, name: str, value: dict[str, Any]) -> None:
        temporary = self.path / f".{name}"
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, self.path / name)

    def _read(self, name: str) -> dict[str, Any]:
        try:
            value: dict[str, Any] = json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ConfigError(f"{self.path} has no {name}: it is not a finished run") from error
        except ValueError as error:
            raise ConfigError(f"{self.path / name} is damaged: {error}") from error
        return value


class Shard:
    """One process's file of records, one line each; a record is on disk before the next example begins.

    Args:
        path: the file; an incomplete last line is removed.
    """

    def __init__(self, path: Path):
        data = path.read_bytes() if path.exists() else b""
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(path, whole)
        self._file = path.open("ab")

    def add(self, record: dict[str, Any]) -> None:
        """Append a record and flush it to disk."""
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Shard:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


def _records(path: Path) -> list[dict[str, Any]]:
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        found = [json.loads(line) for line in data.split(b"\n")[:-1]]
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ConfigError(f"{path} is damaged: {error}; remove it, and run again") from error
    if not all(isinstance(record, dict) and "example" in record for record in found):
        raise ConfigError(f"{path} is damaged: a line is not a record; remove it, and run again")
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
