"""The commands push, pull, ls, serve-check and cache, with servers on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import http_server as faults
from tests.cli_support import run, run_json, write
from tests.http_server import Server, running
from tests.hub_server import HubServer, running_hub
from tests.small_artifact import contents

pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    pytest.mark.usefixtures("own_cache"),
]
REPO = "user/context"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("artifact") / "context")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with running_hub(monkeypatch, token="owner") as found:
        yield found


@pytest.fixture
def web(folder: Path) -> Iterator[Server]:
    with running(Server()) as found:
        found.files = {f"context/{name}": data for name, data in contents(folder).items()}
        yield found


def size_of(folder: Path) -> int:
    return sum(map(len, contents(folder).values()))


def test_push_ls_pull(server: HubServer, folder: Path, tmp_path: Path) -> None:
    pushed = run_json("push", folder, REPO, "--description", "ninety tokens", "--message", "Hello")
    repo = server.repos[f"datasets/{REPO}"]
    assert (pushed["repo_id"], pushed["commit"]) == (REPO, repo.branches["main"])
    assert (repo.private, repo.commits[pushed["commit"]][2]) == (True, "Hello")
    assert b"ninety tokens" in repo.files["README.md"]
    assert run("push", folder, REPO, "--subfolder", "b").exit_code == 0
    size = size_of(folder)
    assert run_json("ls", REPO)["artifacts"] == [{"folder": "", "bytes": size}, {"folder": "b", "bytes": size}]
    assert run("ls", REPO, "--subfolder", "b").stdout.split()[-1] == "."
    (tmp_path / "empty").mkdir()
    nothing = run("ls", tmp_path / "empty")
    assert (nothing.stdout, "neither an artifact nor a profile" in nothing.stderr) == ("", True)
    pulled = run_json("pull", REPO, tmp_path / "copy", "--revision", pushed["commit"])
    assert (pulled["bytes"], contents(tmp_path / "copy")) == (size, contents(folder))
    assert run_json("pull", REPO, tmp_path / "copy", code=2)["error"]["type"] == "ArtifactExistsError"
    assert run("pull", REPO, tmp_path / "copy", "--overwrite").stdout.endswith(f"{size:,} bytes\n")
    assert run_json("inspect", REPO)["bytes"] == run_json("verify", f"hf://datasets/{REPO}/b")["bytes"] == size


def test_links_are_pushed_only_from_within(server: HubServer, folder: Path, tmp_path: Path) -> None:
    """Links within the folder are pushed, like those of the Hub's own cache; links out of it are refused."""
    snapshot = tmp_path / "repo" / "snapshots" / "commit"
    (tmp_path / "repo" / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        (tmp_path / "repo" / "blobs" / path.name).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    run_json("push", snapshot, REPO)
    (tmp_path / "linked").mkdir()
    for path in folder.iterdir():
        (tmp_path / "linked" / path.name).symlink_to(path)
    run_json("verify", tmp_path / "linked")
    assert "link out of" in run_json("push", tmp_path / "linked", REPO, code=3)["error"]["message"]


def test_pushing_to_a_public_repository_needs_the_option(server: HubServer, folder: Path) -> None:
    assert run("push", folder, REPO, "--public").exit_code == 0
    assert not server.repos[f"datasets/{REPO}"].private
    assert "public" in run_json("push", folder, REPO, code=2)["error"]["message"]


@pytest.mark.parametrize(
    ("arguments", "code", "kind"),
    [
        (["pull", "user/nothing", "out"], 3, "ArtifactNotFoundError"),
        (["pull", "http://127.0.0.1:9/x", "out"], 7, "StoreError"),
        (["pull", "ssh+what://x", "out"], 2, "ConfigError"),
        (["ls", "nothing here"], 3, "ArtifactNotFoundError"),
        (["ls", "https://127.0.0.1:9/x"], 2, "ConfigError"),
        (["push", "nothing", "user/name"], 3, "ArtifactNotFoundError"),
        (["cache", "prune", "--to", "lots"], 2, "ConfigError"),
    ],
    ids=["no-repository", "no-server", "scheme", "no-folder", "no-listing", "push-nothing", "size"],
)
def test_wrong_arguments_are_refused(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hf_cachegen.stores.retry.time.sleep", lambda seconds: None)
    assert run_json(*arguments, code=code)["error"]["type"] == kind
    assert not (tmp_path / "out").exists()


def test_pushing_without_the_right_is_refused(server: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "reader")
    assert run_json("push", folder, REPO, code=7)["error"]["type"] == "StoreAccessError"


def test_serve_check(web: Server) -> None:
    found = run_json("serve-check", f"{web.url}/context")
    assert found["passed"]
    assert [row["passed"] for row in found["checks"]] == [True, True, True, True, None]
    assert "ok  ranges" in run("serve-check", f"{web.url}/context").stdout
    web.always = faults.ignore_range
    assert run_json("serve-check", f"{web.url}/context")["passed"]
    assert "-  ranges: ignored" in run("serve-check", f"{web.url}/context").stdout
    web.always = faults.whole_without_length
    assert not run_json("serve-check", f"{web.url}/context", code=1)["passed"]
    assert "FAILED  manifest" in run("serve-check", f"{web.url}/context").stdout


def test_the_cache(web: Server, folder: Path, tmp_path: Path) -> None:
    assert run_json("cache", "ls")["origins"] == []
    run_json("verify", f"{web.url}/context")
    found = run_json("cache", "ls")
    assert found["directory"] == str(tmp_path / "cache")
    (row,) = found["origins"]
    assert (row["origin"], row["bytes"]) == (f"{web.url}/context", size_of(folder))
    assert f"{web.url}/context" in run("cache", "ls").stdout.replace("\n", "")
    assert run_json("cache", "prune", "--to", "1G")["removed"] == 0
    assert run_json("cache", "prune", "--to", "0")["freed"] == size_of(folder)
    assert "removed 0 files" in run("cache", "prune", "--cache-dir", tmp_path / "none").stdout
