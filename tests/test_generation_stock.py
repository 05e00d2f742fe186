"""The failures of stock caches, case by case: the reason for every part of generate().

Each test first shows that the stock call gives other tokens or raises; it fails if a release of Transformers corrects
that. Then it shows that generate() gives the tokens of a call without a cache.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from hf_cachegen.cache import CacheGenCache
from hf_cachegen.errors import PromptMismatchError, WrongDtypeError, WrongWeightsError
from hf_cachegen.generation import generate
from hf_cachegen.models.compat import CACHE_ARGUMENT, cache_of
from tests import tiny_models
from tests.generation_support import CONTEXT, batch, prompt
from tests.tiny_models import shared

OPTIONS: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}


def prefilled(name: str, **kwargs: Any) -> DynamicCache:
    """Return a stock cache of the context."""
    cache = DynamicCache(**kwargs)
    with torch.no_grad():
        shared(name)(CONTEXT, **{CACHE_ARGUMENT: cache}, use_cache=True)
    return cache


def right(name: str, **inputs: Any) -> torch.Tensor:
    """Return the tokens of a call without a cache, after comparing those of generate() with them."""
    expected = shared(name).generate(**inputs, **OPTIONS)
    cache = CacheGenCache.from_context(shared(name), CONTEXT)
    assert torch.equal(generate(shared(name), **inputs, cache=cache, **OPTIONS), expected)
    return expected


def stock(name: str, cache: DynamicCache, **inputs: Any) -> torch.Tensor:
    return shared(name).generate(**inputs, **{CACHE_ARGUMENT: cache}, **OPTIONS)


def test_a_cache_of_the_whole_prompt() -> None:
    """The stock call feeds the whole prompt again, after itself."""
    ids = prompt(0)
    cache = prefilled("llama")
    wrong = stock("llama", cache, input_ids=ids)
    assert cache.get_seq_length() == 40 + 40 + 11
    assert not torch.equal(wrong, right("llama", input_ids=ids))


def test_a_prompt_shorter_than_the_cache() -> None:
    ids = prompt(-15)
    cache = prefilled("llama")
    cache_before = cache.get_seq_length()
    try:
        wrong = stock("llama", cache, input_ids=ids)
    except RuntimeError:
        wrong = None
    assert cache_before == 40
    expected = right("llama", input_ids=ids)
    assert wrong is None or not torch.equal(wrong, expected)


def test_a_prompt_that_is_another() -> None:
    ids = prompt(9)
    ids[0, 5:20] = 50
    assert not torch.equal(stock("llama", prefilled("llama"), input_ids=ids), right("llama", input_ids=ids))
    cache = CacheGenCache.from_context(shared("llama"), CONTEXT)
    with pytest.raises(PromptMismatchError):
        generate(shared("llama"), ids, cache=cache, on_mismatch="error")


@pytest.mark.parametrize("assistant", [None, "qwen3"], ids=["prompt lookup", "assisted"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_assisted_decoding(name: str, assistant: str | None) -> None:
    """The first step feeds the whole prompt even beside a cache."""
    extra = {"assistant_model": shared(assistant)} if assistant else {"prompt_lookup_num_tokens": 3}
    expected = right(name, input_ids=prompt(9), **extra)
    try:
        wrong = stock(name, prefilled(name, config=shared(name).config), input_ids=prompt(9), **extra)
    except RuntimeError:
        return
    assert not torch.equal(wrong, expected)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_one_document_with_many_questions(name: str) -> None:
    """Rows shorter than the longest have pads where the cache has the context's first tokens."""
    inputs = batch(3, 9, 6)
    cache = prefilled(name, config=shared(name).config)
    cache.batch_repeat_interleave(3)
    wrong, expected = stock(name, cache, **inputs), right(name, **inputs)
    assert [torch.equal(*rows) for rows in zip(wrong, expected, strict=True)] == [False, True, False]


