"""Publishing a saved artifact is one call: files, card and profile in one commit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from kv_samples import sample_kv

from hf_cachegen.artifact import MANIFEST_FILE, PROFILE_FILE
from hf_cachegen.artifact.artifact import write
from hf_cachegen.artifact.encoded import encode_kv
from hf_cachegen.errors import ArtifactNotFoundError, ConfigError
from hf_cachegen.stores.publishing import publish_artifact
from hf_cachegen.stores.sealed import seal
from tests.cli_support import run
from tests.hub_server import HubServer, running_hub
from tests.small_artifact import killed_between_renames

# The Hub's client uploads in a way that its HTTP library wants changed.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with running_hub(monkeypatch) as found:
        yield found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(encode_kv(*sample_kv(layers=1, tokens=20)), tmp_path / "context")
    return tmp_path / "context"


def test_an_artifact_its_card_and_its_profile_go_in_one_commit(server: HubServer, folder: Path) -> None:
    pushed = publish_artifact(folder, "user/book", profile=b"a profile", description="a book", token="owner")
    repo = server.repos["datasets/user/book"]
    assert {MANIFEST_FILE, PROFILE_FILE, "README.md"} <= set(repo.files)
    assert repo.files[MANIFEST_FILE] == (folder / MANIFEST_FILE).read_bytes()
    assert repo.files[PROFILE_FILE] == b"a profile"
    assert "20 tokens: a book" in repo.files["README.md"].decode()
    assert len(repo.commits) == 2  # the first made the repository
    assert pushed.location == f"hf://datasets/user/book@{pushed.commit}"


@pytest.mark.parametrize("subfolder", [None, "chapter 1"])
def test_the_card_of_a_sealed_artifact_reveals_nothing(
    server: HubServer, folder: Path, tmp_path: Path, subfolder: str | None
) -> None:
    key = bytes(range(32))
    seal(folder, tmp_path / "sealed", key)
    publish_artifact(tmp_path / "sealed", "user/secret", key=key, token="owner", subfolder=subfolder)
    files = server.repos["datasets/user/secret"].files
    inside = "" if subfolder is None else f"{subfolder}/"
    assert f"{inside}{MANIFEST_FILE}.sealed" in files
    assert "# A sealed KV cache" in files[f"{inside}README.md"].decode()
    assert "tokens" not in files[f"{inside}README.md"].decode()


def test_an_artifact_of_a_killed_writer_is_completed_and_pushed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_hub(monkeypatch, token="owner") as server:
        killed_between_renames(folder)
        publish_artifact(folder, "user/book")
        killed_between_renames(folder)
        assert run("push", folder, "user/again").exit_code == 0
        for name in ("book", "again"):
            assert MANIFEST_FILE in server.repos[f"datasets/user/{name}"].files


def test_artifacts_that_cannot_be_published(server: HubServer, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not sealed"):
        publish_artifact(folder, "user/book", key=bytes(32), token="owner")
    with pytest.raises(ArtifactNotFoundError):
        publish_artifact(tmp_path / "nothing", "user/book", token="owner")
    publish_artifact(folder, "user/book", private=False, token="owner")
    with pytest.raises(ConfigError, match="public"):
        publish_artifact(folder, "user/book", token="owner")
