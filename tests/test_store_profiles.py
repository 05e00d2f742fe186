"""The files of profiles: found by hash, beside an artifact and in repositories, and accepted for the right hash alone.

Any bytes stand for a profile here: its content does not matter.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import xxhash
from huggingface_hub import constants

from hf_cachegen.artifact import PROFILE_FILE, Limits
from hf_cachegen.artifact.pin import Pin
from hf_cachegen.errors import (
    CacheGenError,
    ConfigError,
    LimitError,
    ManifestError,
    OfflineError,
    ProfileError,
    StoreAccessError,
    StoreError,
)
from hf_cachegen.stores import Access, Patience, open_store, pushing
from hf_cachegen.stores.hub import HubLocation
from hf_cachegen.stores.profiles import fetch, fetch_pinned, repositories, repository
from tests import http_server as faults
from tests.http_server import Server, running
from tests.hub_server import HubServer, Repo, point_client_at
from tests.small_artifact import contents, write

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
IMPATIENT = Patience(attempts=2, timeout=10, backoff=0.01)
DATA = bytes(range(256)) * 1200  # more than what comes with opening a file
OTHER = DATA[::-1]
MODEL = "org/model"
REPOSITORY = HubLocation("org/model-cachegen-profile", "model")


def pin_of(data: bytes, **changes: Any) -> Pin:
    pin = Pin(xxhash.xxh3_128_hexdigest(data), hashlib.sha256(data).hexdigest(), len(data), MODEL)
    return replace(pin, **changes)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with running(HubServer()) as found:
        assert isinstance(found, HubServer)
        point_client_at(found, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
        yield found


@pytest.fixture
def access(tmp_path: Path) -> Access:
    return Access(token="owner", cache_dir=tmp_path / "cache", patience=IMPATIENT)


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Server]:
    """Serve an artifact at /a."""
    write(tmp_path / "artifact")
    with running(Server()) as found:
        found.files = {f"a/{name}": data for name, data in contents(tmp_path / "artifact").items()}
        yield found


def push(data: bytes, location: HubLocation = REPOSITORY, **options: Any) -> pushing.Pushed:
    return pushing.push_profile(data, location, "---\n---\n# A profile", **{"token": "owner", **options})


def find(pin: Pin, web: Server, access: Access, limits: Limits | None = None) -> bytes:
    return fetch_pinned(pin, open_store(f"{web.url}/a", access), access, limits or Limits())


def test_repositories_by_convention(monkeypatch: pytest.MonkeyPatch) -> None:
    assert repositories(MODEL, "me") == ["org/model-cachegen-profile", "me/model-cachegen-profile"]
    assert repositories(MODEL, "org") == ["org/model-cachegen-profile"]
    monkeypatch.setenv("HF_CACHEGEN_PROFILES", "us, them")
    assert repositories(MODEL) == ["us/model-cachegen-profile", "them/model-cachegen-profile"]
    monkeypatch.setenv("HF_CACHEGEN_PROFILES", "")
    assert repositories(MODEL) == []
    for name in ("", "/a/folder", "../up", "a/b/c", "a/..", "a/" + "b" * 99, "..", "a/../b", "a\0/b", "-a/b"):
        assert repository(name) is None, name


def test_a_push_keeps_every_profile_under_its_digest(server: HubServer, access: Access) -> None:
    first, second = push(DATA), push(OTHER)
    files = server.repos["models/org/model-cachegen-profile"].files
    digests = [pin_of(data).digest for data in (DATA, OTHER)]
    assert set(files) == {".gitattributes", "README.md", PROFILE_FILE, *(f"{digest}.safetensors" for digest in digests)}
    assert files[PROFILE_FILE] == OTHER
    assert fetch(REPOSITORY.repo_id, replace(access, repo_type="model"), Limits()) == (OTHER, second.location)
    pinned = replace(access, repo_type="model", revision=first.commit)
    assert fetch(REPOSITORY.repo_id, pinned, Limits()) == (DATA, first.location)
    by_digest = fetch(REPOSITORY.repo_id, replace(access, repo_type="model"), Limits(), digests[0])
    assert by_digest == (DATA, second.location)
    assert first.location == f"hf://models/org/model-cachegen-profile@{first.commit}"
    with pytest.raises(ProfileError, match="no profile 0000"):
        fetch(REPOSITORY.repo_id, replace(access, repo_type="model"), Limits(), "0" * 32)


def test_a_concurrent_push_of_a_profile(server: HubServer) -> None:
    push(DATA)
    repo = server.repos["models/org/model-cachegen-profile"]
    server.before_commit = [lambda: repo.commit({**repo.files, "notes.txt": b"theirs"}, "meanwhile") and None]
    push(OTHER)
    assert (repo.files["notes.txt"], repo.files[PROFILE_FILE]) == (b"theirs", OTHER)
    server.before_commit = [lambda: repo.commit({**repo.files, PROFILE_FILE: b"theirs"}, "meanwhile") and None]
    with pytest.raises(CacheGenError, match="somebody else"):
        push(DATA)
    assert repo.files[PROFILE_FILE] == b"theirs"


def test_a_second_load_sends_no_request(server: HubServer, access: Access, web: Server) -> None:
    push(DATA)
    server.calls.clear()
    assert find(pin_of(DATA), web, access) == DATA
    assert server.calls == [f"GET /{REPOSITORY.repo_id}/resolve/main/{pin_of(DATA).digest}.safetensors"] * 2
    server.calls.clear()
    web.requests.clear()
    assert find(pin_of(DATA), web, access) == DATA
    assert find(pin_of(DATA), web, replace(access, local_files_only=True)) == DATA
    assert not [path for path, _ in web.requests if PROFILE_FILE in path]
    assert server.calls == []
    assert find(pin_of(DATA), web, replace(access, force_download=True)) == DATA
    assert server.calls


def test_cached_profiles_are_hashed_again(server: HubServer, access: Access, web: Server, tmp_path: Path) -> None:
    push(DATA)
    find(pin_of(DATA), web, access)
    (path,) = (p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.stat().st_size == len(DATA))
    path.write_bytes(OTHER)
    server.calls.clear()
    assert find(pin_of(DATA), web, access) == DATA
    assert server.calls


def test_the_order_of_the_search(server: HubServer, access: Access, web: Server) -> None:
    """Search beside the artifact, at the pinned location, then in the model's repositories; skip another profile."""
    with pytest.raises(ProfileError) as caught:
        find(pin_of(DATA), web, access)
    for text in (f"beside the artifact, {web.url}/a", "hf://models/org/model-cachegen-profile: not there", "profile="):
        assert text in str(caught.value)
    push(OTHER)
    with pytest.raises(ProfileError, match="another profile"):
        find(pin_of(DATA), web, access)
    pushed = push(DATA, HubLocation("somebody/profiles", "model"))
    assert find(pin_of(DATA, place=pushed.location), web, access) == DATA
    with pytest.raises(ProfileError):
        find(pin_of(DATA), web, replace(access, cache_dir=access.cache_dir.parent / "another"))  # type: ignore[union-attr]
    web.files[f"a/{PROFILE_FILE}"] = DATA
    server.calls.clear()
    assert find(pin_of(DATA), web, replace(access, force_download=True)) == DATA
    assert server.calls == []


