"""Hostile files of the prefix cache: headers that lie about a block's key, number or family, and ambiguous JSON."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from hf_cachegen.artifact.manifest import digest
from hf_cachegen.cli import main
from hf_cachegen.errors import CorruptError, LimitError, ManifestError, PrefixCacheError
from hf_cachegen.prefix_cache.block import Block, dump, load, load_beginning, part_ends
from hf_cachegen.prefix_cache.keys import Family, block_key, checkpoint_key, pack_tokens
from hf_cachegen.prefix_cache.local import LocalTier

FAMILY = Family({"block_tokens": 4, "model_id": "tiny", "codec": {}, "level": None})
TOKENS = (0, 1, 2, 3)
FIRST = Block(block_key(FAMILY.salt, pack_tokens(TOKENS)), FAMILY.salt, 0, FAMILY, TOKENS, {}, {}, b"side", (b"x",))


@pytest.mark.parametrize("change", [
    "UPDATE blocks SET nbytes = 'x'", "UPDATE blocks SET key = 'k'", "UPDATE blocks SET used = 'x'",
    "UPDATE state SET value = 'x' WHERE name = 'nbytes'", "DELETE FROM state",
])  # fmt: skip
def test_an_index_with_other_values_is_made_again(change: str, tmp_path: Path) -> None:
    tier, data = LocalTier(tmp_path, None), dump(FIRST)
    assert tier.put(FIRST, data, ())
    with contextlib.closing(sqlite3.connect(tmp_path / "index.sqlite")) as connection:
        connection.execute(change)
        connection.commit()
    with pytest.raises(PrefixCacheError, match="verify' makes it again"):
        (tier.index.nbytes(), tier.index.rows())
    assert tier.verify().blocks == 1
    assert [row.nbytes for row in tier.index.rows()] == [tier.index.nbytes()] == [len(data)]


@pytest.mark.parametrize("kind", ["device", "pipe", "folder"])
def test_a_block_that_is_no_regular_file_is_not_read(kind: str, tmp_path: Path) -> None:
    """A device has no end, and a pipe may have no writer."""
    tier = LocalTier(tmp_path, None)
    assert tier.put(FIRST, dump(FIRST), ())
    path = tmp_path / "blocks" / FIRST.key.hex()[:2] / FIRST.key.hex()
    path.unlink()
    if kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(PrefixCacheError, match="not a regular file"):
        tier.get(FIRST.key)


@pytest.mark.parametrize("family", ["[", "{}", '{"block_tokens": "4", "model_id": "x"}', "[1]"])
def test_ls_states_that_a_family_is_damaged(family: str, tmp_path: Path) -> None:
    LocalTier(tmp_path, None).put(FIRST, dump(FIRST), ())
    with contextlib.closing(sqlite3.connect(tmp_path / "index.sqlite")) as connection:
        connection.execute("UPDATE families SET family = ?", (family,))
        connection.commit()
    result = CliRunner().invoke(main, ["prefix-cache", "ls", str(tmp_path)])
    assert (result.exit_code, "the index is damaged" in result.output) == (3, True), result.output


@pytest.mark.parametrize(("tokens", "parts"), [(TOKENS, 4), (TOKENS, 20_000), ((), 4097), ((), 20_000)])
def test_a_header_of_many_empty_parts_is_refused(tokens: tuple[int, ...], parts: int) -> None:
    """Its parts have no bytes, so the length of the file does not bound them."""
    key = FIRST.key if tokens else checkpoint_key(FAMILY.salt)
    data = dump(replace(FIRST, key=key, tokens=tokens, parts=(b"",) * parts))
    for read in (load, lambda x: load_beginning(x, key), lambda x: part_ends(x, lambda *_: b"")):
        with pytest.raises(LimitError, match="limit is"):
            read(data)
    assert len(load(dump(replace(FIRST, parts=(b"",) * 3))).parts) == 3


def test_a_header_that_lies_is_refused() -> None:
    block = FIRST
    for wrong in (
        Block(block.key, block.parent, 0, FAMILY, (1, 2, 3, 4), {}, {}, b"", (b"x",)),
        Block(block_key(b"p" * 32, pack_tokens(block.tokens)), b"p" * 32, 0, FAMILY, block.tokens, {}, {}, b"", (b"",)),
        Block(block.key, block.parent, 1 << 30, FAMILY, block.tokens, {}, {}, b"", (b"x",)),
        Block(block.key, block.parent, 0, FAMILY, block.tokens, {}, {}, b"", ()),
        Block(block.key, block.parent, 0, Family({"block_tokens": "4"}), block.tokens, {}, {}, b"", (b"x",)),
    ):
        with pytest.raises((CorruptError, ManifestError)):
            load(dump(wrong))


@pytest.mark.parametrize("fields", [
    {}, {"block_tokens": 4}, {"block_tokens": 0, "model_id": "x"}, {"block_tokens": 4.0, "model_id": "x"},
    {"block_tokens": float("inf"), "model_id": "x"}, {"block_tokens": None, "model_id": "x"},
    {"block_tokens": True, "model_id": "x"}, {"block_tokens": 4, "model_id": None},
], ids=str)  # fmt: skip
def test_a_checkpoint_of_no_family_is_refused(fields: dict[str, Any]) -> None:
    parent = FIRST.key
    good = Block(checkpoint_key(parent), parent, 1, FAMILY, (), {}, {}, b"[]", (b"x",))
    assert load(dump(good), good.key) == good
    with pytest.raises(ManifestError):
        load(dump(replace(good, family=Family(fields))), good.key)


@pytest.mark.parametrize("wrong", ['{"a":1,"a":2}', "[" * 900 + "]" * 900, "NaN", "1e999", r'"\ud800"', "9" * 5000])
def test_a_header_of_ambiguous_json_is_refused(wrong: str) -> None:
    data = dump(FIRST)
    length = int.from_bytes(data[8:12], "little")
    header = data[28 : 28 + length].replace(b'"codec":{}', b'"codec":' + wrong.encode())
    head = data[:8] + len(header).to_bytes(4, "little") + bytes.fromhex(digest(header))
    with pytest.raises(ManifestError, match="is no JSON"):
        load(head + header + data[28 + length :], FIRST.key)
