"""The methods of a store beyond sizes and ranges, called through the whole chain of stores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hf_cachegen.artifact import Range, Segment, Store, chain, innermost, without_signature
from hf_cachegen.artifact.manifest import digest
from hf_cachegen.errors import CorruptError
from hf_cachegen.stores import Access, LocalStore, RemoteStore, SegmentCache, open_store
from hf_cachegen.stores.cached import CachedStore
from hf_cachegen.stores.locations import access_of
from hf_cachegen.stores.metered import MeteredStore
from hf_cachegen.stores.sealed import SealedStore
from hf_cachegen.stores.signed import SignedStore, sign
from tests import http_server as faults
from tests.http_server import Server
from tests.signing_support import KEY, PUBLIC, pem
from tests.small_artifact import MemoryStore, write

DATA = bytes(range(250))
SECRET = bytes(range(32))


class Ranges(Store):
    """A file whose first ten bytes arrive with its size; it records the reads."""

    def __init__(self, data: bytes = DATA) -> None:
        self.data, self.reads = data, list[tuple[int, int]]()
        self.damaged = 0

    def size(self, name: str) -> int:
        return len(self.data)

    def open(self, name: str, first: int = 0) -> tuple[int, bytes]:
        return len(self.data), self.data[:10]

    def read(self, name: str, offset: int, length: int, xxh3: str | None = None) -> bytes:
        self.reads.append((offset, length))
        if len(self.reads) <= self.damaged:
            return bytes(length)
        return self.data[offset : offset + length]


class Recording:
    """A meter that records its calls."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    @contextmanager
    def request(self) -> Iterator[None]:
        self.events.append("begins")
        try:
            yield
        finally:
            self.events.append("ends")

    def arrived(self, nbytes: int) -> None:
        self.events.append(nbytes)


def segment(offset: int, length: int) -> Segment:
    return Segment("data", "a", offset, length, digest(DATA[offset : offset + length]))


