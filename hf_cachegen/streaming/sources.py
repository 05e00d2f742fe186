"""A location being read during a stream: an artifact whose transfers are measured and cut into ranges of any size.

Segments are read through the artifact's own chain of stores, which verifies them. Ranges are fetched ahead of those
reads (`Store.hold`), each over a connection of its own: many small segments in one request, or a large segment in many.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from itertools import pairwise

from hf_cachegen.artifact import BASE_FILE, Range, Segment, Store
from hf_cachegen.artifact.artifact import Artifact
from hf_cachegen.artifact.encoded import SIDE
from hf_cachegen.codec.transforms import Transform
from hf_cachegen.errors import ArtifactNotFoundError, ManifestError, RangeError
from hf_cachegen.profiles.files import Profile
from hf_cachegen.profiles.finding import profile_of
from hf_cachegen.stores import open_store
from hf_cachegen.streaming.link import Link, Share
from hf_cachegen.streaming.locations import Location
from hf_cachegen.streaming.meter import GivenUp, TransferMeter, abandoned

FindProfile = Callable[[Artifact], Profile | None]


class Source:
    """One location of the artifact. Threads may share it.

    Args:
        location: Where the artifact lies.
        link: The link that it arrives over.
        meter: Counts the requests.
        expected: The artifact that the location must hold.
        find_profile: Finds the profile that decoding an artifact takes, None where it takes none.
        opened: Whether `expected` was opened at this location, over this meter. Else the first thread that needs the
            artifact opens it.
    """

    def __init__(
        self,
        location: Location,
        link: Link,
        meter: TransferMeter,
        expected: Artifact,
        find_profile: FindProfile = profile_of,
        *,
        opened: bool = False,
    ) -> None:
        self.location = str(location)
        self._location, self._link, self._meter, self._expected = location, link, meter, expected
        self._find_profile = find_profile
        self._artifact = expected if opened else None
        self._share: Share | None = None
        self._using, self._closed = ExitStack(), False
        self._lock, self._ending = threading.Lock(), threading.Lock()
        self._locks: dict[str, threading.Lock] = {}

    def open(self) -> Artifact:
        """Return the artifact, and join the link.

        Raises:
            ArtifactError, StoreError: It cannot be opened.
            ManifestError: The location holds another artifact.
            GivenUp: The calling thread was given up while another one tried.
        """
        with self._lock:
            if self._artifact is None:
                if abandoned():
                    raise GivenUp
                self._artifact = self._open()
            if self._share is None:
                self._meter.start()
                with self._ending:
                    if not self._closed:
                        self._share = self._using.enter_context(self._link.stream())
            return self._artifact

    def _open(self) -> Artifact:
        expected = self._expected
        store = open_store(self._location.path, self._location.access, expected.reader.limits, self._meter)
        found = Artifact(store, limits=expected.reader.limits)
        if _content(found) != _content(expected):
            raise ManifestError(
                f"{self.location} holds another artifact than {expected.store}; list only copies of it as fallback"
            )
        return found

    def close(self) -> None:
        """Leave the link to other streams. Does not wait for a thread that is opening the artifact."""
        with self._ending:
            self._closed = True
            self._using.close()

    @property
    def expected_rate(self) -> float | None:
        """Bytes per second that the link gave to other streams, shared with them; None where nothing is known."""
        return None if self._share is None else self._share.expected

    def turn(self, given_up: Callable[[], bool], limit: float) -> AbstractContextManager[bool]:
        """Wait for a turn on the link, as `Share.turn` does."""
        return nullcontext(True) if self._share is None else self._share.turn(given_up, limit)

    def decoder(self) -> tuple[Transform, Profile | None]:
        """Fetch what decodes the artifact's chunks, and the profile that it takes.

        Raises:
            ArtifactError, StoreError, ProfileError: It cannot be had.
        """
        artifact = self.open()
        side = artifact.manifest.segment(BASE_FILE, SIDE)
        artifact.store.expect(BASE_FILE, side.offset + side.length)
        self._open_file(artifact, side)
        profile = self._find_profile(artifact)
        return artifact.with_profile(profile).codec(), profile

    def is_local(self, segment: Segment) -> bool:
        """Return whether a segment is on this disk, as far as can be said without reading it."""
        return self._store.is_local(segment)

    def ranges(self, segments: Sequence[Segment], most: float) -> list[Range]:
        """Return ranges to `hold` before these segments of one file, which are not local, are read.

        Args:
            segments: They lie side by side, in this order; else no range is returned.
            most: Bytes of a range, approximately.

        Returns:
            Ranges that together cover the segments; none where nothing can or need be fetched ahead.
        """
        lacking = self._store.unfetched(segments)
        if not lacking or any(a.offset + a.length != b.offset for a, b in pairwise(lacking)):
            return []
        start, end = lacking[0].offset, lacking[-1].offset + lacking[-1].length
        count = max(1, math.ceil((end - start) / most))
        cuts = [start + (end - start) * number // count for number in range(count + 1)]
        return [Range(lacking[0].file, first, last - first) for first, last in pairwise(cuts) if first < last]

    def hold(self, wanted: Range) -> None:
        """Fetch a range for the reads to come. Raises StoreError, GivenUp."""
        # Where the range cannot be had, the read that needs it says why.
        with suppress(RangeError, ArtifactNotFoundError):
            self._store.hold(wanted)

    def release(self, ranges: Iterable[Range]) -> None:
        """Drop held ranges."""
        self._store.release(ranges)

    def read(self, segments: Sequence[Segment]) -> Iterator[bytes]:
        """Yield the verified bytes of segments, one after the other. Raises ArtifactError, StoreError, GivenUp."""
        artifact = self.open()
        self._open_file(artifact, segments[0])
        for segment in segments:
            yield artifact.reader.read(segment)

    @property
    def _store(self) -> Store:
        if self._artifact is None:
            raise RuntimeError(f"{self.location} was not opened")
        return self._artifact.store

    def _open_file(self, artifact: Artifact, segment: Segment) -> None:
        """Open a segment's file once, however many threads are about to read from it."""
        with self._lock:
            lock = self._locks.setdefault(segment.file, threading.Lock())
        with lock:
            if not self.is_local(segment):
                artifact.store.size(segment.file)


def _content(artifact: Artifact) -> tuple[object, ...]:
    """What two copies of an artifact have in common."""
    pin = artifact.pin
    return artifact.manifest.files, artifact.geometry, artifact.config, None if pin is None else pin.digest
