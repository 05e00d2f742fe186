"""Files <-> places. A store gives sizes and byte ranges by name; `container.Store` is its contract."""

from __future__ import annotations

from hf_cachegen.stores.local import LocalStore

__all__ = ["LocalStore"]
