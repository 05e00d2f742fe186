"""Write an artifact so that the directory holds a complete one or none at every moment.

Segments are streamed. Each is appended to its file's spool (unnamed, in the same directory), so memory holds one
segment at a time, and neither the number of segments nor their lengths must be known in advance. `commit` writes header
and spool together under a temporary name, and syncs. Only when every file is on the disk, it

    1. removes the old manifest, if there is one     from here to 4 the directory holds no artifact
    2. renames the files
    3. syncs the directory
    4. renames the manifest                          from here it holds the new one
    5. removes the old artifact's remaining files

A new file is never combined with the old manifest. A crash between 1 and 4 leaves every new file on the disk: the next
reader or writer of the directory completes the steps (`finish_interrupted`). A failure before 1 leaves the old artifact
unchanged. A lock on the directory excludes a second writer. (Exchanging whole directories instead would remove the
user's own files beside the artifact.)
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import stat
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from hf_cachegen.artifact import header
from hf_cachegen.artifact.manifest import (
    DEFAULT_LIMITS,
    MANIFEST_FILE,
    SIGNATURE_FILE,
    Limits,
    Manifest,
    check_file_name,
    digest,
    dumps,
    is_own_file,
    loads,
    tile,
)
from hf_cachegen.artifact.store import output_path
from hf_cachegen.errors import ArtifactError, ArtifactExistsError, TensorError

_COPY_BYTES = 1 << 20
_PARTIAL = re.compile(r"\.(.+)\.partial")


class ArtifactWriter:
    """Write one artifact into `directory`, which is created if it does not exist.

        with ArtifactWriter(directory) as writer:
            writer.add("base.safetensors", "chunk-00000", stream)
            writer.commit(manifest)

    Without `commit`, leaving the block removes everything that was written.

    Args:
        directory: Holds the artifact. Files that are not the artifact's are never changed.
        overwrite: Replace the files of an existing artifact.
        limits: The largest artifact to write.

    Raises:
        ArtifactExistsError: The directory holds files of an artifact, or another writer is using it.
        ConfigError: The directory is no path.
        OSError: The disk is full, or access is denied.
    """

    def __init__(
        self, directory: str | os.PathLike[str], *, overwrite: bool = False, limits: Limits = DEFAULT_LIMITS
    ) -> None:
        self._path = output_path(directory)
        self._overwrite = overwrite
        self._limits = limits
        self._spools: dict[str, BinaryIO] = {}
        self._segments: dict[str, list[tuple[str, int, str]]] = {}
        self._made: list[Path] = []
        self._directory = -1
        self._old: set[str] = set()

    def __enter__(self) -> ArtifactWriter:
        self._made = make_folders(self._path)
        try:
            self._directory = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            remove_empty(self._made)
            raise
        try:
            _lock(self._directory, self._path)
            self._old = self._take_stock()
        except BaseException:
            os.close(self._directory)
            remove_empty(self._made)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, OSError) and error.errno is not None:
            if error.filename is None:  # writing to an open file names no file
                error.filename = str(self._path)
            elif os.path.basename(error.filename) == error.filename:
                error.filename = os.path.join(self._path, error.filename)
        for spool in self._spools.values():
            with contextlib.suppress(OSError):  # on a full disk, flushing the rest of its buffer fails
                spool.close()
        try:
            for name in os.listdir(self._directory):
                partial = _PARTIAL.fullmatch(name)
                if partial and partial[1] in (*self._segments, MANIFEST_FILE):
                    os.unlink(name, dir_fd=self._directory)
        finally:
            os.close(self._directory)
            remove_empty(self._made)

    def add(self, file: str, name: str, data: bytes | memoryview) -> None:
        """Append the segment `name` to `file`. Files may be written in any order, and alternately."""
        if file not in self._spools:
            check_file_name(file)
            self._refuse_existing(file)
            self._segments[file] = []
            self._spools[file] = self._create(file)
            os.unlink(
                _partial(file), dir_fd=self._directory
            )  # the spool lives on without a name; a crash leaves nothing
        self._segments[file].append((name, memoryview(data).nbytes, digest(data)))
        self._spools[file].write(data)

    def commit(self, manifest: Manifest) -> Manifest:
        """Complete the artifact.

        Args:
            manifest: Without files.

        Returns:
            The manifest with its files.
        """
        manifest = replace(manifest, files={file: tile(file, rows) for file, rows in self._segments.items()})
        data = dumps(manifest)
        loads(data, self._limits, manifest.required)  # write only what can be read again
        for file, rows in self._segments.items():
            spool = self._spools[file]
            spool.seek(0)
            with self._create(file) as out:
                out.write(header.build(file, [(name, length) for name, length, _ in rows]))
                shutil.copyfileobj(spool, out, _COPY_BYTES)
                _sync(out)
        with self._create(MANIFEST_FILE) as out:
            out.write(data)
            _sync(out)
        self._swap()
        return manifest

    def _swap(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(MANIFEST_FILE, dir_fd=self._directory)
            os.fsync(self._directory)
        # The old signature does not fit the new files. (One that cannot be removed fails to verify.)
        with contextlib.suppress(FileNotFoundError, IsADirectoryError, PermissionError):
            os.unlink(SIGNATURE_FILE, dir_fd=self._directory)
        for file in self._segments:
            self._rename(file)
        os.fsync(self._directory)
        self._rename(MANIFEST_FILE)
        os.fsync(self._directory)
        for file in self._old - self._segments.keys():
            with contextlib.suppress(FileNotFoundError):
                os.unlink(file, dir_fd=self._directory)
        for made in self._made:
            sync_directory(made.parent)
        self._made, self._segments = [], {}

    def _take_stock(self) -> set[str]:
        """Remove the temporary files of a killed writer, and return the data files of the readable old artifact, if
        any.
        """
        _finish(self._directory, self._limits)
        for name in os.listdir(self._directory):
            partial = _PARTIAL.fullmatch(name)
            if partial and is_own_file(partial[1]):
                os.unlink(name, dir_fd=self._directory)
        self._refuse_existing(MANIFEST_FILE)
        try:
            old = _read_manifest(self._directory, MANIFEST_FILE, self._limits)
        except (OSError, ArtifactError):
            return set()
        return {name for name in old.files if is_own_file(name)}

    def _refuse_existing(self, name: str) -> None:
        try:
            found = os.lstat(name, dir_fd=self._directory)
        except FileNotFoundError:
            return
        if not self._overwrite:
            raise ArtifactExistsError(
                f"{self._path / name} exists; choose another directory, or pass overwrite=True to replace the artifact"
            )
        if stat.S_ISDIR(found.st_mode):
            raise ArtifactExistsError(
                f"{self._path / name} is a directory and cannot be replaced by a file; move it away"
            )

    def _create(self, name: str) -> BinaryIO:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        return os.fdopen(os.open(_partial(name), flags, 0o666, dir_fd=self._directory), "w+b")

    def _rename(self, name: str) -> None:
        os.rename(_partial(name), name, src_dir_fd=self._directory, dst_dir_fd=self._directory)


def finish_interrupted(directory: str | os.PathLike[str], limits: Limits = DEFAULT_LIMITS) -> None:
    """Complete the artifact of a writer that was killed after it had removed the old manifest.

    Nothing is changed in a directory that holds a manifest, lacks a file of the new artifact, has a writer at work, or
    cannot be written.
    """
    path = Path(directory)
    if os.path.lexists(path / MANIFEST_FILE) or not os.path.lexists(path / _partial(MANIFEST_FILE)):
        return
    with contextlib.suppress(OSError, ArtifactError), locked(path) as folder:
        _finish(folder, limits)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[int]:
    """Exclude other writers of a directory in the block, and yield its descriptor.

    Raises:
        ArtifactExistsError: Another writer is using the directory.
        OSError: The directory cannot be opened.
    """
    folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _lock(folder, directory)
        yield folder
    finally:
        os.close(folder)


def make_folders(path: Path) -> list[Path]:
    """Create a directory and its parents; return the created ones, outermost first.

    Raises:
        ArtifactExistsError: The path, or a part of it, is a file.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ArtifactExistsError(f"{path} must be a directory, in which the artifact's files are written") from error
    return missing[::-1]


