"""Verified segments on the local disk, shared by all processes of a user.

    <directory>/<hash of the origin>/origin            the URL or repository
    <directory>/<hash of the origin>/ab/<xxh3>-<bytes> a segment, named by its content
    <directory>/<hash of the origin>/notes/<hash>      a manifest, or the commit at which a branch was last seen

A segment is found by its checksum, so revisions of a repository share unchanged segments. It is never found under
another origin: XXH3 is not cryptographic, and an untrusted artifact must not be able to plant segments in another one.
Files are written under a temporary name and renamed; `prune` removes the temporary files of killed writers. Nothing is
synced to the disk. Every read is hashed instead, and a file that a power cut tore is removed and fetched again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hf_cachegen.artifact.manifest import digest
from hf_cachegen.artifact.store import output_path
from hf_cachegen.errors import ConfigError

DIRECTORY_VARIABLE = "HF_CACHEGEN_CACHE"
LIMIT_VARIABLE = "HF_CACHEGEN_CACHE_BYTES"
DEFAULT_LIMIT = 32 << 30
"""Bytes."""
_PRUNINGS_PER_LIMIT = 16
"""A process prunes after its first write, and again after each limit / 16 bytes that it has written."""
_written: dict[tuple[Path, int], int] = {}
"""By directory and limit: the bytes that this process has written since it pruned. Each load has a cache of its own,
and to prune walks over all files.
"""
_ABANDONED_SECONDS = 3600
"""Age in seconds from which a temporary file counts as left by a killed writer."""
_TEMPORARY = ".tmp-"


@dataclass(frozen=True)
class CachedOrigin:
    """The share of one origin in the cache.

    Attributes:
        origin: the URL or repository.
        files: number of files.
        nbytes: their size in bytes.
        used: time of the last use, in seconds since the epoch.
    """

    origin: str
    files: int
    nbytes: int
    used: float


class SegmentCache:
    """The local cache of verified segments. Threads and processes may share it.

    A failed write raises nothing: without space or permission the cache keeps nothing.

    Args:
        directory: the folder (default: $HF_CACHEGEN_CACHE, else `cachegen` in $HF_HOME).
        limit: size limit in bytes (default: $HF_CACHEGEN_CACHE_BYTES, else 32 GiB). The least recently used files are
            removed first. The limit may be exceeded by a sixteenth between two prunings.

    Raises:
        ConfigError: the directory is no path, or the limit is negative or not a number.
    """

    def __init__(self, directory: str | os.PathLike[str] | None = None, limit: int | None = None) -> None:
        self.directory = Path(os.path.abspath(output_path(default_directory() if directory is None else directory)))
        self.limit = _default_limit() if limit is None else limit
        if self.limit < 0:
            raise ConfigError(f"the limit of the cache must not be negative, got {self.limit}")
        self._known: dict[str, Path] = {}

    def get(self, origin: str, xxh3: str, length: int) -> bytes | None:
        """Return the segment with that checksum, verified; None where the cache lacks it."""
        path = Path(self._segment(origin, xxh3, length))
        data = _read(path)
        if data is not None and (len(data) != length or digest(data) != xxh3):
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        return data

    def has(self, origin: str, xxh3: str, length: int) -> bool:
        """Report whether `get` is likely to find it."""
        return os.path.isfile(self._segment(origin, xxh3, length))

    def put(self, origin: str, xxh3: str, data: bytes) -> None:
        """Keep a segment; the caller has verified that it hashes to `xxh3`."""
        self._write(origin, Path(self._segment(origin, xxh3, len(data))), data)

    def note(self, origin: str, key: str, data: bytes) -> None:
        """Keep bytes under a name, such as a manifest; the reader must verify them."""
        self._write(origin, self._note(origin, key), data)

    def noted(self, origin: str, key: str) -> bytes | None:
        """Return the bytes last kept under that name, not verified; None where the cache lacks them."""
        return _read(self._note(origin, key))

    def has_note(self, origin: str, key: str) -> bool:
        """Report whether `noted` is likely to find it."""
        return self._note(origin, key).is_file()

    def origins(self) -> list[CachedOrigin]:
        """List the origins in the cache, the least recently used first."""
        found = []
        for home in self._homes():
            files = list(_files(home))
            origin = (_read(home / "origin", touch=False) or b"?").decode("utf-8", "replace")
            if files:
                used = max(info.st_mtime for _, info in files)
                found.append(CachedOrigin(origin, len(files), sum(info.st_size for _, info in files), used))
        return sorted(found, key=lambda entry: entry.used)

    def prune(self, limit: int | None = None) -> tuple[int, int]:
        """Remove the least recently used files until the cache is within a limit.

        Nothing is removed while another process prunes.

        Args:
            limit: the limit in bytes (default: the cache's own).

        Returns:
            The numbers of files and bytes that were removed.
        """
        limit = self.limit if limit is None else limit
        if not self.directory.is_dir():
            return 0, 0
        with open(self.directory / ".lock", "a", encoding="ascii") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return 0, 0
            files = [entry for home in self._homes() for entry in _files(home)]
            excess = sum(info.st_size for _, info in files) - limit
            old = time.time() - _ABANDONED_SECONDS
            removed, freed = 0, 0
            for path, info in sorted(files, key=lambda entry: entry[1].st_mtime):
                abandoned = path.name.startswith(_TEMPORARY) and info.st_mtime < old
                if freed >= excess and not abandoned:
                    continue
                with contextlib.suppress(OSError):
                    path.unlink()
                    removed, freed = removed + 1, freed + info.st_size
            for home in self._homes():
                _remove_if_empty(home)
        return removed, freed

    def _homes(self) -> Iterator[Path]:
        if self.directory.is_dir():
            yield from (path for path in self.directory.iterdir() if path.is_dir() and not path.is_symlink())

    def _home(self, origin: str) -> Path:
        if origin not in self._known:  # called for each segment of an artifact
            self._known[origin] = self.directory / hashlib.sha256(origin.encode()).hexdigest()[:32]
        return self._known[origin]

    def _segment(self, origin: str, xxh3: str, length: int) -> str:
        # A load asks for all segments before it fetches the first. Path objects take longer than the system calls.
        return f"{self._home(origin)}/{xxh3[:2]}/{xxh3}-{length}"

    def _note(self, origin: str, key: str) -> Path:
        return self._home(origin) / "notes" / hashlib.sha256(key.encode()).hexdigest()[:32]

    def _write(self, origin: str, path: Path, data: bytes) -> None:
        if len(data) > self.limit:
            return
        with contextlib.suppress(OSError):
            home = self._home(origin)
            if not (home / "origin").exists():
                _replace(home / "origin", origin.encode())
            _replace(path, data)
            written = _written.get((self.directory, self.limit))
            due = written is None or written > self.limit // _PRUNINGS_PER_LIMIT
            _written[self.directory, self.limit] = 0 if due else (written or 0) + len(data)
            if due:
                self.prune()


def default_directory() -> str:
    """Return the default folder of the cache, beside the Hub's own cache."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    hub = os.environ.get("HF_HOME") or os.path.join(caches, "huggingface")
    return os.environ.get(DIRECTORY_VARIABLE) or os.path.join(os.path.expanduser(hub), "cachegen")


def _default_limit() -> int:
    value = os.environ.get(LIMIT_VARIABLE)
    if not value:
        return DEFAULT_LIMIT
    if not value.isdecimal():
        raise ConfigError(f"{LIMIT_VARIABLE} must be a number of bytes, got {value!r:.40}")
    return int(value)


def _read(path: Path, *, touch: bool = True) -> bytes | None:
    try:
        data = path.read_bytes()
        if touch:
            os.utime(path)
        return data
    except FileNotFoundError:
        return None
    except OSError:  # an unreadable file counts as missing
        return None


def _replace(path: Path, data: bytes) -> None:
    for attempt in (1, 2):  # a pruning may remove the empty folder between the two calls
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            handle, name = tempfile.mkstemp(prefix=_TEMPORARY, dir=path.parent)
            break
        except FileNotFoundError:
            if attempt == 2:
                raise
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _files(home: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield the files that pruning may remove."""
    for folder, _, names in os.walk(home):
        for name in names:
            path = Path(folder, name)
            if path != home / "origin":
                with contextlib.suppress(OSError):
                    yield path, path.stat(follow_symlinks=False)


def _remove_if_empty(home: Path) -> None:
    with contextlib.suppress(OSError):
        for folder in [path for path in home.iterdir() if path.is_dir()]:
            with contextlib.suppress(OSError):
                folder.rmdir()
        if [path.name for path in home.iterdir()] == ["origin"]:
            (home / "origin").unlink()
            home.rmdir()
