"""Files in a directory, read by range. Nothing outside it is read: no other names, no links that lead out."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from hf_cachegen.container import Segment, Store
from hf_cachegen.errors import ArtifactNotFoundError, CorruptError, TruncatedError


class LocalStore(Store):
    """The files of `directory`.

    within: symbolic links may lead anywhere inside this directory (default: `directory` itself). The Hub's cache links
        its snapshots to its blobs: pass the repository's cache directory.

    A file that is not there raises ArtifactNotFoundError; a link that leads out, or something that is no regular file,
    CorruptError; other failures (no permission) their OSError. Every read opens the file anew, so threads may share it.
    """

    def __init__(self, directory: str | os.PathLike[str], within: str | os.PathLike[str] | None = None) -> None:
        self.directory = Path(os.path.abspath(directory))
        self._root = os.path.realpath(self.directory if within is None else within)

    def __str__(self) -> str:
        return str(self.directory)

    def size(self, name: str) -> int:
        """Length of the file in bytes."""
        file = self._open(name)
        try:
            return os.fstat(file).st_size
        finally:
            os.close(file)

    def read(self, name: str, offset: int, length: int, xxh3: str | None = None) -> bytes:
        """Exactly `length` bytes from `offset`; TruncatedError, before memory is taken, where the file ends sooner."""
        with os.fdopen(self._open(name), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if offset < 0 or length < 0 or offset + length > size:
                raise TruncatedError(
                    f"{self.directory / name} has {size} bytes; {length} at {offset} were asked for; fetch it again"
                )
            file.seek(offset)
            return file.read(length)

    def is_local(self, segment: Segment) -> bool:
        """Return True: the files lie on this machine."""
        return True

    def folder(self) -> Path:
        """Return the directory."""
        return self.directory

    def _open(self, name: str) -> int:
        if name in ("", ".", "..") or "\0" in name or os.path.basename(name) != name:
            raise CorruptError(f"{name!r} is not the name of a file in {self.directory}")
        path = os.path.realpath(self.directory / name)
        if os.path.commonpath([path, self._root]) != self._root:
            raise CorruptError(f"{self.directory / name} is a link out of {self._root}; copy the file instead")
        try:
            # O_NONBLOCK: opening a pipe must not wait for its writer. O_NOFOLLOW: every link is resolved by now.
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                raise ArtifactNotFoundError(f"there is no {name} in {self.directory}") from error
            if error.errno in (errno.ELOOP, errno.ENXIO):
                raise CorruptError(f"{self.directory / name} is not a regular file") from error
            raise
        if not stat.S_ISREG(os.fstat(file).st_mode):
            os.close(file)
            raise CorruptError(f"{self.directory / name} is not a regular file")
        return file
