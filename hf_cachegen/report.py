"""The report of a cache: its sizes and times as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class CacheReport:
    """The sizes and times of a cache; None for a value that does not apply.

    Attributes:
        context_tokens: length of the context in tokens.
        exact_bytes: size in bytes of the keys and values, and of the states at one position, in the model's dtypes.
        loaded_bytes: bytes that a loader of `level` fetches, manifest and headers included.
        level: the level that was loaded.
        prefill_seconds: time of the prefill in seconds.
        load_seconds: time of loading and decoding in seconds.
        encoding: the report in the artifact: bits per element and relative error of each layer at each level.
        checkpoints: for a model with recurrent states, the numbers of tokens after which they are kept.
        state_bytes: size in bytes of the states at all checkpoints, in the model's dtypes.
        state_budget: the largest size in bytes that they were allowed to have.
        state_kl: for quantised states, the mean KL that they cause, in nats per token of the context.
    """

    context_tokens: int
    exact_bytes: int
    loaded_bytes: int | None = None
    level: int | None = None
    prefill_seconds: float | None = None
    load_seconds: float | None = None
    encoding: dict[str, Any] = field(default_factory=dict)
    checkpoints: tuple[int, ...] = ()
    state_bytes: int = 0
    state_budget: int | None = None
    state_kl: float | None = None

    @property
    def ratio(self) -> float | None:
        """Return exact_bytes / loaded_bytes, None if nothing was loaded."""
        return None if self.loaded_bytes is None else self.exact_bytes / self.loaded_bytes
