"""The commands push-profile and pull-profile, and the profiles of other commands, with a Hub on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from hf_cachegen.cli.errors import MISMATCH, PROFILE, USAGE
from hf_cachegen.profiles import finding
from hf_cachegen.profiles.files import PROFILE_FILE
from hf_cachegen.stores.segment_cache import DIRECTORY_VARIABLE
from tests.cli_support import ENCODE, LEARN, ask, documented, encode, run, run_json, save_model, text, write
from tests.hub_server import HubServer, Repo, hub_of_profiles
from tests.small_artifact import contents

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    folder = tmp_path_factory.mktemp("profile")
    done = run("profile", "--model", model, "--text", "-", "--out", folder, *LEARN, stdin=text(1200))
    assert done.exit_code == 0, done.output
    return folder / PROFILE_FILE


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with hub_of_profiles(monkeypatch, tmp_path / "segments") as found:
        yield found


def elsewhere(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Simulate another machine, with empty caches."""
    finding._known.clear()
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(folder))


def test_a_pushed_profile_is_pulled(server: HubServer, profile: Path, tmp_path: Path) -> None:
    pushed = run_json("push-profile", profile, "user/profiles", "--message", "Hello")
    repo = server.repos["models/user/profiles"]
    assert (pushed["commit"], repo.private) == (repo.branches["main"], True)
    assert repo.commits[pushed["commit"]][2] == "Hello"
    assert pushed["place"] == f"hf://models/user/profiles@{pushed['commit']}"
    pulled = run_json("pull-profile", "user/profiles", tmp_path / "model")
    assert (tmp_path / "model" / PROFILE_FILE).read_bytes() == profile.read_bytes()
    assert (pulled["digest"], pulled["place"]) == (pushed["digest"], pushed["place"])
    for command, found in (("push-profile", pushed), ("pull-profile", pulled)):
        assert documented(command, found)
    shown = run("push-profile", profile.parent, "--public").stdout
    assert shown.startswith(f"{server.url}/models/owner/llama-cachegen-profile/commit/")
    assert not server.repos["models/owner/llama-cachegen-profile"].private
    shown = run("pull-profile", "user/profiles", tmp_path / "mine.safetensors", "--digest", pushed["digest"]).stdout
    assert shown.startswith(f"{tmp_path / 'mine.safetensors'}: ")
    (tmp_path / "mine.safetensors").write_bytes(b"another")
    again = ("pull-profile", "user/profiles", tmp_path / "mine.safetensors")
    assert run_json(*again, code=USAGE)["error"]["type"] == "ArtifactExistsError"
    assert run_json(*again, "--overwrite")["bytes"] == profile.stat().st_size


def test_profiles_are_listed(server: HubServer, profile: Path, tmp_path: Path) -> None:
    """By name, in a folder, and in a namespace next to the artifacts."""
    write(tmp_path / "context")
    nbytes, size = profile.stat().st_size, sum(map(len, contents(tmp_path / "context").values()))
    assert run("push-profile", profile, "user/profiles").exit_code == 0
    assert run("push", tmp_path / "context", "user/context", "--subfolder", "a").exit_code == 0
    repo = server.repos["models/user/profiles"]
    repo.commit({**repo.files, f"{'0' * 32}.safetensors": b"an older one", "notes.safetensors": b"none"}, "more")
    server.repos["models/user/unrelated"] = unrelated = Repo(False)
    unrelated.commit({"README.md": b"weights", "model.safetensors": b"x"}, "hello")
    server.repos["models/other/profiles"] = repo

    row = {"folder": "", "bytes": nbytes, "kept": 1}
    found = run_json("ls", "user/profiles", "--repo-type", "model")
    assert found == {"place": "user/profiles", "artifacts": [], "profiles": [row]}
    assert run("ls", "hf://models/user/profiles").stdout.split("  ")[-2:] == [".", "(profile, 1 older)\n"]
    everything = run_json("ls", "hf://user")
    assert everything["artifacts"] == [{"folder": "hf://datasets/user/context/a", "bytes": size}]
    assert everything["profiles"] == [{**row, "folder": "hf://models/user/profiles"}]
    lines = run("ls", "hf://user/").stdout.splitlines()
    assert [line.endswith("(profile, 1 older)") for line in lines] == [False, True]
    (tmp_path / "context" / PROFILE_FILE).write_bytes(profile.read_bytes())
    local = run_json("ls", tmp_path)
    assert local["artifacts"] == [{"folder": "context", "bytes": size}]
    assert local["profiles"] == [{"folder": "context", "bytes": nbytes, "kept": 0}]
    assert documented("ls", local)
    assert run_json("ls", "hf://user", "--subfolder", "a", code=USAGE)["error"]["type"] == "ConfigError"
    assert run_json("ls", "hf://unknown")["artifacts"] == []


