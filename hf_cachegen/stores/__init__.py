"""Files <-> locations. A store gives the sizes and byte ranges of files by name; `artifact.Store` is its contract."""

from __future__ import annotations

from hf_cachegen.stores.local import LocalStore
from hf_cachegen.stores.locations import Access, open_store
from hf_cachegen.stores.remote import RemoteStore
from hf_cachegen.stores.retry import Patience
from hf_cachegen.stores.segment_cache import SegmentCache

__all__ = ["Access", "LocalStore", "Patience", "RemoteStore", "SegmentCache", "open_store"]
