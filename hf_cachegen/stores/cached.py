"""A store in front of another one: it keeps verified ranges, and reads a complete artifact without network."""

from __future__ import annotations

from collections.abc import Iterable

from hf_cachegen.artifact import MANIFEST_FILE, SIGNATURE_FILE, Limits, Manifest, Segment, Store
from hf_cachegen.artifact.manifest import digest, loads
from hf_cachegen.errors import ArtifactError, OfflineError
from hf_cachegen.stores.segment_cache import SegmentCache


class CachedStore(Store):
    """The artifact at one origin, read through the local cache.

    Args:
        store: the store to fetch from; None to read the cache alone.
        cache: the local cache.
        origin: the URL, or the repository and folder.
        version: name of content that never changes (a commit), whose manifest is kept. Without one the manifest is
            fetched each time; offline, the last one seen is read.
        refresh: fetch everything again, and replace the cached bytes.
        limits: limits for the manifest.

    Raises:
        OfflineError: `store` is None, and the cache lacks the range.
    """

    def __init__(
        self,
        store: Store | None,
        cache: SegmentCache,
        origin: str,
        version: str | None = None,
        *,
        refresh: bool = False,
        limits: Limits | None = None,
    ) -> None:
        self.store, self.cache, self.origin, self.version, self.refresh = store, cache, origin, version, refresh
        self._note = f"manifest {version or 'last seen'}"
        self._limits = limits or Limits()
        self._kept: bytes | None = None
        self._manifest: Manifest | None = None
        if not refresh and (version is not None or store is None):
            self._kept = self._sound(cache.noted(origin, self._note))

    def parsed(self, data: bytes, limits: Limits) -> Manifest | None:
        """Return the manifest that was parsed from these bytes before they were kept."""
        return self._manifest if data == self._kept and limits == self._limits else None

    def __str__(self) -> str:
        return self.origin

    def size(self, name: str) -> int:
        """Return the length of the file in bytes, from the manifest where the cache holds the file's header."""
        if name == MANIFEST_FILE and self._kept is not None:
            return len(self._kept)
        if name == SIGNATURE_FILE and self.store is None:
            return len(self._signature())
        entry = self._manifest.files.get(name) if self._manifest else None
        if entry and not self.refresh and self.cache.has(self.origin, entry.header_xxh3, entry.header_bytes):
            return entry.size
        return self._source(name).size(name)

    def read(self, name: str, offset: int, length: int, xxh3: str | None = None) -> bytes:
        """Read exactly that range, from the cache where it holds it."""
        if name == MANIFEST_FILE:
            if self._kept is None:
                self._kept = self._source(name).read(name, offset, length)
                if self._sound(self._kept) is not None:
                    self.cache.note(self.origin, self._note, self._kept)
            return self._kept[offset : offset + length]
        if name == SIGNATURE_FILE:
            return self._signature(offset, length)
        if xxh3 is None:
            return self._source(name).read(name, offset, length)
        data = None if self.refresh else self.cache.get(self.origin, xxh3, length)
        if data is None:
            data = self._source(name).read(name, offset, length, xxh3)
            if len(data) == length and digest(data) == xxh3:
                self.cache.put(self.origin, xxh3, data)
        return data

    def prefetch(self, segments: Iterable[Segment]) -> None:
        """Begin to fetch those of the segments that the cache lacks."""
        missing = [segment for segment in segments if not self._has(segment)]
        if missing and self.store is not None:
            self.store.prefetch(missing)

    def unwrap(self) -> Store | None:
        """Return the store to fetch from, or None."""
        return self.store

    def is_local(self, segment: Segment) -> bool:
        """Report whether the segment is in the cache, or in a store on this machine."""
        return self._has(segment) or super().is_local(segment)

    def _has(self, segment: Segment) -> bool:
        return not self.refresh and self.cache.has(self.origin, segment.xxh3, segment.length)

    def _signature(self, offset: int = 0, length: int | None = None) -> bytes:
        """Read the signature: fetched each time, because nothing proves a cached one; kept for offline use."""
        key = f"signature of {self._note}"
        if self.store is None:
            data = self.cache.noted(self.origin, key)
            if data is None:
                self._source(SIGNATURE_FILE)
            return (data or b"")[offset : None if length is None else offset + length]
        data = self.store.read(SIGNATURE_FILE, offset, length or 0)
        self.cache.note(self.origin, key, data)
        return data

    def _source(self, name: str) -> Store:
        if self.store is None:
            raise OfflineError(
                f"{self.origin}: {name}, or the range of it that is needed, is not in the cache at "
                f"{self.cache.directory}; load it once without local_files_only (and not in offline mode)"
            )
        return self.store

    def _sound(self, data: bytes | None) -> bytes | None:
        """Parse a manifest and return its bytes; return None for a damaged one, which is never kept."""
        self._manifest = None
        if data is None:
            return None
        try:
            self._manifest = loads(data, self._limits)
        except ArtifactError:
            return None
        return data
