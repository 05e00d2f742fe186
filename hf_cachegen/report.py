"""What a cache is and what it cost: plain numbers, told to whoever asks for a cache's `report`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class CacheReport:
    """What a cache is and what it cost. Sizes in bytes, times in seconds; None where it does not apply.

    exact_bytes: keys and values in the model's dtype; loaded_bytes: what a loader of `level` fetches, everything
    counted; encoding: the artifact's own report (bits per element and relative error of each layer at each level).
    """

    context_tokens: int
    exact_bytes: int
    loaded_bytes: int | None = None
    level: int | None = None
    prefill_seconds: float | None = None
    load_seconds: float | None = None
    encoding: dict[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """exact_bytes / loaded_bytes."""
        return None if self.loaded_bytes is None else self.exact_bytes / self.loaded_bytes