def test_pads_between_context_and_question_fail_with_a_sliding_window() -> None:
    """Such pads work for full attention; a window counts them as tokens, and drops as many."""
    question = batch(3, 12)
    for name, agrees in (("llama", True), ("mistral", False)):
        expected = right(name, **question)
        middle = torch.stack([torch.cat([CONTEXT[0], row[-12:]]) for row in question["input_ids"]])
        mask = torch.ones_like(middle)
        mask[0, 40:49] = 0
        cache = prefilled(name, config=shared(name).config)
        cache.batch_repeat_interleave(2)
        moved = stock(name, cache, input_ids=middle, attention_mask=mask)
        assert torch.equal(moved[0, 52:], expected[0, 52:]) == agrees


@pytest.mark.parametrize("extra", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
def test_beams_and_several_sequences(extra: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match=r"Sizes of tensors must match|size"):
        shared("llama").generate(prompt(9), **{CACHE_ARGUMENT: prefilled("llama")}, **{**OPTIONS, **extra})
    if "num_beams" in extra:
        right("llama", input_ids=prompt(9), **extra)


def test_tokens_without_the_mask_of_what_came_before() -> None:
    """The rest alone needs a mask of the whole prompt, which the stock call does not make."""
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        stock("llama", prefilled("llama"), input_ids=prompt(9)[:, 40:])
    right("llama", input_ids=prompt(9))


def test_a_cache_is_used_twice() -> None:
    """The first question and its answer are still in the stock cache when the second question comes."""
    cache, first, second = prefilled("llama"), prompt(9), prompt(9, seed=8)
    assert torch.equal(stock("llama", cache, input_ids=first), right("llama", input_ids=first))
    assert cache.get_seq_length() == 60
    try:
        wrong = stock("llama", cache, input_ids=second)
    except RuntimeError:
        wrong = None
    expected = right("llama", input_ids=second)
    assert wrong is None or not torch.equal(wrong, expected)


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_a_sliding_window_rebuilt_from_its_tensors(name: str) -> None:
    """The rebuilt layer loses the number of tokens that it has seen, and so the positions."""
    config = shared(name).config
    pairs = [(layer.keys, layer.values) for layer in prefilled(name, config=config).layers]
    rebuilt = DynamicCache(pairs, config=config)
    assert rebuilt.get_seq_length() == 15, "of 40"
    assert not torch.equal(stock(name, rebuilt, input_ids=prompt(3)), right(name, input_ids=prompt(3)))


def test_a_cache_of_another_dtype() -> None:
    """Concatenation promotes bfloat16 to float32 without a warning."""
    cache = DynamicCache([(layer.keys.bfloat16(), layer.values.bfloat16()) for layer in prefilled("llama").layers])
    assert stock("llama", cache, input_ids=prompt(9)).shape == (1, 61)
    ours = CacheGenCache.from_context(tiny_models.make("llama").bfloat16(), CONTEXT)
    with pytest.raises(WrongDtypeError):
        generate(shared("llama"), prompt(9), cache=ours)


def test_a_cache_of_another_model() -> None:
    wrong = shared("llama", 1).generate(prompt(9), **{CACHE_ARGUMENT: prefilled("llama")}, **OPTIONS)
    assert not torch.equal(wrong, shared("llama", 1).generate(prompt(9), **OPTIONS))
    with pytest.raises(WrongWeightsError):
        generate(shared("llama", 1), prompt(9), cache=CacheGenCache.from_context(shared("llama"), CONTEXT))


def test_a_recurrent_state_cannot_be_cut() -> None:
    model = shared("qwen3_next")
    with torch.no_grad():
        cache = cache_of(model(CONTEXT, use_cache=True))
    with pytest.raises((ValueError, RuntimeError)):
        cache.crop(-5)
    expected = model.generate(prompt(9), **OPTIONS)
    ours = CacheGenCache.from_cache(cache, CONTEXT, model)
    assert ours.report.checkpoints == (CONTEXT.shape[1],)
    assert torch.equal(generate(model, prompt(9), cache=ours, **OPTIONS), expected)


def test_a_static_cache_beside_a_cache() -> None:
    extra = {"cache_implementation": "static"}
    with pytest.raises(ValueError, match="cache_implementation"):
        stock("llama", prefilled("llama"), input_ids=prompt(9), **extra)
    right("llama", input_ids=prompt(9), **extra)
