"""A location's name is taken for a local path, which causes no request, or for a repository; errors name both."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from hf_cachegen import CacheGenCache, PrefixCache, Profile
from hf_cachegen.cli.encode_dataset import TextDataset
from hf_cachegen.config import CacheGenConfig
from hf_cachegen.errors import (
    ArtifactNotFoundError,
    CacheGenError,
    ConfigError,
    OfflineError,
    ProfileError,
    StoreAccessError,
    StoreError,
)
from hf_cachegen.profiles.finding import find as find_profile
from hf_cachegen.stores import Access, Patience, open_store
from hf_cachegen.stores.naming import is_hub_id, is_repository
from hf_cachegen.stores.sealed import seal
from hf_cachegen.stores.survey import find, pull
from tests.cli_support import run_json
from tests.http_server import running
from tests.hub_server import HubServer, point_client_at
from tests.small_artifact import write
from tests.tiny_models import shared, tokens

pytestmark = [
    pytest.mark.usefixtures("own_cache"),
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
]
QUICKLY = Patience(attempts=1, timeout=2)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a folder `runs` of runs, and the home directory."""
    (tmp_path / "runs" / "other").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test when an address is looked up: no code under test catches AssertionError."""

    def asked(*arguments: Any, **options: Any) -> None:
        raise AssertionError(f"the network was asked: {arguments}")

    monkeypatch.setattr(socket, "getaddrinfo", asked)
    monkeypatch.setattr(socket.socket, "connect", asked)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with running(HubServer()) as found:
        assert isinstance(found, HubServer)
        point_client_at(found, monkeypatch)
        yield found


PATHS = [
    "runs/report",
    "./runs/report",
    "../report",
    "~/report",
    "/nothing/here",
    "report",
    "user/report/",
    "a/b/c",
    "a/b.cachegen",
    "a/report.sealed",
    "a/b--c",
    "a/..",
    "a/b.git",
    "a/-b",
    "über/bericht",
    "a\\b",
    "a" * 300,
    f"a/{'b' * 300}",
]


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", PATHS)
def test_a_path_causes_no_request(name: str) -> None:
    assert not is_repository(name)
    folder = os.path.abspath(os.path.expanduser(name))
    uses: list[tuple[Callable[[], Any], type[CacheGenError]]] = [
        (lambda: CacheGenCache.from_pretrained(name), ArtifactNotFoundError),
        (lambda: CacheGenCache.stream(name, shared("llama")), ArtifactNotFoundError),
        (lambda: pull(name, "out"), ArtifactNotFoundError),
        (lambda: find(name), ArtifactNotFoundError),
        (lambda: Profile.from_pretrained(name), ProfileError),
    ]
    for use, error in uses:
        with pytest.raises(error) as raised:
            use()
        assert folder in str(raised.value)
        assert type(raised.value) is error


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    "command", [["inspect"], ["verify"], ["ls"], ["pull-profile"], ["pull"], ["serve-check"]], ids=" ".join
)
def test_a_path_causes_no_request_by_a_command(command: list[str], here: Path) -> None:
    out = ["out"] if "pull" in command[0] else []
    code = {"pull-profile": 6, "serve-check": 1}.get(command[0], 3)
    found = run_json(*command, "runs/report", *out, code=code)
    assert str(here / "runs" / "report") in str(found)
    assert "hf://" in str(found), "what to write where the repository is meant"


@pytest.mark.usefixtures("no_network")
def test_a_path_of_a_model_a_profile_or_a_data_set_causes_no_request(here: Path) -> None:
    Path("text.txt").write_text("words")
    found = run_json("encode", "text.txt", "--out", "out", "--model", "runs/model", code=2)
    assert str(here / "runs" / "model") in found["error"]["message"]
    for location in ("runs/data", "data.jsonl", "a/data.csv", "./data"):
        with pytest.raises(ConfigError, match="there is no file or folder"):
            next(TextDataset(location).rows())
    assert find_profile("auto", "runs/model") is None
    with pytest.raises(ProfileError, match="no profile at"):
        find_profile("runs/profile", "")


def test_names_of_models_may_lack_a_namespace() -> None:
    assert [is_hub_id(name) for name in ("gpt2", "org/model", "runs/model", "./gpt2")] == [True, True, False, False]


def test_a_name_that_can_be_both_is_a_repository(hub: HubServer, here: Path) -> None:
    """The error names both, the folder first."""
    for use in (
        lambda: open_store("user/report"),
        lambda: open_store("user/report", Access(revision="0" * 40)),
        lambda: find("user/report"),
        lambda: Profile.from_pretrained("user/report"),
    ):
        with pytest.raises((ArtifactNotFoundError, ProfileError, StoreAccessError)) as raised:
            use()
        text = str(raised.value)
        assert text.startswith(f"there is no folder {here}/user/report, and as a repository on the Hub: ")
        assert "user/report" in text.partition("Hub: ")[2]
    with pytest.raises(ArtifactNotFoundError) as raised:
        open_store("hf://datasets/user/report")
    assert "folder" not in str(raised.value)


@pytest.mark.parametrize("options", [{}, {"key": b"k" * 32}], ids=str)
def test_offline_names_the_folder_first(monkeypatch: pytest.MonkeyPatch, here: Path, options: dict[str, Any]) -> None:
    first = f"^there is no folder {here}/user/report, and as a repository"
    for revision in (None, "0" * 40):
        access = Access(revision, local_files_only=True, **options)
        with pytest.raises(OfflineError, match=first):
            open_store("user/report", access)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OfflineError, match=first):
        find("user/report")
    with pytest.raises(OfflineError, match=first):
        CacheGenCache.stream("user/report", shared("llama"))


def test_a_network_that_fails_names_the_folder_first(monkeypatch: pytest.MonkeyPatch, here: Path) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    first = f"^there is no folder {here}/user/report, and as a repository"
    for use in (
        lambda: CacheGenCache.from_pretrained("user/report", patience=QUICKLY),
        lambda: CacheGenCache.from_pretrained("user/report", patience=QUICKLY, revision="0" * 40),
        lambda: CacheGenCache.stream("user/report", shared("llama"), patience=QUICKLY),
        lambda: Profile.from_pretrained("user/report", patience=QUICKLY),
    ):
        with pytest.raises(StoreError, match=first):
            use()


@pytest.mark.usefixtures("no_network")
def test_a_folder_is_found_under_every_spelling(here: Path) -> None:
    write(here / "runs" / "report.cachegen")
    for name in ("runs/report.cachegen", "runs/report.cachegen/", "~/runs/report.cachegen", "./runs/report.cachegen"):
        assert open_store(name).size("cachegen.json")
        assert [found.folder for found in find(name)] == [""]
    assert open_store(Path("~/runs/report.cachegen")).size("cachegen.json")
    assert open_store("runs", Access(subfolder="report.cachegen")).size("cachegen.json")


def test_home_is_expanded_when_writing_and_reading(here: Path) -> None:
    cache = CacheGenCache.from_context(shared("llama"), tokens(40), CacheGenConfig(chunk_tokens=16))
    cache.save_pretrained("~/saved")
    assert CacheGenCache.from_pretrained("~/saved").input_ids.shape == (1, 40)
    pull("~/saved", "~/copy")
    assert sorted(os.listdir(here)) == ["copy", "runs", "saved"]


@pytest.mark.usefixtures("no_network")
def test_a_file_instead_of_a_folder(here: Path) -> None:
    write(here / "report")
    for use in (lambda: open_store("report/cachegen.json"), lambda: find("report/cachegen.json")):
        with pytest.raises(ArtifactNotFoundError, match="is a file; name the folder"):
            use()
    found = run_json("push", "report/cachegen.json", "user/name", code=3)
    assert "is a file; name the folder" in found["error"]["message"]


@pytest.mark.parametrize("name", ["", "a\0b", b"bytes", None, 3], ids=repr)
def test_names_that_are_empty_or_of_another_type(name: Any) -> None:
    with pytest.raises(ConfigError, match="expected a path, a URL or a repository"):
        open_store(name)


def test_urls_under_other_spellings() -> None:
    with pytest.raises(ArtifactNotFoundError, match="pass it as a string"):
        open_store(Path("https://host/report"))
    with pytest.raises(StoreError, match=r"127\.0\.0\.1:9"):
        open_store("HTTP://127.0.0.1:9/report", Access(patience=QUICKLY)).size("cachegen.json")


MALFORMED = ["simplecache::file:/etc", "simplecache::s3://bucket/x", "s3:/bucket/x", "file:/etc"]


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("url", [*MALFORMED, "s3://bucket/x", "S3://bucket/x"])
def test_a_url_is_no_path_to_write_to(url: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No folder of that name is made."""
    write(here / "report")
    Path("words.txt").write_text("words")
    cache = CacheGenCache.from_context(shared("llama"), tokens(20), profile=None)
    before = sorted(here.rglob("*"))
    for where in (url, Path(url)):
        for use in (
            lambda where=where: cache.save_pretrained(where),
            lambda where=where: pull("report", where),
            lambda where=where: seal("report", where, bytes(32)),
            lambda where=where: PrefixCache(Path(where)),
            lambda where=where: PrefixCache("prefixes", remote=Path(where)),
        ):
            with pytest.raises(ConfigError, match="expected a local path to write to"):
                use()
    encode = ["encode", "words.txt", "--model", "nothing", "--out"]
    for command in (encode, ["pull", "report"], ["convert", "words.txt"]):
        assert "expected a local path to write to" in str(run_json(*command, url, code=2))
    assert sorted(here.rglob("*")) == before


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("url", MALFORMED)
def test_a_malformed_url_is_no_location(url: str, here: Path) -> None:
    for use in (
        lambda: PrefixCache(url),
        lambda: PrefixCache("prefixes", remote=url),
        lambda: PrefixCache("prefixes", shared=[url]),
    ):
        with pytest.raises(ConfigError, match="got a URL"):
            use()
    for read, error in ((open_store, ArtifactNotFoundError), (Profile.from_pretrained, ProfileError)):
        with pytest.raises(error, match="without a chain of schemes"):
            read(url)
    assert not list(here.glob("*:*"))


def test_a_repository_in_capital_letters() -> None:
    for use in (open_store, Profile.from_pretrained, PrefixCache, find):
        with pytest.raises(ConfigError, match="hf:// in lower case"):
            use("HF://datasets/user/report")


def test_a_folder_with_a_colon_is_a_path(here: Path) -> None:
    for folder in ("notes: 2025", "a:b", here / "s3:", "C:/report"):
        write(Path(folder))
        assert open_store(folder).size("cachegen.json")


def test_a_revision_of_a_folder_is_refused() -> None:
    with pytest.raises(ConfigError, match="write hf://datasets/runs/other"):
        open_store("runs/other", Access(revision="v2"))
