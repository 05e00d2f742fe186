"""The local index: which blocks a directory holds, their sizes and when they were last used, in SQLite (WAL mode).

The index is the only authority: a file without a row is invisible and is removed, a row is written after its file. A
lookup reads the index alone, never a block. Several processes and threads share it. Every change happens within one
transaction; the directory's write lock (`local.py`) orders the changes that also touch files.

Chains are kept whole by two rules. A block is used when any of its descendants is, so parents are never older than
their children. Only a block without children can be removed, unless all its descendants go with it.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_cachegen.errors import PrefixCacheError
from hf_cachegen.prefix_cache.keys import checkpoint_key

SCHEMA = """
CREATE TABLE IF NOT EXISTS blocks(
    key BLOB PRIMARY KEY, parent BLOB NOT NULL, salt BLOB NOT NULL, depth INTEGER NOT NULL, nbytes INTEGER NOT NULL,
    created REAL NOT NULL, used REAL NOT NULL, pinned INTEGER NOT NULL DEFAULT 0) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_use ON blocks(used, depth DESC);
CREATE INDEX IF NOT EXISTS by_parent ON blocks(parent);
CREATE TABLE IF NOT EXISTS families(salt BLOB PRIMARY KEY, family TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS pending(name TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS counters(name TEXT PRIMARY KEY, value REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS state(name TEXT PRIMARY KEY, value) WITHOUT ROWID;
INSERT OR IGNORE INTO state VALUES ('nbytes', 0), ('boot', ''), ('version', 1);
"""
BUSY_SECONDS = 30.0
"""How long a statement waits for another process's transaction, which takes milliseconds."""
CHECKPOINT_PAGES = 64
"""Pages of 4 KiB after which SQLite moves its log into the database: keeps the log within 256 KiB, for the budget."""
LOG_BYTES = 384 << 10
"""Bytes that the log may have at any time: CHECKPOINT_PAGES and one transaction of ROWS_AT_ONCE rows, some 30 pages."""
ROWS_AT_ONCE = 8
"""Rows that one transaction changes. Each takes a page of its own in three trees of a large index."""
_KEYS_PER_QUERY = 500
"""Below the number of variables that any SQLite takes."""


@dataclass(frozen=True)
class Row:
    """One block, or checkpoint, as the index knows it. Times are seconds since the epoch."""

    key: bytes
    parent: bytes
    salt: bytes
    depth: int
    nbytes: int
    created: float
    used: float
    pinned: bool

    @property
    def is_checkpoint(self) -> bool:
        """Whether it is a checkpoint of states at the end of its parent, instead of a block."""
        return self.key == checkpoint_key(self.parent)

    @property
    def blocks(self) -> int:
        """Number of blocks of the prefix that it ends."""
        return self.depth if self.is_checkpoint else self.depth + 1


def _row(values: tuple[Any, ...]) -> Row:
    key, parent, salt, depth, nbytes, created, used, pinned = values
    found = [type(value) for value in values]
    if found != [bytes, bytes, bytes, int, int, float, float, int]:
        raise PrefixCacheError(f"expected a row of {_COLUMNS} in the index, found {found}: {_DAMAGED}")
    return Row(key, parent, salt, depth, nbytes, created, used, bool(pinned))


_DAMAGED = "it is damaged; 'hf-cachegen prefix-cache verify' makes it again"
_COLUMNS = "key, parent, salt, depth, nbytes, created, used, pinned"


class Index:
    """The index of one directory. Threads may share it; a forked child opens a connection of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._pid = 0
        self._connection: sqlite3.Connection | None = None

    def close(self) -> None:
        """Close the connection; the next call opens another."""
        with self._lock:
            if self._connection is not None and self._pid == os.getpid():
                self._connection.close()
            self._connection = None

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Run the body as one transaction that other processes see whole or not at all."""
        with self._lock:
            connection = self._open()
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                # After a full disk SQLite may have rolled back by itself.
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    def stored(self, keys: Sequence[bytes]) -> list[int]:
        """Return the sizes in bytes of the longest stored run at the beginning of `keys`."""
        sizes: dict[bytes, int] = {}
        with self._lock:
            for asked, found in self._sizes(keys):
                sizes.update(found)
                if len(found) < asked:
                    break
        run = []
        for key in keys:
            if key not in sizes:
                break
            run.append(sizes[key])
        return run

    def present(self, keys: Sequence[bytes]) -> set[bytes]:
        """Return those of some keys that are stored, in any order."""
        with self._lock:
            return {key for _, found in self._sizes(keys) for key, _ in found}

    def _sizes(self, keys: Sequence[bytes]) -> Iterator[tuple[int, list[tuple[bytes, int]]]]:
        """Iterate over queries for some keys: the number asked for, and the key and size of those that are stored."""
        connection = self._open()
        for first in range(0, len(keys), _KEYS_PER_QUERY):
            asked = keys[first : first + _KEYS_PER_QUERY]
            marks = ",".join("?" * len(asked))
            query = f"SELECT key, nbytes FROM blocks WHERE key IN ({marks})"  # noqa: S608 - marks are "?" alone
            yield len(asked), connection.execute(query, asked).fetchall()

    def touch(self, keys: Sequence[bytes], now: float) -> None:
        """Note that these blocks, a whole chain, were used."""
        for first in range(0, len(keys), ROWS_AT_ONCE):  # parents first: they are never older than their children
            rows = [(now, key) for key in keys[first : first + ROWS_AT_ONCE]]
            with self.transaction() as connection:
                connection.executemany("UPDATE blocks SET used = max(used, ?) WHERE key = ?", rows)

    def add(self, row: Row, family: str, pending: Iterable[str] = ()) -> None:
        """Insert a block whose file is written, and forget the names in `pending`."""
        with self.transaction() as connection:
            values = (row.key, row.parent, row.salt, row.depth, row.nbytes, row.created, row.used, int(row.pinned))
            connection.execute("INSERT OR REPLACE INTO families VALUES (?, ?)", (row.salt, family))
            connection.execute(f"INSERT INTO blocks({_COLUMNS}) VALUES (?,?,?,?,?,?,?,?)", values)  # noqa: S608
            connection.execute("UPDATE state SET value = value + ? WHERE name = 'nbytes'", (row.nbytes,))
            connection.executemany("DELETE FROM pending WHERE name = ?", [(name,) for name in pending])

    def expect(self, names: Iterable[str]) -> None:
        """Note names of files that are about to be written. After a crash the next writer removes them."""
        with self.transaction() as connection:
            connection.executemany("INSERT OR IGNORE INTO pending VALUES (?)", [(name,) for name in names])

    def forget(self, names: Iterable[str]) -> None:
        """Undo `expect`: the files are not there."""
        with self.transaction() as connection:
            connection.executemany("DELETE FROM pending WHERE name = ?", [(name,) for name in names])

    def pending(self) -> list[str]:
        """Return the names of files that a killed writer may have left."""
        with self._lock:
            return [name for (name,) in self._open().execute("SELECT name FROM pending")]

    def remove(self, keys: Sequence[bytes], names: Iterable[str]) -> int:
        """Remove blocks whose files, called `names`, are removed next; return the bytes that were theirs."""
        freed = 0
        with self.transaction() as connection:
            connection.executemany("INSERT OR IGNORE INTO pending VALUES (?)", [(name,) for name in names])
            for key in keys:
                found = connection.execute("SELECT nbytes FROM blocks WHERE key = ?", (key,)).fetchone()
                if found is not None:
                    connection.execute("DELETE FROM blocks WHERE key = ?", (key,))
                    freed += found[0]
            connection.execute("UPDATE state SET value = value - ? WHERE name = 'nbytes'", (freed,))
        return freed

    def leaves(self, before: float | None = None, limit: int = 64) -> list[Row]:
        """Return blocks without children and pins, the least recently used first.

        Args:
            before: only blocks that were last used before this time.
            limit: most rows to return.
        """
        query = (
            f"SELECT {_COLUMNS} FROM blocks AS b WHERE used < ? AND pinned = 0 AND NOT EXISTS "  # noqa: S608
            "(SELECT 1 FROM blocks AS c WHERE c.parent = b.key) ORDER BY used, depth DESC LIMIT ?"
        )
        with self._lock:
            rows = self._open().execute(query, (float("inf") if before is None else before, limit)).fetchall()
        return [_row(values) for values in rows]

    def oldest(self) -> float | None:
        """Return when the least recently used block was used; None for an empty index."""
        with self._lock:
            found: float | None = self._open().execute("SELECT min(used) FROM blocks").fetchone()[0]
        return found

    def descendants(self, key: bytes) -> list[bytes]:
        """Return the key and all keys that are chained with it, the deepest first."""
        query = (
            "WITH RECURSIVE below(key, depth) AS (SELECT ?, 0 UNION ALL SELECT b.key, below.depth + 1 FROM blocks AS b "
            "JOIN below ON b.parent = below.key) SELECT key FROM below ORDER BY depth DESC"
        )
        with self._lock:
            return [found for (found,) in self._open().execute(query, (key,))]

    def rows(self, salt: bytes | None = None) -> list[Row]:
        """Return all blocks, or those of one family, the least recently used first."""
        where, values = ("WHERE salt = ?", (salt,)) if salt is not None else ("", ())
        query = f"SELECT {_COLUMNS} FROM blocks {where} ORDER BY used, depth DESC"  # noqa: S608 - two fixed texts
        with self._lock:
            rows = self._open().execute(query, values).fetchall()
        return [_row(values) for values in rows]

    def find(self, prefix: str) -> list[Row]:
        """Return the blocks whose key, in hexadecimal, begins with `prefix`."""
        low = bytes.fromhex(prefix + "0" * (64 - len(prefix)))
        high = bytes.fromhex(prefix + "f" * (64 - len(prefix)))
        query = f"SELECT {_COLUMNS} FROM blocks WHERE key BETWEEN ? AND ?"  # noqa: S608 - the names are fixed
        with self._lock:
            return [_row(values) for values in self._open().execute(query, (low, high))]

    def pin(self, key: bytes, pinned: bool) -> None:
        """Protect a block, and with it all before it, from removal; or end that."""
        with self.transaction() as connection:
            connection.execute("UPDATE blocks SET pinned = ? WHERE key = ?", (int(pinned), key))

    def families(self) -> dict[bytes, str]:
        """Return the families that blocks were stored of, as JSON, by salt."""
        with self._lock:
            return dict(self._open().execute("SELECT salt, family FROM families").fetchall())

    def nbytes(self) -> int:
        """Return the bytes of all blocks."""
        with self._lock:
            found = self._open().execute("SELECT value FROM state WHERE name = 'nbytes'").fetchone()
        if found is None or type(found[0]) is not int:
            raise PrefixCacheError(f"expected the bytes of all blocks in the index, found {found!r:.80}: {_DAMAGED}")
        return int(found[0])

    def count(self) -> int:
        """Return the number of blocks."""
        with self._lock:
            return int(self._open().execute("SELECT count(*) FROM blocks").fetchone()[0])

    def state(self, name: str) -> str:
        """Return a value that `set_state` stored."""
        with self._lock:
            found = self._open().execute("SELECT value FROM state WHERE name = ?", (name,)).fetchone()
        if found is None:
            raise PrefixCacheError(f"expected {name!r} in the index, found nothing: {_DAMAGED}")
        return str(found[0])

    def set_state(self, name: str, value: str) -> None:
        """Store a value under a name."""
        with self.transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO state VALUES (?, ?)", (name, value))

    def counters(self) -> dict[str, float]:
        """Return the sums of all `count_up` calls of all processes."""
        with self._lock:
            return dict(self._open().execute("SELECT name, value FROM counters").fetchall())

    def count_up(self, amounts: Mapping[str, float]) -> None:
        """Add to named sums."""
        query = "INSERT INTO counters VALUES (?, ?) ON CONFLICT(name) DO UPDATE SET value = value + excluded.value"
        with self.transaction() as connection:
            connection.executemany(query, list(amounts.items()))

    def file_bytes(self) -> int:
        """Return the present size of the index's own files."""
        total = 0
        for suffix in ("", "-wal", "-shm"):
            with suppress(FileNotFoundError):
                total += os.stat(f"{self.path}{suffix}").st_size
        return total

    def most_bytes(self) -> int:
        """Return the size that the index's files may have until a block is added: that of the log may vary."""
        try:
            log = os.stat(f"{self.path}-wal").st_size
        except FileNotFoundError:
            log = 0
        return self.file_bytes() - log + max(log, LOG_BYTES)

    def _open(self) -> sqlite3.Connection:
        """Return this process's connection. A connection must not be used on the other side of a fork."""
        if self._connection is None or self._pid != os.getpid():
            connection = sqlite3.connect(
                self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False, cached_statements=64
            )
            connection.execute("PRAGMA journal_mode = WAL")
            # A power cut may lose the last rows, never the database; `LocalTier` removes files without rows then.
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
            connection.execute(f"PRAGMA journal_size_limit = {CHECKPOINT_PAGES * 4096}")
            connection.executescript(SCHEMA)
            # Closed with this object; not at the exit of a forked child, whose parent goes on using it.
            weakref.finalize(self, connection.close).atexit = False
            self._connection, self._pid = connection, os.getpid()
        return self._connection