def test_private_profiles_are_listed_with_access_only(
    server: HubServer, profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("push-profile", profile, "user/profiles").exit_code == 0
    monkeypatch.setenv("HF_TOKEN", "stranger")
    assert run_json("ls", "hf://user")["profiles"] == []
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert run_json("ls", "hf://user", code=7)["error"]["type"] == "OfflineError"


@pytest.mark.parametrize(
    "arguments",
    [
        ["push-profile", "nothing"],
        ["push-profile", "rubbish.safetensors", "user/name"],
        ["pull-profile", "user/nothing", "out"],
        ["pull-profile", "rubbish.safetensors", "out"],
    ],
    ids=["push-nothing", "push-damaged", "pull-nothing", "pull-damaged"],
)
def test_wrong_arguments_are_refused(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rubbish.safetensors").write_bytes(b"rubbish")
    assert run_json(*arguments, code=PROFILE)["error"]["type"] == "ProfileError"
    assert not (tmp_path / "out").exists()
    assert not server.repos


def test_push_refuses_an_artifact_without_its_profile(
    server: HubServer, model: Path, profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "klt"
    assert encode(model, folder, "--profile", profile).exit_code == 0
    refused = run_json("push", folder, "user/context", code=PROFILE)
    assert "--profile" in refused["error"]["message"]
    assert not server.repos
    assert run("push", folder, "user/without", "--profile", "none").exit_code == 0
    assert PROFILE_FILE not in server.repos["datasets/user/without"].files
    assert run("push", folder, "user/context", "--profile", profile).exit_code == 0
    assert server.repos["datasets/user/context"].files[PROFILE_FILE] == profile.read_bytes()
    for repository, code in (("user/context", 0), ("user/without", PROFILE)):
        elsewhere(monkeypatch, tmp_path / repository)
        assert run(*ask(repository, model)).exit_code == code
    elsewhere(monkeypatch, tmp_path / "pulled")
    assert run("pull", "user/context", tmp_path / "pulled").exit_code == 0
    assert (tmp_path / "pulled" / PROFILE_FILE).read_bytes() == profile.read_bytes()
    assert run("push", tmp_path / "pulled", "user/again").exit_code == 0  # it is beside the artifact now
    assert PROFILE_FILE in server.repos["datasets/user/again"].files
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / PROFILE_FILE).write_bytes(b"what my caches need")
    assert run("pull", "user/context", tmp_path / "mine").exit_code == 0
    assert (tmp_path / "mine" / PROFILE_FILE).read_bytes() == b"what my caches need"
    assert run("pull", "user/context", tmp_path / "mine", "--overwrite").exit_code == 0
    assert (tmp_path / "mine" / PROFILE_FILE).read_bytes() == profile.read_bytes()
    assert run("pull", "user/without", tmp_path / "bare").exit_code == 0
    assert not (tmp_path / "bare" / PROFILE_FILE).exists()


def test_a_profile_of_a_repository(server: HubServer, model: Path, profile: Path, tmp_path: Path) -> None:
    pushed = run_json("push-profile", profile, "user/profiles")
    folder = tmp_path / "klt"
    assert encode(model, folder, "--profile", "user/profiles").exit_code == 0
    assert run_json("inspect", folder)["profile"]["place"] == pushed["place"]
    assert pushed["place"][:40] in run("inspect", folder).stdout
    assert run("push", folder, "user/context").exit_code == 0  # says itself where its profile is
    assert PROFILE_FILE not in server.repos["datasets/user/context"].files
    assert run_json("verify", "user/context", "--model", model)["profile"] == pushed["digest"]
    assert run(*ask("user/context", model, "--profile", "user/profiles")).exit_code == 0


def test_push_refuses_an_unneeded_profile(server: HubServer, model: Path, profile: Path, tmp_path: Path) -> None:
    assert encode(model, tmp_path / "plain", "--profile", "none").exit_code == 0
    for options, code in (((), 0), (("--profile", "none"), 0), (("--profile", profile), USAGE)):
        assert run("push", tmp_path / "plain", "user/plain", *options).exit_code == code


def test_a_model_its_profile_and_its_caches_all_on_the_hub(
    server: HubServer, model: Path, profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's id is enough to encode with its profile, and to answer on another machine."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = server.repos["models/org/model"] = Repo(private=False)
    repo.commit({path.name: path.read_bytes() for path in model.iterdir()}, "a model")
    assert run("push-profile", profile, "org/model-cachegen-profile").exit_code == 0
    done = run("encode", "-", "--model", "org/model", "--out", tmp_path / "klt", *ENCODE, stdin=text(120))
    assert done.exit_code == 0, done.output
    found = run_json("inspect", tmp_path / "klt")
    assert (found["codec"]["config"]["transform"], found["fingerprint"]["model_id"]) == ("klt", "org/model")
    assert found["profile"]["place"].startswith("hf://models/org/model-cachegen-profile@")
    assert run("push", tmp_path / "klt", "user/context").exit_code == 0
    elsewhere(monkeypatch, tmp_path / "elsewhere")
    finding._on_hub.cache_clear()
    asked = ("--model", "org/model", "--prompt", text(5, 3), "--max-new-tokens", 4)
    assert run_json("generate", "user/context", *asked)["new_tokens"] > 0
    other = save_model(tmp_path / "finetuned", seed=1)
    repo.commit({path.name: path.read_bytes() for path in other.iterdir()}, "other weights")
    again = ("encode", "-", "--model", "org/model", "--out", tmp_path / "no", *ENCODE)
    refused = run_json(*again, code=MISMATCH, stdin=text(120))
    assert (refused["error"]["type"], "profile" in refused["error"]["message"]) == ("WrongWeightsError", True)
    assert run(*again, "--profile", "none", stdin=text(120)).exit_code == 0


def test_signed_and_sealed_with_its_profile(
    server: HubServer, model: Path, profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sealed folder holds all that reading needs, except two keys."""
    serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key, pem = Ed25519PrivateKey.generate(), serialization.Encoding.PEM
    private, public, secret = (tmp_path / name for name in ("key.pem", "public.pem", "secret.key"))
    private_form, unencrypted = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    private.write_bytes(key.private_bytes(pem, private_form, unencrypted))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    secret.write_bytes(bytes(range(32)))
    folder, sealed = tmp_path / "klt", tmp_path / "sealed"
    assert encode(model, folder, "--profile", profile).exit_code == 0
    (folder / PROFILE_FILE).write_bytes(profile.read_bytes())
    for command in (("sign", folder, "--key", private), ("seal", folder, sealed, "--key", secret),
                    ("push", sealed, "user/secret", "--key", secret)):  # fmt: skip
        assert run(*command).exit_code == 0
    names = server.repos["datasets/user/secret"].files
    assert all(name.endswith((".sealed", ".gitattributes", ".md")) for name in names)
    elsewhere(monkeypatch, tmp_path / "elsewhere")
    keys = ("--key", secret, "--public-key", public)
    assert run_json("inspect", "user/secret", "--key", secret)["profile"]["model"] == str(model)
    assert run_json("verify", "user/secret", "--model", model, *keys)["sound"]
    assert run_json(*ask("user/secret", model, *keys))["new_tokens"] > 0
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert run_json(*ask("user/secret", model, *keys))["new_tokens"] > 0  # from the local cache, where it is sealed
    kept = [path.read_bytes() for path in (tmp_path / "elsewhere").rglob("*") if path.is_file()]
    assert kept
    assert not [data for data in kept if b"cachegen_profile" in data or b"safetensors" in data]
    assert run_json(*ask("user/secret", model, "--key", private), code=USAGE)["error"]["type"] == "ConfigError"
