"""Signed artifacts: an unsigned range is never returned, from a server or from the cache."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("cryptography", reason="cryptography is not installed (pip install 'hf_cachegen[crypto]')")
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hf_cachegen.artifact import Reader, write_artifact
from hf_cachegen.errors import (
    ArtifactNotFoundError,
    ConfigError,
    CorruptError,
    LimitError,
    MissingExtraError,
    OfflineError,
    SignatureError,
)
from hf_cachegen.stores import Access, LocalStore, Patience, open_store
from hf_cachegen.stores.signed import SIGNATURE_FILE, SignedStore, require_current, sign
from hf_cachegen.stores.survey import pull, serve_check
from tests.cli_support import run, run_json
from tests.http_server import Server, running
from tests.signing_support import KEY, PUBLIC, pem
from tests.small_artifact import MANIFEST, SEGMENTS, contents, killed_between_renames, write

pytestmark = pytest.mark.usefixtures("own_cache")
RAW = serialization.Encoding.Raw
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(32)).public_key().public_bytes(RAW, serialization.PublicFormat.Raw)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "context")
    sign(tmp_path / "context", bytes(range(32)))
    return tmp_path / "context"


def verify(folder: Path, key: bytes = PUBLIC) -> int:
    return Reader(SignedStore(LocalStore(folder), key)).verify()


def test_signed(folder: Path) -> None:
    assert verify(folder) == sum(len(data) for name, data in contents(folder).items() if name != SIGNATURE_FILE)
    before = (folder / SIGNATURE_FILE).read_bytes()
    sign(folder, bytes(range(32)))
    assert (folder / SIGNATURE_FILE).read_bytes() == before
    assert not [name for name in contents(folder) if "partial" in name]


def test_another_key_and_no_signature(folder: Path) -> None:
    with pytest.raises(SignatureError, match="not signed with this key"):
        verify(folder, OTHER)
    (folder / SIGNATURE_FILE).unlink()
    with pytest.raises(SignatureError, match=r"no cachegen\.sig"):
        verify(folder)


@pytest.mark.parametrize("position", [0, 64, 128, 129, 200, -1])
def test_any_flipped_bit_of_the_signature(folder: Path, position: int) -> None:
    data = bytearray((folder / SIGNATURE_FILE).read_bytes())
    data[position] ^= 1
    (folder / SIGNATURE_FILE).write_bytes(data)
    with pytest.raises(SignatureError):
        verify(folder)


@pytest.mark.parametrize(
    "data",
    [b"", b"\n", b"0" * 128, b"0" * 128 + b"\n{}"],
    ids=["empty", "no digits", "no statement", "zeros"],
)
def test_invalid_signature_files(folder: Path, data: bytes) -> None:
    (folder / SIGNATURE_FILE).write_bytes(data)
    with pytest.raises(SignatureError):
        verify(folder)


def test_a_huge_signature(folder: Path) -> None:
    with open(folder / SIGNATURE_FILE, "r+b") as file:
        file.truncate((16 << 20) + 1)
    with pytest.raises(LimitError):
        verify(folder)


@pytest.mark.parametrize(
    "statement",
    [b'{"ranges":[],"signed":"a letter"}', b"cgblock1\xff", b"[1]", b"{}", b"[" * 100_000, b'{"signed":NaN}',
     b'{"ranges":[[1]],"signed":"hf_cachegen artifact 1"}'],
    ids=["letter", "block", "list", "object", "deep", "NaN", "ranges"],
)  # fmt: skip
def test_a_signature_of_something_else(folder: Path, statement: bytes) -> None:
    (folder / SIGNATURE_FILE).write_bytes(KEY.sign(statement).hex().encode() + b"\n" + statement)
    with pytest.raises(SignatureError, match="something else"):
        verify(folder)


def test_a_forged_artifact_under_a_true_signature(folder: Path, tmp_path: Path) -> None:
    """Its checksums are right: an attacker can compute them."""
    forged = [(file, name, data[::-1]) for file, name, data in SEGMENTS]
    write_artifact(tmp_path / "forged", MANIFEST, forged)
    (tmp_path / "forged" / SIGNATURE_FILE).write_bytes((folder / SIGNATURE_FILE).read_bytes())
    assert Reader(LocalStore(tmp_path / "forged")).verify()
    with pytest.raises(SignatureError):
        verify(tmp_path / "forged")
    for name in ("cachegen.json", "base.safetensors"):  # in part
        (tmp_path / "forged" / name).write_bytes((folder / name).read_bytes())
    with pytest.raises((SignatureError, CorruptError)):
        verify(tmp_path / "forged")
    with pytest.raises(SignatureError):
        SignedStore(LocalStore(tmp_path / "forged"), PUBLIC).read("tokens.safetensors", 0, 8)


def test_only_signed_ranges(folder: Path) -> None:
    store = SignedStore(LocalStore(folder), PUBLIC)
    with pytest.raises(SignatureError):
        store.read("base.safetensors", 0, 3)
    (folder / "notes.safetensors").write_bytes(b"unsigned")
    with pytest.raises(SignatureError, match="does not cover"):
        store.size("notes.safetensors")


def test_a_damaged_artifact_is_not_signed(folder: Path) -> None:
    (folder / SIGNATURE_FILE).unlink()
    data = (folder / "base.safetensors").read_bytes()
    (folder / "base.safetensors").write_bytes(data[:-1] + b"x")
    with pytest.raises(CorruptError):
        sign(folder, bytes(range(32)))
    with pytest.raises(ArtifactNotFoundError):
        sign(folder / "nothing", bytes(range(32)))
    assert not (folder / SIGNATURE_FILE).exists()


def test_an_artifact_of_a_killed_writer_is_completed_and_signed(folder: Path) -> None:
    (folder / SIGNATURE_FILE).unlink()
    killed_between_renames(folder)
    sign(folder, KEY.private_bytes_raw())
    assert verify(folder) > 0


def test_an_artifact_that_replaces_a_signed_one_is_not_signed(folder: Path) -> None:
    write_artifact(folder, MANIFEST, [(file, name, data[::-1]) for file, name, data in SEGMENTS], overwrite=True)
    assert not (folder / SIGNATURE_FILE).exists()
    with pytest.raises(SignatureError, match="not signed"):
        verify(folder)
    (folder / SIGNATURE_FILE).mkdir()  # not a signature, and no reason to fail
    write_artifact(folder, MANIFEST, SEGMENTS, overwrite=True)
    with pytest.raises(CorruptError):
        verify(folder)


def test_a_signature_of_another_artifact_is_noticed_without_a_key(folder: Path) -> None:
    require_current(folder)
    old = (folder / SIGNATURE_FILE).read_bytes()
    write_artifact(folder, MANIFEST, [(file, name, data[::-1]) for file, name, data in SEGMENTS], overwrite=True)
    for data in (old, b"", b"rubbish", b"0" * 128 + b"\n{}", b"0" * 128 + b'\n{"ranges": 5}', b"\xff\n\xff"):
        (folder / SIGNATURE_FILE).write_bytes(data)
        with pytest.raises(SignatureError, match="not of this artifact"):
            require_current(folder)


def test_a_damaged_signature_is_not_pushed(folder: Path) -> None:
    (folder / SIGNATURE_FILE).write_bytes(b"0" * 128 + b"\n" + b"[" * 100_000)
    with pytest.raises(SignatureError, match="sign it again"):
        require_current(folder)


def test_an_artifact_that_is_pulled_into_its_own_folder_stays_signed(folder: Path) -> None:
    before = contents(folder)
    pull(str(folder), folder, overwrite=True)
    assert contents(folder) == before


def test_a_signature_that_claims_to_be_huge_is_not_pulled(folder: Path, tmp_path: Path) -> None:
    with open(folder / SIGNATURE_FILE, "r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(LimitError):
        pull(str(folder), tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_invalid_keys(folder: Path, tmp_path: Path) -> None:
    strange = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    (tmp_path / "text.pem").write_text("-----BEGIN secret-----")
    for key in (b"short", tmp_path / "nothing.pem", tmp_path / "text.pem", pem(strange, tmp_path / "rsa.pem"),
                pem(KEY, tmp_path / "locked.pem", b"password")):  # fmt: skip
        with pytest.raises(ConfigError) as caught:
            sign(folder, key)
        assert "secret" not in str(caught.value)
        with pytest.raises(ConfigError):
            SignedStore(LocalStore(folder), key)


def test_without_the_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cryptography.hazmat.primitives.asymmetric", None)
    with pytest.raises(MissingExtraError, match="crypto"):
        SignedStore(LocalStore(folder), PUBLIC)


def test_from_a_server_and_from_the_cache(folder: Path, tmp_path: Path) -> None:
    with running(Server()) as web:
        web.files = {f"context/{name}": data for name, data in contents(folder).items()}
        access = Access(public_key=PUBLIC, patience=Patience(attempts=2, timeout=10, backoff=0.01))
        location = f"{web.url}/context"
        reader = Reader(open_store(location, access))
        reader.prefetch(reader.manifest.segments)
        assert reader.verify()
        assert pull(location, tmp_path / "copy", access)
        assert contents(tmp_path / "copy") == contents(folder)
        assert all(check.passed is not False for check in serve_check(location, access))
        del web.files[f"context/{SIGNATURE_FILE}"]
        with pytest.raises(SignatureError):
            open_store(location, access)
        pull(location, tmp_path / "copy", Access(), overwrite=True)
        assert not (tmp_path / "copy" / SIGNATURE_FILE).exists()
    offline = Access(public_key=PUBLIC, local_files_only=True)
    assert Reader(open_store(location, offline)).verify()
    with pytest.raises(OfflineError):
        open_store(f"{location}/other", offline)


def test_the_commands(folder: Path, tmp_path: Path) -> None:
    (folder / SIGNATURE_FILE).unlink()
    key = pem(KEY, tmp_path / "key.pem")
    public = tmp_path / "public.pem"
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(KEY.public_key().public_bytes(serialization.Encoding.PEM, form))
    found = run_json("verify", folder, "--public-key", public, code=3)
    assert found["error"]["type"] == "SignatureError"
    assert run_json("sign", folder, "--key", key)["signature"] == str(folder / SIGNATURE_FILE)
    assert "cachegen.sig" in run("sign", folder, "--key", key).stdout
    assert Reader(open_store(folder, Access(public_key=public))).verify()
