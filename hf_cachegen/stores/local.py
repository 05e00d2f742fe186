"""Files in a directory that the user named, read by range.

What is safe here. The names of files come from a stranger's manifest, so a name is a plain file name and nothing else:
no separator, no "..". The directory itself was chosen by the user, so its links are followed, as every program follows
them: the Hub's cache (snapshots/<commit>/* -> ../../blobs/*), git-annex, DVC and Nix keep files behind links that leave
the directory. With a link in a directory that was unpacked here a stranger can at most make this process read a file of
the user's whose checksum the stranger knows. Publishing such a file would reveal it, so publishing passes `within`.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from hf_cachegen.artifact import Segment, Store
from hf_cachegen.errors import ArtifactNotFoundError, CorruptError, TruncatedError


class LocalStore(Store):
    """The files of `directory` ("~" is expanded).

    within: links that lead out of this directory are refused; None: links may lead anywhere. Only regular files are
        opened.

    A file that is not there raises ArtifactNotFoundError; a link that leads out of `within`, or something that is no
    regular file, CorruptError; other failures (no permission) their OSError. Every read opens the file, so threads may
    share it.
    """

    def __init__(self, directory: str | os.PathLike[str], within: str | os.PathLike[str] | None = None) -> None:
        self.directory = Path(os.path.abspath(os.path.expanduser(directory)))
        self._root = None if within is None else os.path.realpath(within)

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
        if self._root is not None and os.path.commonpath([path, self._root]) != self._root:
            raise CorruptError(f"{self.directory / name} is a link out of {self._root}; copy the file instead (cp -L)")
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):  # to open a device can have effects
                raise CorruptError(f"{self.directory / name} is not a regular file")
            # O_NONBLOCK: opening a pipe must not wait for its writer. O_NOFOLLOW: every link is resolved by now.
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                raise ArtifactNotFoundError(self._missing(name)) from error
            if error.errno in (errno.ELOOP, errno.ENXIO):
                raise CorruptError(f"{self.directory / name} is not a regular file") from error
            raise
        if not stat.S_ISREG(os.fstat(file).st_mode):
            os.close(file)
            raise CorruptError(f"{self.directory / name} is not a regular file")
        return file

    def _missing(self, name: str) -> str:
        if not self.directory.is_dir():
            what = "is a file; name the folder that holds the artifact" if self.directory.exists() else "is not there"
            return f"there is no {name} in {self.directory}, which {what}"
        if (self.directory / name).is_symlink():
            target = os.readlink(self.directory / name)
            return f"there is no {name} in {self.directory}: it is a link to {target}, which is not there"
        return f"there is no {name} in {self.directory}"


def published_root(directory: str | os.PathLike[str]) -> Path:
    """Return the directory that links in `directory` may not leave when it is published: `directory` itself, or, in a
    snapshot of the Hub's cache, the cache of that repository.
    """
    path = Path(os.path.realpath(directory))
    for folder in path.parents:
        if folder.name == "snapshots" and (folder.parent / "blobs").is_dir():
            return folder.parent
    return path
