"""The cache of segments: files appear whole under concurrent and killed writers, and every read is verified."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hf_cachegen.artifact import Limits, Reader
from hf_cachegen.artifact.manifest import digest
from hf_cachegen.errors import ConfigError, CorruptError, LimitError, ManifestError, OfflineError
from hf_cachegen.stores.cached import CachedStore
from hf_cachegen.stores.segment_cache import DIRECTORY_VARIABLE, LIMIT_VARIABLE, SegmentCache
from tests.small_artifact import MemoryStore, contents, write

HERE = "https://host/context"


class Counting(MemoryStore):
    """A store that records the requests."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(files)
        self.asked: list[str] = []

    def size(self, name: str) -> int:
        self.asked.append(f"size {name}")
        return super().size(name)

    def read(self, name: str, offset: int, length: int, xxh3: str | None = None) -> bytes:
        self.asked.append(f"read {name}")
        return super().read(name, offset, length)


@pytest.fixture
def cache(tmp_path: Path) -> SegmentCache:
    return SegmentCache(tmp_path / "cache")


@pytest.fixture
def store(tmp_path: Path) -> Counting:
    write(tmp_path / "context")
    return Counting(contents(tmp_path / "context"))


def put(cache: SegmentCache, data: bytes, origin: str = HERE) -> str:
    cache.put(origin, digest(data), data)
    return digest(data)


def files_of(cache: SegmentCache) -> list[Path]:
    return [path for path in cache.directory.rglob("*") if path.is_file() and path.name not in ("origin", ".lock")]


def read_all(store: CachedStore) -> int:
    return Reader(store).verify()


def test_a_segment_is_found_under_its_origin_alone(cache: SegmentCache) -> None:
    key = put(cache, b"data")
    assert cache.get(HERE, key, 4) == b"data"
    assert cache.get(f"{HERE}2", key, 4) is None
    assert cache.get(HERE, key, 5) is None
    assert (cache.has(HERE, key, 4), cache.has(HERE, key, 5)) == (True, False)


def test_a_damaged_file_is_removed(cache: SegmentCache) -> None:
    key = put(cache, b"data")
    (path,) = files_of(cache)
    for damaged in (b"dat", b"dbta", b""):
        path.write_bytes(damaged)
        assert cache.get(HERE, key, 4) is None
        assert not path.exists()
        put(cache, b"data")


def test_only_the_user_may_read_the_folder(cache: SegmentCache) -> None:
    put(cache, b"data")
    (path,) = files_of(cache)
    assert path.stat().st_mode & 0o077 == 0
    assert path.parent.stat().st_mode & 0o077 == 0


def test_the_least_recently_used_file_is_removed_first(cache: SegmentCache) -> None:
    keys = [put(cache, bytes([i]) * 100) for i in range(5)]
    for age, path in enumerate(sorted(files_of(cache), key=lambda path: keys.index(path.name.partition("-")[0]))):
        os.utime(path, (age, age))
    assert cache.get(HERE, keys[0], 100)
    assert cache.prune(300) == (2, 200)
    assert [cache.has(HERE, key, 100) for key in keys] == [True, False, False, True, True]
    assert cache.prune(300) == (0, 0)


def test_the_limit_holds_by_itself(tmp_path: Path) -> None:
    cache = SegmentCache(tmp_path / "cache", limit=10_000)
    for i in range(100):
        put(cache, i.to_bytes(2, "big") * 500)
        assert sum(path.stat().st_size for path in files_of(cache)) <= 10_000 + 10_000 // 16 + 1000
    put(cache, bytes(10_001))
    assert not cache.has(HERE, digest(bytes(10_001)), 10_001)


def test_a_process_prunes_once_however_many_caches_it_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pruned: list[SegmentCache] = []

    def prune(cache: SegmentCache) -> None:
        pruned.append(cache)

    monkeypatch.setattr(SegmentCache, "prune", prune)
    first, second = (SegmentCache(tmp_path / "cache", limit=10_000) for _ in range(2))
    for cache in (first, second, first):
        put(cache, bytes(100))
    assert pruned == [first]
    put(second, bytes(600))
    put(second, bytes(1))
    assert pruned == [first, second]


