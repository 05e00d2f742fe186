"""Small whole files at any location, by name: read everywhere, written where fsspec can write."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Mapping
from typing import Any

import fsspec

from hf_cachegen.artifact import Store
from hf_cachegen.artifact.store import output_path
from hf_cachegen.errors import ArtifactNotFoundError, ConfigError, LimitError, StoreError
from hf_cachegen.stores.http import shown
from hf_cachegen.stores.locations import Access, hub_location
from hf_cachegen.stores.naming import is_repository
from hf_cachegen.stores.remote import is_url, lower_scheme, open_files
from hf_cachegen.stores.retry import Patience

_READ_ONLY = ("http://", "https://", "hf://")


class Objects:
    """Files under a URL, a repository on the Hub or a folder. Threads may share it.

    Args:
        location: a folder, a URL (s3://, gs://, memory://, https://, hf://, ...) or a repository ("user/name").
        headers: for http(s) URLs.
        storage_options: for other URLs, passed to fsspec.
        token: for the Hub.
        patience: time limits and attempts.

    Attributes:
        writable: whether `put` works; http(s) locations and the Hub are read-only.

    Raises:
        ConfigError: the location is no URL, or has options of another kind.
        StoreError: it cannot be reached.
    """

    def __init__(
        self,
        location: str | os.PathLike[str],
        *,
        headers: Mapping[str, str] | None = None,
        storage_options: Mapping[str, Any] | None = None,
        token: str | bool | None = None,
        patience: Patience | None = None,
    ) -> None:
        if is_repository(location):
            from hf_cachegen.stores import hub  # the Hub's client is slow to import

            found = hub_location(str(location), Access(token=token))
            commit = hub.resolve(found, token, patience)
            self.files: Store = hub.open_hub(found, commit, token, patience)
            self.location, self.writable = str(found), False
            return
        url = str(location)
        if is_url(url):
            url = lower_scheme(url)
        else:
            url = "file://" + os.path.abspath(output_path(location))
        self.files = open_files(url, headers=headers, storage_options=storage_options, patience=patience)
        self.location, self.writable = shown(url), not url.startswith(_READ_ONLY)
        if self.writable:
            self._filesystem, self._root = fsspec.url_to_fs(url, **(storage_options or {}))

    def __str__(self) -> str:
        return self.location

    def exists(self, name: str) -> bool:
        """Report whether there is a file of this name."""
        try:
            self.files.open(name)
        except ArtifactNotFoundError:
            return False
        return True

    def get(self, name: str, limit: int) -> bytes | None:
        """Return a whole file; None where there is none.

        Raises:
            LimitError: it has more than `limit` bytes.
            StoreError: the location cannot be read.
        """
        try:
            size, head = self.files.open(name)
        except ArtifactNotFoundError:
            return None
        if size > limit:
            raise LimitError(f"{self}/{name} has {size} bytes, the limit is {limit}")
        return head[:size] if len(head) >= size else head + self.files.read(name, len(head), size - len(head))

    def head(self, name: str) -> tuple[int, bytes] | None:
        """Return a file's size in bytes and its first bytes, some or all of them; None where there is no such file.

        Raises:
            StoreError: the location cannot be read.
        """
        try:
            return self.files.open(name)
        except ArtifactNotFoundError:
            return None

    def read(self, name: str, first: int, length: int) -> bytes:
        """Return a range of a file whose head was asked for.

        Raises:
            StoreError: the location cannot be read.
        """
        return self.files.read(name, first, length)

    def put(self, name: str, data: bytes) -> None:
        """Write a whole file, replacing one that is there.

        Raises:
            ConfigError: the location is read-only.
            StoreError: it cannot be written.
        """
        if not self.writable:
            raise ConfigError(f"{self} is read-only: pass it as a shared location")
        path = f"{self._root.rstrip('/')}/{name}"
        try:
            # Object stores show a file when it is whole. Filesystems show it while it is written: those rename.
            if "file" in self._protocols():
                self._filesystem.makedirs(os.path.dirname(path), exist_ok=True)
                partial = f"{path}.{uuid.uuid4().hex}.partial"
                try:
                    self._filesystem.pipe_file(partial, data)
                    os.replace(partial, path)
                except BaseException:
                    with contextlib.suppress(OSError):
                        os.unlink(partial)
                    raise
            else:
                self._filesystem.pipe_file(path, data)
        except Exception as error:  # each filesystem raises its own kinds
            raise StoreError(f"{self}/{name} cannot be written: {type(error).__name__}: {error}") from error

    def _protocols(self) -> tuple[str, ...]:
        found: str | tuple[str, ...] = self._filesystem.protocol
        return (found,) if isinstance(found, str) else tuple(found)
