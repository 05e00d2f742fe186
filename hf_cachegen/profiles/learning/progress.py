"""Progress of a long computation: a bar on a terminal, and messages in the log at INFO, at most one in ten seconds."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

LOG = logging.getLogger("hf_cachegen.profiles.learning")
SECONDS_BETWEEN = 10.0
"""Least time between two messages of a stage, after its first."""
Item = TypeVar("Item")


def shown(items: Iterable[Item], stage: str, total: int | None, done: int = 0, *, bar: bool = False) -> Iterator[Item]:
    """Yield the items, and report the progress after each.

    Args:
        items: The items that are left.
        stage: Its name.
        total: Number of items, those that are done included; None where it is not known.
        done: Number of items that are done.
        bar: Draw a progress bar too.
    """
    start = last = time.monotonic()
    LOG.info("%s: begins%s", stage, f" after {done} that are done" if done else "")
    for count, item in enumerate(tqdm(items, stage, total, initial=done, unit="sample", disable=not bar), 1):
        yield item
        now = time.monotonic()
        if now - last < SECONDS_BETWEEN and done + count != total:
            continue
        last, spent = now, now - start
        if total is None:
            LOG.info("%s: %d measurements, %.0f s", stage, done + count, spent)
        else:
            left = spent / count * (total - done - count)
            LOG.info("%s: %d of %d samples, %.0f s, about %.0f s left", stage, done + count, total, spent, left)


@contextmanager
def timed(stage: str) -> Iterator[None]:
    """Report the beginning of a stage without samples, and the seconds that it took."""
    start = time.monotonic()
    LOG.info("%s: begins", stage)
    yield
    LOG.info("%s: done, %.0f s", stage, time.monotonic() - start)