def test_pruning_everything_leaves_an_empty_folder(cache: SegmentCache) -> None:
    put(cache, b"one")
    put(cache, b"two", "s3://bucket")
    assert [entry.origin for entry in cache.origins()] == [HERE, "s3://bucket"]
    assert cache.prune(0) == (2, 6)
    assert [path.name for path in cache.directory.iterdir()] == [".lock"]
    assert cache.origins() == []


def test_abandoned_temporary_files_are_removed(cache: SegmentCache) -> None:
    put(cache, b"data")
    (path,) = files_of(cache)
    young, old = path.parent / ".tmp-young", path.parent / ".tmp-old"
    young.write_bytes(b"part")
    old.write_bytes(b"part")
    os.utime(old, (1, 1))
    assert cache.prune() == (1, 4)
    assert young.exists()
    assert not old.exists()


def test_a_cache_that_cannot_be_written_raises_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    cache = SegmentCache(tmp_path / "file" / "inside")
    key = put(cache, b"data")
    assert cache.get(HERE, key, 4) is None
    assert (cache.origins(), cache.prune()) == ([], (0, 0))


def test_default_folder_and_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DIRECTORY_VARIABLE, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    assert SegmentCache().directory == tmp_path / "home" / "cachegen"
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path / "mine"))
    monkeypatch.setenv(LIMIT_VARIABLE, "123")
    assert (SegmentCache().directory, SegmentCache().limit) == (tmp_path / "mine", 123)
    monkeypatch.setenv(LIMIT_VARIABLE, "lots")
    with pytest.raises(ConfigError, match="lots"):
        SegmentCache()
    with pytest.raises(ConfigError):
        SegmentCache(limit=-1)


WRITER = """
import sys
from hf_cachegen.artifact.manifest import digest
from hf_cachegen.stores.segment_cache import SegmentCache
cache = SegmentCache(sys.argv[1], limit=int(sys.argv[2]))
print("ready", flush=True)
for turn in range(int(sys.argv[3])):
    for i in range(20):
        data = bytes([i]) * 50_000
        cache.put("origin", digest(data), data)
        found = cache.get("origin", digest(data), len(data))
        assert found in (None, data)
"""


def writer(cache: SegmentCache, limit: int, turns: int) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", WRITER, str(cache.directory), str(limit), str(turns)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)


def test_many_processes_write_and_prune_at_once(cache: SegmentCache) -> None:
    writers = [writer(cache, 500_000, 20) for _ in range(3)]
    assert [process.wait(60) for process in writers] == [0, 0, 0]
    for process in writers:
        process.stdout.close()  # type: ignore[union-attr]
    cache.prune(500_000)
    assert sum(path.stat().st_size for path in files_of(cache)) <= 500_000
    assert not [path for path in files_of(cache) if path.name.startswith(".tmp-")]


def test_a_killed_writer_leaves_whole_segments(cache: SegmentCache) -> None:
    for _ in range(5):
        process = writer(cache, 1 << 30, 10**6)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        process.stdout.close()
    whole = [path for path in files_of(cache) if not path.name.startswith(".tmp-")]
    assert whole
    assert all(f"{digest(path.read_bytes())}-{path.stat().st_size}" == path.name for path in whole)


def test_a_second_load_fetches_nothing(cache: SegmentCache, store: Counting) -> None:
    total = read_all(CachedStore(store, cache, HERE, "commit"))
    store.asked.clear()
    assert read_all(CachedStore(store, cache, HERE, "commit")) == total
    assert store.asked == []
    assert read_all(CachedStore(None, cache, HERE, "commit")) == total


def test_without_a_version_the_manifest_is_fetched(cache: SegmentCache, store: Counting) -> None:
    read_all(CachedStore(store, cache, HERE))
    store.asked.clear()
    read_all(CachedStore(store, cache, HERE))
    assert store.asked == ["size cachegen.json", "read cachegen.json"]
    assert read_all(CachedStore(None, cache, HERE))