def remove_empty(made: Sequence[Path]) -> None:
    """Remove the directories that `make_folders` created and that are still empty."""
    with contextlib.suppress(OSError):  # the user may have put files there
        for folder in reversed(made):
            folder.rmdir()


def write_artifact(
    directory: str | os.PathLike[str],
    manifest: Manifest,
    segments: Iterable[tuple[str, str, bytes]],
    *,
    overwrite: bool = False,
    limits: Limits = DEFAULT_LIMITS,
) -> Manifest:
    """Write segments (file, name, bytes), taken one at a time, and then the manifest.

    Args:
        directory: Created if it does not exist.
        manifest: Without files.
        segments: In the order of writing.
        overwrite: Replace an existing artifact.
        limits: The largest artifact to write.

    Returns:
        The manifest with its files.

    Raises:
        ArtifactExistsError: The directory holds files of an artifact, or another writer is using it.
        OSError: The disk is full, or access is denied.
    """
    with ArtifactWriter(directory, overwrite=overwrite, limits=limits) as writer:
        for file, name, data in segments:
            writer.add(file, name, data)
        return writer.commit(manifest)


def artifact_sizes(manifest: Manifest, lengths: Iterable[tuple[str, str, int]]) -> dict[str, int]:
    """Return the exact size in bytes of every file that `write_artifact` would write, the manifest included.

    Args:
        manifest: Without files.
        lengths: (file, segment name, length in bytes), in the order of writing.
    """
    rows: dict[str, list[tuple[str, int, str]]] = {}
    for file, name, length in lengths:
        rows.setdefault(file, []).append((name, length, "0" * 32))
    files = {file: tile(file, segments) for file, segments in rows.items()}
    sizes = {file: entry.size for file, entry in files.items()}
    return {**sizes, MANIFEST_FILE: len(dumps(replace(manifest, files=files)))}


