"""The text in an artifact: an addition that no reader needs, verified like every other byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_cachegen import CacheGenCache, CacheGenConfig
from hf_cachegen.artifact import TEXT_FILE, ContextText, Limits, Reader, read_text, write_artifact
from hf_cachegen.artifact.artifact import write
from hf_cachegen.artifact.encoded import encode_kv
from hf_cachegen.errors import ConfigError, CorruptError, LimitError
from hf_cachegen.stores import LocalStore
from tests import tiny_models
from tests.text_support import CHAT, tokenizer_of

CONFIG = CacheGenConfig(transform="identity", levels=2)
CHATS = ContextText(
    messages=[{"role": "user", "content": "caf\u00e9", "tool_calls": [{"z": 1, "a": [None, 0.5]}]}],
    template={"tools": [{"name": "b", "arguments": {"y": 1, "x": 2}}]},
)
TEXTS = {"text": ContextText("the caf\u00e9\n\U0001f600"), "chat": CHATS}


def saved(folder: Path, text: ContextText | None) -> Reader:
    encoded = encode_kv([torch.zeros(1, 1, 9, 8)], [torch.ones(1, 1, 9, 8)], CONFIG)
    write(encoded, folder, input_ids=range(9), text=text, overwrite=True)
    return Reader(LocalStore(folder))


@pytest.mark.parametrize("kind", TEXTS)
def test_a_text_is_read_as_it_was_stored(tmp_path: Path, kind: str) -> None:
    reader = saved(tmp_path, TEXTS[kind])
    found = read_text(reader)
    assert found == TEXTS[kind]
    assert found is not None
    assert found.segment() == TEXTS[kind].segment(), "the order of members, which a template may show"
    assert reader.verify() == reader.nbytes_at() == sum(path.stat().st_size for path in tmp_path.iterdir())


def test_no_level_and_no_other_file_needs_it(tmp_path: Path) -> None:
    """An earlier reader takes it for a file that it does not know: nothing else of the artifact differs."""
    bare, full = saved(tmp_path / "bare", None), saved(tmp_path / "full", TEXTS["text"])
    for name in bare.manifest.files:
        assert (tmp_path / "bare" / name).read_bytes() == (tmp_path / "full" / name).read_bytes()
    assert (full.manifest.required, full.manifest.format_version) == (bare.manifest.required, 1)
    grown = full.sizes["cachegen.json"] - bare.sizes["cachegen.json"]
    assert [full.nbytes_at(level) - bare.nbytes_at(level) for level in (1, 2)] == [grown, grown]
    assert full.nbytes_at() - bare.nbytes_at() == grown + full.sizes[TEXT_FILE]
    (tmp_path / "full" / TEXT_FILE).unlink()
    assert full.verify(level=2) == full.nbytes_at(2)


def test_an_artifact_without_it_and_an_overwritten_one(tmp_path: Path) -> None:
    saved(tmp_path, TEXTS["text"])
    assert read_text(saved(tmp_path, None)) is None
    assert not (tmp_path / TEXT_FILE).exists()


def test_a_damaged_text_is_an_error(tmp_path: Path) -> None:
    reader = saved(tmp_path, TEXTS["text"])
    data = bytearray((tmp_path / TEXT_FILE).read_bytes())
    data[-1] ^= 1
    (tmp_path / TEXT_FILE).write_bytes(data)
    with pytest.raises(CorruptError, match="segment text"):
        read_text(reader)
    with pytest.raises(LimitError, match="a text of 14 bytes, the limit is 13"):
        read_text(Reader(LocalStore(tmp_path), Limits(max_text_bytes=13)))


@pytest.mark.parametrize(
    ("segment", "data"),
    [
        ("text", b"\xff\xfe"),
        ("messages", b"[1]"),
        ("messages", b"{}"),
        ("messages", b'{"messages":[]}'),
        ("messages", b'{"messages":[{"role":"a"}],"chat_template":"{{ 1 }}"}'),
        ("messages", b"[" * 5000),
        ("messages", b'{"messages":[{"role":"a","role":"b"}]}'),
    ],
)
def test_a_strangers_text(tmp_path: Path, segment: str, data: bytes) -> None:
    manifest = saved(tmp_path / "a", None).manifest
    store = LocalStore(tmp_path / "a")
    kept = [(s.file, s.name, store.read(s.file, s.offset, s.length)) for s in manifest.segments]
    write_artifact(tmp_path / "b", manifest, [*kept, (TEXT_FILE, segment, data)])
    with pytest.raises(CorruptError, match=TEXT_FILE):
        read_text(Reader(LocalStore(tmp_path / "b")))


def test_a_later_form_is_ignored(tmp_path: Path) -> None:
    manifest = saved(tmp_path / "a", None).manifest
    store = LocalStore(tmp_path / "a")
    kept = [(s.file, s.name, store.read(s.file, s.offset, s.length)) for s in manifest.segments]
    write_artifact(tmp_path / "b", manifest, [*kept, (TEXT_FILE, "later", b"\x00")])
    assert read_text(Reader(LocalStore(tmp_path / "b"))) is None


def test_a_chat_is_a_list_or_an_object() -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "a"}]
    assert ContextText.from_json(json.dumps(messages).encode()) == ContextText(messages=messages)
    object_ = {"messages": messages, "tools": [{"name": "f"}]}
    found = ContextText.from_json(json.dumps(object_).encode())
    assert found.template == {"tools": [{"name": "f"}]}
    assert found.followed_by("") is found
    assert list(found.followed_by("b").messages or [])[1:] == [{"role": "user", "content": "b"}]
    with pytest.raises(ConfigError, match="a JSON list of messages"):
        ContextText.from_json(b'"a"')


def test_caches_keep_their_text(tmp_path: Path) -> None:
    model, tokenizer = tiny_models.make("llama", 0), tokenizer_of(template=CHAT)
    chat = ContextText(messages=[{"role": "user", "content": "the cat"}])
    for name, text in (("text", ContextText("the cat")), ("chat", chat)):
        cache = CacheGenCache.from_text(model, tokenizer, text)
        cache.save_pretrained(tmp_path / name)
        loaded = CacheGenCache.from_pretrained(tmp_path / name, model=model)
        assert cache.read_text() == loaded.read_text() == text
        loaded.save_pretrained(tmp_path / f"{name}-copy")
        assert read_text(Reader(LocalStore(tmp_path / f"{name}-copy"))) == text
    silent = CacheGenCache.from_text(model, tokenizer, "the cat", keep_text=False)
    silent.save_pretrained(tmp_path / "silent")
    assert not (tmp_path / "silent" / TEXT_FILE).exists()
    assert CacheGenCache.from_context(model, silent.input_ids).read_text() is None
    CacheGenCache.from_text(model, tokenizer, "the cat. bed").save_pretrained(tmp_path / "text", overwrite=True)
    old = CacheGenCache.from_pretrained(tmp_path / "chat", model=model)
    CacheGenCache.from_text(model, tokenizer, "fed").save_pretrained(tmp_path / "chat", overwrite=True)
    with pytest.raises(CorruptError, match="no longer the artifact"):
        old.read_text()
