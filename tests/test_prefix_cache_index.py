"""The index of a large prefix cache: lookups are fast, and no change of it can exceed the budget."""

from __future__ import annotations

import hashlib
from pathlib import Path

from hf_cachegen.prefix_cache.index import LOG_BYTES, ROWS_AT_ONCE, Index

CHAINS, BLOCKS = 300, 100


def filled(folder: Path) -> tuple[Index, list[list[bytes]]]:
    """An index of many chains whose keys lie on different pages, and the chains."""
    index, rows, chains = Index(folder / "index.sqlite"), [], []
    for number in range(CHAINS):
        parent, keys = b"s" * 32, []
        for depth in range(BLOCKS):
            key = hashlib.sha256(parent + number.to_bytes(4, "little")).digest()
            rows.append((key, parent, b"s" * 32, depth, 5000, 1.0, float(number), 0))
            keys.append(key)
            parent = key
        chains.append(keys)
    with index.transaction() as connection:
        connection.executemany("INSERT INTO blocks VALUES (?,?,?,?,?,?,?,?)", rows)
    index._open().execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return index, chains


def test_the_log_never_exceeds_its_part_of_the_budget(tmp_path: Path) -> None:
    index, chains = filled(tmp_path)
    log, limit = tmp_path / "index.sqlite-wal", index.most_bytes()
    for chain in chains[:20]:
        index.touch(chain, 1e6)
        assert log.stat().st_size <= LOG_BYTES
    ends = [chain[-1] for chain in chains]
    for first in range(0, len(ends), ROWS_AT_ONCE):
        some = ends[first : first + ROWS_AT_ONCE]
        index.remove(some, [key.hex() for key in some])
        assert log.stat().st_size <= LOG_BYTES
        index.forget([key.hex() for key in some])
    assert index.file_bytes() <= limit + (64 << 10)


def test_what_is_present_is_found_in_any_order(tmp_path: Path) -> None:
    index, chains = filled(tmp_path)
    wanted = [chains[7][3], b"x" * 32, chains[2][99], *chains[5]]
    assert index.present(wanted) == set(wanted) - {b"x" * 32}
    assert index.present([]) == set()
