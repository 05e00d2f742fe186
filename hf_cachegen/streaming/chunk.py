"""The state of one chunk in a stream."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Chunk:
    """The state of one chunk.

    Args:
        index: The number of the chunk.
        first: Its first token.
        tokens: Its number of tokens.
        sizes: Coded bytes of each part.
        wire: Those of them that are not on this disk.
        best: The number of parts that can be had.
        level: The level in place; 0 where it was not decoded.
        decoding: The level that is being decoded; 0 where none is.
        first_level: The level before any refinement.
        text: Whether it was recomputed.
        arrived: Parts that have arrived.
        asked: Parts that are under way.
        why: The reason of the last decision.
        rate: The throughput estimate at that decision, bytes per second.
    """

    index: int
    first: int
    tokens: int
    sizes: tuple[int, ...]
    wire: tuple[int, ...]
    best: int
    level: int = 0
    decoding: int = 0
    first_level: int = 0
    text: bool = False
    arrived: set[int] = field(default_factory=set)
    asked: set[int] = field(default_factory=set)
    why: str = ""
    rate: float | None = None

    @property
    def ready(self) -> bool:
        """Whether its keys and values are in place at any level, or are being decoded."""
        return self.level > 0 or self.decoding > 0 or self.text

    @property
    def have(self) -> int:
        """The level that can be decoded from the parts that have arrived."""
        return self.first_lacking(0)

    def first_lacking(self, part: int) -> int:
        """Return the first part from `part` on that can be had and has not arrived; `best` where all have."""
        return next((finer for finer in range(part, self.best) if finer not in self.arrived), self.best)

    def lacks(self, part: int) -> bool:
        """Return whether a part can be had and is neither here nor under way."""
        return part < self.best and part not in self.arrived and part not in self.asked
