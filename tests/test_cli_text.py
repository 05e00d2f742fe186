"""encode, generate and stream with the text of the context: one text, one BOS, chats, lost tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_cachegen.artifact import TEXT_FILE
from hf_cachegen.cli import errors as cli_errors
from tests import tiny_models
from tests.cli_support import run, run_json
from tests.text_support import DROPS_THINKING, tokenizer_of

pytestmark = pytest.mark.usefixtures("own_cache")

CONTEXT, QUESTION = "the cat. dab", "c fed"
TURNS = [
    {"role": "user", "content": "the cat. "},
    {"role": "assistant", "content": "<think>ab or fed?</think>fed. "},
]
ENCODE = ("--lossless", "--chunk-tokens", 8)
NEW = ("--max-new-tokens", 8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    tokenizer_of(space=True, bos=True, template=DROPS_THINKING).save_pretrained(folder)
    tiny_models.make("llama", 0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A text, the same without its text, and a chat."""
    folder = tmp_path_factory.mktemp("artifacts")
    (folder / "context.txt").write_text(CONTEXT, encoding="utf-8")
    (folder / "turns.json").write_text(json.dumps(TURNS), encoding="utf-8")
    common = ("--model", model, *ENCODE)
    run_json("encode", folder / "context.txt", *common, "--out", folder / "text")
    run_json("encode", folder / "context.txt", *common, "--out", folder / "silent", "--no-text")
    run_json("encode", "--chat", folder / "turns.json", *common, "--out", folder / "chat")
    return folder


def stock(model: Path, ids: list[int]) -> str:
    """Return the answer of the stock model to these tokens."""
    loaded, prompt = AutoModelForCausalLM.from_pretrained(model), torch.tensor([ids])
    output = loaded.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
    answer: str = AutoTokenizer.from_pretrained(model).decode(output[0, len(ids) :], skip_special_tokens=True)
    return answer


def whole_ids(model: Path, messages: list[dict[str, str]] | None = None) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    if messages is None:
        ids: list[int] = tokenizer(CONTEXT + QUESTION)["input_ids"]
        return ids
    found: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    return list(found["input_ids"])


@pytest.mark.parametrize("command", [("generate",), ("stream", "--refine", "before")], ids=lambda command: command[0])
def test_context_and_question_are_one_text(artifacts: Path, model: Path, command: tuple[str, ...]) -> None:
    name, *options = command
    ids = whole_ids(model)
    found = run_json(name, artifacts / "text", "--model", model, "--prompt", QUESTION, *NEW, *options)
    assert found["text"] == stock(model, ids)
    assert found["lost_tokens"] == 1
    assert found["question_tokens"] == len(ids) - (found["context_tokens"] - 1)
    done = run(name, artifacts / "text", "--model", model, "--prompt", QUESTION, *NEW, *options)
    assert f"note: 1 of {found['context_tokens']} tokens of the context are computed again" in done.stderr


def test_an_artifact_without_its_text(artifacts: Path, model: Path) -> None:
    assert (artifacts / "text" / TEXT_FILE).exists()
    assert not (artifacts / "silent" / TEXT_FILE).exists()
    command = ("generate", artifacts / "silent", "--model", model, "--prompt", QUESTION, *NEW)
    done = run(*command)
    assert "does not store its text" in done.stderr
    found = run_json(*command)
    assert found["lost_tokens"] == 0
    given = run_json(*command, "--context", artifacts / "context.txt")
    assert given["text"] == stock(model, whole_ids(model))
    assert given["lost_tokens"] == 1
    assert "does not store" not in run(*command, "--context", artifacts / "context.txt").stderr


@pytest.mark.parametrize("command", [("generate",), ("stream", "--refine", "before")], ids=lambda command: command[0])
def test_a_chat_is_rendered_once_for_all_turns(
    artifacts: Path, model: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    name, *options = command
    asked = [*TURNS, {"role": "user", "content": QUESTION}]
    (tmp_path / "asked.json").write_text(json.dumps({"messages": asked}), encoding="utf-8")
    (tmp_path / "turns.json").write_text(json.dumps(TURNS), encoding="utf-8")
    ids = whole_ids(model, asked)
    assert ids.count(AutoTokenizer.from_pretrained(model).bos_token_id) == 1
    for prompt in (
        ("--prompt", QUESTION),
        ("--chat", tmp_path / "asked.json"),
        ("--chat", tmp_path / "turns.json", "--prompt", QUESTION),
    ):
        found = run_json(name, artifacts / "chat", "--model", model, *prompt, *NEW, *options)
        assert found["text"] == stock(model, ids)
        assert found["lost_tokens"] > 10, "the thinking of an earlier turn"


def test_inspect_shows_the_text(artifacts: Path) -> None:
    found = run_json("inspect", artifacts / "text")["text"]
    assert found == {"kind": "text", "bytes": len(CONTEXT), "begins": CONTEXT}
    assert run_json("inspect", artifacts / "silent")["text"] is None
    chat = run_json("inspect", artifacts / "chat")["text"]
    assert (chat["kind"], json.loads(chat["begins"])) == ("messages", {"messages": TURNS})
    assert CONTEXT in run("inspect", artifacts / "text").stdout


def test_wrong_uses(artifacts: Path, model: Path, tmp_path: Path) -> None:
    asked = ("generate", artifacts / "text", "--model", model)
    turns, words = artifacts / "turns.json", artifacts / "context.txt"
    for command, message in (
        (asked, "expected --prompt"),
        ((*asked, "--chat", turns, "--context", words), "either --context or --chat"),
        ((*asked, "--chat", words), "messages of a chat as JSON"),
        (("encode", "--model", model, "--out", tmp_path / "a"), "either TEXT or --chat"),
        (("encode", words, "--chat", turns, "--model", model, "--out", tmp_path / "a"), "either TEXT or --chat"),
    ):
        assert message in run_json(*command, code=cli_errors.USAGE)["error"]["message"]
