"""generate() from a cache returns what model.generate returns without one, in every decoding mode.

Prompts are random and the models tiny, in fp32: one wrong key changes the tokens.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from transformers.generation import BaseStreamer

from hf_cachegen.cache import CacheGenCache
from hf_cachegen.errors import PromptMismatchError
from hf_cachegen.generation import attach, generate
from hf_cachegen.models.compat import cache_of
from tests import tiny_models
from tests.generation_support import (
    ASSISTED,
    CONTEXT,
    MODES,
    batch,
    cached,
    each_model,
    fed,
    llama,
    prompt,
    same,
    seeded,
)
from tests.tiny_models import shared, tokens

each_length = pytest.mark.parametrize("question", [9, 0, -25], ids=["question", "exact hit", "shorter prompt"])


@pytest.fixture(name="cache")
def _cache(name: str) -> CacheGenCache:
    return cached(name)


@each_length
@pytest.mark.parametrize("mode", MODES)
@each_model
def test_every_mode(name: str, cache: CacheGenCache, mode: str, question: int) -> None:
    assert same(shared(name), cache, prompt(question), **MODES[mode])


@each_length
@pytest.mark.parametrize("mode", ASSISTED)
@each_model
def test_assisted_modes(name: str, cache: CacheGenCache, mode: str, question: int) -> None:
    options = dict(ASSISTED[mode])
    if mode.startswith("assisted"):
        options["assistant_model"] = shared("llama", 0 if name != "llama" else 1)
    assert same(shared(name), cache, prompt(question), **options)


@pytest.mark.parametrize("mode", MODES)
@each_model
def test_one_document_with_many_questions(name: str, cache: CacheGenCache, mode: str) -> None:
    inputs = batch(3, 9, 6)
    assert same(shared(name), cache, inputs["input_ids"], attention_mask=inputs["attention_mask"], **MODES[mode])


@pytest.mark.parametrize("questions", [(5, 5), (9, 0), (9, -20), (4, -39), (0, 60)], ids=str)
@each_model
def test_batches_of_other_shapes(name: str, cache: CacheGenCache, questions: tuple[int, int]) -> None:
    inputs = batch(*questions)
    assert same(shared(name), cache, inputs["input_ids"], attention_mask=inputs["attention_mask"], do_sample=False)


@llama
def test_the_mask_of_a_batch_is_inferred_as_usual(name: str, cache: CacheGenCache) -> None:
    assert same(shared(name), cache, batch(3, 9, 6)["input_ids"], do_sample=False)


@each_model
def test_only_the_rest_is_computed(name: str, cache: CacheGenCache) -> None:
    model = shared(name)
    for question, first in ((9, 9), (1, 1), (0, 1), (-5, 1)):
        with fed(model) as lengths:
            generate(model, prompt(question), cache=cache, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert lengths == [first, 1, 1]
    with fed(model) as lengths:
        generate(model, **batch(3, 9, 6), cache=cache, max_new_tokens=1, do_sample=False)
    assert lengths == [9]
    with fed(model) as lengths:
        generate(model, prompt(9), cache=cache, max_new_tokens=4, prompt_lookup_num_tokens=3, do_sample=False)
    assert max(lengths) <= 9 + 3


@llama
def test_prompt_lookup_sees_the_whole_prompt(name: str, cache: CacheGenCache) -> None:
    """The prompt ends as the context begins, so that the first candidates can come from the context alone."""
    ids = torch.cat([CONTEXT, tokens(4, 7), CONTEXT[:, :2]], dim=1)
    with fed(shared(name)) as lengths:
        generate(shared(name), ids, cache=cache, max_new_tokens=8, prompt_lookup_num_tokens=3, do_sample=False)
    assert lengths[0] == 6 + 3
    assert same(shared(name), cache, ids, prompt_lookup_num_tokens=3, do_sample=False)


@llama
def test_assistants_may_be_cached_models_themselves(name: str, cache: CacheGenCache) -> None:
    assistant = attach(tiny_models.make("llama"))
    assert same(shared(name), cache, prompt(9), assistant_model=assistant, do_sample=False)


@each_model
def test_a_prompt_that_differs_reuses_what_is_common(name: str, cache: CacheGenCache) -> None:
    model, ids = shared(name), prompt(9)
    ids[0, 30] = (ids[0, 30] + 1 - 3) % 90 + 3
    assert same(model, cache, ids, do_sample=False)
    with fed(model) as lengths:
        generate(model, ids, cache=cache, max_new_tokens=1, do_sample=False)
    assert lengths == [19]
    assert same(model, cache, tokens(30, 5), do_sample=False), "nothing in common"
    with pytest.raises(PromptMismatchError, match="does not begin with the whole context"):
        generate(model, ids, cache=cache, on_mismatch="error")
    with pytest.raises(PromptMismatchError):
        generate(model, **batch(9, -3), cache=cache, on_mismatch="error")
    assert generate(model, prompt(0), cache=cache, on_mismatch="error", max_new_tokens=1).shape == (1, 41)


def test_rope_that_depends_on_the_length_is_recomputed() -> None:
    model = tiny_models.make("llama")
    model.config.rope_parameters = {
        "rope_type": "dynamic",
        "rope_theta": 10000.0,
        "factor": 2.0,
        "original_max_position_embeddings": 45,
    }
    cache = CacheGenCache.from_context(model, CONTEXT)
    with fed(model) as lengths:
        generate(model, prompt(9), cache=cache, max_new_tokens=1)
        generate(model, prompt(3), cache=cache, max_new_tokens=1)
    assert lengths == [49, 3]
    with pytest.raises(PromptMismatchError, match="rotary"):
        generate(model, prompt(9), cache=cache, on_mismatch="error")


@llama
def test_generating_does_not_change_the_cache(name: str, cache: CacheGenCache) -> None:
    before = copy.deepcopy(cache)
    for options in (*MODES.values(), ASSISTED["prompt lookup"]):
        assert same(shared(name), cache, prompt(9), **options)
        assert same(shared(name), cache, prompt(9), **options)
    result = generate(shared(name), prompt(9), cache=cache, max_new_tokens=2, return_dict_in_generate=True)
    for layer in cache_of(result).layers:
        layer.keys.zero_()
        layer.values.zero_()
    for left, right in zip((*cache.kv.keys, *cache.kv.values), (*before.kv.keys, *before.kv.values), strict=True):
        assert torch.equal(left, right)


class Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.events: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.events.append(value.tolist())

    def end(self) -> None:
        self.events.append("end")


@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 3}], ids=str)
@llama
def test_streamers(name: str, cache: CacheGenCache, options: dict[str, Any]) -> None:
    stock, ours = Recorder(), Recorder()
    seeded(shared(name).generate, prompt(9), streamer=stock, do_sample=False, **options)
    seeded(generate, shared(name), prompt(9), cache=cache, streamer=ours, do_sample=False, **options)
    assert stock.events[-1] == "end"
    assert ours.events == stock.events


@llama
def test_stopping_criteria_and_processors_see_the_whole_prompt(name: str, cache: CacheGenCache) -> None:
    seen: list[list[list[int]]] = []

    class Stop(transformers.StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            seen.append(input_ids.tolist())
            return torch.full(input_ids.shape[:1], input_ids.shape[1] >= 53)

    class Favour(transformers.LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            seen.append(input_ids.tolist())
            return scores.index_fill(1, input_ids[0, :1], 100.0)

    options = {"stopping_criteria": [Stop()], "logits_processor": [Favour()], "do_sample": False}
    expected = seeded(shared(name).generate, **batch(3, 9), **options)
    stock = list(seen)
    seen.clear()
    assert torch.equal(seeded(generate, shared(name), **batch(3, 9), cache=cache, **options), expected)
    assert seen == stock
    assert expected.shape[1] == 53


@pytest.mark.parametrize("mode", ["greedy", "beams", "beam sampling", "prompt lookup"])
@llama
def test_results_as_dictionaries(name: str, cache: CacheGenCache, mode: str) -> None:
    inputs = {"input_ids": prompt(9)} if mode == "prompt lookup" else batch(3, 9)
    options = {**MODES, **ASSISTED}[mode] | {
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
    }
    expected = seeded(shared(name).generate, **inputs, **options)
    result = seeded(generate, shared(name), **inputs, cache=cache, **options)
    assert type(result) is type(expected)
    assert torch.equal(result.sequences, expected.sequences)
    assert type(cache_of(result)) is type(cache_of(expected))
    assert cache_of(result).get_seq_length() == cache_of(expected).get_seq_length()
    for left, right in zip((*result.scores, *result.logits), (*expected.scores, *expected.logits), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-3)
    if "beam" in mode:
        assert torch.equal(result.beam_indices, expected.beam_indices)
        torch.testing.assert_close(result.sequences_scores, expected.sequences_scores)
