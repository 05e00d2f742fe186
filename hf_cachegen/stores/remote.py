"""A store of the files behind a URL: it fetches ranges ahead, and damaged ranges again."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

from hf_cachegen.artifact import Range, Segment, Store
from hf_cachegen.artifact.manifest import digest
from hf_cachegen.artifact.store import location_name
from hf_cachegen.errors import ConfigError, CorruptError, TruncatedError
from hf_cachegen.stores.files import FilesystemFiles
from hf_cachegen.stores.http import HttpFiles, shown
from hf_cachegen.stores.prefetch import Prefetcher
from hf_cachegen.stores.retry import Patience

THREADS = 8
"""Connections at a time; a single one seldom uses all the bandwidth."""
AHEAD_BYTES = 256 << 20
"""Largest number of bytes that wait for their reader."""
MOST_FIRST_BYTES = 1 << 20
"""Largest beginning of a file, in bytes, that is fetched with the request that opens it, and kept."""
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*(?=://)", re.IGNORECASE)
_RESERVED = "%/:=&?~#+!$,;'@()*[]"
"""Characters of a URL's path and query that mean themselves. Others are sent as their UTF-8 bytes in hex."""


class RemoteStore(Store):
    """The files behind a URL, for an artifact's reader. Threads may share it.

    The bytes that came with opening a file are not fetched again. Announced ranges are fetched ahead, and damaged ones
    a second time.

    Args:
        files: the store that reads the location; `open` is called once for each file.
        location: its name in messages.
        threads: number of connections that a prefetch uses at a time.
        ahead_bytes: largest number of bytes that wait for their reader.

    Raises:
        ConfigError: threads or ahead_bytes is below 1.
    """

    def __init__(
        self, files: Store, location: str = "", threads: int = THREADS, ahead_bytes: int = AHEAD_BYTES
    ) -> None:
        if threads < 1 or ahead_bytes < 1:
            raise ConfigError(f"threads and ahead_bytes must be above 0, got {threads} and {ahead_bytes}")
        self.files = files
        self.location = location
        self._threads, self._ahead_bytes = threads, ahead_bytes
        self._opened: dict[str, tuple[int, bytes]] = {}
        self._expected: dict[str, int] = {}
        self._held: dict[Range, bytes] = {}
        self._prefetcher: Prefetcher | None = None

    def __str__(self) -> str:
        return self.location

    def unwrap(self) -> Store:
        """Return the files."""
        return self.files

    def size(self, name: str) -> int:
        """Return the length of a file in bytes."""
        return self._open(name)[0]

    def read(self, name: str, offset: int, length: int, xxh3: str | None = None) -> bytes:
        """Read exactly that range; fetch it a second time if it does not hash to `xxh3`."""
        size, head = self._open(name)
        if offset < 0 or length < 0 or offset + length > size:
            raise TruncatedError(
                f"{self}: expected {length} bytes at {offset}; {name} has {size} bytes: fetch it again"
            )
        data = head[offset : offset + length] if offset + length <= len(head) else None
        if data is None and self._prefetcher is not None:
            data = self._prefetcher.take((name, offset, length))
        if data is None:
            data = self._from_held(name, offset, length)
        if data is None:
            data = self.files.read(name, offset, length)
        if xxh3 is not None and digest(data) != xxh3:
            self._open(name, again=True)
            data = self.files.read(name, offset, length)
        return data

    def prefetch(self, segments: Iterable[Segment]) -> None:
        """Begin to fetch these segments, which will be read in this order; end an earlier prefetch."""
        self.close()
        wanted = list(segments)
        names = list(dict.fromkeys(segment.file for segment in wanted))
        with ThreadPoolExecutor(self._threads, thread_name_prefix="hf_cachegen-open") as pool:
            opened = dict(zip(names, pool.map(self._open, names), strict=True))
        if not self.files.serves_ranges():
            return  # a read fetches the whole file, after its size was compared with the manifest
        # The ranges that came with opening are at hand; `read` refuses those beyond the end of the file.
        ranges = [
            (s.file, s.offset, s.length)
            for s in wanted
            if len(opened[s.file][1]) < s.offset + s.length <= opened[s.file][0]
        ]
        self._prefetcher = Prefetcher(ranges, self.files.read, self._threads, self._ahead_bytes)

    def close(self) -> None:
        """End a prefetch; the store stays usable."""
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None

    def expect(self, name: str, nbytes: int) -> None:
        """Fetch these first bytes of a file with the request that opens it."""
        if nbytes <= MOST_FIRST_BYTES:
            self._expected[name] = nbytes

    def unfetched(self, segments: Sequence[Segment]) -> list[Segment]:
        """Return the segments that did not come with opening their file; none where only whole files are served."""
        if not self.files.serves_ranges():
            return []
        return [s for s in segments if s.offset + s.length > len(self._opened.get(s.file, (0, b""))[1])]

    def hold(self, wanted: Range) -> None:
        """Fetch a range, and serve reads within held ranges until they are released."""
        self._held[wanted] = self.files.read(wanted.file, wanted.offset, wanted.length)

    def release(self, ranges: Iterable[Range]) -> None:
        """Drop held ranges."""
        for held in ranges:
            self._held.pop(held, None)

    def _from_held(self, name: str, offset: int, length: int) -> bytes | None:
        """Return a range that held ranges cover without a gap; None for any other."""
        found, end, stop = [], offset, offset + length
        for held in sorted((held for held in list(self._held) if held.file == name), key=lambda held: held.offset):
            data = self._held.get(held)
            if data is not None and held.offset <= end < held.end and end < stop:
                found.append(memoryview(data)[end - held.offset : stop - held.offset])
                end = held.end
        return b"".join(found) if end >= stop else None

    def _open(self, name: str, *, again: bool = False) -> tuple[int, bytes]:
        if not _NAME.fullmatch(name):
            raise CorruptError(f"{name!r:.80} is not the name of an artifact's file")
        if again:
            # Bytes of this file failed verification: ranges that were held of it may be as wrong.
            self.release([held for held in list(self._held) if held.file == name])
        if again or name not in self._opened:
            # The files raise ChangedError if the size or the ETag is not the first one.
            self._opened[name] = self.files.open(name, self._expected.get(name, 0))
        return self._opened[name]


