"""The local tier: within its budget, whole or absent, whatever fails and whichever process dies."""

from __future__ import annotations

import errno
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_cachegen import PrefixCache
from hf_cachegen.errors import ConfigError, CorruptError, PrefixCacheError, TruncatedError
from hf_cachegen.prefix_cache import local as local_module
from hf_cachegen.prefix_cache import worker as worker_module
from hf_cachegen.prefix_cache.block import Block, dump, load
from hf_cachegen.prefix_cache.keys import Family, block_key, chain, pack_tokens
from hf_cachegen.prefix_cache.local import LocalTier
from tests.prefix_cache_support import disk_bytes

FAMILY = Family({"block_tokens": 4, "model_id": "tiny", "codec": {}, "level": None})
SIZE = 100_000


def blocks(count: int, seed: int = 0, size: int = SIZE, shared: int = 0) -> list[tuple[Block, bytes]]:
    """A chain of blocks and their files; the first `shared` are the same for all seeds."""
    found, parent = [], FAMILY.salt
    for depth in range(count):
        tokens = tuple(range(4)) if depth < shared else (seed, depth, 7, 8)
        key = block_key(parent, pack_tokens(tokens))
        block = Block(key, parent, depth, FAMILY, tokens, {}, {}, b"side", (os.urandom(16) * (size // 16),))
        found.append((block, dump(block)))
        parent = key
    return found


def put_all(tier: LocalTier, rows: list[tuple[Block, bytes]]) -> list[bool]:
    keys = [block.key for block, _ in rows]
    return [tier.put(block, data, keys[:depth]) for depth, (block, data) in enumerate(rows)]


def put_or_fail(tier: LocalTier, rows: list[tuple[Block, bytes]], depth: int) -> bool:
    try:
        return tier.put(*rows[depth], [block.key for block, _ in rows[:depth]])
    except PrefixCacheError as error:
        return "No space left" not in str(error)


def require_whole(folder: Path) -> LocalTier:
    """What a fresh process finds: every block of the index sound, its predecessor there, and no other file."""
    tier = LocalTier(folder, None)
    rows = tier.index.rows()
    keys = {row.key for row in rows}
    for row in rows:
        assert row.depth == 0 or row.parent in keys
        data = tier.get(row.key)
        assert data is not None
        assert len(data) == row.nbytes
        load(data, row.key)
    files = {path.name for path in (folder / "blocks").rglob("*") if path.is_file()}
    assert files == {key.hex() for key in keys}
    assert tier.index.nbytes() == sum(row.nbytes for row in rows)
    assert tier.index.pending() == []
    return tier


def test_blocks_are_found_by_their_chain(tmp_path: Path) -> None:
    tier, rows = LocalTier(tmp_path, None), blocks(5)
    keys = [block.key for block, _ in rows]
    assert keys == chain(FAMILY.salt, [t for block, _ in rows for t in block.tokens] + [1, 2], 4)
    assert put_all(tier, rows) == [True] * 5
    assert tier.stored(keys) == 5
    assert tier.stored([*keys[:3], b"x" * 32, *keys[3:]]) == 3
    assert tier.stored(keys[1:]) == 4
    assert load(tier.get(keys[2]) or b"") == rows[2][0]
    assert tier.get(b"x" * 32) is None
    assert not tier.put(*blocks(3, 9)[2], [])
    require_whole(tmp_path)


def test_a_lookup_takes_less_than_a_millisecond(tmp_path: Path) -> None:
    """Of a prompt of 32,768 tokens among 100,000 stored blocks, once its keys are known."""
    tier = LocalTier(tmp_path, None)
    keys = chain(FAMILY.salt, list(range(32768)), 256)
    others = [os.urandom(32) for _ in range(100_000 - len(keys))]
    with tier.index.transaction() as connection:
        rows = [(key, b"p" * 32, FAMILY.salt, 0, 1, 0.0, 0.0, 0) for key in [*keys, *others]]
        connection.executemany("INSERT INTO blocks VALUES (?,?,?,?,?,?,?,?)", rows)
    seconds = []
    for _ in range(50):
        begun = time.perf_counter()
        assert tier.stored(keys) == 128
        seconds.append(time.perf_counter() - begun)
    assert min(seconds) < 1e-3


@pytest.mark.parametrize("budget", [1 << 20, 2_000_000])
def test_the_budget_is_never_exceeded(tmp_path: Path, budget: int) -> None:
    tier, stop, most = LocalTier(tmp_path, budget), threading.Event(), [0]

    def watch() -> None:
        while not stop.is_set():
            most[0] = max(most[0], disk_bytes(tmp_path))

    watcher = threading.Thread(target=watch)
    watcher.start()
    for seed in range(15):
        put_all(tier, blocks(5, seed))
    stop.set()
    watcher.join()
    assert budget / 2 < most[0] <= budget
    assert require_whole(tmp_path).index.count() > 2


def test_what_was_not_used_goes_first_from_the_end_of_its_chain(tmp_path: Path) -> None:
    tier = LocalTier(tmp_path, 1_800_000)
    old, used = blocks(5, 1), blocks(5, 2)
    put_all(tier, old)
    put_all(tier, used)
    tier.index.touch([block.key for block, _ in old], time.time() + 1)
    put_all(tier, blocks(3, 3))
    assert tier.stored([block.key for block, _ in old]) == 5
    assert 0 < tier.stored([block.key for block, _ in used]) < 5
    require_whole(tmp_path)


def test_a_chain_does_not_evict_its_own_beginning(tmp_path: Path) -> None:
    tier, rows = LocalTier(tmp_path, 1 << 20), blocks(20)
    stored = put_all(tier, rows)
    count = stored.index(False)
    assert not any(stored[count:])
    assert tier.stored([block.key for block, _ in rows]) == count
    require_whole(tmp_path)


def test_pinned_blocks_and_those_before_them_stay(tmp_path: Path) -> None:
    tier = LocalTier(tmp_path, 1 << 20, ttl=1000)
    kept = blocks(4, 1)
    keys = [block.key for block, _ in kept]
    put_all(tier, kept)
    tier.index.pin(keys[2], True)
    for seed in range(2, 8):
        put_all(tier, blocks(4, seed))
    assert tier.stored(keys) == 3
    with tier.index.transaction() as connection:
        connection.execute("UPDATE blocks SET used = 0")
    assert tier.stored(keys) == 3
    assert tier.index.count() == 3, "the others expired"
    tier.index.pin(keys[2], False)
    assert tier.stored(keys) == 0
    require_whole(tmp_path)


def test_prune(tmp_path: Path) -> None:
    tier = LocalTier(tmp_path, None)
    put_all(tier, blocks(5, 1))
    removed, freed = tier.prune(300_000)
    assert removed >= 3
    assert freed >= 300_000
    assert tier.prune(0)[0] == 5 - removed
    require_whole(tmp_path)


@pytest.mark.parametrize("name", ["write", "fsync", "replace", "mkdir"])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_full_disk_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, at: int
) -> None:
    tier, rows = LocalTier(tmp_path, 2_000_000), blocks(4)
    put_all(tier, rows[:2])
    real, calls = getattr(os, name), [0]

    def fail(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] > at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, name, fail)
        stored = []
        for depth in (2, 3):
            stored.append(put_or_fail(tier, rows, depth))
    assert not all(stored) or calls[0] <= at
    found = require_whole(tmp_path).stored([block.key for block, _ in rows])
    assert found == 2 + stored.index(False) if False in stored else 4
    assert put_all(tier, rows) == [True] * 4, "it works again once there is room"


def test_a_full_disk_while_the_index_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier, rows = LocalTier(tmp_path, None), blocks(2)
    put_all(tier, rows[:1])

    def fail(*_: Any) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(tier.index, "add", fail)
        with pytest.raises(PrefixCacheError, match="disk is full"):
            tier.put(*rows[1], [rows[0][0].key])
    assert require_whole(tmp_path).index.count() == 1


STEPS: list[tuple[Any, str]] = [
    (os, "write"), (os, "fsync"), (os, "replace"), (os, "unlink"), (local_module, "sync_directory"),
]  # fmt: skip


def killed(action: Callable[[], None]) -> None:
    """Run in a child that kills itself."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(7)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("module", "name"), STEPS, ids=[name for _, name in STEPS])
def test_a_writer_that_is_killed_at_any_step(tmp_path: Path, module: Any, name: str, after: bool) -> None:
    budget = 1 << 20
    first, second = blocks(8, 1), blocks(3, 2)
    put_all(LocalTier(tmp_path, budget), first)

    def dying() -> None:
        tier, real = LocalTier(tmp_path, budget), getattr(module, name)

        def die(*args: Any, **kwargs: Any) -> Any:
            if after:
                real(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(module, name, die)
        put_all(tier, second)

    killed(dying)
    assert disk_bytes(tmp_path) <= budget
    require_whole(tmp_path)
    assert put_all(LocalTier(tmp_path, budget), second) == [True] * 3
    assert disk_bytes(tmp_path) <= budget


@pytest.mark.parametrize("step", range(8))
def test_a_writer_that_is_killed_around_a_transaction(tmp_path: Path, step: int) -> None:
    put_all(LocalTier(tmp_path, 1 << 20), blocks(8, 1))

    def dying() -> None:
        tier, count = LocalTier(tmp_path, 1 << 20), [0]
        real = tier.index.transaction

        def transaction() -> Any:
            count[0] += 1
            if count[0] > step:
                os.kill(os.getpid(), signal.SIGKILL)
            return real()

        tier.index.transaction = transaction  # type: ignore[method-assign]
        put_all(tier, blocks(3, 2))

    killed(dying)
    require_whole(tmp_path)
    assert disk_bytes(tmp_path) <= 1 << 20


def test_many_processes_at_once(tmp_path: Path) -> None:
    children = []
    for number in range(4):
        child = os.fork()
        if child == 0:
            try:
                tier = LocalTier(tmp_path, 3_000_000)
                for seed in range(6):
                    rows = blocks(5, seed=seed % 3 * 10 + number % 2, shared=2)
                    put_all(tier, rows)
                    keys = [block.key for block, _ in rows]
                    for key in keys[: tier.stored(keys)]:
                        data = tier.get(key)
                        if data is not None:  # or evicted meanwhile
                            load(data, key)
                os._exit(0)
            except BaseException:
                os._exit(1)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    assert disk_bytes(tmp_path) <= 3_000_000
    assert require_whole(tmp_path).index.count() >= 10


@pytest.fixture(name="folder")
def _folder(tmp_path: Path) -> Path:
    put_all(LocalTier(tmp_path, None), blocks(5))
    return tmp_path


def test_verify_removes_what_is_damaged_and_what_is_chained_with_it(folder: Path) -> None:
    keys = [block.key for block, _ in blocks(5)]
    path = folder / "blocks" / keys[3].hex()[:2] / keys[3].hex()
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    (folder / "blocks" / "ab").mkdir(exist_ok=True)
    (folder / "blocks" / "ab" / "stray").write_bytes(b"x")
    found = LocalTier(folder, None).verify()
    assert found.damaged == (keys[3],)
    assert found.blocks == 3
    assert found.strays == 1
    assert require_whole(folder).stored(keys) == 3


def test_a_damaged_index_is_made_again(folder: Path) -> None:
    keys = [block.key for block, _ in blocks(5)]
    path = folder / "blocks" / keys[3].hex()[:2] / keys[3].hex()
    path.write_bytes(b"torn")
    for name in ("index.sqlite-wal", "index.sqlite-shm"):
        (folder / name).unlink(missing_ok=True)
    (folder / "index.sqlite").write_bytes(b"no database" * 1000)
    assert LocalTier(folder, None).stored(keys) == 3
    require_whole(folder)


def test_after_a_power_cut_files_without_rows_go(folder: Path) -> None:
    tier = LocalTier(folder, None)
    row = tier.index.rows()[0]
    with tier.index.transaction() as connection:
        connection.execute("DELETE FROM blocks WHERE key = ?", (row.key,))
        connection.execute("UPDATE state SET value = value - ? WHERE name = 'nbytes'", (row.nbytes,))
    tier.index.set_state("boot", "an earlier one")
    require_whole(folder)


@pytest.mark.parametrize("damage", ["cut", "flip", "header", "empty", "longer", "other"])
def test_every_damage_of_a_file_is_found(damage: str) -> None:
    (block, data), (_, second) = blocks(2, size=64)
    damaged = {
        "cut": data[:-10], "flip": data[:-10] + bytes([data[-10] ^ 1]) + data[-9:], "empty": b"",
        "header": data[:60] + bytes([data[60] ^ 1]) + data[61:], "longer": data + b"x", "other": second,
    }[damage]  # fmt: skip
    with pytest.raises((CorruptError, TruncatedError)):
        load(damaged, block.key)


def test_a_folder_that_cannot_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(PrefixCacheError, match="cannot be opened"):
        LocalTier(tmp_path / "file", None)
    with pytest.raises(ConfigError, match="at least"):
        LocalTier(tmp_path / "a", 10)
    for none in ("", "a\0b", None):
        with pytest.raises(ConfigError, match="expected a path"):
            PrefixCache(none)  # type: ignore[arg-type]


def test_the_worker_ends_when_idle_and_begins_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "IDLE_SECONDS", 0.01)
    worker, done, before = worker_module.Worker(100), [], set(threading.enumerate())
    for number in range(3):
        assert worker.submit(60, lambda number=number: done.append(number))  # type: ignore[misc]
        assert worker.flush(10)
        time.sleep(0.1)
    assert done == [0, 1, 2]
    assert worker.nbytes == 0
    assert not set(threading.enumerate()) - before


def test_the_worker_survives_what_fails_in_it(caplog: pytest.LogCaptureFixture) -> None:
    worker, done = worker_module.Worker(100), []
    worker.submit(1, lambda: done.remove(2))
    worker.submit(1, lambda: done.append(1))
    assert worker.flush(10)
    assert done == [1]
    assert "a block was not stored" in caplog.text
