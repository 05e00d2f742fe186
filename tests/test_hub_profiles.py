"""Push profiles to the Hub and load them from it; caches find the profile that they need."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM

from hf_cachegen import CacheGenCache, CacheGenConfig, Profile, learn_profile
from hf_cachegen.artifact import PROFILE_FILE, Reader
from hf_cachegen.errors import (
    ConfigError,
    OfflineError,
    ProfileError,
    SignatureError,
    WrongModelError,
    WrongWeightsError,
)
from hf_cachegen.models.sampled_weights import coarse_weights
from hf_cachegen.profiles import finding
from hf_cachegen.stores import LocalStore, Patience, SegmentCache
from hf_cachegen.stores.segment_cache import DIRECTORY_VARIABLE
from tests.http_server import Server, running
from tests.hub_server import HubServer, hub_of_profiles
from tests.klt_support import samples
from tests.small_artifact import contents
from tests.tiny_models import make

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
CONFIG = CacheGenConfig(transform="klt", chunk_tokens=32, protect_last=8)
IMPATIENT = Patience(attempts=2, timeout=10, backoff=0.01)
MODEL = "org/model"
REPO = "org/model-cachegen-profile"


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    found = make("llama")
    found.config._name_or_path = MODEL
    return found


@pytest.fixture(scope="module")
def learnt(model: torch.nn.Module) -> Profile:
    return learn_profile(model, samples(), config=CONFIG, target_kl=0.001)


@pytest.fixture
def profile(learnt: Profile) -> Profile:
    """A profile that was never saved or pushed."""
    return replace(learnt)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    finding._known.clear()  # another test's may not have been collected yet
    with hub_of_profiles(monkeypatch, tmp_path / "segments") as found:
        yield found


def context(model: torch.nn.Module, profile: Profile | str | None = "auto", **options: object) -> CacheGenCache:
    return CacheGenCache.from_context(model, samples()[1][0], CONFIG, profile, **options)


def load(location: str | Path, **options: object) -> CacheGenCache:
    return CacheGenCache.from_pretrained(location, **{"patience": IMPATIENT, **options})


def emptied(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Act as another machine: the local cache is empty, and no profile is in use."""
    finding._known.clear()
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(folder))


def test_push_and_load(server: HubServer, profile: Profile, tmp_path: Path) -> None:
    url = profile.push_to_hub(REPO)
    repo = server.repos[f"models/{REPO}"]
    commit = repo.branches["main"]
    assert url.endswith(f"/commit/{commit}")
    assert repo.private
    loaded = Profile.from_pretrained(REPO)
    assert (loaded.digest, loaded.place) == (profile.digest, f"hf://models/{REPO}@{commit}")
    assert profile.place == loaded.place
    assert replace(profile, step_code=profile.step_code + 1).place is None
    loaded.save(tmp_path)
    assert Profile.from_pretrained(tmp_path).pin == profile.pin
    assert Profile.from_pretrained(REPO, local_files_only=True).place == loaded.place
    assert Profile.from_pretrained(f"hf://{REPO}").place == Profile.from_pretrained(loaded.place).place == loaded.place
    with pytest.raises(TypeError, match="revison"):
        Profile.from_pretrained(REPO, revison="v1")
    with pytest.raises(ConfigError, match="digest"):
        Profile.from_pretrained(REPO, public_key=bytes(32))


def test_the_card(server: HubServer, profile: Profile) -> None:
    profile.push_to_hub(REPO)
    text = server.repos[f"models/{REPO}"].files["README.md"].decode()
    _, metadata, body = text.split("---\n", 2)
    assert 'base_model: ["org/model"]' in metadata
    assert "cachegen-profile" in metadata
    for said in (profile.digest, profile.pin.sha256, f'profile="{REPO}"', "10 samples", "| 3 | 0.00"):
        assert str(said) in body


def test_the_default_repository_is_the_users(server: HubServer, profile: Profile) -> None:
    profile.push_to_hub()
    assert set(server.repos) == {"models/owner/model-cachegen-profile"}
    local = replace(profile, about={**profile.about, "model": "/home/me/models/llama/"})
    local.push_to_hub()
    assert "models/owner/llama-cachegen-profile" in server.repos
    with pytest.raises(ConfigError, match="repo_id"):
        replace(profile, about={**profile.about, "model": ".."}).push_to_hub()


