"""Progress of a learning run in a file, from which an interrupted run resumes.

A run has stages. Each adds samples, one after the other, to sums: float64 or integer tensors, changed in place. From
time to time, after a sample, all sums and the number of samples of each stage are written to the file, completely or
not at all. Sums are restored bit for bit and samples are taken in the same order, so the profile equals that of an
uninterrupted run. The file's key identifies the run: model, samples and options.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_cachegen import strict_json
from hf_cachegen.artifact.store import output_path
from hf_cachegen.errors import ConfigError
from hf_cachegen.profiles.learning.progress import shown

SECONDS_BETWEEN = 120.0
"""Least time between two writes: a run of a small model ends before the first."""
SHARE_OF_TIME = 50
"""Writing takes at most 1 / SHARE_OF_TIME of the time."""
Item = TypeVar("Item")
Sums = Mapping[str, Tensor]


class Journal:
    """Progress of one run.

    Args:
        path: The file; None stores nothing.
        key: Identifies the run.
        progress: Draw a progress bar per stage. The log has the progress in any case (`progress.py`).

    Raises:
        ConfigError: The path is none, or the file is of another run or of another kind.
    """

    def __init__(self, path: str | os.PathLike[str] | None, key: str, *, progress: bool = False):
        self.path, self.key, self.progress = None if path is None else output_path(path), key, progress
        self._partial = None if path is None else output_path(f"{self.path}.partial")
        self._done: dict[str, int] = {}
        self._sums: dict[str, Tensor] = {}
        self._wait, self._last = SECONDS_BETWEEN, time.monotonic()
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                self._read(self.path)

    def _read(self, path: Path) -> None:
        try:
            with safe_open(path, "pt") as file:
                about = strict_json.loads((file.metadata() or {})["cachegen_learning"].encode())
            key, done = str(about["key"]), {str(stage): int(count) for stage, count in about["done"].items()}
            sums = load_file(path)
        except (SafetensorError, OSError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"{path} is not the journal of a learning run: {error}; name another file") from error
        if key != self.key:
            raise ConfigError(
                f"{path} is the journal of another learning run (another model, other samples or other options): "
                "repeat that run, or remove the file to begin this one"
            )
        self._done, self._sums = done, sums

    def each(self, stage: str, items: Sequence[Item], sums: Sums) -> Iterator[Item]:
        """Yield the items that `stage` has not seen yet. The sums of the others are restored into `sums` first."""
        done = self.restore(stage, sums)
        for index in shown(range(done, len(items)), stage, len(items), done, bar=self.progress):
            yield items[index]
            self.keep(stage, sums, index + 1)

    def restore(self, stage: str, sums: Sums) -> int:
        """Restore the sums of `stage` into `sums`, in place. Return the number of items that they contain. Raises
        ConfigError.
        """
        for name, x in sums.items():
            kept = self._sums.get(f"{stage}.{name}")
            if stage in self._done and (kept is None or kept.shape != x.shape or kept.dtype != x.dtype):
                raise ConfigError(f"{self.path} is damaged: remove it to begin again")
            if kept is not None:
                x.copy_(kept)
        return self._done.get(stage, 0)

    def keep(self, stage: str, sums: Sums, done: int) -> None:
        """Record `sums` of the first `done` items, and write the file when it is time."""
        self._done[stage] = done
        self._sums.update((f"{stage}.{name}", x) for name, x in sums.items())
        if self.path is not None and self._partial is not None and time.monotonic() - self._last >= self._wait:
            start = time.monotonic()
            self._write(self.path, self._partial)
            self._last = time.monotonic()
            self._wait = max(SECONDS_BETWEEN, SHARE_OF_TIME * (self._last - start))

    def _write(self, path: Path, partial: Path) -> None:
        about = {"cachegen_learning": json.dumps({"key": self.key, "done": self._done})}
        save_file({name: x.contiguous() for name, x in self._sums.items()}, partial, about)
        os.replace(partial, path)


def unknown(*shape: int) -> Tensor:
    """Return float64 NaN, for numbers to compute."""
    return torch.full(shape, float("nan"), dtype=torch.float64)