def pack_input_ids(ids: Sequence[int]) -> bytes:
    """Pack token ids as I64 little-endian, the bytes of the segment `input_ids`. Raises TensorError for other values.
    """
    try:
        packed = array("q", ids)
    except (TypeError, OverflowError) as error:
        raise TensorError(f"input_ids must be integers below 2^63: {error}") from error
    if packed and min(packed) < 0:
        raise TensorError(f"input_ids must not be negative, got {min(packed)}")
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def _finish(directory: int, limits: Limits) -> None:
    """Make the renames that a killed writer of this locked directory left, if all its files are there."""
    names = os.listdir(directory)
    if MANIFEST_FILE in names or _partial(MANIFEST_FILE) not in names:
        return
    try:
        files = _read_manifest(directory, _partial(MANIFEST_FILE), limits).files
        found = {file: _partial(file) if _partial(file) in names else file for file in files}
        if any(os.lstat(name, dir_fd=directory).st_size != files[file].size for file, name in found.items()):
            return
    except (OSError, ArtifactError):
        return  # killed before step 1: the old artifact, or none, is what the directory holds
    for file, name in found.items():
        os.rename(name, file, src_dir_fd=directory, dst_dir_fd=directory)
    os.fsync(directory)
    os.rename(_partial(MANIFEST_FILE), MANIFEST_FILE, src_dir_fd=directory, dst_dir_fd=directory)
    os.fsync(directory)


def _read_manifest(directory: int, name: str, limits: Limits) -> Manifest:
    # O_NONBLOCK: do not wait for a pipe of that name.
    manifest = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    with os.fdopen(manifest, "rb") as file:
        if not stat.S_ISREG(os.fstat(manifest).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", name)
        return loads(file.read(limits.max_header_bytes + 1), limits)


def _partial(name: str) -> str:
    return f".{name}.partial"


def _lock(directory: int, path: Path) -> None:
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise ArtifactExistsError(f"another writer is using {path}; wait, or choose another directory") from error
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):  # some network file systems have no locks
            raise ArtifactError(f"cannot lock {path}: {error}") from error


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Sync the names in a directory to the disk."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