def test_a_cache_names_the_location_of_its_profile(
    server: HubServer, model, profile: Profile, tmp_path: Path, monkeypatch
) -> None:
    profile.push_to_hub("somebody/else")
    cache = context(model, profile)
    cache.push_to_hub("user/context")
    files = server.repos["datasets/user/context"].files
    assert PROFILE_FILE not in files
    head = server.repos["models/somebody/else"].branches["main"]
    assert f"hf://models/somebody/else@{head}".encode() in files["cachegen.json"]
    emptied(monkeypatch, tmp_path / "elsewhere")
    loaded = load("user/context", model=model)
    assert loaded.kv.geometry == cache.kv.geometry
    server.calls.clear()
    load("user/context", model=model, local_files_only=True)
    assert server.calls == []
    loaded.save_pretrained(tmp_path / "copy")  # and the copy says it too
    assert Reader(LocalStore(tmp_path / "copy")).manifest.codec["profile"]["place"] == profile.place


def test_a_profile_without_a_location_is_pushed_with_the_cache(
    server: HubServer, model, profile: Profile, tmp_path: Path, monkeypatch
) -> None:
    context(model, profile).push_to_hub("user/context")
    assert server.repos["datasets/user/context"].files[PROFILE_FILE] == profile.to_bytes()
    emptied(monkeypatch, tmp_path / "elsewhere")
    assert load("user/context", model=model)
    emptied(monkeypatch, tmp_path / "streamed")
    assert CacheGenCache.stream("user/context", model, patience=IMPATIENT).kv.geometry.tokens == 60
    context(model, profile).push_to_hub("user/without", with_profile=False)
    emptied(monkeypatch, tmp_path / "third")
    with pytest.raises(ProfileError, match=f"{profile.digest}.*{REPO}"):
        load("user/without", model=model)
    profile.push_to_hub("user/model-cachegen-profile")  # where the artifact's owner keeps profiles of this model
    assert load("user/without", model=model)
    context(model, None).save_pretrained(tmp_path / "delta", replace(CONFIG, transform="delta"))
    load(tmp_path / "delta").push_to_hub("user/delta")
    assert PROFILE_FILE not in server.repos["datasets/user/delta"].files


def test_artifacts_find_their_profile_after_a_newer_one(
    server: HubServer, model, profile: Profile, tmp_path: Path, monkeypatch
) -> None:
    context(model, profile).push_to_hub("user/context", with_profile=False)
    profile.push_to_hub(REPO)
    newer = replace(profile, step_code=profile.step_code + 1)
    newer.push_to_hub(REPO)
    emptied(monkeypatch, tmp_path / "elsewhere")
    assert load("user/context", model=model)
    assert load("user/context", model=model, profile=REPO)
    assert Profile.from_pretrained(REPO).digest == newer.digest
    assert Profile.from_pretrained(REPO, digest=profile.digest).digest == profile.digest


def test_from_a_web_server(server: HubServer, model, profile: Profile, tmp_path: Path) -> None:
    context(model, profile).save_pretrained(tmp_path / "a")
    with running(Server()) as web:
        web.files = {f"a/{name}": data for name, data in contents(tmp_path / "a").items()}
        web.files[f"p/{PROFILE_FILE}"] = profile.to_bytes()
        with pytest.raises(ProfileError, match="beside the artifact"):
            load(f"{web.url}/a", model=model)
        with pytest.raises(ProfileError):
            load(f"{web.url}/a", model=model, profile=None)
        web.requests.clear()
        assert load(f"{web.url}/a", model=model, profile=f"{web.url}/p", headers={"X-Key": "secret"})
        assert {headers["X-Key"] for path, headers in web.requests if path.startswith("p/")} == {None}
        web.files[f"a/{PROFILE_FILE}"] = profile.to_bytes()
        assert load(f"{web.url}/a", model=model, profile=None)
        assert load(f"{web.url}/a", model=model)
    assert load(f"{web.url}/a", model=model, local_files_only=True)


def test_a_model_on_the_hub_finds_its_profile(server: HubServer, model, profile: Profile, monkeypatch) -> None:
    profile.push_to_hub(REPO)
    server.calls.clear()
    cache = context(model)
    assert cache.profile is not None
    assert cache.profile.place == profile.place
    asked = list(server.calls)
    assert len(asked) <= 3
    context(model)
    assert server.calls == asked  # once in a process
    finding._on_hub.cache_clear()
    monkeypatch.setenv("HF_CACHEGEN_PROFILES", "")
    assert context(model).profile is None
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.delenv("HF_CACHEGEN_PROFILES")
    assert context(model).profile is not None  # from the local cache
    assert server.calls == asked


def test_a_model_on_the_hub_without_a_profile(server: HubServer, model) -> None:
    assert context(model).profile is None
    assert server.calls == [f"GET /api/models/{REPO}/revision/main"]
    context(model)
    assert len(server.calls) == 1


