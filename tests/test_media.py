"""Contexts with pictures, video and audio: every prompt has the tokens of a call without a cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache as remember
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_cachegen import attach
from hf_cachegen.cache import CacheGenCache
from hf_cachegen.config import CacheGenConfig
from hf_cachegen.models.compat import cache_of
from tests.generation_support import fed
from tests.media_support import FAMILIES, WITH_STATES, Part, batch, inputs, make, shared

NEW_TOKENS = 8
CONTEXT: tuple[Part, ...] = (5, "a", 6)
PROMPTS: dict[str, tuple[Part, ...]] = {
    "question": (5, "a", 6, 7),
    "exact hit": (5, "a", 6),
    "ends with the picture": (5, "a"),
    "before the picture": (5,),
    "another picture": (5, "b", 6, 7),
    "a second picture": (5, "a", 6, 3, "c", 4),
    "another picture, then the same": (5, "b", 6, "a", 2),
}
BATCHES: dict[str, list[tuple[Part, ...]]] = {
    "questions": [(5, "a", 6, 7), (5, "a", 6, 3)],
    "pictures in questions": [(5, "a", 6, 2), (5, "a", 6, 3, "c", 4)],
    "another picture in a row": [(5, "a", 6, 3, "c", 4), (5, "b", 6, 3, "a", 4)],
}
LOSSLESS = CacheGenConfig(lossless=True)
each_family = pytest.mark.parametrize("name", FAMILIES)


def generated(model: Any, given: dict[str, Any], **options: Any) -> torch.Tensor:
    torch.manual_seed(0)
    options = {"do_sample": False, **options}
    found: torch.Tensor = model.generate(**given, max_new_tokens=NEW_TOKENS, **options)
    return found


@contextmanager
def towers(name: str, model: Any) -> Iterator[list[int]]:
    """Record the number of rows of every call of the tower."""
    calls: list[int] = []

    def record(_: Any, args: Any, kwargs: Any) -> None:
        calls.append(len(args[0] if args else next(iter(kwargs.values()))))

    hook = model.get_submodule(FAMILIES[name].tower).register_forward_pre_hook(record, with_kwargs=True)
    yield calls
    hook.remove()


@remember
def cached(name: str) -> CacheGenCache:
    return CacheGenCache.from_context(shared(name), inputs(FAMILIES[name], *CONTEXT))


@remember
def stock(name: str) -> Any:
    return make(name)


@each_family
@pytest.mark.parametrize("prompt", PROMPTS)
def test_tokens_are_those_of_a_call_without_a_cache(name: str, prompt: str) -> None:
    given = inputs(FAMILIES[name], *PROMPTS[prompt])
    expected = generated(stock(name), given)
    assert torch.equal(generated(shared(name), given, cache=cached(name)), expected)


@each_family
def test_media_matter(name: str) -> None:
    """The other tests would pass without media, if these did not change what follows."""
    first, second = (generated(stock(name), inputs(FAMILIES[name], 5, letter, 6, 7)) for letter in "ab")
    assert not torch.equal(first[:, -NEW_TOKENS:], second[:, -NEW_TOKENS:])


@each_family
def test_a_cached_picture_is_neither_read_nor_computed(name: str) -> None:
    model, cache = shared(name), cached(name)
    with fed(model) as lengths, towers(name, model) as calls:
        generated(model, inputs(FAMILIES[name], *PROMPTS["question"]), cache=cache)
        assert lengths[0] == 7
        assert not calls
    new = inputs(FAMILIES[name], *PROMPTS["a second picture"])
    with towers(name, stock(name)) as both:
        generated(stock(name), new)
    with fed(model) as lengths, towers(name, model) as calls:
        generated(model, new, cache=cache)
        assert lengths[0] == new["input_ids"].shape[1] - cache.kv.geometry.tokens
    assert [2 * rows for rows in calls] == both, "the tower gets the new picture alone"


@each_family
@pytest.mark.parametrize("rows", BATCHES)
def test_batches(name: str, rows: str) -> None:
    given = batch(FAMILIES[name], *BATCHES[rows])
    expected = generated(stock(name), given)
    assert torch.equal(generated(shared(name), given, cache=cached(name)), expected)


@each_family
@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"do_sample": True}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}],
    ids=["beams", "sampling", "static cache", "prompt lookup"],
)
def test_modes(name: str, options: dict[str, Any]) -> None:
    given = inputs(FAMILIES[name], *PROMPTS["question"])
    # Stock's own static cache gives other tokens than a dynamic one for Gemma 4 in 5.17.
    expected = generated(stock(name), given, **{key: options[key] for key in options if key != "cache_implementation"})
    assert torch.equal(generated(shared(name), given, cache=cached(name), **options), expected)


@each_family
def test_several_sequences_of_a_question_with_a_picture(name: str) -> None:
    """Stock repeats several pictures of a prompt in the wrong order for some models; a batch of rows is the truth."""
    parts = PROMPTS["a second picture"]
    expected = generated(stock(name), batch(FAMILIES[name], parts, parts), do_sample=True)
    given, options = inputs(FAMILIES[name], *parts), {"do_sample": True, "num_return_sequences": 2}
    assert torch.equal(generated(shared(name), given, cache=cached(name), **options), expected)


@each_family
def test_state_of_an_earlier_picture_does_not_matter(name: str) -> None:
    model, family, cache = attach(make(name)), FAMILIES[name], cached(name)
    given = inputs(family, *PROMPTS["question"])
    expected = generated(stock(name), given)
    generated(model, inputs(family, 3, "x3", 2))
    assert torch.equal(generated(model, given, cache=cache), expected)
    text = inputs(family, 9)
    own = CacheGenCache.from_context(model, text["input_ids"][:, :6])
    expected = generated(make(name), text)
    generated(model, inputs(family, 3, "x3", 2))
    assert torch.equal(generated(model, text, cache=own), expected)


@pytest.mark.parametrize("name", ["qwen2_vl", "gemma3", "llava_onevision"])
@pytest.mark.parametrize("width", [4, 7, 64])
def test_a_prefill_in_chunks_does_not_cut_a_picture(name: str, width: int) -> None:
    given = inputs(FAMILIES[name], 5, "a", 6, "b1", 3)
    with towers(name, shared(name)) as calls:
        found = CacheGenCache.from_context(shared(name), given, prefill_chunk_tokens=width)
    assert len(calls) == (1 if width == 64 else 2)
    whole = CacheGenCache.from_context(shared(name), given, prefill_chunk_tokens=1000)
    assert all(torch.allclose(*pair, atol=1e-3) for pair in zip(found.kv.keys, whole.kv.keys, strict=True))


@each_family
@pytest.mark.parametrize("how", ["from_pretrained", "stream"])
def test_round_trip_through_an_artifact(name: str, how: str, tmp_path: Path) -> None:
    cached(name).save_pretrained(tmp_path, LOSSLESS)
    model = make(name)
    loaded = getattr(CacheGenCache, how)(tmp_path, model=model)
    assert loaded.fingerprint == cached(name).fingerprint
    for prompt in ("question", "another picture"):
        given = inputs(FAMILIES[name], *PROMPTS[prompt])
        assert torch.equal(generated(model, given, cache=loaded), generated(stock(name), given))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3"])
def test_a_cache_that_the_model_filled(name: str) -> None:
    model, given = make(name), inputs(FAMILIES[name], *CONTEXT)
    filled = cache_of(model.generate(**given, max_new_tokens=1, return_dict_in_generate=True))
    if name == "gemma3":  # its sliding layers have dropped tokens
        pytest.skip("sliding layers of the stock cache keep their window alone")
    cache = CacheGenCache.from_cache(filled, given, model)
    assert cache.fingerprint == cached(name).fingerprint
    question = inputs(FAMILIES[name], *PROMPTS["question"])
    assert torch.equal(generated(model, question, cache=cache), generated(stock(name), question))


def test_pictures_that_touch_are_reused_together() -> None:
    """A model that attends in both directions within pictures takes adjacent ones for one."""
    family, model = FAMILIES["gemma3"], shared("gemma3")
    both = inputs(family, 5, "a", "b", 6)
    picture = both["input_ids"] == both["input_ids"][0, 6]
    joined = (both["input_ids"] != 93) & (both["input_ids"] != 94)
    ids = both["input_ids"][joined][None]
    types = picture[joined][None].long()
    given = {**both, "input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": types}
    expected = generated(stock("gemma3"), given)
    end = 5 + 4
    alone = {
        "input_ids": ids[:, :end], "pixel_values": both["pixel_values"][:1],
        "token_type_ids": given["token_type_ids"][:, :end],
    }  # fmt: skip
    cache = CacheGenCache.from_context(model, alone)
    with fed(model) as lengths:
        assert torch.equal(generated(model, given, cache=cache), expected)
    assert lengths[0] == ids.shape[1] - 5


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("every", [None, 4])
def test_a_hybrid_model_resumes_from_a_checkpoint(prompt: str, every: int | None, tmp_path: Path) -> None:
    family, model = WITH_STATES["qwen3_5"], make("qwen3_5")
    cache = CacheGenCache.from_context(model, inputs(family, *CONTEXT), state_every=every)
    assert cache.checkpoints.tokens == ((16,) if every is None else (4, 6, 12, 16))
    cache.save_pretrained(tmp_path, LOSSLESS)
    given = inputs(family, *PROMPTS[prompt])
    expected = generated(stock("qwen3_5"), given)
    loaded = CacheGenCache.from_pretrained(tmp_path, model=model)
    for held in (cache, loaded):
        assert torch.equal(generated(model, given, cache=held), expected)
    if prompt in ("question", "a second picture"):
        with fed(model) as lengths:
            generated(model, given, cache=cache)
        assert lengths[0] == given["input_ids"].shape[1] - 16
