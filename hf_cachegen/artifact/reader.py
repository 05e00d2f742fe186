"""Reads an artifact's segments, each proved before it is handed out.

A store gives byte ranges; it is not trusted. A file's size and header are checked when its first segment is read, a
segment's length and XXH3-128 every time, so whatever flipped, ended early or came from elsewhere is an error here,
before a decoder sees it. Memory: one segment. Threads may share a Reader as far as they may share its store.
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
    """An artifact in a store: `manifest`, and verified bytes. The constructor reads the manifest alone.

    Raises ArtifactNotFoundError where there is none, and what `manifest.loads` raises.
    """

    def __init__(self, store: Store, limits: Limits = DEFAULT_LIMITS, features: Collection[str] = FEATURES) -> None:
        self.store = store
        self.limits = limits
        size = store.size(MANIFEST_FILE)
        if size > limits.max_header_bytes:
            raise LimitError(f"{MANIFEST_FILE} has {size} bytes, the limit is {limits.max_header_bytes}")
        self.manifest: Manifest = loads(store.read(MANIFEST_FILE, 0, size), limits, features)
        self.sizes: dict[str, int] = {name: entry.size for name, entry in self.manifest.files.items()}
        self.sizes[MANIFEST_FILE] = size
        self._checked: set[str] = set()

    def nbytes_at(self, level: int | None = None) -> int:
        """Bytes that a loader of `level` must fetch, the manifest included; None: all that is stored."""
        return nbytes_at(self.sizes, level)

    def read(self, segment: Segment) -> bytes:
        """The segment's bytes. Raises TruncatedError, CorruptError, or ManifestError for a file that is not there."""
        if segment.file not in self._checked:
            self._check_file(segment.file)
        return self._range(segment.file, segment.offset, segment.length, segment.xxh3, f"segment {segment.name}")

    def prefetch(self, segments: Iterable[Segment]) -> None:
        """Announce to the store which segments will be read next, in this order."""
        self.store.prefetch(segments)

    def input_ids(self) -> list[int] | None:
        """The context's token ids; None where the artifact holds none."""
        if TOKENS_FILE not in self.manifest.files:
            return None
        ids = array("q", self.read(self.manifest.segment(TOKENS_FILE, INPUT_IDS)))
        if sys.byteorder == "big":
            ids.byteswap()
        if ids and min(ids) < 0:
            raise CorruptError(f"{TOKENS_FILE}: a token id is negative: {min(ids)}")
        return ids.tolist()

    def verify(self, level: int | None = None, progress: Callable[[int, int], None] | None = None) -> int:
        """Checks every byte of every file (of `level`: of those that it needs) and returns their number.

        progress: called with (bytes checked, bytes in all) after each header and segment.
        Raises what `read` raises, at the first damage.
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
                f"{name} is listed in {MANIFEST_FILE} but is not there; fetch the artifact again"
            ) from error
        if size < entry.size:
            raise TruncatedError(f"{name} has {size} bytes, expected {entry.size}; fetch the artifact again")
        if size > entry.size:
            raise CorruptError(f"{name} has {size} bytes, expected {entry.size}; fetch the artifact again")
        self._range(name, 0, entry.header_bytes, entry.header_xxh3, "the header")
        self._checked.add(name)

    def _range(self, file: str, offset: int, length: int, xxh3: str, what: str) -> bytes:
        data = self.store.read(file, offset, length, xxh3)
        if len(data) < length:
            raise TruncatedError(f"{file}: {what} has {len(data)} bytes, expected {length}; fetch the artifact again")
        if len(data) > length or digest(data) != xxh3:
            raise CorruptError(f"{file}: {what} at byte {offset} is not what was written; fetch the artifact again")
        return data
