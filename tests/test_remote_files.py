"""Ranges through fsspec, from sound and from faulty filesystems; fetching ahead."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import known_implementations

from hf_cachegen.artifact import Reader, Segment
from hf_cachegen.errors import (
    ArtifactNotFoundError,
    ChangedError,
    ConfigError,
    CorruptError,
    MissingExtraError,
    RangeError,
    StoreAccessError,
    StoreError,
    StoreTimeoutError,
)
from hf_cachegen.stores import prefetch
from hf_cachegen.stores.prefetch import Prefetcher
from hf_cachegen.stores.remote import RemoteStore, open_files
from hf_cachegen.stores.retry import Patience
from tests.small_artifact import contents, write

IMPATIENT = Patience(attempts=3, timeout=0.3, backoff=0.01)
DATA = bytes(range(256)) * 16


class Moody(MemoryFileSystem):
    """A filesystem that treats each range by the next of `moods`: an exception, or a function of the right bytes."""

    protocol = "moody"
    store: dict[str, Any] = {}  # noqa: RUF012 (as in fsspec)
    pseudo_dirs = [""]  # noqa: RUF012
    moods: list[Any] = []  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("moody://", "memory://"))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        data = super().cat_file(path, start, end, **options)
        mood = self.moods.pop(0) if self.moods else None
        if isinstance(mood, BaseException):
            raise mood
        return mood(data) if mood else data


@pytest.fixture
def moody() -> Iterator[RemoteStore]:
    fsspec.register_implementation("moody", Moody, clobber=True)
    Moody.store.clear()
    Moody().pipe_file("/context/data", DATA)
    Moody.moods = []
    yield RemoteStore(open_files("moody://context", patience=IMPATIENT))
    Moody.store.clear()


def test_a_filesystem_that_fails_when_its_listings_are_dropped(
    moody: RemoteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def invalidate_cache(self: Moody, path: str | None = None) -> None:
        raise RuntimeError("no name of this host")  # some resolve the path here, with a request

    monkeypatch.setattr(Moody, "invalidate_cache", invalidate_cache)
    with pytest.raises(StoreError, match="no name of this host, in every attempt"):
        moody.size("data")


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_an_artifact(tmp_path: Path, scheme: str) -> None:
    write(tmp_path / "context")
    url = f"{scheme}://{tmp_path}/context"
    if scheme == "memory":
        for name, data in contents(tmp_path / "context").items():
            fsspec.filesystem("memory").pipe_file(f"{tmp_path}/context/{name}", data)
    reader = Reader(RemoteStore(open_files(url)))
    reader.prefetch(reader.manifest.segments)
    assert reader.verify() == sum(map(len, contents(tmp_path / "context").values()))


@pytest.mark.parametrize("name", ["nothing", "inner"])
def test_missing_and_irregular_files(tmp_path: Path, name: str) -> None:
    (tmp_path / "inner").mkdir()
    with pytest.raises((ArtifactNotFoundError, StoreError), match=r"there is no|not a regular file"):
        RemoteStore(open_files(f"file://{tmp_path}")).size(name)


@pytest.mark.parametrize(
    "mood",
    [OSError("lost"), ConnectionResetError(), TimeoutError(), RuntimeError("boto"), lambda data: data[:-1]],
    ids=["lost", "reset", "timeout", "other error", "too short"],
)
def test_a_passing_fault_is_retried(moody: RemoteStore, mood: Any) -> None:
    Moody.moods = [mood, mood]
    assert moody.read("data", 10, 100) == DATA[10:110]
    assert not Moody.moods


@pytest.mark.parametrize(
    ("mood", "error"),
    [
        (PermissionError("403"), StoreAccessError),
        (FileNotFoundError(), ArtifactNotFoundError),
        (OSError("lost"), StoreError),
        (TimeoutError(), StoreTimeoutError),
        (KeyError("boto"), StoreError),
        (lambda data: data[:-1], StoreError),
        (lambda data: DATA, RangeError),
    ],
    ids=["no right", "missing", "lost", "timeout", "other error", "too short", "too long"],
)
def test_a_lasting_fault_is_a_typed_error(moody: RemoteStore, mood: Any, error: type[Exception]) -> None:
    Moody.moods = [mood] * 3
    with pytest.raises(error, match="context/data"):
        moody.read("data", 10, 100)


def test_options_reach_the_filesystem_and_no_others() -> None:
    """Some (sftp) hand all of them to a library that refuses what it does not know."""

    class Strict(MemoryFileSystem):
        protocol = "strict"
        cachable = False

        def __init__(self, host: str = "", port: int = 0) -> None:
            super().__init__()
            assert port == 22

    fsspec.register_implementation("strict", Strict, clobber=True)
    open_files("strict://context", storage_options={"port": 22})
    with pytest.raises(ConfigError):
        open_files("strict://context", storage_options={"colour": 1})


def test_a_file_that_changes_in_mid_read(moody: RemoteStore) -> None:
    moody.size("data")
    Moody().pipe_file("/context/data", DATA[:100])
    with pytest.raises(ChangedError):
        moody.read("data", 50, 100)


def test_wrong_bytes_are_fetched_again(moody: RemoteStore, tmp_path: Path) -> None:
    write(tmp_path / "context")
    for name, data in contents(tmp_path / "context").items():
        Moody().pipe_file(f"/context/{name}", data)
    reader = Reader(moody)
    segment = reader.manifest.segments[0]
    reader.read(segment)
    Moody.moods = [lambda data: b"x" * len(data)]
    assert reader.read(segment) == b"side information" or not Moody.moods
    Moody.moods = [lambda data: b"x" * len(data)] * 2
    with pytest.raises(CorruptError):
        reader.read(segment)


def test_a_filesystem_that_stalls() -> None:
    """A call of an asynchronous filesystem ends at its time limit."""
    class Asleep(AsyncFileSystem):
        protocol = "asleep"

        async def _info(self, path: str, **options: Any) -> dict[str, Any]:
            await asyncio.sleep(30)
            return {}

    fsspec.register_implementation("asleep", Asleep, clobber=True)
    start = time.monotonic()
    with pytest.raises(StoreTimeoutError):
        RemoteStore(open_files("asleep://context", patience=IMPATIENT)).size("data")
    assert time.monotonic() - start < 15


def test_a_filesystem_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"class": "no_such_package.Files", "err": "install no_such_package"}
    monkeypatch.setitem(known_implementations, "absent", entry)
    with pytest.raises(MissingExtraError, match="install no_such_package"):
        open_files("absent://context")


FILES = {name: bytes((i * number) % 251 for i in range(1000)) for number, name in enumerate("abc", 3)}


class Fetch:
    def __init__(self, pause: float = 0) -> None:
        self.asked: list[tuple[str, int, int]] = []
        self.active = self.most = 0
        self.pause = pause
        self._lock = threading.Lock()

    def __call__(self, name: str, offset: int, length: int) -> bytes:
        with self._lock:
            self.asked.append((name, offset, length))
            self.active += 1
            self.most = max(self.most, self.active)
        time.sleep(self.pause)
        with self._lock:
            self.active -= 1
        return FILES[name][offset : offset + length]


def take_all(prefetcher: Prefetcher, ranges: list[tuple[str, int, int]]) -> None:
    for name, offset, length in ranges:
        assert prefetcher.take((name, offset, length)) == FILES[name][offset : offset + length]
    prefetcher.close()


@pytest.mark.parametrize("request_bytes", [7, 100, 1 << 20])
@pytest.mark.parametrize("ahead_bytes", [1, 50, 1 << 20])
def test_every_range_comes_whole(monkeypatch: pytest.MonkeyPatch, request_bytes: int, ahead_bytes: int) -> None:
    monkeypatch.setattr(prefetch, "REQUEST_BYTES", request_bytes)
    ranges = [(name, offset, 40) for offset in (0, 40, 80, 200, 240) for name in "abc"] + [("a", 900, 100)]
    fetch = Fetch()
    take_all(Prefetcher(ranges, fetch, 3, ahead_bytes), ranges)
    assert sum(length for *_, length in fetch.asked) == sum(length for *_, length in ranges)


def test_neighbours_share_a_request() -> None:
    ranges = [("a", 0, 10), ("b", 0, 10), ("a", 10, 10), ("b", 15, 10), ("a", 20, 10)]
    fetch = Fetch()
    take_all(Prefetcher(ranges, fetch, 1, 1 << 20), ranges)
    assert fetch.asked == [("a", 0, 30), ("b", 0, 10), ("b", 15, 10)]


def test_requests_run_side_by_side_but_not_far_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "REQUEST_BYTES", 10)
    ranges = [("a", offset, 10) for offset in range(0, 400, 10)]
    fetch = Fetch(pause=0.01)
    prefetcher = Prefetcher(ranges, fetch, 4, 100)
    prefetcher.take(ranges[0])
    time.sleep(0.2)
    assert len(fetch.asked) == 11
    take_all(prefetcher, ranges[1:])
    assert 2 <= fetch.most <= 4


def test_ranges_may_be_taken_out_of_order_once_and_after_an_end() -> None:
    ranges = [("a", 0, 10), ("a", 500, 10), ("b", 0, 10)]
    prefetcher = Prefetcher(ranges, Fetch(), 2, 1)
    assert prefetcher.take(ranges[2]) == FILES["b"][:10]
    assert prefetcher.take(ranges[0]) == FILES["a"][:10]
    assert prefetcher.take(ranges[0]) is None
    prefetcher.close()
    assert prefetcher.take(ranges[1]) is None


def test_the_error_of_a_request_is_raised_to_its_reader() -> None:
    def fail(name: str, offset: int, length: int) -> bytes:
        raise RangeError("no ranges")

    ranges = [("a", 0, 10), ("a", 10, 10)]
    prefetcher = Prefetcher(ranges, fail, 2, 100)
    with pytest.raises(RangeError):
        prefetcher.take(ranges[0])
    assert prefetcher.take(ranges[1]) is None


def test_a_prefetch_leaves_out_ranges_beyond_the_file(moody: RemoteStore) -> None:
    moody.prefetch([Segment("data", "one", 0, 10, ""), Segment("data", "two", 4090, 10, "")])
    assert moody.read("data", 0, 10) == DATA[:10]
    moody.close()


@pytest.mark.parametrize("wrong", [{"threads": 0}, {"ahead_bytes": 0}], ids=str)
def test_invalid_options(moody: RemoteStore, wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        RemoteStore(moody.files, "here", **wrong)
