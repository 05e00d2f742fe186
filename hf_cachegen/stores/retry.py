"""The retry policy of stores: number of attempts, waits between them, and time limits."""

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
    """Limits of every request.

    Attributes:
        attempts: number of attempts before the error is raised.
        timeout: longest silence of a server in seconds, also while connecting.
        min_bytes_per_second: slowest rate of a body in bytes per second, after the first `timeout` seconds.
        backoff: wait before the second attempt in seconds. It doubles with each attempt, and each wait is shortened by
            up to a half at random, so that many readers of a failing server do not return at once.
        max_wait: longest wait in seconds; the error is raised at once where a server asks for more (Retry-After).

    Raises:
        ConfigError: a value is out of its range.
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
        """Return the seconds that one attempt at `length` bytes may take."""
        return self.timeout + length / self.min_bytes_per_second


class Again(Exception):
    """An attempt failed, and another may succeed.

    Args:
        error: the error to raise if no attempt succeeds.
        wait: seconds that the server asked to wait; None where it did not.
    """

    def __init__(self, error: StoreError, wait: float | None = None) -> None:
        super().__init__(str(error))
        self.error, self.wait = error, wait


def persist(patience: Patience, attempt: Callable[[], Result]) -> Result:
    """Call `attempt` until it does not raise Again, and return its result.

    Args:
        patience: number of attempts, and waits between them.
        attempt: the call to make.

    Raises:
        StoreError: the error of the last attempt.
    """
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
