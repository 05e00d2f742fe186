"""CacheGenCache: created from a context or a cache, saved, loaded, checked, and read-only."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from hf_cachegen.artifact.artifact import Artifact, write
from hf_cachegen.artifact.encoded import encode_kv
from hf_cachegen.cache import CacheGenCache
from hf_cachegen.config import CacheGenConfig
from hf_cachegen.errors import (
    ArtifactExistsError,
    ArtifactNotFoundError,
    ConfigError,
    CorruptError,
    LevelError,
    ManifestError,
    MismatchError,
    ReadOnlyCacheError,
    TensorError,
    WrongDtypeError,
    WrongModelError,
    WrongWeightsError,
)
from hf_cachegen.generation import generate
from hf_cachegen.models.compat import CACHE_ARGUMENT, cache_of
from tests import tiny_models

CONTEXT = tiny_models.tokens(40)
LOSSLESS = CacheGenConfig(transform="identity", lossless=True)


@pytest.fixture(name="cache")
def _cache() -> CacheGenCache:
    return CacheGenCache.from_context(tiny_models.shared("llama"), CONTEXT)


def same(left: CacheGenCache, right: CacheGenCache) -> bool:
    pairs = zip((*left.kv.keys, *left.kv.values), (*right.kv.keys, *right.kv.values), strict=True)
    return left.kv.geometry == right.kv.geometry and all(torch.equal(a, b) for a, b in pairs)


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_from_context_keeps_what_the_model_computes(cache: CacheGenCache) -> None:
    model = tiny_models.shared("llama")
    with torch.no_grad():
        stock = cache_of(model(CONTEXT, use_cache=True))
    for mine, theirs in zip(cache.layers, stock.layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys)
        torch.testing.assert_close(mine.values, theirs.values)
    assert torch.equal(cache.input_ids, CONTEXT)
    assert isinstance(cache, DynamicCache)
    assert cache.get_seq_length() == 40
    assert len(cache) == 4
    assert repr(cache) == "CacheGenCache(40 tokens, 4 layers, float32)"
    assert cache.report.context_tokens == 40
    assert cache.report.exact_bytes == cache.kv.geometry.nbytes
    assert cache.report.ratio is None


@pytest.mark.parametrize("name", tiny_models.SUPPORTED)
def test_a_long_context_is_prefilled_in_chunks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.make(name)
    whole = CacheGenCache.from_context(model, CONTEXT)
    lengths: list[int] = []
    model.register_forward_pre_hook(
        lambda _, __, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    chunked = CacheGenCache.from_context(model, CONTEXT, prefill_chunk_tokens=13)
    assert lengths == [13, 13, 13, 1]
    for left, right in zip((*whole.kv.keys, *whole.kv.values), (*chunked.kv.keys, *chunked.kv.values), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError):
        CacheGenCache.from_context(model, CONTEXT, prefill_chunk_tokens=0)


def test_a_context_is_one_row_of_tokens() -> None:
    model = tiny_models.shared("llama")
    assert same(CacheGenCache.from_context(model, CONTEXT[0].tolist()), CacheGenCache.from_context(model, CONTEXT[0]))
    for wrong in (CONTEXT.repeat(2, 1), CONTEXT[:, :0], CONTEXT.float(), []):
        with pytest.raises(TensorError, match="expected one row of token ids"):
            CacheGenCache.from_context(model, wrong)


def test_from_cache_wraps_a_copy() -> None:
    model, stock = tiny_models.shared("llama"), DynamicCache()
    with torch.no_grad():
        model(CONTEXT, **{CACHE_ARGUMENT: stock})
        cache = CacheGenCache.from_cache(stock, CONTEXT, model)
        stock.layers[0].keys.zero_()
    torch.testing.assert_close(cache.kv.keys[0], CacheGenCache.from_context(model, CONTEXT).kv.keys[0])


def test_from_cache_takes_the_cache_of_generate() -> None:
    model = tiny_models.shared("llama")
    result = model.generate(CONTEXT, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    expected = r"expected a cache of 45 tokens as in input_ids, it holds 44; .* pass sequences\[:, :-1\]"
    with pytest.raises(TensorError, match=expected):
        CacheGenCache.from_cache(cache_of(result), result.sequences, model)
    chat = CacheGenCache.from_cache(cache_of(result), result.sequences[:, :-1], model)
    prompt = torch.cat([result.sequences, tiny_models.tokens(5, 9)], dim=1)
    expected = model.generate(prompt, max_new_tokens=8, do_sample=False)
    assert torch.equal(generate(model, prompt, cache=chat, max_new_tokens=8, do_sample=False), expected)


def test_from_cache_checks_shapes_and_dtype() -> None:
    model = tiny_models.shared("llama")
    with torch.no_grad():
        stock = cache_of(model(CONTEXT, use_cache=True))
    with pytest.raises(WrongDtypeError, match="the cache is float32, the model runs in bfloat16"):
        CacheGenCache.from_cache(stock, CONTEXT, tiny_models.make("llama").bfloat16())
    with pytest.raises(TensorError, match="a cache of 4 layers, this DynamicCache has 0"):
        CacheGenCache.from_cache(DynamicCache(), CONTEXT, model)
    sliding = tiny_models.shared("mistral")
    with torch.no_grad():
        cut = cache_of(sliding(CONTEXT, use_cache=True))
    with pytest.raises(TensorError, match="its sliding window dropped the others"):
        CacheGenCache.from_cache(cut, CONTEXT, sliding)


WRITES: dict[str, Any] = {
    "update": lambda cache: cache.update(torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8), 0),
    "update beyond the last layer": lambda cache: cache.update(torch.zeros(1), torch.zeros(1), 9),
    "crop": lambda cache: cache.crop(-1),
    "reset": lambda cache: cache.reset(),
    "reorder_cache": lambda cache: cache.reorder_cache(torch.tensor([0])),
    "batch_repeat_interleave": lambda cache: cache.batch_repeat_interleave(2),
    "batch_select_indices": lambda cache: cache.batch_select_indices(torch.tensor([0])),
    "early_initialization": lambda cache: cache.early_initialization(1, 2, 8, torch.float32, "cpu"),
    "a layer's update": lambda cache: cache.layers[0].update(torch.zeros(1), torch.zeros(1)),
    "a layer's offload": lambda cache: cache.layers[0].offload(),
}


@pytest.mark.parametrize("write_into", WRITES.values(), ids=WRITES.keys())
def test_it_is_read_only(cache: CacheGenCache, write_into: Any) -> None:
    before = copy.deepcopy(cache)
    with pytest.raises(ReadOnlyCacheError, match=r"read-only.*hf_cachegen.attach.*to_dynamic"):
        write_into(cache)
    assert same(cache, before)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_passed_to_a_model_that_is_not_prepared_it_raises(cache: CacheGenCache, options: dict[str, Any]) -> None:
    model = tiny_models.make("llama")
    prompt = torch.cat([CONTEXT, tiny_models.tokens(5, 9)], dim=1)
    for ids in (prompt, CONTEXT, prompt[:, :20]):
        with pytest.raises(ReadOnlyCacheError):
            model.generate(ids, **{CACHE_ARGUMENT: cache}, max_new_tokens=5, **options)


@pytest.mark.parametrize("name", tiny_models.SUPPORTED)
def test_to_dynamic_is_a_stock_cache_of_its_own(name: str) -> None:
    model = tiny_models.shared(name)
    cache = CacheGenCache.from_context(model, CONTEXT)
    before, stock = copy.deepcopy(cache), cache.to_dynamic()
    prompt = torch.cat([CONTEXT, tiny_models.tokens(5, 9)], dim=1)
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(prompt, **{CACHE_ARGUMENT: stock}, **options), model.generate(prompt, **options))
    for layer in stock.layers:
        layer.keys.zero_()
    assert same(cache, before)


def test_a_cache_of_other_values_on_purpose() -> None:
    model = tiny_models.make("llama")
    with torch.no_grad():
        stock = cache_of(model(CONTEXT, use_cache=True))
    for layer in stock.layers:
        layer.keys.mul_(1.01)
    with pytest.raises(WrongWeightsError, match="first 16 tokens"):
        CacheGenCache.from_cache(stock, CONTEXT, model).check(model)
    CacheGenCache.from_cache(stock, CONTEXT, model, verify="weights").check(model)


def test_copies_and_pickles_are_caches(cache: CacheGenCache) -> None:
    for other in (copy.copy(cache), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert type(other) is CacheGenCache
        assert same(other, cache)
        with pytest.raises(ReadOnlyCacheError):
            other.crop(-1)


@pytest.mark.parametrize("name", tiny_models.SUPPORTED)
def test_a_lossless_artifact_gives_the_same_cache(name: str, tmp_path: Path) -> None:
    model = tiny_models.shared(name)
    cache = CacheGenCache.from_context(model, CONTEXT, LOSSLESS)
    cache.save_pretrained(tmp_path / "artifact")
    loaded = CacheGenCache.from_pretrained(tmp_path / "artifact", model)
    assert same(loaded, cache)
    assert torch.equal(loaded.input_ids, CONTEXT)
    assert loaded.fingerprint == cache.fingerprint
    report = loaded.report
    assert report.level == 1
    assert report.loaded_bytes == sum(len(data) for data in contents(tmp_path / "artifact").values())
    assert report.ratio == report.exact_bytes / report.loaded_bytes
    assert report.load_seconds is not None


def test_levels(cache: CacheGenCache, tmp_path: Path) -> None:
    model = tiny_models.shared("llama")
    cache.save_pretrained(tmp_path / "a", CacheGenConfig(protect_first=1, protect_last=8))
    assert cache.report.encoding["bits_per_element"]
    loaded = [CacheGenCache.from_pretrained(tmp_path / "a", model, level=level) for level in (1, 2, 3)]

    def error(other: CacheGenCache) -> float:
        return sum(float((a - b).square().sum()) for a, b in zip(cache.kv.keys, other.kv.keys, strict=True))

    assert error(loaded[0]) > error(loaded[1]) > error(loaded[2]) > 0
    sizes = [other.report.loaded_bytes for other in loaded]
    assert sizes == sorted(sizes)  # type: ignore[type-var]
    assert same(loaded[2], CacheGenCache.from_pretrained(tmp_path / "a"))
    for level in (0, 4, True):
        with pytest.raises(LevelError):
            CacheGenCache.from_pretrained(tmp_path / "a", model, level=level)


def test_saving_a_loaded_cache_copies_the_artifact(cache: CacheGenCache, tmp_path: Path) -> None:
    cache.save_pretrained(tmp_path / "a")
    coarse = CacheGenCache.from_pretrained(tmp_path / "a", level=1)
    coarse.save_pretrained(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b"), "every level is there, nothing is lost twice"
    coarse.save_pretrained(tmp_path / "a", overwrite=True)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    with pytest.raises(ConfigError, match="would add a second loss"):
        coarse.save_pretrained(tmp_path / "c", LOSSLESS)
    CacheGenCache.from_context(tiny_models.shared("llama"), CONTEXT.flip(1)).save_pretrained(
        tmp_path / "a", overwrite=True
    )
    with pytest.raises(ConfigError, match="is no longer the artifact"):
        coarse.save_pretrained(tmp_path / "c")


def test_saving_does_not_overwrite_by_default(cache: CacheGenCache, tmp_path: Path) -> None:
    cache.save_pretrained(tmp_path / "a")
    with pytest.raises(ArtifactExistsError):
        cache.save_pretrained(tmp_path / "a")
    cache.save_pretrained(tmp_path / "a", LOSSLESS, overwrite=True)
    assert same(CacheGenCache.from_pretrained(tmp_path / "a"), cache)


def test_loading_checks_the_model_before_decoding(
    cache: CacheGenCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.save_pretrained(tmp_path / "a")
    monkeypatch.setattr(Artifact, "decode", lambda *_: pytest.fail("decoded"))
    for error, model in (
        (WrongModelError, tiny_models.shared("qwen3")),
        (WrongWeightsError, tiny_models.shared("llama", 1)),
        (WrongDtypeError, tiny_models.make("llama").bfloat16()),
        (MismatchError, tiny_models.shared("t5")),
    ):
        with pytest.raises(error):
            CacheGenCache.from_pretrained(tmp_path / "a", model)


def test_artifacts_that_hold_no_context(cache: CacheGenCache, tmp_path: Path) -> None:
    with pytest.raises(ArtifactNotFoundError):
        CacheGenCache.from_pretrained(tmp_path / "nothing")
    encoded, ids = encode_kv(cache.kv.keys, cache.kv.values), CONTEXT[0].tolist()
    write(encoded, tmp_path / "tensors")
    with pytest.raises(ManifestError, match="without fingerprint or tokens"):
        CacheGenCache.from_pretrained(tmp_path / "tensors")
    write(encoded, tmp_path / "other", input_ids=ids[::-1], fingerprint=cache.fingerprint.to_dict())
    with pytest.raises(CorruptError, match="the stored tokens are not those of the fingerprint"):
        CacheGenCache.from_pretrained(tmp_path / "other")
    rows = [[torch.cat([tensor] * 2) for tensor in side] for side in (cache.kv.keys, cache.kv.values)]
    write(encode_kv(*rows), tmp_path / "rows", input_ids=ids, fingerprint=cache.fingerprint.to_dict())
    with pytest.raises(ManifestError, match="holds 2 rows"):
        CacheGenCache.from_pretrained(tmp_path / "rows")
