"""Arguments of a wrong kind, and names that no file system or server takes: typed errors state what is expected."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_cachegen
from hf_cachegen import CacheGenCache, PrefixCache, Profile, learn_profile
from hf_cachegen.artifact.artifact import Artifact, write
from hf_cachegen.artifact.encoded import encode_kv
from hf_cachegen.config import CacheGenConfig
from hf_cachegen.errors import (
    ArtifactNotFoundError,
    ConfigError,
    CorruptError,
    PrefixCacheError,
    ProfileError,
    StoreError,
    TensorError,
)
from hf_cachegen.models.convert import save_cache
from hf_cachegen.models.fingerprint import hash_tokens
from hf_cachegen.profiles.files import write_file
from hf_cachegen.profiles.learning.journal import Journal
from hf_cachegen.stores import Access, LocalStore, Patience, SegmentCache, open_store
from hf_cachegen.stores.publishing import publish_artifact
from hf_cachegen.stores.sealed import seal
from hf_cachegen.stores.signed import sign
from hf_cachegen.stores.survey import find, pull
from hf_cachegen.streaming import measure
from tests.cli_support import run_json
from tests.http_server import Request, Server
from tests.klt_support import make_profile
from tests.streaming_support import CONTEXT, exact, serve, stream
from tests.tiny_models import make, shared, tokens

pytestmark = pytest.mark.usefixtures("own_cache")

PROMPT = torch.cat([CONTEXT, tokens(5)], 1)
IMPATIENT = Patience(1, 0.5, backoff=0.01, max_wait=0.1)
KEY = b"k" * 32

WITH_MODEL: dict[str, Callable[[Any, Path], Any]] = {
    "generate": lambda model, folder: hf_cachegen.generate(model, PROMPT, cache=folder),
    "generate with a cache": lambda model, folder: hf_cachegen.generate(model, PROMPT, cache=exact("llama")),
    "generate with an SLO": lambda model, folder: hf_cachegen.generate(model, PROMPT, cache=folder, slo=1.0),
    "generate_text": lambda model, folder: hf_cachegen.generate_text(model, None, "a", cache=folder),  # type: ignore[call-overload]
    "from_pretrained": lambda model, folder: CacheGenCache.from_pretrained(folder, model=model),
    "from_context": lambda model, folder: CacheGenCache.from_context(model, CONTEXT),
    "from_cache": lambda model, folder: CacheGenCache.from_cache(exact("llama").to_dynamic(), CONTEXT, model),
    "stream": lambda model, folder: CacheGenCache.stream(folder, model),
    "attach": lambda model, folder: hf_cachegen.attach(model),
    "detach": lambda model, folder: hf_cachegen.detach(model),
    "learn_profile": lambda model, folder: learn_profile(model, []),
    "measure": lambda model, folder: measure(model),
    "a prefix cache": lambda model, folder: PrefixCache(folder.parent / "prefixes").check(model),
    "a loaded cache": lambda model, folder: exact("llama").check(model),
}


@pytest.mark.parametrize("use", WITH_MODEL)
@pytest.mark.parametrize(
    "model", ["runs/model", 3, Path("model"), {}, torch.nn.Linear(2, 2)], ids=lambda x: type(x).__name__
)
def test_something_else_than_a_model(use: str, model: Any, folder: Path) -> None:
    with pytest.raises(ConfigError, match="expected a model of Transformers, got"):
        WITH_MODEL[use](model, folder)


@pytest.mark.parametrize(
    "cache", [3, 1.5, True, {}, [], b"x", object(), torch.zeros(2)], ids=lambda x: type(x).__name__
)
def test_something_else_than_a_cache(cache: Any) -> None:
    model = hf_cachegen.attach(make("llama"))
    for generate in (
        lambda **given: hf_cachegen.generate(model, PROMPT, **given),
        lambda **given: model.generate(PROMPT, **given),
    ):
        with pytest.raises(ConfigError, match=f"as cache=, got {type(cache).__name__}"):
            generate(cache=cache, max_new_tokens=2)


@pytest.mark.parametrize(
    "config", [{"levels": 2}, "klt", 3, CacheGenConfig, make_profile()], ids=["dict", "str", "int", "class", "profile"]
)
def test_something_else_than_a_config(config: Any, tmp_path: Path) -> None:
    kv = exact("llama").to_dynamic()
    keys, values = [layer.keys for layer in kv.layers], [layer.values for layer in kv.layers]
    for use in (
        lambda: CacheGenCache.from_context(shared("llama"), CONTEXT, config),
        lambda: CacheGenCache.from_cache(kv, CONTEXT, shared("llama"), config),
        lambda: exact("llama").save_pretrained(tmp_path / "context", config),
        lambda: hf_cachegen.encode_kv(keys, values, config),
        lambda: PrefixCache(tmp_path / "prefixes", config=config),
    ):
        with pytest.raises(ConfigError, match="expected a CacheGenConfig or None as config, got"):
            use()
    assert not list(tmp_path.iterdir())


def test_an_unknown_option_of_a_location(folder: Path) -> None:
    for use in (
        lambda **option: CacheGenCache.from_pretrained(folder, **option),
        lambda **option: CacheGenCache.stream(folder, shared("llama"), **option),
        lambda **option: Profile.from_pretrained(folder, **option),
    ):
        with pytest.raises(TypeError, match="unexpected keyword argument 'levl'; the options of a location are"):
            use(levl=1)


@pytest.mark.parametrize("tokenizer", [None, "runs/model", 3], ids=str)
def test_something_else_than_a_tokenizer(tokenizer: Any, folder: Path) -> None:
    uses: list[Callable[[], Any]] = [
        lambda: hf_cachegen.generate_text(shared("llama"), tokenizer, "words", cache=folder),
        lambda: CacheGenCache.from_text(shared("llama"), tokenizer, "words"),
    ]
    if tokenizer is not None:
        uses.append(lambda: CacheGenCache.from_context(shared("llama"), CONTEXT, tokenizer=tokenizer))
    for use in uses:
        with pytest.raises(ConfigError, match="expected the tokenizer of the model, got"):
            use()


@pytest.mark.parametrize("verify", ["probe", "weights"])
@pytest.mark.parametrize("wrong", [97, 10**6, 2**63 - 1])
def test_tokens_beyond_the_vocabulary(wrong: int, verify: Any, tmp_path: Path) -> None:
    """Looking one up would end the use of a GPU. An artifact can hold them with the right hash and probe."""
    model, ids = shared("llama"), CONTEXT.clone()
    ids[0, -1] = wrong
    past = exact("llama").to_dynamic()
    for use in (
        lambda: CacheGenCache.from_context(model, ids),
        lambda: CacheGenCache.from_cache(past, ids, model),
        lambda: learn_profile(model, [(ids, CONTEXT[:, :8])] * 5),
    ):
        with pytest.raises(TensorError, match=f"expected token ids of 0 to 96, .* got {wrong}"):
            use()
    fingerprint = {**exact("llama").fingerprint.to_dict(), "tokens": hash_tokens(ids[0].tolist())}
    kv = exact("llama").kv
    write(encode_kv(kv.keys, kv.values), tmp_path, input_ids=ids[0].tolist(), fingerprint=fingerprint)
    for load in (
        lambda: CacheGenCache.from_pretrained(tmp_path, model, verify=verify),
        lambda: CacheGenCache.stream(tmp_path, model, verify=verify, level="text"),
        lambda: hf_cachegen.generate(model, PROMPT, cache=CacheGenCache.from_pretrained(tmp_path, verify=verify)),
    ):
        with pytest.raises(CorruptError, match="expected token ids of 0 to 96"):
            load()


OPTIONS: dict[str, tuple[Any, ...]] = {
    "prompt_tokens": (-1, "7", 1.5),
    "stall_seconds": (0, "1", float("nan"), float("inf")),
    "connections": (0, "8", 1.5),
    "link": ("a", 3),
    "cancel": (True, "a"),
    "on_event": ("a", 3),
    "slo": (0, "1", float("nan")),
    "fallback": ("a", [3], [("a", 3)]),
    "revision": (3, "a\0", "\ud800"),
    "subfolder": (3, "a\nb"),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_a_stream_of_a_wrong_kind(option: str, folder: Path) -> None:
    for value in OPTIONS[option]:
        with pytest.raises(ConfigError, match=option):
            CacheGenCache.stream(folder, shared("llama"), **{option: value})


@pytest.mark.parametrize(
    "prompt", ["ab", 3, (PROMPT,), (PROMPT, None), (PROMPT, PROMPT, PROMPT)], ids=lambda x: type(x).__name__
)
def test_something_else_than_a_prompt(prompt: Any, folder: Path) -> None:
    with pytest.raises(TensorError, match="prompt must be"):
        CacheGenCache.stream(folder, shared("llama"), prompt=prompt)


LONG = {
    "a name": "n" * 300,
    "a folder": f"a/{'n' * 300}/b",
    "a path": "/".join(["n" * 200] * 25),
    "bytes": "\u00e9" * 200,
}
WRITES: dict[str, Callable[[Any, Path], Any]] = {
    "save_pretrained": lambda name, folder: exact("llama").save_pretrained(name),
    "a profile": lambda name, folder: write_file(name, b""),
    "pull": lambda name, folder: pull(str(folder), name),
    "seal": lambda name, folder: seal(folder, name, KEY),
    "convert": lambda name, folder: save_cache(Artifact(LocalStore(folder)), name, "legacy"),
    "a journal": lambda name, folder: Journal(name, "key"),
    "the local cache": lambda name, folder: SegmentCache(name),
    "a prefix cache": lambda name, folder: PrefixCache(name),
}
READS: dict[str, Callable[[Any], Any]] = {
    "from_pretrained": CacheGenCache.from_pretrained,
    "stream": stream,
    "generate": lambda name: hf_cachegen.generate(shared("llama"), PROMPT, cache=name),
    "Profile.load": Profile.load,
    "profile=": lambda name: CacheGenCache.from_context(shared("llama"), CONTEXT, profile=name),
    "ls": find,
    "sign": lambda name: sign(name, KEY),
    "push": lambda name: publish_artifact(name, "user/name"),
    "a public key": lambda name: open_store(name, Access(public_key=name)),
    "a file of a store": lambda name: LocalStore(".").size(name.replace("/", "")),
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("use", WRITES)
def test_a_name_too_long_to_write(use: str, name: str, folder: Path) -> None:
    with pytest.raises((ConfigError, PrefixCacheError), match=r"at most 255|File name too long"):
        WRITES[use](LONG[name], folder)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("use", READS)
def test_a_name_too_long_to_exist(use: str, name: str) -> None:
    with pytest.raises((ArtifactNotFoundError, ProfileError, ConfigError), match=r"there is no|key file|is a file"):
        READS[use](LONG[name])


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("use", ["convert", "a journal"])
def test_a_name_without_room_for_the_suffix_of_its_partial_file(use: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match="at most 255"):
        WRITES[use]("n" * 252, folder)


@pytest.mark.parametrize("name", ["", "a\0b", "a\ud800", 3, b"a"], ids=ascii)
def test_what_no_path_can_be(name: Any, folder: Path) -> None:
    for use in (
        lambda: CacheGenCache.from_pretrained(name),
        lambda: stream(name),
        lambda: Profile.load(name),
        lambda: find(name),
    ):
        with pytest.raises(ConfigError, match="expected a path, a URL or a repository, got"):
            use()
    for save in WRITES.values():
        with pytest.raises(ConfigError, match="expected a path"):
            save(name, folder)


@pytest.mark.usefixtures("here")
def test_names_of_outputs_and_folders_of_commands(folder: Path) -> None:
    long, url = "n" * 300, "http://[::1"
    for command, code in {
        ("pull", folder, long): 2, ("seal", folder, long, "--key", "k"): 2, ("convert", folder, long): 2,
        ("pull-profile", folder, long): 2, ("encode", __file__, "--model", "m", "--out", long): 2,
        ("encode-dataset", "d.txt", "--model", "m", "--out", long): 2, ("inspect", folder, "--plot", long): 2,
        ("cache", "ls", "--cache-dir", long): 2, ("prefix-cache", "ls", long): 3, ("push", long, "user/name"): 3,
        ("inspect", long): 3, ("sign", long, "--key", __file__): 2, ("inspect", url): 2, ("ls", url): 2,
    }.items():  # fmt: skip
        assert run_json(*command, code=code)["error"]["exit_code"] == code, command


URLS = (
    "http://[::1", "http://", "http:///x", "http://a b/c", "http://127.0.0.1:99999/x", "http://127.0.0.1:abc/x",
    "https://\ud800/x", "http://a..b/x", f"http://{'a' * 300}/x", "nonsense://x", "http://user:password@127.0.0.1/x",
)  # fmt: skip


@pytest.mark.parametrize("url", URLS, ids=ascii)
def test_malformed_urls(url: str) -> None:
    """Nothing is asked, and a password is not repeated."""
    for use in (
        lambda: open_store(url, Access(patience=IMPATIENT)).size("cachegen.json"),
        lambda: stream(url, patience=IMPATIENT),
        lambda: Profile.from_pretrained(url, patience=IMPATIENT),
        lambda: PrefixCache(url),
        lambda: find(url),
    ):
        with pytest.raises(ConfigError) as raised:
            use()
        assert "password" not in str(raised.value)


def test_letters_of_any_alphabet_in_a_url(server: Server, folder: Path) -> None:
    url = serve(server, folder, "\u00fcber einen Bericht")
    for written in (url, f"{server.url}/%C3%BCber%20einen%20Bericht", url.replace("http", "HTTP")):
        assert CacheGenCache.from_pretrained(written).get_seq_length() == CONTEXT.shape[1]
    long = f"{server.url}/{'n' * 1000}?signature={'s' * 1000}"
    with pytest.raises(ArtifactNotFoundError):  # a URL has no limit of a file's name
        stream(long)


@pytest.mark.parametrize(
    "headers", [{"a": "b\r\nc: d"}, {"a b": "c"}, {"a": "\u20ac"}, {"a": 3}, ["a"], {"": "a"}], ids=str
)
def test_headers_that_cannot_be_sent(headers: Any) -> None:
    with pytest.raises(ConfigError, match="header") as raised:
        open_store("http://127.0.0.1:1/x", Access(headers=headers, patience=IMPATIENT))
    assert "c: d" not in str(raised.value)


@pytest.mark.parametrize(
    "location", ["http://[::1", "http://127.0.0.1:abc/", "file:///etc/passwd", "http://\x80\x81/", "//["]
)
def test_a_redirect_to_a_malformed_or_unsafe_url(server: Server, location: str) -> None:
    def redirect(request: Request, body: bytes, headers: dict[str, str]) -> None:
        request.answer(302, b"", {"Location": location})

    server.files["a/cachegen.json"], server.always = b"{}", redirect
    with pytest.raises(StoreError):
        open_store(f"{server.url}/a", Access(patience=IMPATIENT)).size("cachegen.json")


def test_a_filesystem_that_cannot_be_reached() -> None:
    """Some connect when they are made."""
    for use in (lambda: open_store("ftp://127.0.0.1:1/x"), lambda: PrefixCache("ftp://127.0.0.1:1/x")):
        with pytest.raises(StoreError, match="ConnectionRefusedError"):
            use()
