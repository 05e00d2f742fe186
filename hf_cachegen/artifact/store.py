"""The contract between an artifact's reader and the code that reads a location.

Stores form a chain: a signature check reads through a cache, the cache through a remote store, that one through a web
server's files. `unwrap` leads from one to the next. A capability that only some stores have is a method of `Store` with
a default, so no caller asks for the class of a store.
"""

from __future__ import annotations

import os
import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol
from urllib.parse import urlsplit

from hf_cachegen.artifact.manifest import Limits, Manifest, Segment
from hf_cachegen.errors import ConfigError

MAX_NAME_BYTES = 255
"""Longest name of a file or folder that file systems allow."""
MAX_PATH_BYTES = 4000
"""Longest path of a folder: the system allows 4,095 bytes, and files in it have names."""
_URL = re.compile(r"[a-z][a-z0-9+.-]+:[/:]", re.IGNORECASE)
"""The beginning of a URL, of one that went through a path object ("s3:/"), or of a chain ("simplecache::"). The scheme
has two letters or more: one is a drive.
"""


def location_name(location: str | os.PathLike[str]) -> str:
    """Return the text of a path, a URL or a repository. Raise ConfigError where it is none of them."""
    if not isinstance(location, str | os.PathLike):
        raise ConfigError(f"expected a path, a URL or a repository, got {type(location).__name__}")
    name = os.fspath(location)
    if not isinstance(name, str) or not name or "\0" in name:
        raise ConfigError(f"expected a path, a URL or a repository, got {name!r:.200}")
    try:
        os.fsencode(name)
        if "://" in name:
            urlsplit(name)
    except ValueError as error:  # a UnicodeError too
        raise ConfigError(f"expected a path, a URL or a repository, got {name!a:.200}: {error}") from error
    return name


def local_path(location: str | os.PathLike[str]) -> Path:
    """Return the path that `location` names, with "~" expanded. Raise ConfigError where it cannot be a path."""
    return Path(os.path.expanduser(location_name(location)))


def resembles_url(location: str | os.PathLike[str]) -> bool:
    """Report whether a location begins like a URL, also one that is malformed or went through a path object."""
    return _URL.match(location_name(location)) is not None


def output_path(location: str | os.PathLike[str]) -> Path:
    """Return the path to write to.

    Raises:
        ConfigError: `location` cannot be a path, is longer than paths can be, or is a URL: a folder of that name would
            be made here, and nothing be written there.
    """
    path = local_path(location)
    if resembles_url(location):
        raise ConfigError(
            f"expected a local path to write to, got a URL ({os.fspath(location).partition(':')[0]}:...): write to a "
            "folder, and copy or push it; a path that begins like a URL must be absolute"
        )
    name = max(path.parts, key=lambda part: len(os.fsencode(part)), default="")
    longest, whole = len(os.fsencode(name)), len(os.fsencode(path))
    if longest > MAX_NAME_BYTES or whole > MAX_PATH_BYTES:
        raise ConfigError(
            f"expected a path of at most {MAX_PATH_BYTES} bytes, with names of at most {MAX_NAME_BYTES}, got {whole} "
            f"bytes with a name of {longest}: {name[:40]!r}..."
        )
    return path


@dataclass(frozen=True, eq=False)
class Range:
    """Bytes [offset, offset + length) of a file. Compared by identity: of two ranges with equal numbers, one may be
    released while the other is still fetched.
    """

    file: str
    offset: int
    length: int

    @property
    def end(self) -> int:
        """Offset of the first byte after the range."""
        return self.offset + self.length


