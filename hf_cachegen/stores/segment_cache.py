"""Verified segments on the local disk, shared by all processes of a user.

    <directory>/<hash of the origin>/origin            the URL or repository that this came from
    <directory>/<hash of the origin>/ab/<xxh3>-<bytes> a segment, named by its content
    <directory>/<hash of the origin>/notes/<hash>      manifests, and which commit a branch was last seen at

A segment is found by its checksum, so revisions of a repository share what did not change. It is never found under
another origin: XXH3 is not cryptographic, and a stranger's artifact must not be able to plant segments in yours.
Files appear by renaming, whole; killed writers leave temporary files that `prune` removes. Nothing is synced to the
disk and nothing believed: every read is hashed, and what a power cut tore is thrown away and fetched again.
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
from hf_cachegen.errors import ConfigError

DIRECTORY_VARIABLE = "HF_CACHEGEN_CACHE"
LIMIT_VARIABLE = "HF_CACHEGEN_CACHE_BYTES"
DEFAULT_LIMIT = 32 << 30
"""Bytes."""
_PRUNINGS_PER_LIMIT = 16
"""A process prunes after its first write, and each time that it has written this share of the limit."""
_ABANDONED_SECONDS = 3600
"""A temporary file of this age has lost its writer."""
_TEMPORARY = ".tmp-"


@dataclass(frozen=True)
class CachedOrigin:
    """What the cache holds of one origin: files, bytes, and when it was last used (seconds since the epoch)."""

    origin: str
    files: int
    nbytes: int
    used: float


class SegmentCache:
    """directory: default $HF_CACHEGEN_CACHE, else `cachegen` in $HF_HOME.
    limit: bytes, default $HF_CACHEGEN_CACHE_BYTES, else 32 GiB; what was not used for longest goes first. Between two
        prunings it may be exceeded by a sixteenth.

    Threads and processes may share it. Writing never fails a reader: without space or permission nothing is kept.
    Raises ConfigError for a limit that is none.
    """

    def __init__(self, directory: str | os.PathLike[str] | None = None, limit: int | None = None) -> None:
        self.directory = Path(os.path.abspath(default_directory() if directory is None else directory))
        self.limit = _default_limit() if limit is None else limit
        if self.limit < 0:
            raise ConfigError(f"the limit of the cache must not be negative, got {self.limit}")
        self._unpruned: int | None = None
        self._known: dict[str, Path] = {}

    def get(self, origin: str, xxh3: str, length: int) -> bytes | None:
        """The segment of that checksum, proved; None where it is not here."""
        path = self._segment(origin, xxh3, length)
        data = _read(path)
        if data is not None and (len(data) != length or digest(data) != xxh3):
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        return data

    def has(self, origin: str, xxh3: str, length: int) -> bool:
        """Whether `get` is likely to find it."""
        return os.path.isfile(self._segment(origin, xxh3, length))

    def put(self, origin: str, xxh3: str, data: bytes) -> None:
        """Keeps a segment; the caller has proved that it hashes to `xxh3`."""
        self._write(origin, self._segment(origin, xxh3, len(data)), data)

    def note(self, origin: str, key: str, data: bytes) -> None:
        """Keeps something small under a name, such as a manifest; whoever reads it must check it."""
        self._write(origin, self._note(origin, key), data)

    def noted(self, origin: str, key: str) -> bytes | None:
        """What was last noted under that name."""
        return _read(self._note(origin, key))

    def has_note(self, origin: str, key: str) -> bool:
        """Whether `noted` is likely to find it."""
        return self._note(origin, key).is_file()

    def origins(self) -> list[CachedOrigin]:
        """What the cache holds, the least recently used first."""
        found = []
        for home in self._homes():
            files = list(_files(home))
            origin = (_read(home / "origin", touch=False) or b"?").decode("utf-8", "replace")
            if files:
                used = max(info.st_mtime for _, info in files)
                found.append(CachedOrigin(origin, len(files), sum(info.st_size for _, info in files), used))
        return sorted(found, key=lambda entry: entry.used)

    def prune(self, limit: int | None = None) -> tuple[int, int]:
        """Removes what was not used for longest until `limit` (default: the cache's own) holds: (files, bytes) removed.

        Does nothing while another process prunes.
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
        if origin not in self._known:  # asked for each segment of an artifact
            self._known[origin] = self.directory / hashlib.sha256(origin.encode()).hexdigest()[:32]
        return self._known[origin]

    def _segment(self, origin: str, xxh3: str, length: int) -> Path:
        return self._home(origin) / xxh3[:2] / f"{xxh3}-{length}"

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
            due = self._unpruned is None or self._unpruned > self.limit // _PRUNINGS_PER_LIMIT
            self._unpruned = 0 if due else (self._unpruned or 0) + len(data)
            if due:
                self.prune()


def default_directory() -> str:
    """Where the cache is unless somebody says otherwise: beside the Hub's own."""
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
    except OSError:  # what cannot be read is not here
        return None


def _replace(path: Path, data: bytes) -> None:
    for attempt in (1, 2):  # a pruning may remove the empty folder in between
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
    """All files that pruning may remove."""
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
