"""Prompts as one text: the tokens of the whole text, one BOS, and the answer of a call without a cache."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_cachegen import CacheGenCache, CacheGenConfig, TextAnswer, generate_text
from hf_cachegen.artifact import ContextText
from hf_cachegen.errors import ConfigError, PromptMismatchError, WrongTokenizerError
from hf_cachegen.models.text import prompt_ids
from tests import tiny_models
from tests.text_support import CHAT, DROPS_THINKING, tokenizer_of

GREEDY = {"max_new_tokens": 8, "do_sample": False}
SEAMS = {
    "space": ({"space": True}, "the cat. dab", "bed fed", 0),
    "merge": ({}, "the cat. da", "bc fed", 1),
    "bos": ({"bos": True}, "the cat. ", "bc fed", 0),
    "all": ({"space": True, "bos": True}, "the cat. dab", "c fed", 1),
}
"""Tokenizer, context, question, and the tokens of the context that the whole text does not share."""
USER = {"role": "user", "content": "the cat. "}
THOUGHT = {"role": "assistant", "content": "<think>ab or fed?</think>fed. "}
ASKED = {"role": "user", "content": "bed?"}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_models.make("llama", 0).eval()


def stock(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """Return the tokens of the stock call without a cache."""
    prompt = torch.tensor([ids])
    found: Tensor = model.generate(prompt, attention_mask=torch.ones_like(prompt), **GREEDY)
    return found


def ask(model: PreTrainedModel, tokenizer: Any, **arguments: Any) -> TextAnswer:
    return generate_text(model, tokenizer, return_output=True, **GREEDY, **arguments)


@pytest.mark.parametrize("seam", SEAMS)
def test_the_tokens_are_those_of_the_whole_text(model: PreTrainedModel, seam: str, tmp_path: Path) -> None:
    options, context, question, lost = SEAMS[seam]
    tokenizer = tokenizer_of(**options)
    whole = tokenizer(context + question)["input_ids"]
    assert tokenizer(context)["input_ids"] + tokenizer(question)["input_ids"] != whole, "this seam shows no fault"
    expected = stock(model, whole)
    cache = CacheGenCache.from_text(model, tokenizer, context, CacheGenConfig(transform="identity", lossless=True))
    cache.save_pretrained(tmp_path / "a")
    for given in (cache, tmp_path / "a"):
        found = ask(model, tokenizer, text=context + question, cache=given)
        assert torch.equal(found.output, expected)
        assert (found.context_tokens, found.lost_tokens) == (cache.input_ids.shape[1], lost)
        assert found.text == tokenizer.decode(expected[0, len(whole) :], skip_special_tokens=True)
    streamed = ask(model, tokenizer, text=context + question, cache=tmp_path / "a", slo=60.0)
    assert torch.equal(streamed.output, expected)
    assert streamed.lost_tokens == lost


def test_the_answer_alone_is_a_text(model: PreTrainedModel) -> None:
    tokenizer = tokenizer_of()
    found = ask(model, tokenizer, text="the cat")
    assert generate_text(model, tokenizer, "the cat", **GREEDY) == found.text
    assert (found.context_tokens, found.reused_tokens, found.lost_tokens) == (0, 0, 0)
    beams = generate_text(model, tokenizer, "the cat", num_beams=2, return_dict_in_generate=True, **GREEDY)
    assert isinstance(beams, str)


@pytest.mark.parametrize("space", [False, True], ids=["plain", "space"])
def test_one_bos_where_both_the_tokenizer_and_the_template_bring_one(model: PreTrainedModel, space: bool) -> None:
    tokenizer = tokenizer_of(space=space, bos=True, template=CHAT)
    rendered = tokenizer.apply_chat_template([USER, ASKED], tokenize=False, add_generation_prompt=True)
    assert tokenizer(rendered)["input_ids"].count(tokenizer.bos_token_id) == 2, "the fault"
    whole = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    cache = CacheGenCache.from_text(model, tokenizer, ContextText(messages=[USER]))
    assert cache.input_ids[0].tolist().count(tokenizer.bos_token_id) == 1
    for prompt in ({"messages": [USER, ASKED]}, {"text": rendered}):
        found = ask(model, tokenizer, cache=cache, **prompt)
        assert torch.equal(found.output, stock(model, whole))
        assert found.lost_tokens == 0


def test_a_bos_of_the_text_itself_is_kept() -> None:
    """Without a BOS from the tokenizer, nothing is removed."""
    tokenizer = tokenizer_of()
    assert prompt_ids(tokenizer, ContextText("<s><s>ab"), answer=True) == tokenizer("<s><s>ab")["input_ids"]


def test_a_template_that_changes_earlier_turns(
    model: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = tokenizer_of(bos=True, template=DROPS_THINKING)
    turns = [USER, THOUGHT]
    cache = CacheGenCache.from_text(model, tokenizer, ContextText(messages=turns))
    whole = tokenizer.apply_chat_template([*turns, ASKED], add_generation_prompt=True, return_dict=True)["input_ids"]
    with caplog.at_level(logging.INFO, "hf_cachegen.generation"):
        found = ask(model, tokenizer, messages=[*turns, ASKED], cache=cache)
    assert torch.equal(found.output, stock(model, whole))
    thought = len(tokenizer("<think>ab or fed?</think>fed. ", add_special_tokens=False)["input_ids"])
    assert found.lost_tokens == thought
    assert f"{thought} tokens of the context are lost" in caplog.text
    with pytest.raises(PromptMismatchError):
        ask(model, tokenizer, messages=[*turns, ASKED], cache=cache, on_mismatch="error")


def test_variables_of_the_template(model: PreTrainedModel) -> None:
    tokenizer = tokenizer_of(template="{{ greeting }}" + CHAT)
    plain = tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    found = ask(model, tokenizer, messages=[USER], template={"greeting": "cab "})
    assert found.prompt_tokens == len(tokenizer(f"cab {plain}")["input_ids"])


def test_another_tokenizer_is_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    cache = CacheGenCache.from_text(model, tokenizer_of(), "the cat")
    cache.save_pretrained(tmp_path)
    for given in (cache, tmp_path):
        with pytest.raises(WrongTokenizerError):
            generate_text(model, tokenizer_of(space=True), "the cat", cache=given)
    with pytest.raises(WrongTokenizerError):
        generate_text(model, tokenizer_of(space=True), "the cat", cache=tmp_path, slo=60.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either a text or the messages"),
        ({"text": "a", "messages": [USER]}, "either a text or the messages"),
        ({"text": "a", "template": {"tools": []}}, "for messages"),
        ({"text": ["a"]}, "expected a text, got list"),
        ({"messages": []}, "at least one message"),
        ({"messages": [{"content": "a"}]}, 'message 0: expected an object with a "role"'),
        ({"messages": [USER], "template": {"chat_template": "x"}}, "must not set .'chat_template'"),
        ({"messages": [{"role": "user", "content": {1}}]}, "cannot be stored"),
        ({"text": "\ud800"}, "cannot be stored"),
        ({"text": "a", "input_ids": torch.ones(1, 1)}, "leave them out"),
        ({"text": "a", "slo": 1.0}, "pass it as cache="),
        ({"messages": [USER]}, "chat template of the tokenizer cannot render these 1 messages"),
    ],
)
def test_wrong_arguments(model: PreTrainedModel, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        generate_text(model, tokenizer_of(), **arguments)