class Store(Protocol):
    """The files of one location. Inherit from it, and implement `size` and `read`.

    Each other method has a default: it asks the store that `unwrap` returns, and the innermost store answers as the
    method's docstring says. All methods may raise ArtifactNotFoundError for a missing file, and StoreError.
    """

    signed: ClassVar[bool] = False
    """Whether this store lets only signed bytes through. Then `unwrap` returns the store without that check."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Return the length of a file in bytes."""
        ...

    @abstractmethod
    def read(self, name: str, offset: int, length: int, xxh3: str | None = None) -> bytes:
        """Read exactly that range of a file.

        Args:
            name: The file.
            offset: The first byte.
            length: The number of bytes.
            xxh3: The expected XXH3-128 of the range, for stores that keep ranges or fetch them again. The reader checks
                it in any case.

        Raises:
            TruncatedError: The file ends before the range does.
        """
        ...

    def unwrap(self) -> Store | None:
        """Return the store that this one reads through; None for the innermost."""
        return None

    def expect(self, name: str, nbytes: int) -> None:
        """Note that the first `nbytes` of a file, which is not open yet, will be read: one request opens the file and
        fetches them. Innermost: do nothing.
        """
        inner = self.unwrap()
        if inner is not None:
            inner.expect(name, nbytes)

    def parsed(self, data: bytes, limits: Limits) -> Manifest | None:
        """Return the manifest that this store has parsed from these bytes within these limits. Innermost: None."""
        inner = self.unwrap()
        return None if inner is None else inner.parsed(data, limits)

    def open(self, name: str, first: int = 0) -> tuple[int, bytes]:
        """Return a file's size and the first bytes that arrived with it: about `first` of them are wanted. By default
        no bytes arrive with the size.
        """
        return self.size(name), b""

    def mark(self, name: str) -> str:
        """Return what changes with the content of an opened file, such as its ETag. Innermost: empty, unknown."""
        inner = self.unwrap()
        return "" if inner is None else inner.mark(name)

    def find(self) -> dict[str, int] | None:
        """Return the size of each file at or below the location, by relative path. Innermost: None, it cannot list."""
        inner = self.unwrap()
        return None if inner is None else inner.find()

    def serves_ranges(self) -> bool:
        """Return False once the location turned out to give whole files for ranges. Innermost: True."""
        inner = self.unwrap()
        return True if inner is None else inner.serves_ranges()

    def prefetch(self, segments: Iterable[Segment]) -> None:
        """Fetch these segments ahead of the reads, which come in this order. Innermost: do nothing."""
        inner = self.unwrap()
        if inner is not None:
            inner.prefetch(segments)

    def unfetched(self, segments: Sequence[Segment]) -> list[Segment]:
        """Return the segments that `hold` can fetch ahead and that have not arrived. Innermost: none."""
        inner = self.unwrap()
        return [] if inner is None else inner.unfetched(segments)

    def hold(self, wanted: Range) -> None:
        """Fetch a range, and serve reads within it until it is released. Innermost: do nothing."""
        inner = self.unwrap()
        if inner is not None:
            inner.hold(wanted)

    def release(self, ranges: Iterable[Range]) -> None:
        """Drop held ranges. Innermost: do nothing."""
        inner = self.unwrap()
        if inner is not None:
            inner.release(ranges)

    def is_local(self, segment: Segment) -> bool:
        """Return whether reading a segment needs no network, as far as can be said without reading it. Innermost: no.
        """
        inner = self.unwrap()
        return False if inner is None else inner.is_local(segment)

    def locate(self, segment: Segment) -> Segment:
        """Return the range of the stored files that holds a segment. Innermost: the segment itself."""
        inner = self.unwrap()
        return segment if inner is None else inner.locate(segment)

    def folder(self) -> Path | None:
        """Return the local directory that holds these files as they are. Innermost: None."""
        inner = self.unwrap()
        return None if inner is None else inner.folder()

    def access(self) -> object | None:
        """Return the options that the location was opened with (hf_cachegen.stores.Access). Innermost: None."""
        inner = self.unwrap()
        return None if inner is None else inner.access()


def chain(store: Store) -> Iterator[Store]:
    """Iterate over a store, the one that it reads through, and so on to the innermost."""
    found: Store | None = store
    while found is not None:
        yield found
        found = found.unwrap()


def innermost(store: Store) -> Store:
    """Return the last store of the chain: the one that reads the location itself."""
    *_, last = chain(store)
    return last


def without_signature(store: Store) -> Store:
    """Return the store for files whose bytes are authenticated by other means, such as a hash in a signed manifest."""
    for one in chain(store):
        if one.signed:
            return one.unwrap() or one
    return store
