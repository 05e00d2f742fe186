"""Where a stream's bytes come from: an opened artifact whose transfers are counted, cut into ranges of any size, and
can be given up.

All checks stay where they are: segments are read through the artifact's own stores, which verify them. What is added
sits below those, between a remote store and its files: a `Wire`. It tells a `Bandwidth` of every piece that arrives,
ends a request under way when the stream is given up, and holds ranges that were fetched ahead, each over a connection
of its own, from which the reads above are then served: many small segments in one request, or a large one in many.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from hf_cachegen.artifact import BASE_FILE, Segment, Store
from hf_cachegen.artifact.artifact import Artifact
from hf_cachegen.artifact.encoded import SIDE
from hf_cachegen.codec.transforms import Transform
from hf_cachegen.errors import ArtifactNotFoundError, ManifestError, RangeError
from hf_cachegen.profiles.files import Profile
from hf_cachegen.profiles.finding import profile_of
from hf_cachegen.stores import LocalStore, RemoteStore
from hf_cachegen.stores.cached import CachedStore
from hf_cachegen.stores.remote import Files
from hf_cachegen.stores.sealed import SealedStore
from hf_cachegen.streaming.bandwidth import Bandwidth
from hf_cachegen.streaming.link import Link, Share


class GivenUp(Exception):
    """Ends a request that nobody waits for any more; no user sees it."""


@dataclass(frozen=True, eq=False)
class Range:
    """Bytes [offset, offset + length) of a file; each is one of its own, since one may be let go while its successor is
    fetched.
    """

    file: str
    offset: int
    length: int

    @property
    def end(self) -> int:
        return self.offset + self.length


class Wire:
    """files: those of a remote store. meters: told of what arrives. given_up: asked at each piece. Threads share it."""

    def __init__(self, files: Files, meters: Sequence[Bandwidth], given_up: Callable[[], bool]) -> None:
        self._files, self._meters, self._given_up = files, meters, given_up
        self._held: dict[Range, bytes] = {}
        self._heads: dict[str, int] = {}
        self._request = threading.local()
        self._pieces = hasattr(files, "progress")
        if self._pieces:
            files.progress = self._arrived  # type: ignore[attr-defined]

    @property
    def ranged(self) -> bool:
        """As that of the files."""
        return self._files.ranged

    def open(self, name: str) -> tuple[int, bytes]:
        """As that of the files. Who opens a file once more was given wrong bytes: what is held of it goes."""
        if name in self._heads:
            self.release([held for held in list(self._held) if held.file == name])
        found: tuple[int, bytes] = self._counted(lambda: self._files.open(name), lambda found: len(found[1]))
        self._heads[name] = len(found[1])
        return found

    def came(self, segment: Segment) -> bool:
        """Whether a segment came with opening its file."""
        return segment.offset + segment.length <= self._heads.get(segment.file, 0)

    def mark(self, name: str) -> str:
        """As that of the files."""
        return self._files.mark(name)

    def read(self, name: str, offset: int, length: int) -> bytes:
        """As that of the files; from what is held, where that is all of it."""
        found, end, stop = [], offset, offset + length
        for held in sorted((held for held in list(self._held) if held.file == name), key=lambda held: held.offset):
            data = self._held.get(held)
            if data is not None and held.offset <= end < held.end and end < stop:
                found.append(memoryview(data)[end - held.offset : stop - held.offset])
                end = held.end
        if end >= stop:
            return b"".join(found)
        fetched: bytes = self._counted(lambda: self._files.read(name, offset, length), len)
        return fetched

    def hold(self, wanted: Range) -> None:
        """Fetches a range for the reads to come; `release` lets it go."""
        self._held[wanted] = self._counted(lambda: self._files.read(wanted.file, wanted.offset, wanted.length), len)

    def release(self, ranges: Iterable[Range]) -> None:
        """What is held is not needed any more."""
        for held in ranges:
            self._held.pop(held, None)

    def _counted(self, fetch: Callable[[], Any], size: Callable[[Any], int]) -> Any:
        if self._given_up():
            raise GivenUp
        ages = [meter.began() for meter in self._meters]
        self._request.began = time.monotonic()
        try:
            found = fetch()
            if not self._pieces:
                self._arrived(size(found))
            return found
        finally:
            for meter, age in zip(self._meters, ages, strict=True):
                meter.ended(age)

    def _arrived(self, count: int) -> None:
        if self._given_up():
            raise GivenUp
        began, self._request.began = self._request.began, None
        for meter in self._meters:
            if began is not None:
                meter.answered(time.monotonic() - began)
            meter.add(count)


class Source:
    """One place with the artifact. Threads may share it.

    open_artifact: gives the artifact, opened; called once, by the first that needs it. link: over which it comes.
    bandwidth: of the stream. given_up: as for `Wire`. same: the artifact that it must be equal to, for a fallback.
    find_profile: gives the profile that decoding an artifact takes, None where it takes none.
    """

    def __init__(
        self,
        place: str,
        open_artifact: Callable[[], Artifact],
        link: Link,
        bandwidth: Bandwidth,
        given_up: Callable[[], bool],
        same: Artifact | None = None,
        find_profile: Callable[[Artifact], Profile | None] = profile_of,
    ) -> None:
        self.place, self._open_artifact, self._given_up, self._same = place, open_artifact, given_up, same
        self._find_profile = find_profile
        self._link, self._meters = link, (bandwidth, link.bandwidth)
        self._using, self._closed = ExitStack(), False
        self._share: Share | None = None
        self._lock, self._ending = threading.Lock(), threading.Lock()
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
                if self._given_up():  # while another thread tried
                    raise GivenUp
                found = self._open_artifact()
                if self._same is not None and _content(found) != _content(self._same):
                    raise ManifestError(f"{self.place} holds another artifact than {self._same.store}")
                self._attach(found)
                with self._ending:
                    if not self._closed:
                        self._share = self._using.enter_context(self._link.stream())
                self._artifact = found
            return self._artifact

    def close(self) -> None:
        """The link is left to others. Waits for nobody who is still opening."""
        with self._ending:
            self._closed = True
            self._using.close()

    @property
    def expected(self) -> float | None:
        """Bytes a second that the link gave to others before, once opened; None where nothing is known."""
        return None if self._share is None else self._share.expected

    def turn(self, given_up: Callable[[], bool], limit: float) -> AbstractContextManager[bool]:
        """As that of the link's share."""
        return nullcontext(True) if self._share is None else self._share.turn(given_up, limit)

    def _attach(self, artifact: Artifact) -> None:
        """Puts a wire below an artifact's stores, if they are remote."""
        self._stores = list(_chain(artifact.store))
        self._bundles = not any(isinstance(store, SealedStore) for store in self._stores)
        inner = self._stores[-1]
        if isinstance(inner, RemoteStore):
            self._wire = Wire(inner.files, self._meters, self._given_up)
            inner.files = self._wire

    def decoder(self) -> tuple[Transform, Profile | None]:
        """What decodes the artifact's chunks, and the profile that it takes. Raises ArtifactError, StoreError,
        ProfileError.
        """
        artifact = self.open()
        self._open_file(artifact, artifact.manifest.segment(BASE_FILE, SIDE))
        profile = self._find_profile(artifact)
        return artifact.with_profile(profile).codec(), profile

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

    def ranges(self, far: Sequence[Segment], most: float) -> list[Range]:
        """What to `hold` before these segments of one file, which are not here, are read: ranges of about `most` bytes.
        None where they came with opening it, do not lie side by side, or where reading does not go by their ranges.
        """
        if self._wire is None or not self._wire.ranged or not self._bundles:
            return []
        lacking = [segment for segment in far if not self._wire.came(segment)]
        if not lacking or any(a.offset + a.length != b.offset for a, b in pairwise(lacking)):
            return []
        start, end = lacking[0].offset, lacking[-1].offset + lacking[-1].length
        count = max(1, math.ceil((end - start) / most))
        cuts = [start + (end - start) * number // count for number in range(count + 1)]
        return [Range(lacking[0].file, first, last - first) for first, last in pairwise(cuts) if first < last]

    def hold(self, wanted: Range) -> None:
        """Fetches a range for the reads to come. Raises StoreError; GivenUp."""
        # Where it cannot be had, reading says why.
        with suppress(RangeError, ArtifactNotFoundError):
            if self._wire is not None:
                self._wire.hold(wanted)

    def release(self, ranges: Iterable[Range]) -> None:
        """What is held is not needed any more."""
        if self._wire is not None:
            self._wire.release(ranges)

    def read(self, segments: Sequence[Segment]) -> Iterator[bytes]:
        """The bytes of segments, each verified, one after the other. Raises ArtifactError and StoreError; GivenUp."""
        artifact = self.open()
        self._open_file(artifact, segments[0])
        for segment in segments:
            yield artifact.reader.read(segment)

    def _open_file(self, artifact: Artifact, segment: Segment) -> None:
        """Several threads shall not each ask for the head of a file."""
        with self._lock:
            lock = self._locks.setdefault(segment.file, threading.Lock())
        with lock:
            if not self.here(segment):
                artifact.store.size(segment.file)


def _content(artifact: Artifact) -> tuple[object, ...]:
    """What two copies of an artifact have in common."""
    pin = artifact.pin
    return artifact.manifest.files, artifact.geometry, artifact.config, None if pin is None else pin.digest


def _chain(store: Store) -> Iterator[Any]:
    """A store, the one that it stands before, and so on to the innermost."""
    found: Any = store
    while found is not None:
        yield found
        found = getattr(found, "store", None)