def test_the_namespace_of_the_artifact(server: HubServer, access: Access, tmp_path: Path) -> None:
    write(tmp_path / "artifact")
    pushing.push(tmp_path / "artifact", HubLocation("me/report"), "---\n---\n", token="owner")
    push(DATA, HubLocation("me/model-cachegen-profile", "model"))
    assert fetch_pinned(pin_of(DATA), open_store("me/report", access), access, Limits()) == DATA


def test_a_repository_that_was_uploaded_by_hand(server: HubServer, access: Access, web: Server) -> None:
    """A repository that was uploaded by hand has the one file."""
    repo = server.repos["models/org/model-cachegen-profile"] = Repo(private=False)
    repo.commit({PROFILE_FILE: DATA}, "by hand")
    assert find(pin_of(DATA), web, access) == DATA


def test_a_branch_that_moves(server: HubServer, access: Access, web: Server) -> None:
    """The branch moves after a commit was resolved, and in the middle of a download."""
    push(DATA)
    repo = server.repos["models/org/model-cachegen-profile"]

    def move(request: faults.Request, body: bytes, headers: dict[str, str]) -> None:
        repo.commit({**repo.files, PROFILE_FILE: OTHER, f"{pin_of(DATA).digest}.safetensors": OTHER}, "moved")
        request.answer(206, body, headers)

    server.faults = [move]
    data, _ = fetch(REPOSITORY.repo_id, replace(access, repo_type="model"), Limits())
    assert data == DATA  # all of it from the commit that was listed
    repo.commit({**repo.files, f"{pin_of(DATA).digest}.safetensors": DATA}, "back")
    server.faults = [move]
    with pytest.raises(StoreError, match="changed while it was being read"):
        find(pin_of(DATA), web, replace(access, cache_dir=access.cache_dir.parent / "b"))  # type: ignore[union-attr]
    with pytest.raises(ProfileError, match="another profile"):
        find(pin_of(DATA), web, replace(access, cache_dir=access.cache_dir.parent / "c"))  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "fault", [faults.status(500), faults.reset_at_once, faults.cut(0.3), faults.whole_without_length]
)
def test_a_location_that_fails_does_not_count_as_empty(
    server: HubServer, access: Access, web: Server, fault: faults.Fault
) -> None:
    push(DATA)
    server.always = fault
    with pytest.raises(StoreError, match="org/model-cachegen-profile"):
        find(pin_of(DATA), web, access)
    server.always = None
    assert find(pin_of(DATA), web, access) == DATA


