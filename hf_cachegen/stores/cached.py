"""A store in front of another: what was verified once is not fetched again, and what is complete needs no network."""

from __future__ import annotations

from collections.abc import Iterable

from hf_cachegen.artifact import MANIFEST_FILE, SIGNATURE_FILE, Limits, Manifest, Segment, Store
from hf_cachegen.artifact.manifest import digest, loads
from hf_cachegen.errors import ArtifactError, OfflineError
from hf_cachegen.stores.segment_cache import SegmentCache


class CachedStore(Store):
    """The artifact at `origin` (a URL, or a repository and folder).

    store: where to fetch from; None: nowhere, and OfflineError for what the cache lacks.
    version: names content that never changes (a commit); its manifest is kept. Without one the manifest is fetched
        each time, except offline, which takes the last one seen.
    anew: fetch everything, and keep it instead of what was there.
    """

    def __init__(
        self,
        store: Store | None,
        cache: SegmentCache,
        origin: str,
        version: str | None = None,
        *,
        anew: bool = False,
        limits: Limits | None = None,
    ) -> None:
        self.store, self.cache, self.origin, self.version, self.anew = store, cache, origin, version, anew
        self._note = f"manifest {version or 'last seen'}"
        self._limits = limits or Limits()
        self._kept: bytes | None = None
        self._manifest: Manifest | None = None
        if not anew and (version is not None or store is None):
            self._kept = self._sound(cache.noted(origin, self._note))

    def __str__(self) -> str:
        return self.origin

    def size(self, name: str) -> int:
        """Length of the file in bytes; as its manifest says, once its header was fetched and proved."""
        if name == MANIFEST_FILE and self._kept is not None:
            return len(self._kept)
        if name == SIGNATURE_FILE and self.store is None:
            return len(self._signature())
        entry = self._manifest.files.get(name) if self._manifest else None
        if entry and not self.anew and self.cache.has(self.origin, entry.header_xxh3, entry.header_bytes):
            return entry.size
        return self._source(name).size(name)

    def read(self, name: str, offset: int, length: int, xxh3: str | None = None) -> bytes:
        """Exactly that range, from the cache if it is there."""
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
        data = None if self.anew else self.cache.get(self.origin, xxh3, length)
        if data is None:
            data = self._source(name).read(name, offset, length, xxh3)
            if len(data) == length and digest(data) == xxh3:
                self.cache.put(self.origin, xxh3, data)
        return data

    def prefetch(self, segments: Iterable[Segment]) -> None:
        """Has the missing ones of these segments fetched ahead."""
        missing = [segment for segment in segments if not self._has(segment)]
        if missing and self.store is not None:
            self.store.prefetch(missing)

    def unwrap(self) -> Store | None:
        """Return the store to fetch from; None where there is none."""
        return self.store

    def is_local(self, segment: Segment) -> bool:
        """Return whether the segment is in the cache, or on this machine anyway."""
        return self._has(segment) or super().is_local(segment)

    def _has(self, segment: Segment) -> bool:
        return not self.anew and self.cache.has(self.origin, segment.xxh3, segment.length)

    def _signature(self, offset: int = 0, length: int | None = None) -> bytes:
        """Fetched each time, since a damaged one could not be told from a wrong one later; kept for offline use."""
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
                f"{self.origin}: {name}, or the part of it that is needed, is not in the cache at "
                f"{self.cache.directory}; load it once without local_files_only (and not in offline mode)"
            )
        return self.store

    def _sound(self, data: bytes | None) -> bytes | None:
        """`data` if it is a whole manifest, which is remembered; a damaged one is never kept."""
        if data is None:
            return None
        try:
            self._manifest = loads(data, self._limits)
        except ArtifactError:
            return None
        return data
