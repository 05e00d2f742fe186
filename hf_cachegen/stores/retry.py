"""How patient a store is: how often an attempt is made again, how long it waits in between, and when it gives up."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from hf_cachegen.errors import ConfigError, StoreError

Result = TypeVar("Result")


@dataclass(frozen=True)
class Patience:
    """Limits of every request; times in seconds.

    attempts: how often a range is asked for before its error is raised.
    timeout: longest silence of a server, also while connecting.
    min_bytes_per_second: a body that comes slower than this, the first `timeout` seconds aside, counts as stalled.
    backoff: wait before the second attempt; doubles from attempt to attempt, each shortened by up to a half at random,
        so that many readers of a failing server do not come back at once.
    max_wait: longest wait; a server that asks (Retry-After) for more is not waited for.

    Raises ConfigError for a value out of range.
    """

    attempts: int = 5
    timeout: float = 30.0
    min_bytes_per_second: int = 1 << 13
    backoff: float = 0.5
    max_wait: float = 60.0

    def __post_init__(self) -> None:
        if not (self.attempts >= 1 and self.timeout > 0 and self.min_bytes_per_second > 0):
            raise ConfigError(f"attempts, timeout and min_bytes_per_second must be above 0, got {self}")
        if not (self.backoff >= 0 and self.max_wait >= 0):
            raise ConfigError(f"backoff and max_wait must not be negative, got {self}")

    def seconds_for(self, length: int) -> float:
        """Time that one attempt at `length` bytes may take."""
        return self.timeout + length / self.min_bytes_per_second


class Again(Exception):
    """An attempt failed, another may not; `error` is raised if none succeeds, `wait` are the seconds asked for."""

    def __init__(self, error: StoreError, wait: float | None = None) -> None:
        super().__init__(str(error))
        self.error, self.wait = error, wait


def persist(patience: Patience, attempt: Callable[[], Result]) -> Result:
    """What `attempt` returns, made again after each `Again`; the last one's error when patience is at its end."""
    for number in range(1, patience.attempts + 1):
        try:
            return attempt()
        except Again as failure:
            wait = failure.wait
            if wait is None:
                wait = min(patience.max_wait, patience.backoff * 2 ** (number - 1)) * random.uniform(0.5, 1)
            if number == patience.attempts or wait > patience.max_wait:
                raise failure.error from failure.__cause__
        time.sleep(wait)
    raise RuntimeError("unreachable: the last attempt returns or raises")
