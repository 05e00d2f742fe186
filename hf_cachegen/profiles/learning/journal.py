"""How far a learning has got, kept in a file, so that one that was killed goes on where it was.

A learning goes through stages; each adds samples, one after the other, to sums: float64 or integer tensors, changed in
place. After a sample, when it is time, all sums and how many samples each stage has seen are written to the file, whole
or not at all. Sums are restored to the bit and samples are taken in the same order, so the profile is the same as
without the interruption. The file's key says of which learning it is: model, samples and options.
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
from tqdm import tqdm

from hf_cachegen.errors import ConfigError

SECONDS_BETWEEN = 30.0
SHARE_OF_TIME = 20
"""Writing may take one part in so many of the time."""
Item = TypeVar("Item")
Sums = Mapping[str, Tensor]


class Journal:
    """path: the file, or None to keep nothing. Raises ConfigError for a file of another learning or another kind."""

    def __init__(self, path: str | os.PathLike[str] | None, key: str, *, progress: bool = False):
        self.path, self.key, self.progress = None if path is None else Path(path), key, progress
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
                about = json.loads((file.metadata() or {})["cachegen_learning"])
            key, done = str(about["key"]), {str(stage): int(count) for stage, count in about["done"].items()}
            sums = load_file(path)
        except (SafetensorError, OSError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"{path} is not the record of a learning: {error}; name another file") from error
        if key != self.key:
            raise ConfigError(
                f"{path} is the record of another learning (of another model, other samples or other options): repeat "
                "that one, or remove the file to begin this one"
            )
        self._done, self._sums = done, sums

    def each(self, stage: str, items: Sequence[Item], sums: Sums) -> Iterator[Item]:
        """The items that `stage` has not seen yet; what was done with the others is put into `sums` first."""
        done = self.restore(stage, sums)
        for index in tqdm(
            range(done, len(items)), stage, len(items), initial=done, unit="sample", disable=not self.progress
        ):
            yield items[index]
            self.keep(stage, sums, index + 1)

    def restore(self, stage: str, sums: Sums) -> int:
        """Puts what was kept of `stage` into `sums`; returns how many items that has seen. Raises ConfigError."""
        for name, x in sums.items():
            kept = self._sums.get(f"{stage}.{name}")
            if stage in self._done and (kept is None or kept.shape != x.shape or kept.dtype != x.dtype):
                raise ConfigError(f"{self.path} is damaged: remove it to begin anew")
            if kept is not None:
                x.copy_(kept)
        return self._done.get(stage, 0)

    def keep(self, stage: str, sums: Sums, done: int) -> None:
        """Notes that `sums` have seen so many items, and writes everything when it is time."""
        self._done[stage] = done
        self._sums.update((f"{stage}.{name}", x) for name, x in sums.items())
        if self.path is not None and time.monotonic() - self._last >= self._wait:
            start = time.monotonic()
            self._write(self.path)
            self._last = time.monotonic()
            self._wait = max(SECONDS_BETWEEN, SHARE_OF_TIME * (self._last - start))

    def _write(self, path: Path) -> None:
        partial = path.with_name(path.name + ".partial")
        about = {"cachegen_learning": json.dumps({"key": self.key, "done": self._done})}
        save_file({name: x.contiguous() for name, x in self._sums.items()}, partial, about)
        os.replace(partial, path)


def unknown(*shape: int) -> Tensor:
    """float64 numbers that are not known yet."""
    return torch.full(shape, float("nan"), dtype=torch.float64)
