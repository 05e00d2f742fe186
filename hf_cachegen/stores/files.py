"""Byte ranges of any filesystem that fsspec knows: s3://, gs://, az://, sftp://, memory://, file:// and many more.

fsspec shows no headers, so less is checked here than over HTTP: the length of a range, and, after a short or wrong
range, whether the file is still the one that was opened. The checksums prove the rest.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import fsspec
import fsspec.asyn
from fsspec.exceptions import FSTimeoutError

from hf_cachegen.artifact import Store
from hf_cachegen.errors import (
    ArtifactNotFoundError,
    ChangedError,
    ConfigError,
    MissingExtraError,
    RangeError,
    StoreAccessError,
    StoreError,
    StoreTimeoutError,
)
from hf_cachegen.stores.http import shown
from hf_cachegen.stores.retry import Again, Patience, persist

_MARKS = ("VersionId", "generation", "ETag", "etag", "mtime", "LastModified", "created")
"""Names that filesystems give to a value that changes with the content, the most precise first."""


class FilesystemFiles(Store):
    """Files under an fsspec URL. Threads may share them.

    Args:
        url: the URL of the folder.
        storage_options: options of the filesystem (credentials, endpoints).
        patience: time limits and number of attempts.
        progress: called with the length in bytes of each range that arrives, and with 0 when a file is opened.

    Raises:
        MissingExtraError: the filesystem's package is not installed.
        ConfigError: the scheme is unknown, or an option is.
        StoreError: the filesystem cannot be reached.
        ArtifactNotFoundError: when read: there is no such file.
        StoreError: when read: the filesystem fails.
    """

    ranged = True

    def __init__(
        self,
        url: str,
        storage_options: Mapping[str, Any] | None = None,
        patience: Patience | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self.location = shown(url)
        self.patience = patience or Patience()
        self._progress = progress
        try:
            self._files, self._root = fsspec.url_to_fs(url, **(storage_options or {}))
        except ImportError as error:
            raise MissingExtraError(f"{self.location}: {error}") from error
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{self.location}: {error}") from error
        except Exception as error:  # some filesystems connect here, and each raises its own kinds
            raise StoreError(f"{self.location}: {type(error).__name__}: {error}") from error
        self._one_at_a_time = threading.Lock()
        self._seen: dict[str, tuple[int, str]] = {}

    def size(self, name: str) -> int:
        """Return the file's length in bytes without reading it."""
        identity = persist(self.patience, lambda: self._identity(name))
        self._expect(name, identity)
        self._arrived(0)
        return identity[0]

    def read(self, name: str, offset: int, length: int, xxh3: str | None = None) -> bytes:
        """Read exactly that range of a file that was opened."""
        data = persist(self.patience, lambda: self._read(name, offset, length)) if length else b""
        self._arrived(len(data))
        return data

    def mark(self, name: str) -> str:
        """Return the value that changes with an opened file's content; empty where the filesystem has none."""
        return self._seen[name][1]

    def find(self) -> dict[str, int]:
        """Return the sizes in bytes of all files at or below the location, by path relative to it."""
        found = persist(self.patience, lambda: self._call("", self.patience.timeout, "find", self._root, detail=True))
        root = self._root.strip("/")
        return {path.strip("/").removeprefix(root).strip("/"): info["size"] for path, info in found.items()}

    def _arrived(self, nbytes: int) -> None:
        if self._progress is not None:
            self._progress(nbytes)

    def _read(self, name: str, offset: int, length: int) -> bytes:
        path = f"{self._root.rstrip('/')}/{name}"
        seconds = self.patience.seconds_for(length)
        data = self._call(name, seconds, "cat_file", path, start=offset, end=offset + length)
        if len(data) > length:
            raise RangeError(f"{self.location}/{name}: expected a range of {length} bytes, got {len(data)}")
        if len(data) < length:
            self._expect(name, self._identity(name))
            raise Again(StoreError(f"{self.location}/{name}: expected a range of {length} bytes, got {len(data)}"))
        return bytes(data)

    def _expect(self, name: str, identity: tuple[int, str]) -> None:
        before = self._seen.setdefault(name, identity)
        if before != identity:
            raise ChangedError(f"{self.location}/{name} changed while it was being read: {before} became {identity}")

    def _identity(self, name: str) -> tuple[int, str]:
        """Return (size, the value that changes with the content)."""
        with self._failures(f"{self.location}/{name}"):
            self._files.invalidate_cache(self._root)  # fsspec caches listings for the whole process
        info = self._call(name, self.patience.timeout, "info", f"{self._root.rstrip('/')}/{name}")
        if info.get("type") == "directory" or type(info.get("size")) is not int:
            raise StoreError(f"{self.location}/{name} is not a regular file")
        marks = (info.get(key) for key in _MARKS)
        return info["size"], str(next((mark for mark in marks if mark is not None), ""))

    def _call(self, name: str, seconds: float, method: str, *args: Any, **options: Any) -> Any:
        """Call a method of the filesystem within `seconds`, and raise its failures as errors of this package."""
        with self._failures(f"{self.location}/{name}"):
            if self._files.async_impl:
                coroutine = getattr(self._files, f"_{method}")
                return fsspec.asyn.sync(self._files.loop, coroutine, *args, timeout=seconds, **options)
            with self._one_at_a_time:  # few of the synchronous filesystems may be shared by threads
                return getattr(self._files, method)(*args, **options)

    @staticmethod
    @contextmanager
    def _failures(location: str) -> Iterator[None]:
        """Raise the filesystem's failures as errors of this package that name `location`."""
        try:
            yield
        except FileNotFoundError as error:
            raise ArtifactNotFoundError(f"there is no {location}") from error
        except PermissionError as error:
            raise StoreAccessError(f"{location}: {error}; pass credentials with the right to read it") from error
        except (FSTimeoutError, TimeoutError, asyncio.TimeoutError) as error:
            raise Again(StoreTimeoutError(f"{location}: no answer in time, in every attempt")) from error
        except Exception as error:  # each filesystem raises its own kinds
            raise Again(StoreError(f"{location}: {type(error).__name__}: {error}, in every attempt")) from error