def is_url(location: str) -> bool:
    """Report whether this is a URL rather than a folder or a repository. Raise ConfigError for a malformed one."""
    return _SCHEME.match(location_name(location)) is not None


def lower_scheme(url: str) -> str:
    """Return a URL with its scheme in lower case, in which it is compared. Raise ConfigError where it has none."""
    scheme = _SCHEME.match(url)
    if scheme is None:
        raise ConfigError(f"expected a URL with a scheme, such as https://... or s3://..., got {url!r:.200}")
    return scheme[0].lower() + url[scheme.end() :]


def open_files(
    url: str,
    *,
    headers: Mapping[str, str] | None = None,
    storage_options: Mapping[str, Any] | None = None,
    patience: Patience | None = None,
    progress: Callable[[int], None] | None = None,
) -> Store:
    """Open the files under a URL.

    Args:
        url: the URL of the folder.
        headers: HTTP headers, for http(s) URLs.
        storage_options: options for fsspec, for URLs of other schemes.
        patience: time limits and number of attempts.
        progress: called with the length in bytes of each piece that arrives; an error that it raises ends the request.

    Raises:
        ConfigError: the URL is not valid, or an option is for another scheme.
        MissingExtraError: the package of the filesystem is not installed.
    """
    written, url = url, lower_scheme(url)
    if url.startswith("hf://"):
        raise ConfigError(f"expected a repository as hf:// in lower case, got {written!r:.200}")
    if not url.startswith(("http://", "https://")):
        if headers:
            raise ConfigError(f"headers are for http(s) URLs; pass storage_options for {shown(url)}")
        return FilesystemFiles(url, storage_options, patience, progress)
    if storage_options:
        raise ConfigError(f"storage_options are for fsspec URLs; pass headers for {shown(url)}")
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise ConfigError(f"expected a URL without credentials ({shown(url)}): pass them as headers")
    folder, query, host = quote(parts.path.rstrip("/"), _RESERVED), quote(parts.query, _RESERVED), _host(url)
    return HttpFiles(
        lambda name: urlunsplit((parts.scheme, host, f"{folder}/{quote(name)}", query, "")),
        headers,
        patience,
        progress,
    )


def _host(url: str) -> str:
    """Return the host and port of a URL as they are sent. Raise ConfigError where they are not valid."""
    parts = urlsplit(url)
    try:
        name, port = parts.hostname or "", parts.port
        if not name or re.search(r"[^\w.:%-]", name):
            raise ValueError("it has no valid host")
        name = name if ":" in name else name.encode("idna").decode("ascii")
    except ValueError as error:  # a UnicodeError too
        raise ConfigError(f"expected a URL with a host, got {shown(url)!a:.200}: {error}") from error
    name = f"[{name}]" if ":" in name else name
    return name if port is None else f"{name}:{port}"
