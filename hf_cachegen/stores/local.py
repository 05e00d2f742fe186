"""Files in a directory that the user named, read by range.

Security: the names of files come from an untrusted manifest, so a name must be a plain file name, without a separator
and not "..". The user chose the directory itself, so links in it are followed: the Hub's cache (snapshots/<commit>/* ->
../../blobs/*), git-annex, DVC and Nix keep files behind links that leave the directory. A link in an unpacked archive
can at most make this process read a file of the user's whose checksum the attacker knows. Publishing such a file would
reveal it, so publishing passes `within`.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from hf_cachegen.artifact import Segment, Store
from hf_cachegen.artifact.store import local_path
from hf_cachegen.artifact.writer import finish_interrupted
from hf_cachegen.errors import ArtifactNotFoundError, ConfigError, CorruptError, TruncatedError

MAX_KEY_FILE_BYTES = 1 << 16
"""Above every key file. A device that is named by mistake, such as /dev/urandom, has no end."""


class LocalStore(Store):
    """The regular files of a directory. Every read opens the file, so threads may share the store.

    Args:
        directory: the directory; "~" is expanded.
        within: refuse links that lead out of this directory; None to follow every link.

    Raises:
        ConfigError: the directory is no path.
        ArtifactNotFoundError: when read: there is no such file.
        CorruptError: when read: a link leads out of `within`, or the file is not a regular one.
        OSError: when read: another failure, such as a missing permission.
    """

    def __init__(self, directory: str | os.PathLike[str], within: str | os.PathLike[str] | None = None) -> None:
        self.directory = Path(os.path.abspath(local_path(directory)))
        self._root = None if within is None else os.path.realpath(within)

    def __str__(self) -> str:
        return str(self.directory)

    def size(self, name: str) -> int:
        """Return the length of the file in bytes."""
        file = self._open(name)
        try:
            return os.fstat(file).st_size
        finally:
            os.close(file)

    def read(self, name: str, offset: int, length: int, xxh3: str | None = None) -> bytes:
        """Read exactly that range; raise TruncatedError, before memory is allocated, where the file ends sooner."""
        with os.fdopen(self._open(name), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if offset < 0 or length < 0 or offset + length > size:
                raise TruncatedError(
                    f"expected {length} bytes at {offset}; {self.directory / name} has {size} bytes: fetch it again"
                )
            file.seek(offset)
            return file.read(length)

    def is_local(self, segment: Segment) -> bool:
        """Return True: the files are on this machine."""
        return True

    def folder(self) -> Path:
        """Return the directory."""
        return self.directory

    def _open(self, name: str) -> int:
        if name in ("", ".", "..") or "\0" in name or os.path.basename(name) != name:
            raise CorruptError(f"{name!r} is not the name of a file in {self.directory}")
        path = os.path.realpath(self.directory / name)
        if self._root is not None and os.path.commonpath([path, self._root]) != self._root:
            raise CorruptError(f"{self.directory / name} is a link out of {self._root}; copy the file instead (cp -L)")
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):  # opening a device can have effects
                raise CorruptError(f"{self.directory / name} is not a regular file")
            # O_NONBLOCK: opening a pipe must not wait for its writer. O_NOFOLLOW: every link is resolved already.
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
                raise ArtifactNotFoundError(self._missing(name)) from error
            if error.errno in (errno.ELOOP, errno.ENXIO):
                raise CorruptError(f"{self.directory / name} is not a regular file") from error
            raise
        if not stat.S_ISREG(os.fstat(file).st_mode):
            os.close(file)
            raise CorruptError(f"{self.directory / name} is not a regular file")
        return file

    def _missing(self, name: str) -> str:
        if not os.path.isdir(self.directory):
            there = os.path.exists(self.directory)
            what = "is a file; name the folder that holds the artifact" if there else "is not there"
            return f"there is no {name} in {self.directory}, which {what}"
        if os.path.islink(self.directory / name):
            target = os.readlink(self.directory / name)
            return f"there is no {name} in {self.directory}: it is a link to {target}, which is not there"
        return f"there is no {name} in {self.directory}"


def open_folder(directory: str | os.PathLike[str], within: str | os.PathLike[str] | None = None) -> LocalStore:
    """Open a directory that the user named, and complete a save that was interrupted in it.

    Args:
        directory: the directory; "~" is expanded.
        within: refuse links that lead out of this directory; None to follow every link.

    Raises:
        ConfigError: the directory is no path.
    """
    finish_interrupted(local_path(directory))
    return LocalStore(directory, within)


def read_key_file(path: str | os.PathLike[str]) -> bytes:
    """Read a key file that the user named, at most MAX_KEY_FILE_BYTES. Raises ConfigError where it cannot be read."""
    try:
        with open(local_path(path), "rb") as file:
            return file.read(MAX_KEY_FILE_BYTES)
    except OSError as error:
        raise ConfigError(f"expected a key file at {os.fspath(path)!r}: {error.strerror}") from error


def published_root(directory: str | os.PathLike[str]) -> Path:
    """Return the directory that links in `directory` may not leave when it is published.

    This is `directory` itself, or, for a snapshot in the Hub's cache, the cache of that repository.
    """
    path = Path(os.path.realpath(directory))
    for folder in path.parents:
        if folder.name == "snapshots" and (folder.parent / "blobs").is_dir():
            return folder.parent
    return path