def test_versions_share_unchanged_segments(cache: SegmentCache, store: Counting) -> None:
    read_all(CachedStore(store, cache, HERE, "one"))
    store.asked.clear()
    read_all(CachedStore(store, cache, HERE, "two"))
    assert store.asked == ["size cachegen.json", "read cachegen.json"]


def test_refresh_fetches_everything(cache: SegmentCache, store: Counting) -> None:
    read_all(CachedStore(store, cache, HERE, "commit"))
    first = list(store.asked)
    store.asked.clear()
    read_all(CachedStore(store, cache, HERE, "commit", refresh=True))
    assert store.asked == first


def test_offline_without_cached_files(cache: SegmentCache) -> None:
    with pytest.raises(OfflineError, match="local_files_only"):
        Reader(CachedStore(None, cache, HERE, "commit"))


def test_offline_with_a_part_of_the_files(cache: SegmentCache, store: Counting) -> None:
    reader = Reader(CachedStore(store, cache, HERE, "commit"))
    reader.verify(level=1)
    offline = Reader(CachedStore(None, cache, HERE, "commit"))
    assert offline.verify(level=1)
    with pytest.raises(OfflineError):
        offline.store.read("refine-1.safetensors", 100, 5, "0" * 32)
    with pytest.raises(OfflineError):
        offline.verify(level=2)


def test_damaged_entries_are_fetched_again(cache: SegmentCache, store: Counting) -> None:
    total = read_all(CachedStore(store, cache, HERE, "commit"))
    for path in files_of(cache):
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert read_all(CachedStore(store, cache, HERE, "commit")) == total


def test_damage_at_the_source_is_not_kept(cache: SegmentCache, store: Counting) -> None:
    store.files["base.safetensors"] = store.files["base.safetensors"][:-1] + b"x"
    with pytest.raises(CorruptError):
        read_all(CachedStore(store, cache, HERE, "commit"))
    kept = {path.name for path in files_of(cache)}
    assert digest(store.files["base.safetensors"][-60:]) not in {name.partition("-")[0] for name in kept}
    store.files["cachegen.json"] = b"{}"
    with pytest.raises(ManifestError):
        Reader(CachedStore(store, cache, HERE, "other"))
    with pytest.raises(OfflineError):
        Reader(CachedStore(None, cache, HERE, "other"))


def test_an_interrupted_load_continues(cache: SegmentCache, store: Counting) -> None:
    sound = store.files["refine-1.safetensors"]
    store.files["refine-1.safetensors"] = sound[:-1] + b"x"
    with pytest.raises(CorruptError):
        read_all(CachedStore(store, cache, HERE, "commit"))
    store.files["refine-1.safetensors"] = sound
    store.asked.clear()
    assert read_all(CachedStore(store, cache, HERE, "commit"))
    assert store.asked.count("read refine-1.safetensors") == 1
    assert "read base.safetensors" not in store.asked


def test_limits_of_the_reader_apply(cache: SegmentCache, store: Counting) -> None:
    tight = Limits(max_tokens=1)
    with pytest.raises(LimitError, match="the limit"):
        Reader(CachedStore(store, cache, HERE, "commit", limits=tight), tight)


def test_a_cache_behind_a_link(tmp_path: Path) -> None:
    """The folder itself may be a link (home folders are small); links out of it are neither listed nor emptied."""
    (tmp_path / "large").mkdir()
    (tmp_path / "cache").symlink_to(tmp_path / "large")
    cache = SegmentCache(tmp_path / "cache", limit=1 << 20)
    cache.put("here", digest(b"data"), b"data")
    assert cache.get("here", digest(b"data"), 4) == b"data"
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis").write_bytes(b"x" * 1000)
    (tmp_path / "cache" / "0123").symlink_to(mine)
    home = next(path for path in (tmp_path / "large").iterdir() if path.is_dir() and not path.is_symlink())
    (home / "ab").symlink_to(mine)
    (home / "notes").mkdir()
    (home / "notes" / "link").symlink_to(mine / "thesis")
    assert sum(row.nbytes for row in cache.origins()) < 1000
    cache.prune(0)
    assert (mine / "thesis").read_bytes() == b"x" * 1000
    assert cache.get("here", digest(b"data"), 4) is None
