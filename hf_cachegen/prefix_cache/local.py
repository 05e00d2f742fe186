"""The local tier: block files in a directory, within a byte budget, whole or absent whatever happens.

    <directory>/index.sqlite          which blocks there are (`index.py`)
    <directory>/lock                  locked by the one process that writes or removes files
    <directory>/blocks/ab/ab12...     a block, named by its key

Note [Order of writing]. Under the lock: (1) make room, (2) note the names in the index as pending, (3) write a
temporary file and sync it, (4) rename it and sync its directory, (5) insert the row and clear the names, in one
transaction. The process that takes the lock next removes the pending names that are left. So a writer that was killed
at any step leaves the old state or the new one, and no bytes that the budget does not count. Removal runs the other
way: rows become pending names in one transaction, then files go, then the names.

Readers take no lock. A reader that loses its file to an eviction sees a block that is not there. Every read is proved;
a damaged block is removed with all blocks that are chained with it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hf_cachegen.artifact.store import output_path
from hf_cachegen.artifact.writer import sync_directory
from hf_cachegen.errors import ArtifactError, ConfigError, PrefixCacheError
from hf_cachegen.prefix_cache.block import Block, load
from hf_cachegen.prefix_cache.index import ROWS_AT_ONCE, Index, Row

LOG = logging.getLogger("hf_cachegen.prefix_cache")
INDEX_GROWTH = 64 << 10
"""Bytes by which the index may grow while one block is added; part of the budget."""
MIN_BYTES = 1 << 20
"""The smallest budget; below it the index alone would fill it."""
_TEMPORARY = ".partial"
Parse = Callable[[bytes, bytes], Block]
_BOOT_ID = "/proc/sys/kernel/random/boot_id"


@dataclass(frozen=True)
class Verified:
    """What `LocalTier.verify` found: blocks and bytes that are sound, keys that were damaged, files that had no row."""

    blocks: int
    nbytes: int
    damaged: tuple[bytes, ...]
    strays: int


class LocalTier:
    """The blocks in one directory. Threads and processes may share it.

    Args:
        directory: made if need be, readable by its owner alone: a KV cache reveals its text.
        max_bytes: budget of everything in the directory, index included; None for no limit.
        ttl: seconds after its last use at which a block is removed; None for never.
        parse: parses and proves the bytes of the file of a key.

    Raises:
        ConfigError: the directory is no path, the budget is below MIN_BYTES, or the ttl is not positive.
        PrefixCacheError: the directory cannot be made or its index cannot be opened.
    """

    def __init__(
        self, directory: str | os.PathLike[str], max_bytes: int | None, ttl: float | None = None, parse: Parse = load
    ) -> None:
        if max_bytes is not None and max_bytes < MIN_BYTES:
            raise ConfigError(f"max_bytes must be at least {MIN_BYTES} bytes, got {max_bytes}")
        if ttl is not None and not ttl > 0:
            raise ConfigError(f"ttl must be a number of seconds above 0, got {ttl!r}")
        self.directory = Path(os.path.abspath(output_path(directory)))
        self.max_bytes, self.ttl, self._parse = max_bytes, ttl, parse
        self.index = Index(self.directory / "index.sqlite")
        self._thread_lock = threading.RLock()
        try:
            (self.directory / "blocks").mkdir(parents=True, exist_ok=True, mode=0o700)
            with self._writing():
                pass
        except (OSError, sqlite3.Error) as error:
            raise PrefixCacheError(f"the prefix cache in {self.directory} cannot be opened: {error}") from error

    def stored(self, keys: Sequence[bytes]) -> int:
        """Return how many of the first keys are stored. Reads the index alone."""
        self._expire_if_due()
        return len(self.index.stored(keys))

    def get(self, key: bytes) -> bytes | None:
        """Return the bytes of a block's file, not proved; None where it is not there."""
        try:
            return _read(self._path(key))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise PrefixCacheError(f"{self._path(key)} cannot be read: {error}") from error

    def put(self, block: Block, data: bytes, chain: Sequence[bytes]) -> bool:
        """Store a block.

        Args:
            block: what `data` holds.
            data: the bytes of its file.
            chain: the keys before it, from the first; they are not evicted for it.

        Returns:
            Whether it is stored now. It is not where the budget has no room for it, or where the block before it has
            gone.

        Raises:
            PrefixCacheError: the disk is full or fails; the directory is as it was before.
        """
        try:
            with self._writing():
                return self._put(block, data, chain)
        except (OSError, sqlite3.Error) as error:
            message = f"block {block.key.hex()[:16]} was not stored in {self.directory}: {error}"
            raise PrefixCacheError(message) from error

    def drop(self, key: bytes) -> int:
        """Remove a block and all that are chained with it; return their number."""
        with self._changing(), self._writing():
            keys = self.index.descendants(key)
            self._remove(keys)
            return len(keys)

    def prune(self, max_bytes: int | None = None) -> tuple[int, int]:
        """Remove expired blocks, then the least recently used, until the directory has at most `max_bytes`.

        Args:
            max_bytes: default the budget.

        Returns:
            Blocks and bytes removed. Pinned blocks and those before them stay.
        """
        with self._changing(), self._writing():
            count, size = self.index.count(), self.index.nbytes()
            self._expire(time.time())
            self._make_room(0, (), self.max_bytes if max_bytes is None else max_bytes)
            return count - self.index.count(), size - self.index.nbytes()

    def verify(self) -> Verified:
        """Read every block; remove damaged ones with what is chained with them, and files without a row."""
        damaged, blocks, nbytes = [], 0, 0
        try:
            self.index.nbytes()
            rows = self.index.rows()
        except (PrefixCacheError, sqlite3.DatabaseError):
            self.rebuild()
            rows = self.index.rows()
        for row in sorted(rows, key=lambda row: row.depth):
            try:
                data = self.get(row.key)
                if not self.index.stored([row.key]):
                    continue  # evicted meanwhile, or chained with a damaged one
                if data is None:
                    raise PrefixCacheError("its file is missing")
                self._parse(data, row.key)
            except (ArtifactError, PrefixCacheError) as error:
                LOG.warning("block %s is damaged and is removed: %s", row.key.hex()[:16], error)
                damaged.append(row.key)
                self.drop(row.key)
                continue
            blocks, nbytes = blocks + 1, nbytes + len(data)
        with self._changing(), self._writing():
            return Verified(blocks, nbytes, tuple(damaged), self._remove_strays())

    def rebuild(self) -> int:
        """Make a new index of the blocks whose files are sound; return their number. For a damaged index."""
        with self._changing(), self._thread_lock, self._locked():
            return self._rebuild()

    def _put(self, block: Block, data: bytes, chain: Sequence[bytes]) -> bool:
        now = time.time()
        if self.index.stored([block.key]):
            self.index.touch([*chain, block.key], now)
            return True
        if block.depth and not self.index.stored([block.parent]):
            return False
        self.index.touch(chain, now)
        if not self._make_room(len(data), chain, self.max_bytes):
            return False
        path = self._path(block.key)
        partial = path.with_name(path.name + _TEMPORARY)
        names = [self._name(path), self._name(partial)]
        self.index.expect(names)
        try:
            path.parent.mkdir(exist_ok=True, mode=0o700)
            _write(partial, data)
            os.replace(partial, path)
            sync_directory(path.parent)
            row = Row(block.key, block.parent, block.family.salt, block.depth, len(data), now, now, False)
            self.index.add(row, block.family.text, names)
        except BaseException:
            with contextlib.suppress(OSError, sqlite3.Error):
                self._clear_pending(names)
            raise
        return True

    def _rebuild(self) -> int:
        self.index.close()
        for suffix in ("", "-wal", "-shm"):
            Path(f"{self.index.path}{suffix}").unlink(missing_ok=True)
        found = []
        for path in self._files():
            try:
                block = self._parse(_read(path), bytes.fromhex(path.name))
            except (ArtifactError, ValueError, OSError):
                continue
            info = path.stat()
            row = Row(block.key, block.parent, block.family.salt, block.depth, info.st_size, info.st_mtime,
                      info.st_mtime, False)  # fmt: skip
            found.append((row, block.family.text))
        for row, family in sorted(found, key=lambda item: item[0].depth):
            if row.depth == 0 or self.index.stored([row.parent]):
                self.index.add(row, family)
        self._remove_strays()
        self._make_room(0, (), self.max_bytes)
        return self.index.count()

    def _make_room(self, nbytes: int, keep: Collection[bytes], limit: int | None) -> bool:
        """Remove least recently used leaves until `nbytes` more fit; report whether they do."""
        if limit is None:
            return True
        kept = set(keep)
        while True:
            index = self.index.most_bytes() + INDEX_GROWTH if nbytes else self.index.file_bytes()
            excess = self.index.nbytes() + nbytes + index - limit
            if excess <= 0:
                return True
            victims = []
            for row in self.index.leaves():
                if row.key in kept:
                    continue
                victims.append(row.key)
                excess -= row.nbytes
                if excess <= 0:
                    break
            if not victims:
                return False
            self._remove(victims)

    def _expire_if_due(self) -> None:
        oldest = None if self.ttl is None else self.index.oldest()
        if self.ttl is not None and oldest is not None and oldest < time.time() - self.ttl:
            with self._changing(), self._writing():
                self._expire(time.time())

    def _expire(self, now: float) -> None:
        while self.ttl is not None and (rows := self.index.leaves(before=now - self.ttl)):
            self._remove([row.key for row in rows])

    def _remove(self, keys: Sequence[bytes]) -> None:
        for first in range(0, len(keys), ROWS_AT_ONCE):
            some = keys[first : first + ROWS_AT_ONCE]
            names = [self._name(self._path(key)) for key in some]
            self.index.remove(some, names)
            self._clear_pending(names)

    def _clear_pending(self, names: Iterable[str]) -> None:
        gone = []
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.directory / name)
            gone.append(name)
        self.index.forget(gone)

    def _remove_strays(self) -> int:
        """Remove files that the index does not know, and rows without a file."""
        known = {row.key: row for row in self.index.rows()}
        strays = 0
        present = set()
        for path in self._files():
            key = bytes.fromhex(path.name) if len(path.name) == 64 else b""
            if key in known:
                present.add(key)
            else:
                path.unlink(missing_ok=True)
                strays += 1
        for key in known.keys() - present:
            self._remove(self.index.descendants(key))
        return strays

    def _files(self) -> Iterator[Path]:
        for folder in (self.directory / "blocks").iterdir():
            if folder.is_dir():
                yield from folder.iterdir()

    def _path(self, key: bytes) -> Path:
        name = key.hex()
        return self.directory / "blocks" / name[:2] / name

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self.directory))

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Give failures of the disk and the index their typed error."""
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            raise PrefixCacheError(f"the prefix cache in {self.directory} cannot be changed: {error}") from error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        file = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
        finally:
            os.close(file)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Hold the directory's write lock, after finishing what a killed writer began (see Note [Order of writing])."""
        with self._thread_lock, self._locked():
            try:
                self._recover()
            except (PrefixCacheError, sqlite3.DatabaseError) as error:
                if isinstance(error, sqlite3.OperationalError):  # a full disk or a lock, not damage
                    raise
                LOG.warning("the index in %s is damaged (%s): it is made again", self.directory, error)
                self._rebuild()
            yield

    def _recover(self) -> None:
        if pending := self.index.pending():
            self._clear_pending(pending)
        boot = _boot_id()
        if self.index.state("boot") != boot:
            # After a power cut the newest rows may be lost whose files are there, or the other way round.
            self._remove_strays()
            self.index.set_state("boot", boot)


def _read(path: Path) -> bytes:
    """Read a regular file, or the one that a link leads to. Raises OSError for another: a device has no end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    with open(path, "rb") as file:
        return file.read(os.fstat(file.fileno()).st_size)


def _write(path: Path, data: bytes) -> None:
    """Write a new file and sync it to the disk."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(file, view) :]
        os.fsync(file)
    finally:
        os.close(file)


def _boot_id() -> str:
    """Return what names this start of the machine; empty where the system does not tell."""
    try:
        return Path(_BOOT_ID).read_text(encoding="ascii").strip()
    except OSError:
        return ""
