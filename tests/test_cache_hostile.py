"""Artifacts whose manifest states another geometry than the model's, and contexts that are not token ids."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BatchEncoding

from hf_cachegen.artifact import MANIFEST_FILE, manifest
from hf_cachegen.artifact.artifact import Artifact
from hf_cachegen.cache import CacheGenCache
from hf_cachegen.errors import ManifestError, TensorError, WrongModelError
from hf_cachegen.generation import generate
from hf_cachegen.models.requirements import require_geometry
from tests import tiny_models

CONTEXT = tiny_models.tokens(40)


def edited(folder: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """Change the geometry in the manifest, and its checksum."""
    path = folder / MANIFEST_FILE
    members = json.loads(path.read_text())
    edit(members["geometry"])
    members.pop("xxh3")
    lines = ["{"] + [f"{json.dumps(name)}:{json.dumps(value)}," for name, value in sorted(members.items())]
    body = ("\n".join(lines) + "\n").encode()
    path.write_bytes(body + f'"xxh3":"{manifest.digest(body)}"\n}}\n'.encode())
    return folder


def every_layer(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda geometry: [layer.update(changes) for layer in geometry["layers"]] and None


def halved(geometry: dict[str, Any]) -> None:
    """Double the layers and halve their heads: the number of channels stays."""
    geometry["layers"] = [{**layer, "heads": 1, "v_heads": 1} for layer in geometry["layers"] for _ in range(2)]


EDITS: dict[str, tuple[str, Callable[[dict[str, Any]], None], str]] = {
    "sliding": ("llama", every_layer(kind="sliding", window=8), "kind: expected full, got sliding; window: expected"),
    "mla": ("llama", every_layer(kind="mla"), "kind: expected full, got mla"),
    "window": ("mistral", every_layer(window=8), "window: expected 16, got 8"),
    "hybrid": ("gemma3", every_layer(kind="full", window=None), "layer 0 .* expected sliding, got full"),
    "no latent": ("deepseek", every_layer(kind="full"), "kind: expected mla, got full"),
    "more layers": ("llama", halved, "expected 4 layers as in the model, the cache has 8"),
    "heads": ("llama", every_layer(heads=4, k_dim=4), "heads: expected 2, got 4; k_dim: expected 8, got 4"),
    "dims": ("qwen3", every_layer(v_heads=1, v_dim=16), "v_heads: expected 2, got 1; v_dim: expected 8, got 16"),
}


@pytest.mark.parametrize(("name", "edit", "message"), EDITS.values(), ids=EDITS.keys())
def test_a_geometry_that_is_not_the_models_is_refused_before_decoding(
    name: str, edit: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_models.shared(name)
    CacheGenCache.from_context(model, CONTEXT).save_pretrained(tmp_path / "a")
    assert CacheGenCache.from_pretrained(tmp_path / "a", model).get_seq_length() == 40
    edited(tmp_path / "a", edit)
    monkeypatch.setattr(Artifact, "decode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(WrongModelError, match=message):
        CacheGenCache.from_pretrained(tmp_path / "a", model)
    with pytest.raises(WrongModelError, match=message):
        generate(model, CONTEXT, cache=tmp_path / "a", max_new_tokens=1)


@pytest.mark.parametrize("with_model", [True, False])
def test_a_geometry_of_another_dtype_than_the_fingerprint(with_model: bool, tmp_path: Path) -> None:
    model = tiny_models.shared("llama")
    CacheGenCache.from_context(model, CONTEXT).save_pretrained(tmp_path / "a")
    edited(tmp_path / "a", lambda geometry: geometry.update(dtype="bfloat16"))
    with pytest.raises(ManifestError, match="the geometry is of bfloat16, the fingerprint of float32"):
        CacheGenCache.from_pretrained(tmp_path / "a", model if with_model else None)


def test_generate_checks_a_cache_that_was_loaded_without_a_model(tmp_path: Path) -> None:
    model = tiny_models.shared("llama")
    CacheGenCache.from_context(model, CONTEXT).save_pretrained(tmp_path / "a")
    edited(tmp_path / "a", every_layer(kind="sliding", window=8))
    cache = CacheGenCache.from_pretrained(tmp_path / "a")
    prompt = torch.cat([CONTEXT, tiny_models.tokens(5, 9)], dim=1)
    with pytest.raises(WrongModelError, match="kind: expected full, got sliding"):
        generate(model, prompt, cache=cache, max_new_tokens=2)


def test_heads_are_compared_only_where_every_layer_has_the_same() -> None:
    model = tiny_models.shared("llama")
    cache = CacheGenCache.from_context(model, CONTEXT)
    layers = tuple(dataclasses.replace(layer, heads=3, v_dim=5) for layer in cache.kv.geometry.layers)
    odd = dataclasses.replace(cache.kv.geometry, layers=layers)
    config = copy.deepcopy(model.config)
    with pytest.raises(WrongModelError):
        require_geometry(config, odd)
    config.v_head_dim = 5
    require_geometry(config, odd)
    config = copy.deepcopy(model.config)
    config.update({"per_layer_config": {"1": {"head_dim": 5}}})
    require_geometry(config, odd)


def test_a_model_in_training_mode_is_prefilled_without_dropout() -> None:
    model = tiny_models.make("llama")
    expected = CacheGenCache.from_context(model, CONTEXT)
    model.train()
    model.model.layers[1].eval()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    modes = [module.training for module in model.modules()]
    assert len(set(modes)) == 2
    cache = CacheGenCache.from_context(model, CONTEXT)
    for left, right in zip((*cache.kv.keys, *cache.kv.values), (*expected.kv.keys, *expected.kv.values), strict=True):
        assert torch.equal(left, right)
    assert [module.training for module in model.modules()] == modes
    model.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        CacheGenCache.from_context(model, CONTEXT)
    assert [module.training for module in model.modules()] == modes, "restored after an error, too"


@pytest.mark.parametrize(
    "context",
    [BatchEncoding({"input_ids": "a text"}), {"input_ids": CONTEXT.float()}, "a text", None, ["a", "text"],
     [[3, 4], [5]], [CONTEXT]],
    ids=["encoding of a text", "dict of numbers", "text", "none", "words", "ragged", "list of tensors"],
)  # fmt: skip
def test_a_context_that_is_not_token_ids(context: Any) -> None:
    with pytest.raises(TensorError, match=r"expected one row of token ids"):
        CacheGenCache.from_context(tiny_models.shared("llama"), context)
