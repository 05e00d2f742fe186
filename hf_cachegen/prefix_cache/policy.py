"""Whether reusing a stored prefix pays: loading it against computing it.

Loading costs a fixed time and a time per token, measured from the loads of this process. Computing costs what the
model's measured prefill speed says (`streaming/prefill_speed.py`). Nothing is known at first: then a prefix is reused,
which measures loading.
"""

from __future__ import annotations

import threading

WEIGHT = 0.3
"""Share of the newest load in the estimate."""
FORGIVE = 0.9
"""Factor of the estimate after each prefix that was declined, so that one slow load is not believed forever."""


class LoadSpeed:
    """Seconds per token of loading blocks of one family. Threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._per_token: float | None = None

    def add(self, tokens: int, seconds: float) -> None:
        """Take a load into account."""
        with self._lock:
            new = seconds / max(1, tokens)
            self._per_token = new if self._per_token is None else (1 - WEIGHT) * self._per_token + WEIGHT * new

    def seconds(self, tokens: int) -> float | None:
        """Return the expected time of loading so many tokens; None where nothing was measured."""
        return None if self._per_token is None else self._per_token * tokens

    def pays(self, tokens: int, prefill_seconds: float | None) -> bool:
        """Report whether loading so many tokens is expected to be faster than computing them.

        Args:
            tokens: tokens of the prefix.
            prefill_seconds: the expected time of computing them; None where the speed is not known.
        """
        load = self.seconds(tokens)
        if load is None or prefill_seconds is None or load <= prefill_seconds:
            return True
        with self._lock:
            self._per_token = None if self._per_token is None else self._per_token * FORGIVE
        return False
