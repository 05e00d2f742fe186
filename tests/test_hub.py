"""Pushing to and reading from a Hub on loopback, with the real huggingface_hub client."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants

import hf_cachegen
from hf_cachegen.artifact import Reader, write_artifact
from hf_cachegen.errors import (
    ArtifactNotFoundError,
    CacheGenError,
    ConfigError,
    ConflictError,
    CorruptError,
    OfflineError,
    SignatureError,
    StoreAccessError,
    StoreError,
    TruncatedError,
)
from hf_cachegen.stores import Access, hub, open_store, pushing
from hf_cachegen.stores.hub import HubLocation
from hf_cachegen.stores.pushing import Pushed
from hf_cachegen.stores.remote import RemoteStore
from hf_cachegen.stores.retry import Patience
from hf_cachegen.stores.signed import sign
from hf_cachegen.stores.survey import Found, find
from tests import http_server as faults
from tests.http_server import Server, running
from tests.hub_server import HubServer, Repo, running_hub
from tests.small_artifact import FILES, MANIFEST, SEGMENTS, contents, write

# The Hub's client uploads in a way that its HTTP library wants changed.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

IMPATIENT = Patience(attempts=2, timeout=10, backoff=0.01)
LOCATION = HubLocation("user/context")
TEXT = "---\ntags: [kv-cache]\n---\n# A context\n"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with running_hub(monkeypatch) as found:
        yield found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "context")
    return tmp_path / "context"


def push(folder: Path, location: HubLocation = LOCATION, **options: object) -> Pushed:
    return pushing.push(folder, location, TEXT, **{"token": "owner", **options})


def repo_of(server: HubServer, location: HubLocation = LOCATION) -> Repo:
    return server.repos[f"{location.repo_type}s/{location.repo_id}"]


def reader(location: HubLocation = LOCATION, token: str | None = "owner") -> Reader:
    commit = hub.resolve(location, token, IMPATIENT)
    return Reader(RemoteStore(hub.open_hub(location, commit, token, IMPATIENT)))


def test_push_and_read_back(server: HubServer, folder: Path) -> None:
    pushed = push(folder)
    repo = repo_of(server)
    assert repo.private
    assert set(repo.files) == {*FILES, ".gitattributes", "README.md"}
    assert {name: repo.files[name] for name in FILES} == contents(folder)
    assert (pushed.commit, len(repo.commits)) == (repo.branches["main"], 2)
    assert pushed.url.endswith(f"/commit/{pushed.commit}")
    assert server.lfs
    assert reader().verify() == sum(map(len, contents(folder).values()))


def test_the_user_agent(server: HubServer, folder: Path) -> None:
    push(folder)
    reader()
    assert all(f"hf_cachegen/{hf_cachegen.__version__}" in agent for agent in server.agents), server.agents


@pytest.mark.parametrize(
    "location",
    [
        HubLocation("user/context", "model"),
        HubLocation("user/context", subfolder="a b/c"),
        HubLocation("user/context", revision="other/branch"),
    ],
    ids=str,
)
def test_other_locations(server: HubServer, folder: Path, location: HubLocation) -> None:
    push(folder, location)
    assert reader(location).verify()
    paths = set(repo_of(server, location).commits[repo_of(server, location).branches[location.revision]][1])
    assert {location.path(name) for name in (*FILES, "README.md")} <= paths


def test_a_revision_is_a_commit_for_the_whole_load(server: HubServer, folder: Path) -> None:
    push(folder)
    first = reader()
    repo_of(server).commit(dict.fromkeys(FILES, b"other"), "meanwhile")
    assert first.verify()
    with pytest.raises(CacheGenError):
        reader()
    commit = next(oid for oid, (_, files, _) in repo_of(server).commits.items() if "cachegen.json" in files)
    server.calls.clear()
    pinned = HubLocation("user/context", revision=commit)
    assert reader(pinned).verify()
    assert not [call for call in server.calls if "/api/" in call]


def test_a_second_push_replaces_the_first_in_one_commit(server: HubServer, folder: Path, tmp_path: Path) -> None:
    push(folder)
    repo_of(server).commit({**repo_of(server).files, "notes.txt": b"mine"}, "a note")
    write_artifact(tmp_path / "less", MANIFEST, [row for row in SEGMENTS if not row[0].startswith("refine")])
    before = len(repo_of(server).commits)
    push(tmp_path / "less", commit_message="Only the base")
    repo = repo_of(server)
    assert len(repo.commits) == before + 1
    assert repo.commits[repo.branches["main"]][2] == "Only the base"
    assert set(repo.files) == {*contents(tmp_path / "less"), ".gitattributes", "README.md", "notes.txt"}
    assert reader().verify()


def test_a_signature_is_pushed_too(server: HubServer, folder: Path) -> None:
    pytest.importorskip("cryptography", reason="cryptography is not installed (pip install 'hf_cachegen[crypto]')")
    data = sign(folder, bytes(range(32))).read_bytes()
    push(folder)
    assert repo_of(server).files["cachegen.sig"] == data
    (folder / "cachegen.sig").unlink()
    push(folder)
    assert "cachegen.sig" not in repo_of(server).files
    (folder / "cachegen.sig").write_bytes(data.replace(b"ranges", b"strange"))
    with pytest.raises(SignatureError, match="sign it again"):
        push(folder)


def test_sealed_artifacts(server: HubServer, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("cryptography", reason="cryptography is not installed (pip install 'hf_cachegen[crypto]')")
    from hf_cachegen.stores.sealed import seal

    key, sealed = bytes(range(32)), tmp_path / "sealed"
    push(folder)  # the plain files are removed
    seal(folder, sealed, key)
    push(sealed, key=key)
    assert set(repo_of(server).files) == {*(f"{name}.sealed" for name in FILES), ".gitattributes", "README.md"}
    assert find("user/context", Access(token="owner"))[0].folder == ""
    access = Access(token="owner", cache_dir=tmp_path / "cache", key=key, patience=IMPATIENT)
    total = sum(map(len, contents(folder).values()))
    assert Reader(open_store("user/context", access)).verify() == total
    server.requests.clear()
    assert Reader(open_store("user/context", access)).verify() == total  # all of it is in the cache, at this commit
    assert server.requests == []
    assert Reader(open_store("user/context", replace(access, local_files_only=True))).verify() == total
    with pytest.raises(CorruptError, match="another key"):
        push(sealed, key=bytes(32))
    with pytest.raises(ConfigError, match="not sealed"):
        push(folder, key=key)
    (sealed / "base.safetensors.sealed").write_bytes(b"cut")
    for options in ({}, {"key": key}):
        with pytest.raises(TruncatedError):
            push(sealed, **options)


def test_a_repeated_push_changes_no_file(server: HubServer, folder: Path) -> None:
    push(folder)
    uploads = [call for call in server.calls if call.startswith("PUT")]
    push(folder)
    assert [call for call in server.calls if call.startswith("PUT")] == uploads


def test_a_foreign_card_stays(server: HubServer, folder: Path) -> None:
    push(folder)
    assert repo_of(server).files["README.md"].startswith(TEXT.encode())
    repo_of(server).commit({**repo_of(server).files, "README.md": b"my own words"}, "a card")
    push(folder)
    assert repo_of(server).files["README.md"] == b"my own words"


def test_a_concurrent_commit(server: HubServer, folder: Path) -> None:
    push(folder)
    repo = repo_of(server)
    server.before_commit = [lambda: repo.commit({**repo.files, "notes.txt": b"theirs"}, "meanwhile") and None] * 2
    push(folder, commit_message="mine")
    assert repo.files["notes.txt"] == b"theirs"
    assert [message for _, _, message in repo.commits.values()][-2:] == ["meanwhile", "mine"]


def test_a_concurrent_push_of_the_same_artifact(server: HubServer, folder: Path) -> None:
    push(folder)
    repo = repo_of(server)
    server.before_commit = [lambda: repo.commit({**repo.files, "base.safetensors": b"theirs"}, "meanwhile") and None]
    with pytest.raises(ConflictError, match="somebody else"):
        push(folder)
    assert repo.files["base.safetensors"] == b"theirs"


def test_commits_during_every_attempt(server: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push(folder)
    repo = repo_of(server)
    numbers = iter(range(99))
    server.before_commit = [
        lambda: repo.commit({**repo.files, "notes.txt": b"%d" % next(numbers)}, "meanwhile") and None
    ] * 99
    monkeypatch.setattr(pushing, "BACKOFF_SECONDS", 0.01)
    with pytest.raises(ConflictError, match="each of 8 attempts"):
        push(folder)


def test_many_push_to_one_repository(server: HubServer, folder: Path) -> None:
    """Each pushes its own artifact at the same time: none is lost, and each is one commit."""
    names = [f"part-{number}" for number in range(6)]
    push(folder)
    with ThreadPoolExecutor(len(names)) as pool:
        jobs = [
            pool.submit(push, folder, HubLocation("user/context", subfolder=name), progress=False) for name in names
        ]
    assert len({job.result().commit for job in jobs}) == len(names)
    assert [row.folder for row in find("user/context", Access(token="owner"))] == ["", *names]
    assert len(repo_of(server).commits) == 2 + len(names)


def test_a_pull_request(server: HubServer, folder: Path) -> None:
    push(folder)
    head = repo_of(server).branches["main"]
    pushed = push(folder, create_pr=True, commit_message="please")
    assert pushed.url.endswith("/discussions/1")
    assert repo_of(server).branches["main"] == head


def test_a_public_repository_needs_consent(server: HubServer, folder: Path) -> None:
    push(folder, private=False)
    assert not repo_of(server).private
    with pytest.raises(ConfigError, match="private=False"):
        push(folder)
    assert reader(token=None).verify()


def test_a_damaged_artifact_is_not_pushed(server: HubServer, folder: Path) -> None:
    data = (folder / "base.safetensors").read_bytes()
    (folder / "base.safetensors").write_bytes(data[:-1] + b"x")
    with pytest.raises(CorruptError):
        push(folder)
    assert not server.calls


def test_who_may_read_and_write(server: HubServer, folder: Path) -> None:
    with pytest.raises(StoreAccessError):
        push(folder, token="reader")
    push(folder)
    assert reader(token="reader").verify()
    with pytest.raises(StoreAccessError):
        push(folder, token="reader")
    for token in (None, "stranger"):
        with pytest.raises(ArtifactNotFoundError, match="private one needs a token"):
            reader(token=token)
    with pytest.raises(StoreAccessError, match="token"):
        hub.open_hub(LOCATION, "main", None, IMPATIENT).open("cachegen.json")


def test_missing_repositories_and_files(server: HubServer, folder: Path) -> None:
    push(folder)
    for location in (HubLocation("user/nothing"), HubLocation("user/context", revision="nothing")):
        with pytest.raises(ArtifactNotFoundError, match="nothing"):
            reader(location)
    with pytest.raises(ArtifactNotFoundError, match=r"sub/cachegen.json"):
        reader(HubLocation("user/context", subfolder="sub"))


def test_listing(server: HubServer, folder: Path) -> None:
    size = sum(map(len, contents(folder).values()))
    push(folder)
    for subfolder in ("b", "a/c"):
        push(folder, HubLocation("user/context", subfolder=subfolder))
    found = find("user/context", Access(token="owner"))
    assert found == [Found("", size), Found("a/c", size), Found("b", size)]
    assert find("user/context", Access(token="owner", subfolder="a")) == [Found("c", size)]


def test_offline(server: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for act in (lambda: push(folder), reader, lambda: hub.open_hub(LOCATION, "main"), lambda: hub.find_files(LOCATION)):
        with pytest.raises(OfflineError, match="HF_HUB_OFFLINE"):
            act()
    assert not server.calls


def test_the_hub_is_down(server: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(Server()) as other:
        monkeypatch.setattr(constants, "ENDPOINT", other.url)
    for act in (lambda: hub.resolve(LOCATION, "owner", IMPATIENT), lambda: push(folder)):
        with pytest.raises(StoreError, match=r"hf://datasets/user/context at main: .*refused"):
            act()


def test_network_faults(server: HubServer, folder: Path) -> None:
    push(folder)
    found = reader()
    server.faults = [faults.reset_in_body, None, faults.status(503), None, faults.cut(0.3)]
    assert found.verify()
    server.always = faults.status(500)
    with pytest.raises(StoreError, match="500"):
        reader()


def test_the_token_stays_with_the_hub(server: HubServer, folder: Path) -> None:
    """The Hub redirects to a storage host, with a signature of its own in the query."""
    push(folder)
    with running(Server()) as storage:
        storage.files = {f"blobs/{name}": data for name, data in contents(folder).items()}

        def redirect(request: faults.Request, body: bytes, headers: dict[str, str]) -> None:
            name = request.path.rpartition("/")[2]
            request.answer(302, b"", {"Location": f"{storage.url}/blobs/{name}?X-Amz-Signature=secret"})

        server.always = redirect
        assert reader().verify()
        assert len(storage.requests) == len(FILES)
        assert {headers["Authorization"] for _, headers in storage.requests} == {None}
        storage.always = faults.status(403)
        with pytest.raises(StoreAccessError) as caught:
            reader()
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "location",
    [
        {"repo_id": "no//name"},
        {"repo_id": "a/b/c"},
        {"repo_id": "user/x", "repo_type": "bucket"},
        {"repo_id": "user/x", "subfolder": "../up"},
        {"repo_id": "user/x", "subfolder": "/etc"},
        {"repo_id": "user/x", "subfolder": "a/./b"},
        {"repo_id": "user/x", "subfolder": "a\0b"},
        {"repo_id": "user/x", "revision": ""},
    ],
    ids=["empty part", "three parts", "type", "parent folder", "absolute folder", "dot folder", "nul", "revision"],
)
def test_invalid_locations(location: dict[str, str]) -> None:
    with pytest.raises(ConfigError):
        HubLocation(**location)


@pytest.mark.parametrize(
    ("url", "location"),
    [
        ("hf://datasets/user/name", HubLocation("user/name")),
        ("hf://user/name", HubLocation("user/name")),
        ("hf://user/name@v1", HubLocation("user/name", revision="v1")),
        ("hf://models/user/name@v1/a/b", HubLocation("user/name", "model", "a/b", "v1")),
        ("hf://datasets/user/name@refs%2Fpr%2F1/", HubLocation("user/name", revision="refs/pr/1")),
        ("hf://user", None),
        ("hf://datasets/user/name/../other", None),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value),
)
def test_urls(url: str, location: HubLocation | None) -> None:
    if location is None:
        with pytest.raises(ConfigError):
            HubLocation.from_url(url)
    else:
        assert HubLocation.from_url(url) == location
