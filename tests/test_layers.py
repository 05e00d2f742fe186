"""Caches captured and rebuilt: geometry, prefixes, rows, and every kind of layer that is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from hf_cachegen.codec.geometry import Geometry, LayerGeometry
from hf_cachegen.errors import (
    LimitError,
    ManifestError,
    TensorError,
    UnsupportedLayerError,
    UnsupportedModelError,
)
from hf_cachegen.models import kinds
from hf_cachegen.models.compat import CACHE_ARGUMENT
from hf_cachegen.models.layers import KVTensors, build_dynamic, build_static, capture
from hf_cachegen.models.prefix import Reuse, match
from hf_cachegen.models.requirements import layer_kinds, positions_change, require_model
from hf_cachegen.models.running import layer_devices
from tests import tiny_models

CPU = torch.device("cpu")
CONTEXT = 40


def prefill(name: str, cache: DynamicCache, count: int = CONTEXT) -> DynamicCache:
    with torch.no_grad():
        tiny_models.shared(name)(tiny_models.tokens(count), **{CACHE_ARGUMENT: cache}, use_cache=True)
    return cache


@pytest.mark.parametrize("name", tiny_models.SUPPORTED)
def test_capture_holds_every_token_of_every_layer(name: str) -> None:
    model = tiny_models.shared(name)
    kv = capture(prefill(name, DynamicCache()), model.config)
    assert kv.geometry.tokens == CONTEXT
    assert kv.geometry.nbytes == sum(t.numel() * 4 for t in (*kv.keys, *kv.values))
    assert [(layer.kind, layer.window) for layer in kv.geometry.layers] == layer_kinds(model.config)


def test_sliding_and_latent_layers_have_their_geometry() -> None:
    kinds = [layer[0] for layer in layer_kinds(tiny_models.shared("gemma3").config)]
    assert kinds == ["sliding", "full", "sliding", "full"]
    latent = capture(prefill("deepseek", DynamicCache()), tiny_models.shared("deepseek").config).geometry.layers[0]
    assert (latent.kind, latent.heads) == ("mla", 1)
    assert latent.k_dim != latent.v_dim, "K is a latent, V a rotary key"


@pytest.mark.parametrize("length", [1, 15, 16, 17, 39, 40])
@pytest.mark.parametrize("name", tiny_models.SUPPORTED)
def test_a_built_cache_is_the_stock_one_of_that_prefix(name: str, length: int) -> None:
    config = tiny_models.shared(name).config
    kv = capture(prefill(name, DynamicCache()), config)
    built = build_dynamic(kv, Reuse((0,), length, False), 1, [CPU] * 4)
    stock = prefill(name, DynamicCache(config=config), length)
    assert type(built) is DynamicCache
    for mine, theirs in zip(built.layers, stock.layers, strict=True):
        assert type(mine) is type(theirs)
        assert mine.get_seq_length() == theirs.get_seq_length() == length
        assert mine.get_mask_sizes(3) == theirs.get_mask_sizes(3)
        torch.testing.assert_close(mine.keys, theirs.keys)
        torch.testing.assert_close(mine.values, theirs.values)


def test_rows_of_one_context_are_views() -> None:
    kv = capture(prefill("llama", DynamicCache()), tiny_models.shared("llama").config)
    built = build_dynamic(kv, Reuse((0, 0), 30, False), 2, [CPU] * 4)
    assert built.layers[0].keys.shape[0] == 4
    assert built.layers[0].keys.untyped_storage().data_ptr() == kv.keys[0].untyped_storage().data_ptr()


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_padded_rows_hold_the_context_after_their_pads(name: str) -> None:
    kv = capture(prefill(name, DynamicCache()), tiny_models.shared(name).config)
    built = build_dynamic(kv, Reuse((0, 3, 50), 40, False), 2, [CPU] * 4)
    keys = built.layers[0].keys
    kept = keys.shape[2]
    assert torch.equal(keys[0], kv.keys[0][0, :, 40 - kept : 40])
    assert torch.equal(keys[2], keys[3])
    assert torch.equal(keys[3][:, -10:], kv.keys[0][0, :, 27:37])
    assert not keys[5].any(), "a row that begins after the cached length has none"


def test_static_caches_have_the_requested_room() -> None:
    config = tiny_models.shared("gemma3").config
    kv = capture(prefill("gemma3", DynamicCache()), config)
    built = build_static(kv, Reuse((0,), 30, False), 2, [CPU] * 4, config, 64)
    assert type(built) is StaticCache
    assert built.layers[1].keys.shape[:3] == (2, 2, 64)
    assert int(built.get_seq_length(1)) == 30


@pytest.mark.parametrize("name", tiny_models.REFUSED)
def test_models_without_a_cuttable_cache_are_refused(name: str) -> None:
    with pytest.raises((UnsupportedLayerError, UnsupportedModelError)):
        require_model(tiny_models.shared(name))


def test_a_layer_of_an_unknown_class_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "_known", {})
    monkeypatch.setattr(kinds, "KINDS", (DynamicLayer,))
    with pytest.raises(UnsupportedLayerError, match=r"layer 0 of 'qwen3_next' is a LinearAttentionLayer"):
        require_model(tiny_models.shared("qwen3_next"))


def test_encoder_decoder_models_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match="T5ForConditionalGeneration is an encoder-decoder"):
        require_model(tiny_models.shared("t5"))


def test_invalid_caches_are_refused() -> None:
    config = tiny_models.shared("llama").config
    with pytest.raises(TensorError, match="has 0"):
        capture(DynamicCache(), config)
    with pytest.raises(TensorError, match="layer 0 of the cache is empty"):
        capture(DynamicCache(config=config), config)
    cache = prefill("llama", DynamicCache())
    cache.batch_repeat_interleave(2)
    with pytest.raises(TensorError, match="one row"):
        capture(cache, config)
    cache = prefill("llama", DynamicCache())
    cache.layers[2].crop(-3)
    with pytest.raises(TensorError, match="layer 2: expected keys"):
        capture(cache, config)
    with pytest.raises(UnsupportedLayerError, match=r"layer 0 .* is a DynamicLayer.*conv_states"):
        capture(cache, tiny_models.shared("qwen3_next").config)


def test_a_layer_with_an_unknown_tensor_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "TOKEN_TENSORS", ("keys",))
    monkeypatch.setattr(kinds, "_known", {})  # as in a fresh process, where this release is the installed one
    with pytest.raises(UnsupportedLayerError, match=r"layer 0 of 'llama' is a DynamicLayer, which holds \['values'\]"):
        require_model(tiny_models.shared("llama"))


def test_a_window_that_was_cut_is_refused() -> None:
    config = tiny_models.shared("mistral").config
    with pytest.raises(TensorError, match=r"expected 40 tokens, it keeps 15, because its sliding window"):
        capture(prefill("mistral", DynamicCache(config=config)), config)
    short = capture(prefill("mistral", DynamicCache(config=config), 12), config)
    assert short.geometry.tokens == 12, "a window that is not full yet lacks nothing"


def test_tensors_that_contradict_the_geometry_are_refused() -> None:
    kv = capture(prefill("llama", DynamicCache()), tiny_models.shared("llama").config)
    with pytest.raises(TensorError, match="3 keys and 4 values"):
        KVTensors(kv.keys[:3], kv.values, kv.geometry)
    with pytest.raises(TensorError, match="layer 0: expected keys"):
        KVTensors(tuple(k.half() for k in kv.keys), kv.values, kv.geometry)


def test_layers_of_a_dispatched_model_have_their_devices() -> None:
    model = tiny_models.shared("llama")
    assert layer_devices(model, 4) == [CPU] * 4
    assert layer_devices(model, 5) == [CPU] * 5, "no list of five layers: the model's own device"


def test_rope_that_depends_on_the_length_forbids_reuse_across_it() -> None:
    config = tiny_models.make("llama").config
    assert not positions_change(config, 10, 9999)
    config.rope_parameters = {"rope_type": "longrope", "original_max_position_embeddings": 50}
    assert not positions_change(config, 40, 50)
    assert positions_change(config, 40, 51)
    assert not positions_change(config, 51, 99)
    config.rope_parameters = {"full_attention": {"rope_type": "dynamic", "original_max_position_embeddings": 50}}
    assert not positions_change(config, 40, 50)
    assert positions_change(config, 51, 99)


def test_match_finds_the_common_prefix() -> None:
    context = torch.tensor([5, 6, 7, 8])

    def of(*rows: list[int]) -> Reuse:
        ids = torch.tensor(rows)
        return match(context, ids, (ids != 0).long())

    assert of([5, 6, 7, 8, 9]) == Reuse((0,), 4, True)
    assert of([5, 6, 7, 8]) == Reuse((0,), 3, True)
    assert of([5, 6]) == Reuse((0,), 1, False)
    assert of([5, 6, 9, 8, 1]) == Reuse((0,), 2, False)
    assert of([9, 6]) == Reuse((0,), 0, False)
    assert of([0, 0, 5, 6, 7, 8, 1], [5, 6, 7, 8, 1, 2, 3]) == Reuse((2, 0), 4, True)
    assert of([0, 0, 0, 0, 5, 6], [5, 6, 7, 8, 1, 2]) == Reuse((4, 0), 4, False)
    assert of([5, 6, 7, 8, 1, 0, 0]) == Reuse((0,), 4, True), "right-padding"
    assert of([0, 0]) == Reuse((2,), 1, False), "a row of pads has nothing that could differ"
    with pytest.raises(TensorError, match="for the whole prompt"):
        match(context, torch.tensor([[5, 6]]), torch.ones(1, 3))
    with pytest.raises(TensorError, match=r"must be \[rows, tokens\]"):
        match(context, torch.tensor([5, 6]), torch.ones(2))


LAYER = {"kind": "full", "heads": 2, "k_dim": 8, "v_heads": 2, "v_dim": 8, "window": None}
GEOMETRY = {"layers": [LAYER], "tokens": 3, "batch": 1, "dtype": "bfloat16"}


def test_geometry_survives_its_dictionary() -> None:
    geometry = Geometry((LayerGeometry("sliding", 2, 8, 2, 8, 16),), 3, 1, "float16")
    assert Geometry.from_dict(geometry.to_dict()) == geometry
    assert Geometry.from_dict({**GEOMETRY, "later": 1}).nbytes == 2 * 3 * 32


@pytest.mark.parametrize(
    "hostile",
    [
        None,
        [],
        {},
        {**GEOMETRY, "layers": {}},
        {**GEOMETRY, "layers": [7]},
        {**GEOMETRY, "tokens": True},
        {**GEOMETRY, "tokens": -1},
        {**GEOMETRY, "tokens": 2.0},
        {**GEOMETRY, "tokens": 1 << 60},
        {**GEOMETRY, "batch": "1"},
        {**GEOMETRY, "dtype": []},
        {**GEOMETRY, "dtype": "float64"},
        {**GEOMETRY, "layers": [LAYER] * 5000},
        {**GEOMETRY, "layers": [{**LAYER, "kind": []}]},
        {**GEOMETRY, "layers": [{**LAYER, "kind": "linear"}]},
        {**GEOMETRY, "layers": [{**LAYER, "heads": 0}]},
        {**GEOMETRY, "layers": [{**LAYER, "window": 4}]},
        {**GEOMETRY, "layers": [{**LAYER, "kind": "sliding"}]},
        {**GEOMETRY, "tokens": 1 << 24, "layers": [{**LAYER, "heads": 1 << 14, "k_dim": 1 << 16}]},
    ],
    ids=[
        "none", "list", "empty", "layers dict", "layer number", "tokens bool", "tokens negative",
        "tokens float", "tokens huge", "batch string", "dtype list", "dtype unknown", "many layers", "kind list",
        "kind unknown", "no heads", "window of a full layer", "sliding without window", "huge product",
    ],
)  # fmt: skip
def test_hostile_geometry_is_refused(hostile: object) -> None:
    with pytest.raises((ManifestError, LimitError)):
        Geometry.from_dict(hostile)
