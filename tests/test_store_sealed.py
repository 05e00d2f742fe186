"""Sealed artifacts: they open with their key alone, whole and by ranges; no byte can be moved."""

from __future__ import annotations

import errno
import hashlib
import os
import sys
from pathlib import Path

import pytest
import xxhash

pytest.importorskip("cryptography", reason="cryptography is not installed (pip install 'hf_cachegen[crypto]')")

from hf_cachegen.artifact import Limits, Reader, Segment
from hf_cachegen.artifact.pin import Pin
from hf_cachegen.artifact.writer import locked
from hf_cachegen.errors import (
    ArtifactExistsError,
    ArtifactNotFoundError,
    ConfigError,
    CorruptError,
    MissingExtraError,
    OfflineError,
    TruncatedError,
)
from hf_cachegen.stores import Access, LocalStore, Patience, open_store
from hf_cachegen.stores.http import HEAD_BYTES
from hf_cachegen.stores.profiles import fetch_pinned
from hf_cachegen.stores.sealed import BLOCK_BYTES, SealedStore, _cipher, _sealed, seal
from hf_cachegen.stores.segment_cache import DIRECTORY_VARIABLE
from hf_cachegen.stores.signed import sign
from hf_cachegen.stores.survey import pull, serve_check
from tests import http_server as faults
from tests.cli_support import run, run_json
from tests.http_server import Server, running
from tests.signing_support import PUBLIC
from tests.small_artifact import MemoryStore, contents, killed_between_renames, write

KEY, OTHER = bytes(range(32)), bytes(32)
LONG = bytes(range(256)) * 1024


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path / "segments"))
    return tmp_path / "segments"


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    write(tmp_path / "context")
    seal(tmp_path / "context", tmp_path / "sealed", KEY)
    return tmp_path / "sealed"


def verify(folder: Path, key: bytes = KEY) -> int:
    return Reader(SealedStore(LocalStore(folder), key)).verify()


def long_store(tmp_path: Path, size: int) -> MemoryStore:
    (tmp_path / "data").write_bytes(LONG[:size])
    return MemoryStore({"data.sealed": b"".join(_sealed(LocalStore(tmp_path), "data", KEY))})


def test_sealed_and_opened(sealed: Path, tmp_path: Path) -> None:
    plain = contents(tmp_path / "context")
    assert verify(sealed) == sum(map(len, plain.values()))
    found = contents(sealed)
    assert set(found) == {f"{name}.sealed" for name in plain}
    assert not any(data[:16] in other for data in plain.values() for other in found.values())
    pull(str(sealed), tmp_path / "opened", Access(key=KEY))
    assert contents(tmp_path / "opened") == plain


def test_two_seals_are_never_alike(sealed: Path, tmp_path: Path) -> None:
    seal(tmp_path / "context", tmp_path / "again", KEY)
    one, other = contents(sealed), contents(tmp_path / "again")
    assert all(one[name][8:40] != other[name][8:40] and one[name][48:] != other[name][48:] for name in one)


@pytest.mark.parametrize("size", [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 3 * BLOCK_BYTES, len(LONG)])
def test_ranges(tmp_path: Path, size: int) -> None:
    store = SealedStore(long_store(tmp_path, size), KEY)
    assert store.size("data") == size
    for offset in (0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, 2 * BLOCK_BYTES + 5, size - 1, size):
        for length in (0, 1, 2, BLOCK_BYTES, 2 * BLOCK_BYTES, size):
            if offset >= 0 and offset + length <= size:
                assert store.read("data", offset, length) == LONG[offset : offset + length]
    for offset, length in ((0, size + 1), (-1, 1), (size, 1), (0, -1)):
        with pytest.raises(TruncatedError):
            store.read("data", offset, length)


def test_another_key(sealed: Path) -> None:
    with pytest.raises(CorruptError, match="another key"):
        verify(sealed, OTHER)


