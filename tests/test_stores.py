"""The local store: byte ranges of regular files of one directory, and nothing else."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from hf_cachegen.artifact import Reader
from hf_cachegen.errors import ArtifactNotFoundError, CorruptError, TruncatedError
from hf_cachegen.stores import LocalStore, open_store
from hf_cachegen.stores.local import published_root
from hf_cachegen.stores.survey import find
from tests.small_artifact import FILES, write


def store_with(tmp_path: Path, data: bytes = b"0123456789") -> LocalStore:
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory" / "file").write_bytes(data)
    return LocalStore(tmp_path / "directory")


def test_ranges(tmp_path: Path) -> None:
    store = store_with(tmp_path)
    assert store.size("file") == 10
    assert [store.read("file", 0, 10), store.read("file", 3, 4), store.read("file", 10, 0)] == [
        b"0123456789",
        b"3456",
        b"",
    ]


@pytest.mark.parametrize(("offset", "length"), [(0, 11), (11, 0), (10, 1), (-1, 2), (0, -1), (0, 1 << 62)])
def test_a_range_beyond_the_file(tmp_path: Path, offset: int, length: int) -> None:
    with pytest.raises(TruncatedError, match="has 10 bytes"):
        store_with(tmp_path).read("file", offset, length)


@pytest.mark.parametrize("name", ["", ".", "..", "../secret", "/etc/passwd", "a/b", "file\0"])
def test_invalid_file_names(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    with pytest.raises(CorruptError, match="not the name of a file"):
        store_with(tmp_path).size(name)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ArtifactNotFoundError, match="no other in"):
        store_with(tmp_path).size("other")


def test_a_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(ArtifactNotFoundError, match=r"no cachegen.json"):
        Reader(LocalStore(tmp_path / "nowhere"))


def test_a_directory_that_is_a_file(tmp_path: Path) -> None:
    store_with(tmp_path)
    with pytest.raises(ArtifactNotFoundError):
        LocalStore(tmp_path / "directory" / "file").size("cachegen.json")


def test_a_link_within_the_directory_is_followed(tmp_path: Path) -> None:
    store = store_with(tmp_path)
    (tmp_path / "directory" / "link").symlink_to("file")
    assert store.read("link", 0, 2) == b"01"


@pytest.mark.parametrize("target", ["../secret", "inner/secret", "ABSOLUTE"])
def test_a_link_out_of_the_directory_is_the_users_own(tmp_path: Path, target: str) -> None:
    """git-annex, DVC and Nix link to files elsewhere; such links are refused only when publishing."""
    store = store_with(tmp_path)
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "directory" / "inner").symlink_to(tmp_path)
    (tmp_path / "directory" / "link").symlink_to(target if target != "ABSOLUTE" else tmp_path / "secret")
    assert (store.size("link"), store.read("link", 0, 6)) == (6, b"secret")
    strict = LocalStore(store.directory, within=published_root(store.directory))
    for use in (strict.size, lambda name: strict.read(name, 0, 1)):
        with pytest.raises(CorruptError, match="link out of"):
            use("link")


@pytest.mark.parametrize("name", ["../secret", "inner/secret", "/etc/passwd", ".."])
def test_a_name_never_leaves_the_directory(tmp_path: Path, name: str) -> None:
    store = store_with(tmp_path)
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "directory" / "inner").symlink_to(tmp_path)
    with pytest.raises(CorruptError, match="not the name of a file"):
        store.size(name)


def test_a_neighbour_whose_name_begins_alike_is_outside(tmp_path: Path) -> None:
    store = store_with(tmp_path)
    (tmp_path / "directory-two").write_bytes(b"secret")
    (tmp_path / "directory" / "link").symlink_to("../directory-two")
    with pytest.raises(CorruptError, match="link out of"):
        LocalStore(store.directory, within=store.directory).size("link")


def test_a_link_to_a_device_is_not_opened(tmp_path: Path) -> None:
    store = store_with(tmp_path)
    (tmp_path / "directory" / "link").symlink_to("/dev/zero")
    with pytest.raises(CorruptError, match="not a regular file"):
        store.read("link", 0, 1)


def test_a_link_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    store = store_with(tmp_path)
    (tmp_path / "directory" / "link").symlink_to("../../blobs/0123")
    with pytest.raises(ArtifactNotFoundError, match=r"a link to \.\./\.\./blobs/0123, which is not there"):
        store.size("link")


@pytest.mark.parametrize("subfolder", ["", "long/inner"])
def test_the_hub_cache_is_read_through_its_links(tmp_path: Path, subfolder: str) -> None:
    """The Hub's cache: snapshots/<commit>/<file> is a link to ../../blobs/<hash>. It may be published, too."""
    write(tmp_path / "blobs")
    snapshot = tmp_path / "snapshots" / "commit" / subfolder
    snapshot.mkdir(parents=True)
    for name in FILES:
        (snapshot / name).symlink_to(os.path.relpath(tmp_path / "blobs" / name, snapshot))
    assert Reader(LocalStore(snapshot)).verify()
    assert Reader(open_store(snapshot)).verify()
    assert [found.folder for found in find(str(snapshot))] == [""]
    assert published_root(snapshot) == tmp_path
    assert Reader(LocalStore(snapshot, within=published_root(snapshot))).verify()
    (tmp_path / "blobs" / "tokens.safetensors").unlink()
    assert [found.folder for found in find(str(snapshot))] == [""]


def test_a_directory_that_is_itself_a_link(tmp_path: Path) -> None:
    write(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    assert Reader(LocalStore(tmp_path / "link")).verify()


def test_a_relative_directory_outlives_a_change_of_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store_with(tmp_path)
    monkeypatch.chdir(tmp_path)
    store = LocalStore("directory")
    monkeypatch.chdir("/")
    assert store.size("file") == 10


def test_a_pipe_a_socket_a_directory_and_a_loop_are_no_regular_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_with(tmp_path)
    monkeypatch.chdir(tmp_path / "directory")  # a socket's name must be short
    os.mkfifo("pipe")
    Path("inner").mkdir()
    Path("loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        for name in ("pipe", "socket", "inner", "loop"):
            with pytest.raises(CorruptError, match="not a regular file"):
                store.read(name, 0, 0)


def test_every_read_closes_its_file(tmp_path: Path) -> None:
    store = store_with(tmp_path)
    (tmp_path / "directory" / "inner").mkdir()
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(20):
        store.size("file")
        store.read("file", 0, 1)
        with pytest.raises(CorruptError):
            store.size("inner")
        with pytest.raises(TruncatedError):
            store.read("file", 0, 99)
    after = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert after == before
