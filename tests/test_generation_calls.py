"""The arguments and refusals of generate(), attach, threads, and models on several devices."""

from __future__ import annotations

import copy
import pickle
import threading
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers

import hf_cachegen
from hf_cachegen.cache import CacheGenCache
from hf_cachegen.config import CacheGenConfig
from hf_cachegen.errors import ConfigError, TensorError, UnsupportedModelError, WrongModelError, WrongWeightsError
from hf_cachegen.generation import attach, detach, generate
from tests import tiny_models
from tests.generation_support import CONTEXT, NEW_TOKENS, cached, each_model, fed, llama, prompt, same, seeded
from tests.tiny_models import attributes, shared


@pytest.fixture(name="cache")
def _cache(name: str) -> CacheGenCache:
    return cached(name)


@llama
def test_arguments_are_those_of_the_stock_generate(name: str, cache: CacheGenCache) -> None:
    model, ids = shared(name), prompt(9)
    settings = transformers.GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=2)
    expected = model.generate(ids, settings)
    assert torch.equal(generate(model, ids, settings, cache=cache), expected)
    assert torch.equal(generate(model, inputs=ids, generation_config=settings, cache=cache), expected)
    assert torch.equal(generate(model, input_ids=ids, generation_config=settings, cache=cache), expected)
    assert torch.equal(generate(model, ids, settings, past_key_values=cache), expected)
    encoding = transformers.BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert torch.equal(generate(model, **encoding, generation_config=settings, cache=cache), expected)
    assert torch.equal(generate(model, ids, settings), expected), "no cache at all"
    usual = torch.arange(49)[None]
    assert torch.equal(generate(model, ids, settings, position_ids=usual, cache=cache), expected)
    static = transformers.GenerationConfig(max_new_tokens=5, cache_implementation="static", do_sample=False)
    assert torch.equal(generate(model, ids, static, cache=cache), expected)
    with pytest.raises(TypeError, match="given twice"):
        generate(model, ids, inputs=ids, cache=cache)
    with pytest.raises(TypeError, match="given twice"):
        generate(model, ids, settings, generation_config=settings, cache=cache)


REFUSED: dict[str, dict[str, Any]] = {
    "inputs_embeds": {"inputs_embeds": torch.zeros(1, 49, 32)},
    "use_cache": {"use_cache": False},
    "contrastive_search": {"penalty_alpha": 0.6, "top_k": 4},
    "dola_generation": {"dola_layers": "low"},
    "custom_generate": {"custom_generate": "owner/name"},
    "token_healing": {"token_healing": True},
    "output_attentions": {"output_attentions": True, "return_dict_in_generate": True},
    "cache_implementation='quantized'": {"cache_implementation": "quantized"},
    "assisted decoding with cache_implementation": {"cache_implementation": "static", "prompt_lookup_num_tokens": 3},
    "token_type_ids": {"token_type_ids": torch.ones(1, 49, dtype=torch.long)},
    "the tokens of its images are not known": {"pixel_values": torch.zeros(1)},
    r"model inputs \['image_embeds'\]": {"image_embeds": torch.zeros(1)},
    "position_ids": {"position_ids": torch.arange(49)[None] + 1},
}


