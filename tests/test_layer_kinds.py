"""Kinds of cache layers beside full, sliding and latent ones, and what is tried of a model before its cache is kept."""

from __future__ import annotations

import json
from functools import cache as remember
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from transformers import DynamicCache

from hf_cachegen import CacheGenCache, CacheGenConfig, generate
from hf_cachegen.artifact.artifact import Artifact
from hf_cachegen.codec.geometry import LayerGeometry
from hf_cachegen.errors import (
    LimitError,
    ManifestError,
    ReadOnlyCacheError,
    TensorError,
    UnsupportedFormatError,
    UnsupportedLayerError,
    UnsupportedModelError,
)
from hf_cachegen.models import causality
from hf_cachegen.models.compat import CACHE_ARGUMENT, RELEASE, cache_of, run
from hf_cachegen.models.indexed import joined, require_no_positions, split
from hf_cachegen.models.kinds import layer_contents
from hf_cachegen.stores import LocalStore
from tests import tiny_models
from tests.architectures.checks import CONTEXT, QUESTION
from tests.architectures.models import entries, make

INDEXED, SHARED = "deepseek_v32", "gemma3n_text"
BY_NAME = {entry.name: entry for entry in entries()}
PROMPT = torch.cat([CONTEXT, QUESTION], 1)


@remember
def model(name: str) -> Any:
    if name not in BY_NAME:
        pytest.skip(f"this release of Transformers has no {name}")
    return make(BY_NAME[name])


def tokens(found: Any, **options: Any) -> torch.Tensor:
    return generate(found, PROMPT, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0, **options)


def test_an_index_key_survives_joining() -> None:
    values, index = torch.randn(2, 3, 5, 4), torch.randn(2, 1, 5, 6)
    whole = joined(values, index)
    assert whole.shape == (2, 1, 5, 18)
    found = split(whole, 3, 6)
    assert torch.equal(found[0], values)
    assert torch.equal(found[1], index)
    assert found[0].data_ptr() == whole.data_ptr(), "views, into which a layer can write"


def test_index_keys_are_part_of_the_artifact(tmp_path: Path) -> None:
    cache = CacheGenCache.from_context(model(INDEXED), CONTEXT)
    layer = cache.kv.geometry.layers[0]
    assert (layer.kind, layer.v_heads) == ("indexed", 1)
    cache.save_pretrained(tmp_path, CacheGenConfig(lossless=True))
    manifest = json.loads((tmp_path / "cachegen.json").read_text(encoding="utf-8"))
    assert "indexed" in manifest["required"]
    assert manifest["geometry"]["layers"][0]["index_dim"] == layer.index_dim
    loaded = CacheGenCache.from_pretrained(tmp_path, model(INDEXED))
    assert all(torch.equal(*pair) for pair in zip(loaded.kv.values, cache.kv.values, strict=True))
    assert torch.equal(tokens(model(INDEXED), cache=loaded), tokens(model(INDEXED)))


def test_an_earlier_reader_refuses_index_keys(tmp_path: Path) -> None:
    from hf_cachegen.artifact.manifest import FEATURES, loads

    CacheGenCache.from_context(model(INDEXED), CONTEXT).save_pretrained(tmp_path)
    data = (tmp_path / "cachegen.json").read_bytes()
    with pytest.raises(UnsupportedFormatError, match="indexed"):
        loads(data, features=FEATURES - {"indexed"})


def test_index_keys_without_their_feature_are_refused(tmp_path: Path) -> None:
    from hf_cachegen.artifact import manifest

    CacheGenCache.from_context(model(INDEXED), CONTEXT).save_pretrained(tmp_path)
    path = tmp_path / "cachegen.json"
    found = manifest.loads(path.read_bytes())
    object.__setattr__(found, "required", tuple(name for name in found.required if name != "indexed"))
    path.write_bytes(manifest.dumps(found))
    with pytest.raises(ManifestError, match="indexed layers and the required feature"):
        Artifact(LocalStore(tmp_path))


@pytest.mark.parametrize("index_dim", [0, -1, 19, 1 << 17, "8", True, 7])
def test_a_hostile_index_dim_is_refused(index_dim: Any) -> None:
    with pytest.raises((TensorError, LimitError)):
        LayerGeometry("indexed", 2, 4, 1, 18, index_dim=index_dim)


def test_only_indexed_layers_have_an_index_key() -> None:
    for kind, index_dim in (("full", 4), ("indexed", None)):
        with pytest.raises(TensorError, match="if and only if it is indexed"):
            LayerGeometry(kind, 2, 4, 2, 4, index_dim=index_dim)


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("level", ["text", 1])
@pytest.mark.parametrize("name", [INDEXED, SHARED])
def test_such_contexts_are_streamed_and_recomputed(name: str, level: Any, tmp_path: Path) -> None:
    cache = CacheGenCache.from_context(model(name), CONTEXT)
    cache.save_pretrained(tmp_path, CacheGenConfig(chunk_tokens=16))
    streamed = CacheGenCache.stream(tmp_path, model(name), level=level)
    if level == "text":
        for found, exact in zip(streamed.kv.values, cache.kv.values, strict=True):
            assert torch.allclose(found, exact, atol=1e-3)
        assert torch.equal(tokens(model(name), cache=streamed), tokens(model(name)))
    else:
        assert torch.isfinite(tokens(model(name), cache=streamed).float()).all()