def test_without_the_key_there_is_no_artifact(sealed: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactNotFoundError):
        Reader(LocalStore(sealed))
    with pytest.raises(ArtifactNotFoundError, match="is sealed: pass its key as key="):
        open_store(sealed)
    with pytest.raises(ArtifactNotFoundError):
        verify(tmp_path / "context")
    with pytest.raises(ArtifactNotFoundError, match="is not sealed: pass no key"):
        open_store(tmp_path / "context", Access(key=KEY))


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    store = long_store(tmp_path, BLOCK_BYTES + 100)
    data = store.files["data.sealed"]
    for position in [*range(48), 48, 1000, BLOCK_BYTES + 47, BLOCK_BYTES + 64, BLOCK_BYTES + 70, len(data) - 1]:
        store.files["data.sealed"] = data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]
        with pytest.raises(CorruptError):
            SealedStore(store, KEY).read("data", 0, BLOCK_BYTES + 100)


def test_nothing_can_be_moved(tmp_path: Path) -> None:
    store = long_store(tmp_path, 2 * BLOCK_BYTES)
    data, step = store.files["data.sealed"], BLOCK_BYTES + 16
    first, second = data[48 : 48 + step], data[48 + step :]
    shorter = data[:40] + BLOCK_BYTES.to_bytes(8, "little") + first
    for changed in (data[:48] + second + first, data[:48] + first + first, shorter):
        store.files["data.sealed"] = changed
        with pytest.raises(CorruptError):
            SealedStore(store, KEY).read("data", 0, SealedStore(store, KEY).size("data"))
    store.files["other.sealed"] = data
    with pytest.raises(CorruptError):
        SealedStore(store, KEY).read("other", 0, 10)


@pytest.mark.parametrize("cut", [0, 47, 48, 60, 500])
def test_truncated(tmp_path: Path, cut: int) -> None:
    store = long_store(tmp_path, 1000)
    store.files["data.sealed"] = store.files["data.sealed"][:cut]
    with pytest.raises((TruncatedError, CorruptError)):
        SealedStore(store, KEY).read("data", 0, 10)