@pytest.mark.parametrize("reason", REFUSED)
@llama
def test_calls_that_cannot_start_from_a_cache_are_refused(name: str, cache: CacheGenCache, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        generate(shared(name), prompt(9), cache=cache, **REFUSED[reason])


@llama
def test_invalid_arguments_are_refused(name: str, cache: CacheGenCache) -> None:
    with pytest.raises(UnsupportedModelError, match="no input_ids"):
        generate(shared(name), cache=cache)
    with pytest.raises(ConfigError, match=r"given twice, as \['cache', 'past_key_values'\]"):
        generate(shared(name), prompt(9), cache=cache, past_key_values=transformers.DynamicCache())
    with pytest.raises(TensorError, match="input_ids must be a tensor"):
        generate(shared(name), prompt(9)[0], cache=cache)
    with pytest.raises(TensorError, match="for the whole prompt"):
        generate(shared(name), prompt(9), attention_mask=torch.ones(1, 9), cache=cache)
    with pytest.raises(ConfigError, match="on_mismatch"):
        generate(shared(name), prompt(9), cache=cache, on_mismatch="ignore")  # type: ignore[arg-type]
    with pytest.raises(WrongModelError, match="T5ForConditionalGeneration"):
        generate(shared("t5"), prompt(9), cache=cache)


@llama
def test_the_model_is_checked_at_every_generation(name: str, cache: CacheGenCache) -> None:
    with pytest.raises(WrongModelError):
        generate(shared("qwen3"), prompt(9), cache=cache)
    model = tiny_models.make("llama")
    generate(model, prompt(9), cache=cache, max_new_tokens=1)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    with pytest.raises(WrongWeightsError):
        generate(model, prompt(9), cache=cache, max_new_tokens=1)


@each_model
def test_an_artifact_s_path_is_a_cache(name: str, cache: CacheGenCache, tmp_path: Path) -> None:
    cache.save_pretrained(tmp_path, CacheGenConfig(transform="identity", lossless=True), overwrite=True)
    for path in (tmp_path, str(tmp_path)):
        assert same(shared(name), path, prompt(9), do_sample=False)


@llama
def test_attach_and_detach(name: str, cache: CacheGenCache) -> None:
    model = tiny_models.make(name)
    before = attributes(model)
    expected = seeded(model.generate, prompt(9), num_beams=2)
    assert attach(attach(model)) is model
    assert torch.equal(seeded(model.generate, prompt(9), cache=cache, num_beams=2), expected)
    assert torch.equal(seeded(model.generate, prompt(9), num_beams=2), expected)
    assert torch.equal(seeded(model.generate, input_ids=prompt(9), past_key_values=cache, num_beams=2), expected)
    lookup = seeded(model.generate, prompt(9), cache=cache, prompt_lookup_num_tokens=3)
    assert same(model, cache, prompt(9), do_sample=False)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.generate.model is other
        assert torch.equal(seeded(other.generate, prompt(9), cache=cache, num_beams=2), expected)
    assert detach(detach(model)) is model
    assert attributes(model) == before
    assert torch.equal(seeded(model.generate, prompt(9), prompt_lookup_num_tokens=3), lookup)


def test_attach_keeps_a_generate_of_the_model_s_own() -> None:
    model = tiny_models.make("llama")
    model.generate = own = lambda *_, **__: "own"
    assert attach(model).generate(prompt(9)) == "own"
    assert detach(model).generate is own


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_threads_share_a_cache(name: str, cache: CacheGenCache) -> None:
    model, prompts = shared(name), [prompt(9), prompt(5, 8), prompt(-3), prompt(7, 11)]
    options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    expected = [model.generate(ids, **options) for ids in prompts]
    results: dict[int, list[torch.Tensor]] = {}

    def work(index: int) -> None:
        extra = {"prompt_lookup_num_tokens": 3} if index % 2 else {}
        results[index] = [generate(model, prompts[index], cache=cache, **options, **extra) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, sequences in enumerate(expected):
        assert all(torch.equal(result, sequences) for result in results[index])


@pytest.mark.filterwarnings("ignore:You are calling .generate")
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_models_that_accelerate_dispatched(name: str, cache: CacheGenCache) -> None:
    placed = accelerate.dispatch_model(tiny_models.make(name), {"": "cpu"}, force_hooks=True)
    offloaded = accelerate.cpu_offload(tiny_models.make(name), execution_device=torch.device("cpu"))
    assert offloaded.lm_head.weight.device.type == "meta"
    for model in (placed, offloaded):
        assert same(model, cache, prompt(9), do_sample=False)
        assert same(model, CacheGenCache.from_context(model, CONTEXT), prompt(9), num_beams=2)
    assert same(placed, cache, prompt(9), prompt_lookup_num_tokens=3)


def test_bfloat16() -> None:
    model = tiny_models.make("llama").bfloat16()
    cache = CacheGenCache.from_context(model, CONTEXT)
    assert cache.kv.geometry.dtype == "bfloat16"
    with fed(model) as lengths:
        assert generate(model, prompt(9), cache=cache, max_new_tokens=4).shape[0] == 1
    assert lengths[0] == 9


def test_the_package_names_them() -> None:
    assert (hf_cachegen.generate, hf_cachegen.attach, hf_cachegen.detach) == (generate, attach, detach)
