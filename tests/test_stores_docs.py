"""Run all code and commands of docs/stores.md, in order, against a Hub and a server on loopback."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch

import hf_cachegen
from hf_cachegen import CacheGenCache, CacheGenConfig, Profile
from tests.cli_support import run, save_model
from tests.http_server import Server, running
from tests.hub_server import HubServer, hub_of_profiles
from tests.klt_support import samples
from tests.small_artifact import contents

pytest.importorskip("cryptography", reason="cryptography is not installed (pip install 'hf_cachegen[crypto]')")
pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed"),
]
DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "stores.md"
BLOCK = re.compile(r"^```(python)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CONFIG = CacheGenConfig(chunk_tokens=32, protect_last=8)
ELSEWHERE = {
    's3://bucket/report", model=model, storage_options={"profile": "work"}': 'memory://bucket/report", model=model',
}
"""Code of the document that needs a real object store, and the code that runs instead."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with hub_of_profiles(monkeypatch, tmp_path / "segments") as found:
        yield found


@pytest.fixture
def web() -> Iterator[Server]:
    with running(Server()) as found:
        yield found


def test_the_document(hub: HubServer, web: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    folder = save_model(tmp_path / "path" / "of" / "the" / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config._name_or_path = "org/model"
    ids = samples()[1][0]
    cache = CacheGenCache.from_context(model, ids, CONFIG, None)
    cache.save_pretrained("report.cachegen")
    cache.push_to_hub("user/report", subfolder="long", revision="v2")
    cache.push_to_hub("stranger/name")
    files = contents(tmp_path / "report.cachegen")
    web.files = {f"caches/report/{name}": data for name, data in files.items()}
    for name, data in files.items():
        fsspec.filesystem("memory").pipe_file(f"/bucket/report/{name}", data)
    names = {
        "CacheGenCache": CacheGenCache, "Profile": Profile, "cache": cache, "hf_cachegen": hf_cachegen, "ids": ids,
        "model": model, "samples": samples(),
    }  # fmt: skip
    text = DOCUMENT.read_text(encoding="utf-8").replace("https://host/", f"{web.url}/")
    for there, here in ELSEWHERE.items():
        assert there in text
        text = text.replace(there, here)
    blocks = BLOCK.findall(text)
    assert len(blocks) == text.count("```") / 2 >= 9
    for language, code in blocks:
        if language:
            exec(compile(code, str(DOCUMENT), "exec"), names)
            continue
        for line in code.splitlines():
            if not line.startswith("hf-cachegen "):
                subprocess.run(line, shell=True, check=True, capture_output=True, timeout=60)
                continue
            done = run(*shlex.split(line, comments=True)[1:])
            assert done.exit_code == 0, f"{line}\n{done.output}"
    secret = web.requests[0][1]["Authorization"]
    assert secret == "Bearer ..."
    assert torch.equal(CacheGenCache.from_pretrained("copy.cachegen").input_ids, ids)
    assert set(hub.repos) == {
        "datasets/user/report", "datasets/stranger/name", "models/owner/model-cachegen-profile",
        "models/org/model-cachegen-profile",
    }  # fmt: skip
    assert not hub.repos["models/org/model-cachegen-profile"].private
    assert all(name.endswith(".sealed") or name in (".gitattributes", "README.md") or "/" in name
               for name in hub.repos["datasets/user/report"].files)  # fmt: skip
    assert os.path.getsize("secret.key") == 32