def test_a_hub_that_is_down_is_reported(server: HubServer, model, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(Server()) as gone:
        monkeypatch.setattr(constants, "ENDPOINT", gone.url)
    monkeypatch.setattr(finding, "QUICK", IMPATIENT)
    with pytest.warns(UserWarning, match=re.escape(f"cannot determine whether {REPO} has a profile")):
        assert context(model).profile is None


def test_a_profile_found_by_name_is_checked(server: HubServer, model, profile: Profile) -> None:
    """A profile found by the model's name must be of its configuration and its exact weights."""
    finetuned = make("llama", 1)
    finetuned.config._name_or_path = MODEL
    profile.push_to_hub(REPO)
    with pytest.raises(WrongWeightsError, match=REPO):
        context(finetuned)
    halved = make("llama", 1).half()
    halved.config._name_or_path = MODEL
    with pytest.raises(WrongWeightsError, match="other weights"):
        context(halved)
    assert context(finetuned, profile).profile is profile  # a named profile is the user's decision
    older = replace(profile, about={k: v for k, v in profile.about.items() if k != "weights"})
    older.push_to_hub(REPO)
    finding._on_hub.cache_clear()
    with pytest.raises(WrongWeightsError):
        context(model)
    other = make("qwen3")
    other.config._name_or_path = MODEL
    with pytest.raises(WrongModelError):
        context(other)
    server.repos[f"models/{REPO}"].commit({PROFILE_FILE: b"rubbish"}, "rubbish")
    finding._on_hub.cache_clear()
    with pytest.raises(ProfileError, match="not a profile"):
        context(model)


def test_weights_are_the_same_in_every_dtype_that_holds_them(model, profile: Profile, tmp_path: Path) -> None:
    make("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    found = {
        coarse_weights(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype))
        for dtype in (torch.bfloat16, torch.float32)
    }
    assert found == {profile.about["weights"]}
    assert coarse_weights(make("llama", 1)) not in found


def test_a_profile_serves_its_model_in_float16(server: HubServer) -> None:
    model = make("llama")
    model.config._name_or_path = MODEL
    with torch.no_grad():  # values of bfloat16 that float16 does not hold
        model.model.embed_tokens.weight[:8] = 1e-6
    learnt = learn_profile(model, samples(), config=CONFIG, target_kl=0.001)
    learnt.push_to_hub(REPO)
    rounded = model.half()
    assert coarse_weights(rounded) != learnt.about["weights"]
    assert context(rounded).profile.digest == learnt.digest
    earlier = replace(learnt, about={k: v for k, v in learnt.about.items() if k != "weights_float16"})
    earlier.push_to_hub(REPO)
    finding._on_hub.cache_clear()
    with pytest.raises(WrongWeightsError, match=r"an earlier release.*learn it again"):
        context(rounded)
    assert context(rounded, earlier).profile is earlier


def test_a_signature_covers_the_profile(server: HubServer, model, profile: Profile, tmp_path: Path) -> None:
    ed25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")
    from hf_cachegen.artifact.manifest import Manifest, dumps, loads
    from hf_cachegen.stores.signed import sign

    private = ed25519.Ed25519PrivateKey.generate()
    secret, public = private.private_bytes_raw(), private.public_key().public_bytes_raw()
    folder = tmp_path / "a"
    context(model, profile).save_pretrained(folder)
    sign(folder, secret)
    profile.save(folder)
    assert load(folder, model=model, public_key=public)
    manifest = loads((folder / "cachegen.json").read_bytes())
    assert isinstance(manifest, Manifest)
    del manifest.codec["profile"]["sha256"]  # as older releases wrote it
    (folder / "cachegen.json").write_bytes(dumps(manifest))
    sign(folder, secret)
    assert load(folder, model=model)
    with pytest.raises(SignatureError, match="does not cover"):
        load(folder, model=model, public_key=public)
    assert load(folder, model=model, public_key=public, profile=profile)


def test_profiles_are_counted_and_pruned_like_segments(server: HubServer, profile: Profile) -> None:
    profile.push_to_hub(REPO)
    Profile.from_pretrained(REPO)
    rows = {row.origin: row.nbytes for row in SegmentCache().origins()}
    assert rows["profiles, by their SHA-256"] == len(profile.to_bytes())
    SegmentCache().prune(0)
    with pytest.raises(OfflineError):
        Profile.from_pretrained(REPO, local_files_only=True)


def test_a_profile_that_another_release_wrote_is_not_written_again(profile: Profile, tmp_path: Path) -> None:
    """The digest is that of the file: the same content in other bytes is another profile."""
    data = profile.to_bytes()
    length = int.from_bytes(data[:8], "little")
    spaced = (length + 8).to_bytes(8, "little") + data[8 : 8 + length] + b" " * 8 + data[8 + length :]
    found = Profile.from_bytes(spaced)
    assert found.digest != profile.digest
    with pytest.raises(ProfileError, match="copy its file"):
        found.save(tmp_path)
    with pytest.raises(ProfileError, match="copy its file"):
        found.push_to_hub(REPO)