def test_layers_that_share_keys_hold_none() -> None:
    found = model(SHARED)
    cache = CacheGenCache.from_context(found, CONTEXT)
    assert len(cache.kv.geometry.layers) == found.config.num_hidden_layers - 2
    assert torch.equal(tokens(found, cache=cache), tokens(found))
    for given in (None, found):
        copy = cache.to_dynamic(given)
        assert torch.isfinite(run(found, QUESTION, copy).logits).all()


def test_a_shared_cache_stays_read_only() -> None:
    found = model(SHARED)
    cache = CacheGenCache.from_context(found, CONTEXT, attach=False)
    with pytest.raises(ReadOnlyCacheError):
        found(QUESTION, **{CACHE_ARGUMENT: cache}, use_cache=True)


def test_positions_beside_index_keys_are_refused_by_name() -> None:
    layer = type("DynamicIndexedLayer", (), {"indexer_position_ids": torch.tensor([[[0, 0, 1]]])})()
    with pytest.raises(UnsupportedLayerError, match="layer 3 of the cache, a DynamicIndexedLayer"):
        require_no_positions(3, layer)
    layer.indexer_position_ids = None
    require_no_positions(3, layer)


def test_a_quantised_cache_is_dequantised() -> None:
    cache_utils = pytest.importorskip("transformers.cache_utils")
    if not hasattr(cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("this release of Transformers has no quantised cache without further packages")
    found = tiny_models.shared("llama")
    context = tiny_models.tokens(40)
    filled = cache_utils.QuantizedCache("fp8", found.config)
    with torch.no_grad():
        for part in context.split(25, 1):
            run(found, part, filled)
    exact = CacheGenCache.from_context(found, context)
    cache = CacheGenCache.from_cache(filled, context, found, verify="weights")
    for mine, theirs in zip(cache.kv.keys, exact.kv.keys, strict=True):
        assert mine.dtype == theirs.dtype
        assert 0 < (mine - theirs).norm() / theirs.norm() < 0.3
    prompt = torch.cat([context, tiny_models.tokens(3, 9)], 1)
    assert generate(found, prompt, cache=cache, max_new_tokens=3).shape[1] == prompt.shape[1] + 3


def test_a_static_cache_is_captured() -> None:
    from transformers import StaticCache

    found = tiny_models.shared("llama")
    context = tiny_models.tokens(40)
    filled = StaticCache(config=found.config, max_cache_len=64)
    with torch.no_grad():
        run(found, context, filled)
    exact = CacheGenCache.from_context(found, context)
    cache = CacheGenCache.from_cache(filled, context, found)
    assert all(torch.equal(*pair) for pair in zip(cache.kv.keys, exact.kv.keys, strict=True))


def test_a_model_that_reads_beyond_its_window_continues_as_one_pass() -> None:
    found = model("moshi")
    cache = CacheGenCache.from_context(found, CONTEXT)
    assert torch.equal(tokens(found, cache=cache), tokens(found))
    with pytest.raises(UnsupportedModelError, match="outside its window"):
        tokens(found, cache=cache, cache_implementation="static")


def test_a_model_that_is_not_causal_is_refused() -> None:
    encoder = make(BY_NAME["roberta"])
    encoder.config.is_decoder = False
    encoder = type(encoder)(encoder.config).eval()
    with pytest.raises(UnsupportedModelError, match="is_decoder=True"):
        CacheGenCache.from_context(encoder, CONTEXT)


def test_positions_are_those_of_the_stock_generate() -> None:
    """RoBERTa's forward pass begins after its pad token's id; `generate` begins at 0."""
    found = model("roberta")
    cache = CacheGenCache.from_context(found, CONTEXT)
    assert torch.equal(tokens(found, cache=cache), tokens(found))


@pytest.mark.parametrize(("name", "hides"), [("llama", True), ("bloom", True), ("git", False), ("roberta", True)])
def test_pads_are_tried(name: str, hides: bool) -> None:
    assert causality.hides_pads(model(name)) is hides


def test_a_stock_cache_of_a_plain_forward_pass_is_still_accepted() -> None:
    found = model("llama")
    with torch.no_grad():
        filled = cache_of(found(CONTEXT, **{CACHE_ARGUMENT: DynamicCache()}, use_cache=True))
    cache = CacheGenCache.from_cache(filled, CONTEXT, found)
    assert torch.equal(tokens(found, cache=cache), tokens(found))


def test_a_model_that_chooses_its_tokens_is_refused_beyond_its_window() -> None:
    found = model("doge")
    kept = found.config.keep_window_size
    found.config.keep_window_size = 16
    with pytest.raises(UnsupportedModelError, match="at most 16 tokens, it has 40"):
        CacheGenCache.from_context(found, CONTEXT)
    found.config.keep_window_size = kept
    try:
        cache = CacheGenCache.from_context(found, CONTEXT)
    except UnsupportedModelError:  # in some releases its mask lets later tokens change the keys of earlier ones
        assert Version("5.24.dev0") > RELEASE
        return
    assert torch.equal(tokens(found, cache=cache), tokens(found))


def test_a_changed_configuration_is_read_again() -> None:
    config = tiny_models.make("gemma3").config
    text = config.get_text_config(decoder=True)
    before = layer_contents(config)
    kept = list(text.layer_types)
    assert {content.kind for content in before} == {"sliding", "full"}
    try:
        text.layer_types[:] = ["full_attention"] * len(kept)  # in place, and so without a new attribute
        assert {content.kind for content in layer_contents(config)} == {"full"}
    finally:
        text.layer_types[:] = kept
    assert layer_contents(config) == before
