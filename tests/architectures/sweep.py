"""Examine families in several processes, and write the results."""

from __future__ import annotations

import io
import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.architectures.checks import examine
from tests.architectures.models import Entry, entries
from tests.architectures.page import render

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE = ROOT / "docs" / "results" / "architectures.json", ROOT / "docs" / "models.md"


def sweep(chosen: list[Entry], jobs: int) -> dict[str, Any]:
    """Examine entries in processes of one thread each, and return the content of the JSON file."""
    start, families = time.perf_counter(), {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=prepare) as pool:
        for entry, outcome in zip(chosen, pool.map(examine, chosen), strict=True):
            print(f"{outcome.status:12}{entry.name:28}{outcome.seconds:6.1f} s  {outcome.reason[:200]}", flush=True)  # noqa: T201
            found = {"model_class": entry.model_class, "task": entry.task, **asdict(outcome)}
            families[entry.name] = {name: value for name, value in found.items() if name not in ("seconds", "failed")}
    print(f"{time.perf_counter() - start:.0f} s with {jobs} processes")  # noqa: T201
    return {
        "command": "python -m tests.architectures --write",
        "transformers": transformers.__version__,
        "torch": torch.__version__.split("+")[0],
        "families": families,
    }


def merged(results: dict[str, Any]) -> dict[str, Any]:
    """Return the recorded results with those of some families replaced.

    Raises:
        ValueError: the recorded results are of another release.
    """
    known = json.loads(RESULTS.read_text(encoding="utf-8"))
    if known["transformers"] != results["transformers"]:
        raise ValueError(f"the recorded results are of Transformers {known['transformers']}: examine all families")
    families = {**known["families"], **results["families"]}
    return {**results, "families": {entry.name: families[entry.name] for entry in entries() if entry.name in families}}


def write(results: dict[str, Any]) -> None:
    """Write the JSON file and the page."""
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(render(results), encoding="utf-8")


def prepare() -> None:
    """Prepare a process of the pool."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    sys.stdout = io.StringIO()  # some configurations print themselves