def test_the_layout_of_a_sealed_file(tmp_path: Path) -> None:
    """Rebuild a file by hand: key derivation, nonce and layout are part of the format."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    data = long_store(tmp_path, 100).files["data.sealed"]
    assert (data[:8], data[40:48], len(data)) == (b"cgseal01", (100).to_bytes(8, "little"), 48 + 100 + 16)
    info = b"hf_cachegen seal 1\0data\0" + (100).to_bytes(8, "little")
    key = HKDF(hashes.SHA256(), 32, data[8:40], info).derive(KEY)
    assert AESGCM(key).decrypt(bytes(12), data[48:], None) == LONG[:100]
    assert _cipher(KEY, data[:48], "data").decrypt(bytes(12), data[48:], None) == LONG[:100]


def test_from_a_server_and_from_the_cache(sealed: Path, tmp_path: Path, cache_folder: Path) -> None:
    """The cache keeps sealed bytes alone."""
    patience = Patience(attempts=2, timeout=10, backoff=0.01)
    with running(Server()) as web:
        web.files = {f"context/{name}": data for name, data in contents(sealed).items()}
        location, access = f"{web.url}/context", Access(key=KEY, patience=patience)
        reader = Reader(open_store(location, access))
        reader.prefetch(reader.manifest.segments)
        assert reader.verify() == verify(sealed)
        kept = [path.read_bytes() for path in cache_folder.rglob("*") if path.is_file()]
        assert kept
        assert not [data for data in kept for word in (b"side information", b"chunks", b"safetensors") if word in data]
        web.requests.clear()
        assert Reader(open_store(location, access)).verify() == verify(sealed)
        assert {headers["Range"] for _, headers in web.requests} == {f"bytes=0-{HEAD_BYTES - 1}"}  # to see what changed
        assert all(check.passed is not False for check in serve_check(location, access))
        assert not serve_check(location, Access(key=OTHER, patience=patience))[0].passed
        web.faults = [None, faults.flip]
        with pytest.raises(CorruptError):
            Reader(open_store(location, access)).verify()
    offline = Access(key=KEY, local_files_only=True)
    assert Reader(open_store(location, offline)).verify() == verify(sealed)
    with pytest.raises(CorruptError, match="another key"):
        Reader(open_store(location, Access(key=OTHER, local_files_only=True)))
    with pytest.raises(OfflineError, match=r"cachegen\.json\.sealed"):
        Reader(open_store("http://host/context", offline))
    for path in cache_folder.rglob("*"):
        if path.is_file() and path.stat().st_size > 100:
            path.write_bytes(path.read_bytes()[:-1] + b"x")  # torn by a power cut
    with pytest.raises(CorruptError):
        Reader(open_store(location, offline)).verify()


def test_sealed_a_second_time(sealed: Path, tmp_path: Path) -> None:
    """The same artifact sealed a second time has other bytes; cached bytes of the first are not used."""
    seal(tmp_path / "context", tmp_path / "again", KEY)
    with running(Server()) as web:
        for folder in (sealed, tmp_path / "again"):
            web.files = {f"context/{name}": data for name, data in contents(folder).items()}
            assert Reader(open_store(f"{web.url}/context", Access(key=KEY))).verify() == verify(sealed)


def test_a_block_that_was_damaged_on_its_way_is_fetched_again(tmp_path: Path) -> None:
    data = long_store(tmp_path, len(LONG)).files["data.sealed"]
    with running(Server()) as web:
        web.files["data.sealed"] = data
        store = open_store(web.url, Access(key=KEY))
        assert store.size("data") == len(LONG)
        web.faults = [faults.flip]
        assert store.read("data", 200_000, 1000) == LONG[200_000:201_000]
        store.prefetch([Segment("data", "a", 70_000, 1000, ""), Segment("data", "b", 71_000, 100_000, "")])
        web.requests.clear()
        assert store.read("data", 71_000, 100_000) == LONG[71_000:171_000]
        assert store.read("data", 70_000, 1000) == LONG[70_000:71_000]
        assert len(web.requests) <= 2


def test_damage_in_what_came_with_opening_a_file(tmp_path: Path) -> None:
    def damaged(request: faults.Request, body: bytes, headers: dict[str, str]) -> None:
        request.answer(206, body[:100] + bytes([body[100] ^ 1]) + body[101:], headers)

    with running(Server()) as web:
        web.files["data.sealed"] = long_store(tmp_path, 1000).files["data.sealed"]
        web.faults = [damaged]
        assert open_store(web.url, Access(key=KEY)).read("data", 0, 1000) == LONG[:1000]


def test_signed_and_sealed_with_a_profile_beside(tmp_path: Path) -> None:
    write(tmp_path / "context")
    sign(tmp_path / "context", KEY)
    (tmp_path / "context" / "cachegen_profile.safetensors").write_bytes(b"a profile")
    seal(tmp_path / "context", tmp_path / "sealed", OTHER)
    store = open_store(tmp_path / "sealed", Access(key=OTHER, public_key=PUBLIC))
    assert Reader(store).verify()
    inner = SealedStore(LocalStore(tmp_path / "sealed"), OTHER)
    assert inner.read("cachegen_profile.safetensors", 0, 9) == b"a profile"
    pin = Pin(xxhash.xxh3_128_hexdigest(b"a profile"), hashlib.sha256(b"a profile").hexdigest(), 9)
    assert fetch_pinned(pin, store, Access(), Limits(), beside_alone=True) == b"a profile"


def test_sealing_refuses(sealed: Path, tmp_path: Path) -> None:
    before = contents(sealed)
    with pytest.raises(ArtifactExistsError):
        seal(tmp_path / "context", sealed, OTHER)
    assert contents(sealed) == before
    plain = contents(tmp_path / "context")
    with pytest.raises(ArtifactExistsError, match="would stay readable"):
        seal(tmp_path / "context", tmp_path / "context", KEY)
    assert contents(tmp_path / "context") == plain
    base = tmp_path / "context" / "base.safetensors"
    base.write_bytes(base.read_bytes()[:-1] + b"x")
    with pytest.raises(CorruptError):
        seal(tmp_path / "context", tmp_path / "new", KEY)
    assert not (tmp_path / "new").exists()


def test_the_source_of_a_killed_writer_is_completed(tmp_path: Path) -> None:
    write(tmp_path / "context")
    killed_between_renames(tmp_path / "context")
    seal(tmp_path / "context", tmp_path / "sealed", KEY)
    assert verify(tmp_path / "sealed") == Reader(LocalStore(tmp_path / "context")).verify()


def test_what_a_killed_process_left_is_replaced(tmp_path: Path) -> None:
    write(tmp_path / "context")
    (tmp_path / "sealed").mkdir()
    (tmp_path / "sealed" / ".base.safetensors.sealed.partial").write_bytes(b"half of it")
    (tmp_path / "sealed" / ".base.safetensors.partial").write_bytes(b"the user's own")
    seal(tmp_path / "context", tmp_path / "sealed", KEY)
    assert verify(tmp_path / "sealed") > 0
    assert [name for name in contents(tmp_path / "sealed") if name.endswith(".partial")] == [
        ".base.safetensors.partial"
    ]


def test_a_plain_artifact_of_a_killed_writer_is_kept(tmp_path: Path) -> None:
    write(tmp_path / "context")
    write(tmp_path / "out")
    killed_between_renames(tmp_path / "out")
    with pytest.raises(ArtifactExistsError, match="would stay readable"):
        seal(tmp_path / "context", tmp_path / "out", KEY)
    assert contents(tmp_path / "out") == contents(tmp_path / "context")


def test_a_second_writer_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    write(tmp_path / "context")
    (tmp_path / "sealed").mkdir()
    (tmp_path / "sealed" / ".base.safetensors.sealed.partial").write_bytes(b"of the first writer")
    with locked(tmp_path / "sealed"), pytest.raises(ArtifactExistsError, match="another writer"):
        seal(tmp_path / "context", tmp_path / "sealed", KEY)
    assert list(contents(tmp_path / "sealed").values()) == [b"of the first writer"]


def test_a_full_disk_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write(tmp_path / "context")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="sealed"):  # the message names the folder
        seal(tmp_path / "context", tmp_path / "sealed", KEY)
    assert not (tmp_path / "sealed").exists()


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "context")
    (tmp_path / "sealed").write_text("a file")
    with pytest.raises(ArtifactExistsError, match="must be a directory"):
        seal(tmp_path / "context", tmp_path / "sealed", KEY)


@pytest.mark.parametrize(
    "key", [b"", b"short", bytes(33), "no/such/file", "/dev/zero"], ids=["empty", "short", "long", "no file", "device"]
)
def test_invalid_keys(tmp_path: Path, key: bytes | str) -> None:
    with pytest.raises(ConfigError):
        SealedStore(LocalStore(tmp_path), key)


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers", None)
    with pytest.raises(MissingExtraError, match="crypto"):
        SealedStore(LocalStore(tmp_path), KEY)


def test_the_commands(tmp_path: Path) -> None:
    write(tmp_path / "context")
    (tmp_path / "secret.key").write_bytes(KEY)
    found = run_json("seal", tmp_path / "context", tmp_path / "sealed", "--key", tmp_path / "secret.key")
    assert found["bytes"] == sum(map(len, contents(tmp_path / "sealed").values()))
    assert run("pull", tmp_path / "sealed", tmp_path / "out", "--key", tmp_path / "secret.key").exit_code == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "context")
    opened = run_json("verify", tmp_path / "sealed", "--key", tmp_path / "secret.key")
    assert opened["bytes"] == sum(map(len, contents(tmp_path / "context").values()))
    (tmp_path / "secret.key").write_bytes(OTHER)
    wrong = run_json("pull", tmp_path / "sealed", tmp_path / "no", "--key", tmp_path / "secret.key", code=3)
    assert wrong["error"]["type"] == "CorruptError"
