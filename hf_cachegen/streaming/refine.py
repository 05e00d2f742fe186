"""Refinements that go on arriving after generation began."""

from __future__ import annotations


class Refinement:
    """What still improves a context. `wait` until it is done, `cancel` to end it; the context is usable at any time."""

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until nothing more will arrive; False where that took longer than `timeout` seconds."""
        return True

    def cancel(self) -> None:
        """Ends it; nothing is left running."""
