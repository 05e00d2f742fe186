"""Convert caches that torch.save wrote to artifacts and back, and refuse hostile files."""

from __future__ import annotations

import json
import os
import resource
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from hf_cachegen import CacheGenCache, CacheGenConfig, encode_kv
from hf_cachegen.artifact import artifact
from hf_cachegen.codec.geometry import LayerGeometry
from hf_cachegen.errors import (
    ArtifactExistsError,
    ArtifactNotFoundError,
    ConfigError,
    CorruptError,
    TensorError,
    UnsupportedLayerError,
)
from hf_cachegen.models.compat import CACHE_ARGUMENT
from hf_cachegen.models.convert import load_cache, save_cache
from hf_cachegen.stores import LocalStore
from tests import tiny_models
from tests.cli_support import LEARN, encode, run_json, save_model, text

LOSSLESS = CacheGenConfig(transform="identity", lossless=True, levels=1)


def tensors(tokens: int = 12) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(1, 2, tokens, 8, generator=generator), torch.randn(1, 2, tokens, 8, generator=generator))
        for _ in range(3)
    ]


def dynamic(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> DynamicCache:
    cache = DynamicCache()
    for index, (key, value) in enumerate(pairs):
        cache.update(key, value, index)
    return cache


def saved(value: Any, path: Path) -> Path:
    torch.save(value, path)
    return path


@pytest.mark.parametrize("form", ["legacy", "dynamic"])
def test_files_round_trip(tmp_path: Path, form: str) -> None:
    pairs = tensors()
    path = saved(tuple(pairs) if form == "legacy" else dynamic(pairs), tmp_path / "past.pt")
    keys, values = load_cache(path)
    artifact.write(encode_kv(keys, values, LOSSLESS), tmp_path / "context")
    save_cache(artifact.Artifact(LocalStore(tmp_path / "context")), tmp_path / "back.pt", form)  # type: ignore[arg-type]
    for (key, value), found_key, found_value in zip(pairs, *load_cache(tmp_path / "back.pt"), strict=True):
        assert torch.equal(key, found_key)
        assert torch.equal(value, found_value)
    assert sorted(os.listdir(tmp_path)) == ["back.pt", "context", "past.pt"]


class Bomb:
    def __reduce__(self) -> Any:
        return os.system, ("touch exploded",)


class Other(DynamicCache):
    """A cache class of another program."""


def broken_cache() -> DynamicCache:
    cache = dynamic(tensors())
    cache.layers[1].keys = "no tensor"
    return cache


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (Bomb(), CorruptError),
        ([(torch.zeros(1), Bomb())], CorruptError),
        (Other(), CorruptError),
        ({"a": torch.zeros(1)}, TensorError),
        (torch.zeros(3), TensorError),
        ((), TensorError),
        (DynamicCache(), TensorError),
        ([torch.zeros(1, 1, 1, 1)], TensorError),
        ([(torch.zeros(1), 3)], TensorError),
        ([(torch.zeros(1),) * 4], UnsupportedLayerError),
        (broken_cache(), TensorError),
    ],
    ids=["code", "code-in-pair", "subclass", "dictionary", "tensor", "empty", "empty-cache", "one-tensor", "number",
         "four-entries", "text-as-keys"],
)  # fmt: skip
def test_other_objects_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: Any, error: type[Exception]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=r"past.pt"):
        load_cache(saved(value, tmp_path / "past.pt"))
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "data", [b"", b"not a file of torch", b"PK\x03\x04", b"\x80\x02}"], ids=["empty", "text", "zip", "pickle"]
)
def test_damaged_files_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "past.pt").write_bytes(data)
    with pytest.raises(CorruptError):
        load_cache(tmp_path / "past.pt")
    whole = saved(tuple(tensors()), tmp_path / "whole.pt").read_bytes()
    (tmp_path / "past.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptError):
        load_cache(tmp_path / "past.pt")


def test_a_full_disk_is_an_error_of_the_system(tmp_path: Path) -> None:
    keys = [torch.randn(1, 2, 2000, 8)]
    artifact.write(encode_kv(keys, keys, CacheGenConfig(lossless=True)), tmp_path / "artifact")
    stored = artifact.Artifact(LocalStore(tmp_path / "artifact"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # Python ignores SIGXFSZ, so writing fails with EFBIG
    try:
        with pytest.raises(OSError, match=r"too large: '.*past.pt'"):
            save_cache(stored, tmp_path / "past.pt", "legacy")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


def test_an_archive_that_unpacks_to_more_bytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "past.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 24))
        archive.writestr("archive/version", "3")
    with pytest.raises(CorruptError, match=r"it unpacks from \d+ to 16777217 bytes"):
        load_cache(path)


def test_missing_files_are_an_error(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.pt", tmp_path):
        with pytest.raises(ArtifactNotFoundError):
            load_cache(path)


def test_saving_refuses_unsupported_layers_and_existing_files(tmp_path: Path) -> None:
    pairs = tensors()
    sliding = [LayerGeometry("sliding", 2, 8, 2, 8, window=4)] * 3
    encoded = encode_kv([k for k, _ in pairs], [v for _, v in pairs], LOSSLESS, layers=sliding)
    artifact.write(encoded, tmp_path / "context")
    found = artifact.Artifact(LocalStore(tmp_path / "context"))
    with pytest.raises(UnsupportedLayerError, match="legacy"):
        save_cache(found, tmp_path / "out.pt", "dynamic")
    with pytest.raises(ConfigError):
        save_cache(found, tmp_path / "out.pt", "pickle")  # type: ignore[arg-type]
    save_cache(found, tmp_path / "out.pt", "legacy")
    with pytest.raises(ArtifactExistsError):
        save_cache(found, tmp_path / "out.pt", "legacy")
    save_cache(found, tmp_path / "out.pt", "legacy", overwrite=True)


def test_the_convert_command(tmp_path: Path) -> None:
    path = saved(tuple(tensors()), tmp_path / "past.pt")
    found = run_json("convert", path, tmp_path / "context")
    assert found["bytes"] == sum(file.stat().st_size for file in (tmp_path / "context").iterdir())
    assert run_json("convert", path, tmp_path / "context", code=2)["error"]["type"] == "ArtifactExistsError"
    run_json("convert", path, tmp_path / "context", "--overwrite")
    found = run_json("convert", tmp_path / "context", tmp_path / "out.pt", "--to", "dynamic", "--level", "1")
    assert found["form"] == "dynamic"
    assert load_cache(tmp_path / "out.pt")[0][0].shape == (1, 2, 12, 8)
    assert run_json("convert", tmp_path / "no.pt", tmp_path / "x", code=3)["error"]["type"] == "ArtifactNotFoundError"


@pytest.mark.parametrize("value", [[1, 2], [], ((torch.full((1, 2, 8, 4), float("nan")),) * 2,)], ids=["1", "0", "NaN"])
def test_a_file_without_a_cache_is_an_error_of_the_input(value: object, tmp_path: Path) -> None:
    path = saved(value, tmp_path / "past.pt")
    assert run_json("convert", path, tmp_path / "context", code=3)["error"]["type"] == "TensorError"


def test_the_profile_that_an_artifact_needs_can_be_named(tmp_path: Path) -> None:
    model, context, out = save_model(tmp_path / "model"), tmp_path / "context", tmp_path / "out.pt"
    samples = tmp_path / "samples.txt"
    samples.write_text(text(1200))
    profile = tmp_path / "profile.safetensors"
    run_json("profile", "--model", model, "--text", samples, "--out", profile, *LEARN)
    assert encode(model, context, "--profile", profile).exit_code == 0
    found = run_json("convert", context, out, "--to", "legacy", code=6)["error"]["message"]
    assert "pass it with --profile" in found
    run_json("convert", context, out, "--to", "legacy", "--profile", profile)
    ids = CacheGenCache.from_pretrained(context, profile=profile).input_ids[0].tolist()
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    again = tmp_path / "again"
    options = ("--model", model, "--input-ids", tmp_path / "ids.json", "--dtype", "float32", "--profile")
    for choice in (profile, "none"):
        run_json("convert", out, again, *options, choice, "--overwrite")
        assert (run_json("inspect", again)["codec"]["config"]["transform"] == "klt") == (choice == profile)


def test_the_convert_command_with_a_model(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    model = tiny_models.make("llama", 0)
    ids = list(range(5, 25))
    past = DynamicCache()
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]), **{CACHE_ARGUMENT: past}, use_cache=True)
    path = saved(past, tmp_path / "past.pt")
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    options = ["--model", folder, "--input-ids", tmp_path / "ids.json", "--dtype", "float32"]
    run_json("convert", path, tmp_path / "context", *options)
    assert CacheGenCache.from_pretrained(tmp_path / "context", model=model).input_ids.tolist() == [ids]
    (tmp_path / "ids.json").write_text("[1, 2]")
    assert run_json("convert", path, tmp_path / "other", *options, code=3)["error"]["type"] == "TensorError"
    for wrong in (b"{}", b"[1.5]", b"[-1]", b"no json", b"[NaN]", b"[" * 100_000, b"\xff\xfe"):
        (tmp_path / "ids.json").write_bytes(wrong)
        assert run_json("convert", path, tmp_path / "other", *options, code=2)["error"]["type"] == "ConfigError"


@pytest.mark.parametrize(
    "options",
    [["--model", "x"], ["--level", "1"], ["--profile", "x"], ["--to", "legacy", "--model", "x", "--input-ids", "-"]],
    ids=" ".join,
)
def test_contradictory_options_are_refused(tmp_path: Path, options: list[str]) -> None:
    assert run_json("convert", "past.pt", tmp_path / "out", *options, code=2)["error"]["type"] == "UsageError"
