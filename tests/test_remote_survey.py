"""List locations, copy artifacts whole, and check whether a server can serve one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from hf_cachegen.artifact import Limits, Reader
from hf_cachegen.errors import ArtifactExistsError, ArtifactNotFoundError, ConfigError, CorruptError, LimitError
from hf_cachegen.stores import Access, LocalStore, Patience
from hf_cachegen.stores.survey import Found, find, pull, serve_check
from tests import http_server as faults
from tests.http_server import Fault, Server, running
from tests.small_artifact import contents, write

pytestmark = pytest.mark.usefixtures("own_cache")
ACCESS = Access(patience=Patience(attempts=2, timeout=10, backoff=0.01))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "context")
    return tmp_path / "context"


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    with running(Server()) as found:
        found.files = {f"context/{name}": data for name, data in contents(folder).items()}
        yield found


def test_artifacts_in_folders_and_filesystems(tmp_path: Path, folder: Path) -> None:
    write(tmp_path / "deep" / "inside")
    (tmp_path / "deep" / "notes.txt").write_text("no artifact")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "base.safetensors").write_bytes(b"no manifest")
    size = sum(map(len, contents(folder).values()))
    expected = [Found("context", size), Found("deep/inside", size)]
    assert find(str(tmp_path)) == expected
    assert find(f"file://{tmp_path}") == expected
    assert find(str(folder)) == [Found("", size)]
    fsspec.filesystem("memory").put(str(tmp_path / "deep"), "/survey", recursive=True)
    assert find("memory://survey") == [Found("inside", size)]


def test_locations_that_cannot_be_listed(tmp_path: Path, server: Server) -> None:
    with pytest.raises(ConfigError, match="lists no files"):
        find(f"{server.url}/context")
    with pytest.raises(ArtifactNotFoundError):
        find(str(tmp_path / "nothing"))


def test_a_copy_is_the_same_to_the_byte(tmp_path: Path, folder: Path, server: Server) -> None:
    steps: list[tuple[int, int]] = []
    total = pull(f"{server.url}/context", tmp_path / "copy", ACCESS, progress=lambda *step: steps.append(step))
    assert contents(tmp_path / "copy") == contents(folder)
    assert total == sum(map(len, contents(folder).values()))
    assert steps[-1][0] == steps[-1][1]
    with pytest.raises(ArtifactExistsError):
        pull(f"{server.url}/context", tmp_path / "copy", ACCESS)
    pull(f"{server.url}/context", tmp_path / "copy", ACCESS, overwrite=True)
    assert Reader(LocalStore(tmp_path / "copy")).verify()


def test_a_failed_copy_leaves_nothing(tmp_path: Path, server: Server) -> None:
    data = server.files["context/base.safetensors"]
    server.files["context/base.safetensors"] = data[:-1] + b"x"
    with pytest.raises(CorruptError):
        pull(f"{server.url}/context", tmp_path / "copy", ACCESS)
    with pytest.raises(LimitError):
        pull(f"{server.url}/context", tmp_path / "copy", ACCESS, limits=Limits(max_tokens=1))
    assert not (tmp_path / "copy").exists()


def test_a_sound_server(server: Server) -> None:
    checks = serve_check(f"{server.url}/context", ACCESS)
    assert [(check.name, check.passed) for check in checks] == [
        ("manifest", True), ("ranges", True), ("changes are noticed", True), ("level 1", True), ("speed", None)
    ]  # fmt: skip


def test_a_server_without_etag_and_date(server: Server) -> None:
    server.always = faults.with_headers(ETag=None)
    assert [check.passed for check in serve_check(f"{server.url}/context", ACCESS)] == [True, True, None, True, None]


def test_a_server_without_ranges(server: Server) -> None:
    server.always = faults.ignore_range
    checks = serve_check(f"{server.url}/context", ACCESS)
    assert [check.passed for check in checks] == [True, None, True, True, None]
    assert "whole" in checks[1].detail


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (faults.whole_without_length, "RangeError"),
        (faults.with_headers(Content_Encoding="gzip"), "gzip"),
        (faults.status(403), "StoreAccessError"),
        (faults.status(404), "there is no"),
    ],
)
def test_a_faulty_server(server: Server, fault: Fault, said: str) -> None:
    server.always = fault
    (check,) = serve_check(f"{server.url}/context", ACCESS)
    assert (check.name, check.passed) == ("manifest", False)
    assert said in check.detail


def test_damage_is_found(server: Server) -> None:
    data = server.files["context/base.safetensors"]
    server.files["context/base.safetensors"] = data[:-1] + b"x"
    *_, last = serve_check(f"{server.url}/context", ACCESS)
    assert (last.name, last.passed) == ("level 1", False)
    assert "CorruptError" in last.detail


def test_a_folder_is_not_served(folder: Path) -> None:
    *_, last = serve_check(str(folder))
    assert (last.name, last.passed) == ("ranges", False)
    assert "local folder" in last.detail
