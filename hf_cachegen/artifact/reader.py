"""Read an artifact's segments. Each is verified before it is returned.

A store returns byte ranges and is not trusted. A file's size and header are checked when its first segment is read, and
a segment's length and XXH3-128 at every read. Flipped, missing and foreign bytes are therefore an error here, before
they reach a decoder. Memory: one segment. Threads may share a Reader if they may share its store.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Collection, Iterable

from hf_cachegen.artifact.manifest import (
    DEFAULT_LIMITS,
    FEATURES,
    INPUT_IDS,
    MANIFEST_FILE,
    TOKENS_FILE,
    Limits,
    Manifest,
    Segment,
    digest,
    files_at,
    loads,
    nbytes_at,
)
from hf_cachegen.artifact.store import Store
from hf_cachegen.errors import ArtifactNotFoundError, CorruptError, LimitError, ManifestError, TruncatedError


class Reader:
    """An artifact in a store. The constructor reads the manifest only.

    Args:
        store: Holds the files.
        limits: The largest artifact to accept.
        features: The features that the caller supports.

    Attributes:
        manifest: The checked manifest.
        sizes: Bytes of every file, the manifest's included.

    Raises:
        ArtifactNotFoundError: The store holds no artifact.
        ManifestError: The manifest is damaged, or contradicts itself.
        LimitError: The artifact is larger than the limits.
        UnsupportedFormatError: A later format version, or a required feature that is not among `features`.
    """

    def __init__(self, store: Store, limits: Limits = DEFAULT_LIMITS, features: Collection[str] = FEATURES) -> None:
        self.store = store
        self.limits = limits
        size = store.size(MANIFEST_FILE)
        if size > limits.max_header_bytes:
            raise LimitError(f"{MANIFEST_FILE} has {size} bytes, the limit is {limits.max_header_bytes}")
        data = store.read(MANIFEST_FILE, 0, size)
        known = store.parsed(data, limits) if features == FEATURES else None
        self.manifest: Manifest = loads(data, limits, features) if known is None else known
        self.sizes: dict[str, int] = {name: entry.size for name, entry in self.manifest.files.items()}
        self.sizes[MANIFEST_FILE] = size
        self._checked: set[str] = set()

    def nbytes_at(self, level: int | None = None) -> int:
        """Return the bytes that a loader of `level` fetches, manifest included. None: all stored bytes."""
        return nbytes_at(self.sizes, level)

    def read(self, segment: Segment) -> bytes:
        """Read a segment.

        Raises:
            TruncatedError, CorruptError: The file is damaged.
            ManifestError: The file is missing.
        """
        if segment.file not in self._checked:
            self._check_file(segment.file)
        return self._range(segment.file, segment.offset, segment.length, segment.xxh3, f"segment {segment.name}")

    def prefetch(self, segments: Iterable[Segment]) -> None:
        """Announce to the store the segments that will be read next, in this order."""
        self.store.prefetch(segments)

    def input_ids(self) -> list[int] | None:
        """Return the context's token ids; None if the artifact holds none."""
        if TOKENS_FILE not in self.manifest.files:
            return None
        ids = array("q", self.read(self.manifest.segment(TOKENS_FILE, INPUT_IDS)))
        if sys.byteorder == "big":
            ids.byteswap()
        if ids and min(ids) < 0:
            raise CorruptError(f"{TOKENS_FILE}: token ids must be at least 0, got {min(ids)}")
        return ids.tolist()

    def verify(self, level: int | None = None, progress: Callable[[int, int], None] | None = None) -> int:
        """Check every byte of every file (with a level, of the files that it needs).

        Args:
            level: Default: all levels.
            progress: Called with (bytes checked, all bytes) after each header and segment.

        Returns:
            The number of bytes checked.

        Raises:
            TruncatedError, CorruptError: A file is damaged.
            ManifestError: A file is missing.
        """
        files = sorted(self.manifest.files) if level is None else files_at(self.manifest.files, level)
        done = self.sizes[MANIFEST_FILE]
        total = done + sum(self.sizes[file] for file in files)
        for file in files:
            self._check_file(file)
            done += self.manifest.files[file].header_bytes
            if progress:
                progress(done, total)
            for segment in self.manifest.files[file].segments:
                done += len(self.read(segment))
                if progress:
                    progress(done, total)
        return done

    def _check_file(self, name: str) -> None:
        entry = self.manifest.files[name]
        try:
            size = self.store.size(name)
        except ArtifactNotFoundError as error:
            raise ManifestError(
                f"{name} is listed in {MANIFEST_FILE} but missing; fetch the artifact again"
            ) from error
        if size < entry.size:
            raise TruncatedError(f"expected {name} to have {entry.size} bytes, got {size}; fetch the artifact again")
        if size > entry.size:
            raise CorruptError(f"expected {name} to have {entry.size} bytes, got {size}; fetch the artifact again")
        self._range(name, 0, entry.header_bytes, entry.header_xxh3, "the header")
        self._checked.add(name)

    def _range(self, file: str, offset: int, length: int, xxh3: str, what: str) -> bytes:
        data = self.store.read(file, offset, length, xxh3)
        if len(data) < length:
            raise TruncatedError(f"{file}: expected {length} bytes, {what} has {len(data)}; fetch the artifact again")
        if len(data) > length or digest(data) != xxh3:
            raise CorruptError(f"{file}: {what} at byte {offset} has a wrong checksum; fetch the artifact again")
        return data
