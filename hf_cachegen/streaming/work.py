"""The next step of the thread that decodes: what `Schedule.next_work` returns."""

from __future__ import annotations

from dataclasses import dataclass, field

WAKE_SECONDS = 0.1
"""A wait is at most this long, since time alone can change a plan."""


@dataclass(frozen=True)
class Decode:
    """Decode a chunk from its first `level` parts."""

    chunk: int
    level: int


@dataclass(frozen=True)
class Recompute:
    """Run the model over a chunk's tokens; all chunks before it are in place. why: the reason."""

    chunk: int
    why: str = field(default="", compare=False)


@dataclass(frozen=True)
class Wait:
    """Wait until a part arrives, at most `seconds`, which do not pass the deadline."""

    seconds: float = field(default=WAKE_SECONDS, compare=False)


@dataclass(frozen=True)
class Settle:
    """Wait until all chunks that are being decoded are in place, or are known to be damaged."""


@dataclass(frozen=True)
class Finished:
    """All chunks are in place, at the best level that they will have."""


@dataclass(frozen=True)
class Stuck:
    """Nothing more will arrive, and the first missing chunk cannot be recomputed."""

    chunk: int


Work = Decode | Recompute | Wait | Settle | Finished | Stuck
