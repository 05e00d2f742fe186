"""Streams that have more than one source."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from eval.reference import MODEL_PATH
from hf_cachegen import CacheGenConfig
from hf_cachegen.cache import CacheGenCache
from hf_cachegen.errors import ArtifactNotFoundError, ConfigError, StoreError
from hf_cachegen.streaming.bandwidth import Bandwidth
from hf_cachegen.streaming.fetching import Fetcher
from tests import http_server as faults
from tests.http_server import Request, Server, running
from tests.streaming_support import CONFIG, at_level, only, report, same_kv, serve, stream
from tests.tiny_models import shared, tokens

pytestmark = pytest.mark.usefixtures("own_cache")


def test_the_first_source_may_be_unreachable(spare: Server, folder: Path) -> None:
    with running(Server()) as gone:
        dead = gone.url
    cache = stream(dead, fallback=[serve(spare, folder)])
    assert same_kv(cache, at_level(folder))
    assert dead in report(cache).faults[0]


def test_an_unreachable_source_and_fallback_is_an_error(server: Server) -> None:
    with running(Server()) as gone:
        dead = gone.url
    with pytest.raises(StoreError):
        stream(dead, fallback=[dead])
    with pytest.raises(ArtifactNotFoundError):
        stream(server.url, fallback=[dead])


def test_another_artifact_is_refused_as_a_fallback(server: Server, spare: Server, folder: Path, tmp_path: Path) -> None:
    """It would decode to the keys and values of another context."""
    CacheGenCache.from_context(shared("llama"), tokens(100, seed=8), CONFIG).save_pretrained(tmp_path / "other")
    server.always = only("refine-2", faults.status(500))
    cache = stream(serve(server, folder), fallback=[serve(spare, tmp_path / "other")], refine="while_generating")
    assert cache.refinement is not None
    cache.refinement.wait(60)
    assert same_kv(cache, at_level(folder, 2))
    assert "holds another artifact" in "".join(report(cache).faults)


@pytest.mark.parametrize("gone", [False, True])
def test_a_file_that_fails_does_not_exclude_its_source(server: Server, folder: Path, gone: bool) -> None:
    """A finer part fails repeatedly before the coarser part, requested meanwhile, arrives."""

    def answer(request: Request, body: bytes, headers: dict[str, str]) -> None:
        if "refine-2" in request.path:
            faults.status(500)(request, body, headers)
            return
        if "refine-1" in request.path:
            time.sleep(0.3)
        request.answer(206, body, headers)

    with running(Server()) as other:
        dead = other.url
    server.always = answer
    cache = stream(serve(server, folder), fallback=[dead] if gone else [], refine="while_generating")
    assert cache.refinement is not None
    cache.refinement.wait(60)
    assert same_kv(cache, at_level(folder, 2))


def test_a_source_is_left_in_one_step(
    server: Server, spare: Server, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise, on a slow link, nothing would seem to be expected any more."""
    give_back, rate, leaving = Fetcher._give_back, Bandwidth.rate, threading.Event()

    def slowly(self: Fetcher, *arguments: Any) -> Any:
        leaving.set()
        try:
            return give_back(self, *arguments)
        finally:
            time.sleep(0.3)
            leaving.clear()

    monkeypatch.setattr(Fetcher, "_give_back", slowly)
    monkeypatch.setattr(Bandwidth, "rate", lambda self: 1e-9 if leaving.is_set() else rate(self))
    server.always = only("refine", faults.status(403))
    cache = stream(serve(server, folder), fallback=[serve(spare, folder)], slo=20.0)
    assert same_kv(cache, at_level(folder))


def test_credentials_are_not_sent_to_the_fallback(server: Server, spare: Server, folder: Path) -> None:
    server.always = only("refine", faults.status(500))
    stream(serve(server, folder), fallback=[serve(spare, folder)], headers={"Authorization": "Bearer secret"})
    assert all(headers.get("Authorization") == "Bearer secret" for _, headers in server.requests)
    assert spare.requests
    assert not any(headers.get("Authorization") for _, headers in spare.requests)
    spare.requests.clear()
    other = (spare.url, {"headers": {"Authorization": "Bearer other"}})
    stream(server.url, fallback=[other], force_download=True)
    assert {headers.get("Authorization") for _, headers in spare.requests} == {"Bearer other"}


def test_a_fallback_is_decoded_with_the_profile_in_the_models_folder(
    server: Server, spare: Server, tmp_path: Path
) -> None:
    model = hf.AutoModelForCausalLM.from_pretrained(MODEL_PATH, dtype=torch.bfloat16)
    exact = CacheGenCache.from_context(model, torch.arange(100)[None] + 3, CacheGenConfig(transform="klt"))
    exact.save_pretrained(tmp_path / "klt")
    server.always = only("base", faults.status(500))
    url, other = serve(server, tmp_path / "klt"), serve(spare, tmp_path / "klt")
    cache = CacheGenCache.stream(url, model, fallback=[other], stall_seconds=0.5)
    assert same_kv(cache, CacheGenCache.from_pretrained(tmp_path / "klt", model))
    assert report(cache).text_chunks == 0


def test_a_fallback_with_an_invalid_location_ends_the_stream(server: Server, folder: Path) -> None:
    """The error is raised once the fallback is needed."""
    url = serve(server, folder)
    server.always = only("base", faults.status(500))
    with pytest.raises(ConfigError):
        stream(url, fallback=["nonsense://somewhere/else"])
    server.always = None
    assert report(stream(url, fallback=["nonsense://somewhere/else"])).level == 3
