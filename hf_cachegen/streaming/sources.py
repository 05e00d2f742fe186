"""Where a stream's bytes come from: an opened artifact whose transfers are counted, bundled and can be given up.

All checks stay where they are: segments are read through the artifact's own stores, which verify them. What is added
sits below those, between a remote store and its files: a `Wire`. It tells a `Bandwidth` of every piece that arrives,
ends a request under way when the stream is given up, and fetches a run of segments that lie side by side as one range,
from which the reads above are then served.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

from hf_cachegen.artifact import Artifact
from hf_cachegen.codec.chunk import Codec
from hf_cachegen.container import BASE_FILE, Segment, Store
from hf_cachegen.encoding import SIDE
from hf_cachegen.errors import ManifestError
from hf_cachegen.stores import LocalStore, RemoteStore
from hf_cachegen.stores.cached import CachedStore
from hf_cachegen.stores.remote import Files
from hf_cachegen.stores.sealed import SealedStore
from hf_cachegen.streaming.bandwidth import Bandwidth


class GivenUp(Exception):
    """Ends a request that nobody waits for any more; no user sees it."""


class Wire:
    """files: those of a remote store. meters: told of what arrives. given_up: asked at each piece. Threads share it."""

    def __init__(self, files: Files, meters: Sequence[Bandwidth], given_up: Callable[[], bool]) -> None:
        self._files, self._meters, self._given_up = files, meters, given_up
        self._held: dict[tuple[str, int], bytes] = {}
        self._heads: dict[str, int] = {}
        self._pieces = hasattr(files, "progress")
        if self._pieces:
            files.progress = self._arrived  # type: ignore[attr-defined]

    def open(self, name: str) -> tuple[int, bytes]:
        """As that of the files. What is held of the file goes: who opens it once more was given wrong bytes."""
        for held in list(self._held):
            if held[0] == name:
                self.release(held)
        size, head = self._counted(lambda: self._files.open(name), lambda found: len(found[1]))
        self._heads[name] = len(head)
        return size, head

    def mark(self, name: str) -> str:
        """As that of the files."""
        return self._files.mark(name)

    def read(self, name: str, offset: int, length: int) -> bytes:
        """As that of the files; from a run that is held, where the range lies in one."""
        for (file, start), data in list(self._held.items()):
            if file == name and start <= offset and offset + length <= start + len(data):
                return data[offset - start : offset - start + length]
        return self._counted(lambda: self._files.read(name, offset, length), len)

    def hold(self, name: str, offset: int, length: int) -> tuple[str, int] | None:
        """Fetches a range for the reads to come, as far as it did not come with opening; `release` lets it go."""
        skip = max(0, self._heads.get(name, 0) - offset)
        if skip >= length:
            return None
        data = self._counted(lambda: self._files.read(name, offset + skip, length - skip), len)
        self._held[name, offset + skip] = data
        return name, offset + skip

    def release(self, held: tuple[str, int] | None) -> None:
        """What is held is not needed any more."""
        if held is not None:
            self._held.pop(held, None)

    def _counted(self, fetch: Callable[[], Any], size: Callable[[Any], int]) -> Any:
        if self._given_up():
            raise GivenUp
        for meter in self._meters:
            meter.began()
        try:
            found = fetch()
            if not self._pieces:
                self._arrived(size(found))
            return found
        finally:
            for meter in self._meters:
                meter.ended()

    def _arrived(self, count: int) -> None:
        if self._given_up():
            raise GivenUp
        for meter in self._meters:
            meter.add(count)


class Source:
    """One place with the artifact. Threads may share it.

    open_artifact: gives the artifact, opened; called once, by the first that needs it. same: the artifact that it must
    be equal to, for a fallback. meters, given_up: as for `Wire`.
    """

    def __init__(
        self,
        place: str,
        open_artifact: Callable[[], Artifact],
        meters: Sequence[Bandwidth],
        given_up: Callable[[], bool],
        same: Artifact | None = None,
    ) -> None:
        self.place, self._open_artifact, self._meters, self._given_up = place, open_artifact, meters, given_up
        self._same = same
        self._lock = threading.Lock()
        self._locks: dict[str, threading.Lock] = {}
        self._artifact: Artifact | None = None
        self._wire: Wire | None = None
        self._bundles = False
        self._stores: list[Any] = []

    def open(self) -> Artifact:
        """The artifact, opened by the first that asks. Raises what opening does, and ManifestError where it is another
        than it must be.
        """
        with self._lock:
            if self._artifact is None:
                found = self._open_artifact()
                if self._same is not None and found.manifest.files != self._same.manifest.files:
                    raise ManifestError(f"{self.place} holds another artifact than {self._same.store}")
                self._attach(found)
                self._artifact = found
            return self._artifact

    def _attach(self, artifact: Artifact) -> None:
        """Puts a wire below an artifact's stores, if they are remote."""
        self._stores = list(_chain(artifact.store))
        self._bundles = not any(isinstance(store, SealedStore) for store in self._stores)
        inner = self._stores[-1]
        if isinstance(inner, RemoteStore):
            self._wire = Wire(inner.files, self._meters, self._given_up)
            inner.files = self._wire

    def codec(self) -> Codec:
        """What decodes the artifact's chunks. Raises ArtifactError, StoreError, ProfileError."""
        artifact = self.open()
        self._open_file(artifact, artifact.manifest.segment(BASE_FILE, SIDE))
        return artifact.codec()

    def here(self, segment: Segment) -> bool:
        """Whether a segment is on this disk (as far as one can tell without reading it)."""
        return any(
            isinstance(store, LocalStore)
            or (
                isinstance(store, CachedStore)
                and not store.anew
                and store.cache.has(store.origin, segment.xxh3, segment.length)
            )
            for store in self._stores
        )

    def fetch(self, segments: Sequence[Segment]) -> Iterator[bytes]:
        """The bytes of segments that lie side by side in one file, each verified, one after the other.

        Raises ArtifactError and StoreError; GivenUp.
        """
        artifact = self.open()
        self._open_file(artifact, segments[0])
        far, held = [segment for segment in segments if not self.here(segment)], None
        side_by_side = all(a.offset + a.length == b.offset for a, b in pairwise(far))
        try:
            if self._wire is not None and self._bundles and len(far) > 1 and side_by_side:
                length = far[-1].offset + far[-1].length - far[0].offset
                held = self._wire.hold(far[0].file, far[0].offset, length)
            for segment in segments:
                yield artifact.reader.read(segment)
        finally:
            if self._wire is not None:
                self._wire.release(held)

    def _open_file(self, artifact: Artifact, segment: Segment) -> None:
        """Several threads shall not each ask for the head of a file."""
        with self._lock:
            lock = self._locks.setdefault(segment.file, threading.Lock())
        with lock:
            if not self.here(segment):
                artifact.store.size(segment.file)


def _chain(store: Store) -> Iterator[Any]:
    """A store, the one that it stands before, and so on to the innermost."""
    found: Any = store
    while found is not None:
        yield found
        found = getattr(found, "store", None)