CHAINS: dict[str, tuple[Callable[[Path], Store], dict[str, Any]]] = {
    "folder": (LocalStore, {"is_local": True, "folder": True, "unfetched": 0}),
    "memory": (lambda _: MemoryStore({}), {"is_local": False, "folder": False, "unfetched": 0}),
    "remote": (lambda _: RemoteStore(Ranges()), {"is_local": False, "folder": False, "unfetched": 1}),
    "remote, metered": (
        lambda _: RemoteStore(MeteredStore(Ranges(), Recording())), {"is_local": False, "folder": False, "unfetched": 1}
    ),
    "remote, cached": (
        lambda path: CachedStore(RemoteStore(Ranges()), SegmentCache(path / "cache"), "here"),
        {"is_local": False, "folder": False, "unfetched": 1},
    ),
    "cache alone": (
        lambda path: CachedStore(None, SegmentCache(path / "cache"), "here"),
        {"is_local": False, "folder": False, "unfetched": 0},
    ),
    "folder, sealed": (
        lambda path: SealedStore(LocalStore(path), SECRET), {"is_local": True, "folder": False, "unfetched": 0}
    ),
    "remote, sealed": (
        lambda _: SealedStore(RemoteStore(Ranges()), SECRET), {"is_local": False, "folder": False, "unfetched": 0}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINS)
def test_capabilities(name: str, tmp_path: Path) -> None:
    made, expected = CHAINS[name]
    store, wanted = made(tmp_path), segment(100, 20)
    assert store.is_local(wanted) == expected["is_local"]
    assert store.folder() == (tmp_path if expected["folder"] else None)
    assert len(store.unfetched([wanted])) == expected["unfetched"]
    assert store.find() is None
    assert access_of(store) == Access()


def test_a_cached_segment_is_local(tmp_path: Path) -> None:
    cache, wanted = SegmentCache(tmp_path), segment(100, 20)
    store = CachedStore(RemoteStore(Ranges()), cache, "here")
    store.read("data", 100, 20, wanted.xxh3)
    assert store.is_local(wanted)
    assert not CachedStore(store.store, cache, "here", refresh=True).is_local(wanted)


def test_a_segment_is_located_in_the_sealed_file() -> None:
    store = CHAINS["remote"][0](Path())
    assert store.locate(segment(100, 20)) == segment(100, 20)


def test_an_opened_store_has_its_options(tmp_path: Path) -> None:
    write(tmp_path / "artifact")
    sign(tmp_path / "artifact", pem(KEY, tmp_path / "key.pem"))
    access = Access(public_key=PUBLIC)
    store = open_store(tmp_path / "artifact", access)
    assert access_of(store) == access
    assert [one.signed for one in chain(store)] == [False, True, False]
    assert isinstance(innermost(store), LocalStore)
    assert innermost(without_signature(store)) is innermost(store)
    assert not any(one.signed for one in chain(without_signature(store)))
    assert without_signature(innermost(store)) is innermost(store)


def test_a_second_signature_check_does_not_replace_the_first(tmp_path: Path) -> None:
    write(tmp_path / "artifact")
    sign(tmp_path / "artifact", pem(KEY, tmp_path / "key.pem"))
    store = SignedStore(LocalStore(tmp_path / "artifact"), PUBLIC)
    assert without_signature(store) is store.unwrap()


def test_held_ranges_serve_the_reads_within_them() -> None:
    """One request for many segments, and many requests for one segment."""
    files = Ranges()
    store = RemoteStore(files)
    ranges = [Range("data", 50, 20), Range("data", 70, 30), Range("data", 120, 10)]
    for held in reversed(ranges):
        store.hold(held)
    files.reads.clear()
    for offset, length in ((50, 50), (55, 10), (60, 30), (120, 10), (130, 0)):
        assert store.read("data", offset, length) == DATA[offset : offset + length]
    assert files.reads == []
    assert store.read("data", 90, 40) == DATA[90:130]  # ten of them are not here
    assert store.read("other", 50, 10) == DATA[50:60]
    store.release(ranges[:1])
    assert store.read("data", 55, 10) == DATA[55:65]
    assert files.reads == [(90, 40), (50, 10), (55, 10)]


def test_damage_in_a_held_range_is_fetched_once_more() -> None:
    files = Ranges()
    files.damaged = 1
    store, wanted = RemoteStore(files), segment(100, 20)
    store.hold(Range("data", 100, 50))
    assert store.read("data", 100, 20, wanted.xxh3) == DATA[100:120]
    assert files.reads == [(100, 50), (100, 20)]
    assert store.read("data", 120, 10) == DATA[120:130]
    assert files.reads[2:] == [(120, 10)]  # the other ranges of the file were dropped


def test_the_head_of_a_file_need_not_be_held() -> None:
    store = RemoteStore(Ranges())
    head, later = segment(0, 10), segment(5, 10)
    assert store.unfetched([head, later]) == [head, later]
    store.size("data")
    assert store.unfetched([head, later]) == [later]


def test_each_request_is_metered_and_held_ranges_are_not() -> None:
    meter = Recording()
    store = RemoteStore(MeteredStore(Ranges(), meter))
    store.size("data")
    store.read("data", 0, 10)
    assert meter.events == ["begins", "ends"]
    held = Range("data", 100, 50)
    store.hold(held)
    store.read("data", 110, 10)
    assert meter.events == ["begins", "ends"] * 2
    store.read("data", 50, 10)
    assert meter.events == ["begins", "ends"] * 3


def test_a_failed_request_ends_too() -> None:
    class Failing(MemoryStore):
        def read(self, *_: Any, **__: Any) -> bytes:
            raise CorruptError("damaged")

    meter = Recording()
    store = MeteredStore(Failing({"data": DATA}), meter)
    with pytest.raises(CorruptError):
        store.read("data", 0, 10)
    assert meter.events == ["begins", "ends"]
    assert store.open("data") == (250, b"")


@pytest.mark.parametrize("memory", [False, True], ids=["http", "fsspec"])
def test_pieces_are_metered_as_they_arrive(server: Server, own_cache: Path, memory: bool) -> None:
    import fsspec

    server.files["a/data"] = DATA * 4000
    url = f"{server.url}/a"
    if memory:
        fsspec.filesystem("memory").pipe("/metered/data", DATA * 4000)
        url = "memory://metered"
    meter = Recording()
    store = open_store(url, meter=meter)
    store.size("data")
    meter.events.clear()
    assert store.read("data", 100_000, 700_000) == (DATA * 4000)[100_000:800_000]
    first, *pieces, last = meter.events
    assert (first, sum(pieces), last) == ("begins", 700_000, "ends")
    assert memory or len(pieces) > 1


def test_a_meter_ends_a_request(server: Server, own_cache: Path) -> None:
    class Full(Recording):
        def arrived(self, nbytes: int) -> None:
            raise CorruptError("enough")

    server.files["a/data"] = DATA
    server.always = faults.with_headers()
    with pytest.raises(CorruptError, match="enough"):
        open_store(f"{server.url}/a", meter=Full()).size("data")