def test_wrong_bytes_are_refused(server: HubServer, access: Access, web: Server) -> None:
    push(DATA)
    server.always = faults.flip
    with pytest.raises(ProfileError, match="another profile"):
        find(pin_of(DATA), web, access)
    assert not any(p.is_file() and p.stat().st_size == len(DATA) for p in access.cache_dir.rglob("*"))  # type: ignore[union-attr]


def test_a_length_that_is_not_the_pins_is_not_fetched(server: HubServer, access: Access, web: Server) -> None:
    web.files[f"a/{PROFILE_FILE}"] = OTHER * 10
    with pytest.raises(ProfileError, match=f"{len(OTHER) * 10} bytes"):
        find(pin_of(DATA), web, access)
    assert len([path for path, _ in web.requests if path.endswith(PROFILE_FILE)]) == 1


def test_limits(server: HubServer, access: Access, web: Server) -> None:
    push(DATA)
    limits = Limits(max_profile_bytes=len(DATA) - 1)
    with pytest.raises(ProfileError, match="LimitError"):
        find(pin_of(DATA), web, access, limits)
    with pytest.raises(LimitError):
        fetch(REPOSITORY.repo_id, replace(access, repo_type="model"), limits)


def test_offline(server: HubServer, access: Access, web: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    push(DATA)
    offline = replace(access, local_files_only=True)
    named = replace(access, repo_type="model")
    local = replace(named, local_files_only=True)
    for act in (lambda: find(pin_of(DATA), web, offline), lambda: fetch(REPOSITORY.repo_id, local, Limits())):
        with pytest.raises(OfflineError, match="local_files_only"):
            act()
    fetch(REPOSITORY.repo_id, named, Limits())
    server.calls.clear()
    assert find(pin_of(DATA), web, offline) == DATA
    assert fetch(REPOSITORY.repo_id, local, Limits())[0] == DATA
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch(REPOSITORY.repo_id, named, Limits())[0] == DATA
    with pytest.raises(OfflineError):
        fetch("org/another", named, Limits())
    with pytest.raises(OfflineError):
        push(DATA)
    assert server.calls == []


def test_private_repositories(server: HubServer, access: Access, web: Server) -> None:
    push(DATA)
    anonymous = replace(access, token=None)
    with pytest.raises(ProfileError, match="StoreAccessError"):
        find(pin_of(DATA), web, anonymous)
    with pytest.raises(ProfileError, match="private one needs a token"):
        fetch(REPOSITORY.repo_id, replace(anonymous, repo_type="model"), Limits())
    with pytest.raises(StoreAccessError):
        push(OTHER, token="reader")


@pytest.mark.parametrize("kind", ["folder", "file", "url", "url of the file", "link"])
def test_other_locations(server: HubServer, access: Access, web: Server, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "here" / PROFILE_FILE
    path.parent.mkdir()
    path.write_bytes(DATA)
    web.files[f"p/{PROFILE_FILE}"] = DATA
    (tmp_path / "link.safetensors").symlink_to(path)
    locations: dict[str, str | Path] = {
        "folder": path.parent, "file": str(path), "url": f"{web.url}/p",
        "url of the file": f"{web.url}/p/{PROFILE_FILE}", "link": tmp_path / "link.safetensors",
    }  # fmt: skip
    assert fetch(locations[kind], access, Limits()) == (DATA, None)
    assert fetch(locations[kind], replace(access, local_files_only=True), Limits()) == (DATA, None)
    fsspec.filesystem("memory").pipe_file(f"/p/{PROFILE_FILE}", DATA)
    assert fetch("memory://p", replace(access, local_files_only=True), Limits()) == (DATA, None)  # no farther than that
    with pytest.raises(ProfileError, match=pin_of(OTHER).digest):
        fetch(locations[kind], access, Limits(), pin_of(OTHER).digest)
    with pytest.raises(ConfigError, match="revision"):
        fetch(locations[kind], replace(access, revision="v1"), Limits())


@pytest.mark.parametrize(
    "make", [lambda path: None, os.mkfifo, lambda path: path.mkdir()], ids=["none", "pipe", "folder"]
)
def test_locations_without_a_profile(access: Access, tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / PROFILE_FILE)
    with pytest.raises(ProfileError, match="there is no profile"):
        fetch(tmp_path / PROFILE_FILE, access, Limits())
    assert pin_of(DATA).in_file(tmp_path / PROFILE_FILE, Limits()) is None


@pytest.mark.parametrize(
    "named",
    [
        None, [], {}, {"digest": 5}, {"digest": "0" * 31}, {"digest": "../../etc/passwd"},
        {"digest": "0" * 32, "sha256": "1"},
        {"digest": "0" * 32, "bytes": -1}, {"digest": "0" * 32, "bytes": True}, {"digest": "0" * 32, "place": "file:///etc"},
        {"digest": "0" * 32, "place": "https://inside.example/metadata"}, {"digest": "0" * 32, "place": ["hf://a/b"]},
    ],
    ids=str,
)  # fmt: skip
def test_an_untrusted_manifest(named: Any) -> None:
    with pytest.raises(ManifestError, match="profile"):
        Pin.from_codec({"profile": named})
    pin = pin_of(DATA, place="hf://models/a/b@" + "0" * 40)
    assert Pin.from_codec({"profile": pin.to_dict()}) == pin


@pytest.mark.parametrize("location", ["hf://models/../x", "hf://x", "hf://models/a/b@v1/../c", "hf://a/b\0"])
def test_an_untrusted_location_that_is_invalid(server: HubServer, access: Access, web: Server, location: str) -> None:
    with pytest.raises(ProfileError, match="ConfigError"):
        find(pin_of(DATA, place=location), web, access)
    assert not [call for call in server.calls if "model-cachegen-profile" not in call]


def test_untrusted_text_does_not_reach_the_terminal(server: HubServer, access: Access, web: Server) -> None:
    with pytest.raises(ProfileError) as caught:
        find(pin_of(DATA, place="hf://models/a/b\x1b[2J", model="a\x1b[2Jb"), web, access)
    assert "\x1b" not in str(caught.value)


def test_an_untrusted_model_name_names_no_location(server: HubServer, access: Access, web: Server) -> None:
    for model in ("../../etc", "org/../x", "a/b?c=d", "http://a/b", "org/" + "x" * 500):
        with pytest.raises(ProfileError):
            find(pin_of(DATA, model=model), web, access)
    assert server.calls == []


def test_secrets_stay_with_their_host(server: HubServer, access: Access, web: Server) -> None:
    """Headers for the artifact's server do not go to the Hub, the Hub's token not to the artifact's server, and neither
    along a redirect.
    """
    push(DATA, private=False)
    with running(Server()) as storage:
        storage.files = {"blob": DATA}
        server.always = lambda request, body, headers: request.answer(302, b"", {"Location": f"{storage.url}/blob"})
        own = replace(access, headers={"X-Key": "secret"})
        assert find(pin_of(DATA), web, own) == DATA
        assert {headers["X-Key"] for _, headers in web.requests} == {"secret"}
        assert {headers["Authorization"] for _, headers in web.requests} == {None}
        assert {headers["Authorization"] for _, headers in server.requests} == {"Bearer owner"}
        for _, headers in [*server.requests, *storage.requests]:
            assert headers["X-Key"] is None
        assert {headers["Authorization"] for _, headers in storage.requests} == {None}
