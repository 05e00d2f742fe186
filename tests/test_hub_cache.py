"""Push caches to the Hub and load them from it and from URLs, with the argument names of Transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from huggingface_hub import constants

from hf_cachegen import CacheGenCache, CacheGenConfig, generate
from hf_cachegen.artifact import Limits, Manifest, Reader
from hf_cachegen.errors import (
    ArtifactNotFoundError,
    ConfigError,
    LimitError,
    OfflineError,
    StoreAccessError,
    WrongWeightsError,
)
from hf_cachegen.stores import LocalStore, Patience
from hf_cachegen.stores.card import card
from hf_cachegen.stores.segment_cache import DIRECTORY_VARIABLE
from tests import http_server as faults
from tests import tiny_models
from tests.http_server import Server, running
from tests.hub_server import HubServer, running_hub
from tests.small_artifact import write

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
IMPATIENT = Patience(attempts=2, timeout=10, backoff=0.01)
CONFIG = CacheGenConfig(chunk_tokens=16)
REPO = "user/context"


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path / "segments"))
    return tmp_path / "segments"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with running_hub(monkeypatch) as found:
        yield found


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return tiny_models.make("llama")


@pytest.fixture(scope="module")
def context(model: torch.nn.Module) -> CacheGenCache:
    ids = torch.randint(5, tiny_models.VOCABULARY, (1, 40), generator=torch.Generator().manual_seed(0))
    return CacheGenCache.from_context(model, ids, CONFIG)


@pytest.fixture
def pushed(server: HubServer, context: CacheGenCache) -> HubServer:
    context.push_to_hub(REPO, token="owner", description="Forty words | <b>about</b>\nnothing")
    server.calls.clear()
    server.requests.clear()
    return server


def load(location: str = REPO, **options: object) -> CacheGenCache:
    return CacheGenCache.from_pretrained(location, **{"token": "owner", "patience": IMPATIENT, **options})


def same(one: CacheGenCache, other: CacheGenCache) -> bool:
    pairs = zip(one.kv.keys + one.kv.values, other.kv.keys + other.kv.values, strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_push_and_load(
    pushed: HubServer, context: CacheGenCache, model: torch.nn.Module, tmp_path: Path
) -> None:
    context.save_pretrained(tmp_path / "local")
    local = CacheGenCache.from_pretrained(tmp_path / "local")
    loaded = load(model=model)
    assert same(loaded, local)
    prompt = torch.cat([loaded.input_ids, torch.tensor([[7, 8]])], 1)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(
        generate(model, prompt, cache=loaded, **options), generate(model, prompt, cache=local, **options)
    )


def test_the_second_load_asks_for_the_commit_alone(pushed: HubServer) -> None:
    first = load()
    fetched = len(pushed.requests)
    pushed.calls.clear()
    assert same(load(), first)
    assert pushed.calls == [f"GET /api/datasets/{REPO}/revision/main"]
    assert same(load(force_download=True), first)
    assert len(pushed.requests) == 2 * fetched
    assert fetched <= 8


def test_local_files_only(pushed: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OfflineError, match="local_files_only"):
        load(local_files_only=True)
    first = load()
    pushed.calls.clear()
    assert same(load(local_files_only=True), first)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert same(load(), first)
    assert pushed.calls == []
    with pytest.raises(OfflineError):
        load(revision="other")
    with pytest.raises(OfflineError):
        first.push_to_hub("user/other", token="owner")


def test_a_coarse_level_offline_is_that_level_alone(pushed: HubServer) -> None:
    load(level=1)
    assert same(load(level=1, local_files_only=True), load(level=1))
    with pytest.raises(OfflineError):
        load(local_files_only=True)


def test_another_cache_dir(pushed: HubServer, tmp_path: Path, cache_folder: Path) -> None:
    load(cache_dir=tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere").is_dir()
    assert not cache_folder.exists()


def test_revisions_and_folders(server: HubServer, context: CacheGenCache, model: torch.nn.Module) -> None:
    context.push_to_hub(REPO, token="owner", subfolder="deep/inside", revision="trial")
    for location, options in ((REPO, {"subfolder": "deep/inside", "revision": "trial"}),
                           (f"hf://datasets/{REPO}@trial/deep/inside", {})):  # fmt: skip
        assert same(load(location, **options), load(location, **options))
    with pytest.raises(ArtifactNotFoundError):
        load(revision="trial")
    with pytest.raises(ConfigError, match="two revisions"):
        load(f"hf://datasets/{REPO}@trial", revision="main")
    with pytest.raises(ConfigError, match="two folders"):
        load(f"hf://datasets/{REPO}/deep", subfolder="inside")
    other = tiny_models.make("llama", 1)
    with pytest.raises(WrongWeightsError):
        load(subfolder="deep/inside", revision="trial", model=other)


def test_a_model_repository(server: HubServer, context: CacheGenCache) -> None:
    context.push_to_hub(REPO, token="owner", repo_type="model")
    assert load(repo_type="model")
    assert load(f"hf://{REPO}", repo_type="model")  # where the URL says no kind
    with pytest.raises(ArtifactNotFoundError):
        load()


def test_a_loaded_cache_is_pushed_unchanged(pushed: HubServer) -> None:
    load().push_to_hub("user/copy", token="owner")
    files, copies = (pushed.repos[f"datasets/{name}"].files for name in (REPO, "user/copy"))
    assert {k: v for k, v in files.items() if k != "README.md"} == {k: v for k, v in copies.items() if k != "README.md"}


def test_limits(pushed: HubServer) -> None:
    for limits in (Limits(max_tokens=39), Limits(max_decoded_bytes=1000), Limits(max_header_bytes=100)):
        with pytest.raises(LimitError):
            load(limits=limits)
        load()  # and a limit is not reported as a damaged cache


def test_the_card(pushed: HubServer) -> None:
    text = pushed.repos[f"datasets/{REPO}"].files["README.md"].decode()
    _, metadata, body = text.split("---\n", 2)
    assert 'tags: ["kv-cache", "cachegen", "hf_cachegen"]' in metadata
    for said in ("reveals its text", "40 tokens", "float32", f'from_pretrained("{REPO}"', "a local model",
                 r"Forty words \| \<b\>about\</b\> nothing", "| 1 |", "| 3 |"):  # fmt: skip
        assert said in body, said


def test_the_card_without_measurements(tmp_path: Path) -> None:
    write(tmp_path / "context")
    manifest = Reader(LocalStore(tmp_path / "context")).manifest
    layer = {"kind": "full", "heads": 1, "k_dim": 2, "v_heads": 1, "v_dim": 2, "window": None}
    geometry = {"layers": [layer], "tokens": 5, "batch": 1, "dtype": "float16"}
    strange = {"model_id": "org/model", "commit": "0" * 40}

    class Other:
        def __init__(self) -> None:
            self.manifest = Manifest(geometry, {}, manifest.chunks, manifest.files, strange, {"layers": [{}]})

        def nbytes_at(self, level: int) -> int:
            return 10 * level

    text = card(Other(), "user/name", subfolder="a")  # type: ignore[arg-type]
    for said in ('base_model: ["org/model"]', "not measured", 'subfolder="a"', "`" + "0" * 40 + "`"):
        assert said in text


def test_from_a_web_server(context: CacheGenCache, tmp_path: Path) -> None:
    context.save_pretrained(tmp_path / "local")
    with running(Server()) as web:
        web.files = {f"a/b/{path.name}": path.read_bytes() for path in (tmp_path / "local").iterdir()}
        first = CacheGenCache.from_pretrained(f"{web.url}/a/b", patience=IMPATIENT)
        assert same(first, CacheGenCache.from_pretrained(tmp_path / "local"))
        web.requests.clear()
        CacheGenCache.from_pretrained(f"{web.url}/a", subfolder="b", patience=IMPATIENT)
        assert [path for path, _ in web.requests] == ["a/b/cachegen.json"]
        with pytest.raises(ConfigError, match="has none"):
            CacheGenCache.from_pretrained(f"{web.url}/a/b", revision="main")
        with pytest.raises(ConfigError, match="contradict"):
            CacheGenCache.from_pretrained(f"{web.url}/a/b", local_files_only=True, force_download=True)
        web.always = faults.status(403)
        with pytest.raises(StoreAccessError):
            CacheGenCache.from_pretrained(f"{web.url}/a/b", force_download=True, patience=IMPATIENT)
    assert same(CacheGenCache.from_pretrained(f"{web.url}/a/b", local_files_only=True), first)


def test_from_memory(context: CacheGenCache, tmp_path: Path, cache_folder: Path) -> None:
    context.save_pretrained(tmp_path / "local")
    fsspec.filesystem("memory").put(str(tmp_path / "local"), "/context", recursive=True)
    assert same(CacheGenCache.from_pretrained("memory://context"), CacheGenCache.from_pretrained(tmp_path / "local"))
    assert not cache_folder.exists()


@pytest.mark.parametrize("location", ["nothing at all", "/nothing/here", "./user/name", "a/b/c"])
def test_locations_that_are_neither_folder_nor_repository(location: str) -> None:
    with pytest.raises(ArtifactNotFoundError):
        CacheGenCache.from_pretrained(location)


def test_unknown_options(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="revison"):
        CacheGenCache.from_pretrained(tmp_path, revison="main")
    for wrong in ({"revision": "main"}, {"headers": {"a": "b"}}, {"storage_options": {"a": "b"}}):
        with pytest.raises(ConfigError, match="a local folder"):
            CacheGenCache.from_pretrained(tmp_path, **wrong)
    with pytest.raises(ConfigError, match="takes a token"):
        CacheGenCache.from_pretrained(REPO, headers={"a": "b"})
