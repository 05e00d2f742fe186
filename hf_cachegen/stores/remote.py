"""The artifact behind a URL: sizes and ranges as `artifact.Store` wants them, fetched ahead, damage fetched anew."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol
from urllib.parse import quote, urlsplit, urlunsplit

from hf_cachegen.artifact import Segment
from hf_cachegen.artifact.manifest import digest
from hf_cachegen.errors import ConfigError, CorruptError, TruncatedError
from hf_cachegen.stores.access import Access
from hf_cachegen.stores.files import FilesystemFiles
from hf_cachegen.stores.http import HttpFiles, shown
from hf_cachegen.stores.prefetch import Prefetcher
from hf_cachegen.stores.retry import Patience

THREADS = 8
"""Connections at a time; one seldom fills a link."""
AHEAD_BYTES = 256 << 20
"""Most bytes that wait for their reader."""
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*(?=://)", re.IGNORECASE)


class Files(Protocol):
    """What a kind of place must know; all raise ArtifactNotFoundError and StoreError, and threads may share them."""

    @property
    def ranged(self) -> bool:
        """False once the server turned out to ignore byte ranges; reading then takes whole files."""
        ...

    def open(self, name: str) -> tuple[int, bytes]:
        """The file's size, and as many of its first bytes as came with it."""
        ...

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Exactly that range of a file that was opened."""
        ...

    def mark(self, name: str) -> str:
        """What tells that an opened file was changed; empty where nothing does."""
        ...


class RemoteStore:
    """Files of any kind of place as a store; `place` is its name. Threads may share it; `close` ends what `prefetch`
    began.
    """

    def __init__(
        self, files: Files, place: str = "", threads: int = THREADS, ahead_bytes: int = AHEAD_BYTES, *,
        access: Access | None = None,
    ) -> None:  # fmt: skip
        if threads < 1 or ahead_bytes < 1:
            raise ConfigError(f"threads and ahead_bytes must be above 0, got {threads} and {ahead_bytes}")
        self.files = files
        self.place = place
        self.access = access
        self._threads, self._ahead_bytes = threads, ahead_bytes
        self._opened: dict[str, tuple[int, bytes]] = {}
        self._prefetcher: Prefetcher | None = None

    def __str__(self) -> str:
        return self.place

    def size(self, name: str) -> int:
        """Length of the file in bytes."""
        return self._open(name)[0]

    def read(self, name: str, offset: int, length: int, xxh3: str | None = None) -> bytes:
        """Exactly that range; where it does not hash to `xxh3`, it is fetched a second time."""
        size, head = self._open(name)
        if offset < 0 or length < 0 or offset + length > size:
            raise TruncatedError(f"{name} has {size} bytes; {length} at {offset} were asked for; fetch it again")
        if offset + length <= len(head):
            data: bytes | None = head[offset : offset + length]
        else:
            prefetcher = self._prefetcher
            data = prefetcher.take((name, offset, length)) if prefetcher else None
        if data is None:
            data = self.files.read(name, offset, length)
        if xxh3 is not None and digest(data) != xxh3:
            self._open(name, anew=True)
            data = self.files.read(name, offset, length)
        return data

    def prefetch(self, segments: Iterable[Segment]) -> None:
        """Begins to fetch these segments, which will be read in this order; ends an earlier prefetch."""
        self.close()
        wanted = list(segments)
        names = list(dict.fromkeys(segment.file for segment in wanted))
        with ThreadPoolExecutor(self._threads, thread_name_prefix="hf_cachegen-open") as pool:
            opened = dict(zip(names, pool.map(self._open, names), strict=True))
        if not self.files.ranged:
            return  # a read takes the whole file, once its size was held against the manifest: there is no part to plan
        # What came with opening is here already, and what the file has not is for `read` to refuse.
        ranges = [
            (s.file, s.offset, s.length)
            for s in wanted
            if len(opened[s.file][1]) < s.offset + s.length <= opened[s.file][0]
        ]
        self._prefetcher = Prefetcher(ranges, self.files.read, self._threads, self._ahead_bytes)

    def close(self) -> None:
        """Ends a prefetch; the store may be used on."""
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None

    def _open(self, name: str, *, anew: bool = False) -> tuple[int, bytes]:
        if not _NAME.fullmatch(name):
            raise CorruptError(f"{name!r:.80} is not the name of an artifact's file")
        if anew or name not in self._opened:
            # The files compare what they find with what they found at first: ChangedError.
            self._opened[name] = self.files.open(name)
        return self._opened[name]


def is_url(place: str) -> bool:
    """Whether this is a URL rather than a folder or a repository."""
    return _SCHEME.match(place) is not None


def open_files(
    url: str,
    *,
    headers: Mapping[str, str] | None = None,
    storage_options: Mapping[str, Any] | None = None,
    patience: Patience | None = None,
) -> Files:
    """The files under a URL: http(s) with `headers`, anything else through fsspec with `storage_options`.

    Raises ConfigError for a URL that cannot be one, or for options that the other kind takes.
    """
    scheme = _SCHEME.match(url)
    if scheme is None:
        raise ConfigError(f"expected a URL with a scheme, such as https://... or s3://..., got {url!r:.200}")
    url = scheme[0].lower() + url[scheme.end() :]
    if not url.startswith(("http://", "https://")):
        if headers:
            raise ConfigError(f"headers are for http(s) URLs; pass storage_options for {shown(url)}")
        return FilesystemFiles(url, storage_options, patience)
    if storage_options:
        raise ConfigError(f"storage_options are for fsspec URLs; pass headers for {shown(url)}")
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise ConfigError(f"credentials do not belong into a URL ({shown(url)}): pass them as headers")
    folder = parts.path.rstrip("/")
    return HttpFiles(
        lambda name: urlunsplit((parts.scheme, parts.netloc, f"{folder}/{quote(name)}", parts.query, "")),
        headers,
        patience,
    )
