"""Models with recurrent states: a prefix cache resumes from checkpoints, with the tokens of a call without it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from torch import Tensor

from hf_cachegen import CacheGenCache, CacheGenConfig, PrefixCache, attach
from hf_cachegen.errors import (
    ArtifactError,
    ConfigError,
    CorruptError,
    LimitError,
    ManifestError,
    UnsupportedModelError,
    WrongModelError,
)
from hf_cachegen.generation import generate
from hf_cachegen.models.continuation import continuation_of
from hf_cachegen.prefix_cache.binding import bind
from hf_cachegen.prefix_cache.checkpoint import decode_checkpoint
from hf_cachegen.prefix_cache.transfer import export_artifact, import_artifact
from tests import state_models
from tests.generation_support import MODES, fed, seeded
from tests.prefix_cache_support import small

REFUSED = ("minimax", "rwkv", "recurrent_gemma")
FAMILIES = [name for name in state_models.NAMES if name not in REFUSED and state_models.known(name)]
SINGLE = ("mamba", "falcon_mamba", "jamba", "zamba")
"""Families that read one token at a time after their states."""
OPTIONS: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
FAST = ("qwen3_next",)
each_family = pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
some = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) for name in ("falcon_h1", "jamba", "lfm2") if name in FAMILIES]
)


def text(count: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 97, (1, count), generator=torch.Generator().manual_seed(seed))


def same(model: Any, cache: PrefixCache, ids: Tensor, **options: Any) -> Tensor:
    chosen = {**OPTIONS, "attention_mask": torch.ones_like(ids), **options}
    expected = seeded(model.generate, ids, **chosen)
    found: Tensor = seeded(generate, model, ids, prefix_cache=cache, **chosen)
    assert torch.equal(found, expected)
    cache.flush()
    return found


def computed(model: Any, cache: PrefixCache, ids: Tensor) -> int:
    """Tokens of the prompt that a call computes."""
    before = cache.stats().tokens_computed
    bind(cache, model)  # the first time, this tries how the model continues
    with fed(model) as lengths:
        seeded(generate, model, ids, prefix_cache=cache, attention_mask=torch.ones_like(ids), **OPTIONS)
    cache.flush()
    found = cache.stats().tokens_computed - before
    assert sum(lengths) == found + 11, "what was counted is what was computed; 11 steps follow"
    return found


@each_family
def test_growth_edits_rewinds_and_restarts(name: str, tmp_path: Path, own_cache: None) -> None:
    model, cache, ids = state_models.shared(name), small(tmp_path / "p", state_every=16), text(43)
    answer = same(model, cache, ids)
    stats = cache.stats()
    assert stats.errors == stats.unsupported == stats.blocks_damaged == 0
    assert stats.checkpoints_stored == (4 if name not in SINGLE else 2), "16, 32, 40 and 48, or 40 and 48 tokens"
    grown = torch.cat([answer, text(5, 1)], 1)
    assert computed(model, cache, ids) == 3
    assert computed(model, cache, grown) == 12, "the answer's states are kept"
    same(model, cache, grown)
    edited = grown.clone()
    edited[0, 35] = (edited[0, 35] - 3 + 1) % 90 + 3
    again = small(tmp_path / "p", state_every=16)
    assert computed(model, again, edited) == (60 - 32 if name not in SINGLE else 60)
    for prompt in (edited, ids[:, :33], ids[:, :32], ids[:, :7], text(20, 9)):
        same(model, again, prompt)
    assert again.stats().errors == again.stats().blocks_damaged == 0
    assert again.verify().damaged == ()


FEW_MODES = {
    "sampling": {"num_return_sequences": 2, "do_sample": True},
    "beams": {"num_beams": 2},
    "chunked prefill": {"prefill_chunk_size": 16},
}


@pytest.mark.parametrize(
    "mode", [mode if mode == "sampling" else pytest.param(mode, marks=pytest.mark.slow) for mode in FEW_MODES]
)
def test_modes(mode: str, tmp_path: Path, own_cache: None) -> None:
    model, cache, ids = state_models.shared("falcon_h1"), small(tmp_path / "p"), text(40)
    for prompt in (ids, torch.cat([ids, text(9, 5)], 1)):
        same(model, cache, prompt, **FEW_MODES[mode])
    assert cache.stats().errors == 0
    assert cache.stats().hits == 1


@some
@pytest.mark.parametrize("mode", MODES)
def test_every_mode(name: str, mode: str, tmp_path: Path, own_cache: None) -> None:
    model, cache, ids = state_models.shared(name), small(tmp_path / "p", state_every=16), text(40)
    for prompt in (ids, torch.cat([ids, text(9, 5)], 1), ids):
        same(model, cache, prompt, **MODES[mode])
    assert cache.stats().errors == 0
    if "static" in mode or (name == "jamba" and "chunked" in mode):
        return  # left to the stock call; and it cannot read a prompt in chunks
    assert cache.stats().hits == 2


@pytest.fixture(name="filled")
def _filled(tmp_path: Path, own_cache: None) -> tuple[Any, PrefixCache, Tensor]:
    """A model, a prefix cache with checkpoints after 16, 32 and 40 tokens of a prompt, and the prompt."""
    model, cache, ids = state_models.shared("qwen3_next"), small(tmp_path / "p", state_every=16), text(43)
    seeded(generate, model, ids, prefix_cache=cache, attention_mask=torch.ones_like(ids), **OPTIONS)
    cache.flush()
    return model, cache, ids


def checkpoints(cache: PrefixCache) -> dict[int, Any]:
    """The rows of the stored checkpoints, by their blocks."""
    return {row.blocks: row for row in cache.local.index.rows() if row.is_checkpoint}


def test_a_checkpoint_is_evicted_alone_or_with_its_block(filled: tuple[Any, PrefixCache, Tensor]) -> None:
    model, cache, ids = filled
    assert sorted(checkpoints(cache)) == [2, 4, 5, 6]
    assert cache.local.drop(checkpoints(cache)[5].key) == 1
    assert computed(model, cache, ids) == 43 - 32
    assert sorted(checkpoints(cache)) == [2, 4, 5, 6], "it is stored again"
    budget = cache.stats().nbytes
    while cache.stats().blocks > 3:
        budget -= 2000
        cache.prune(budget + cache.local.index.file_bytes())
        rows = cache.local.index.rows()
        keys = {row.key for row in rows}
        assert all(row.depth == 0 or row.parent in keys for row in rows), "no chain is broken"
    assert cache.stats().nbytes <= budget
    same(model, cache, ids)
    assert cache.verify().damaged == ()
    assert computed(model, cache, ids) == 3


def test_a_pin_protects_what_is_resumed(filled: tuple[Any, PrefixCache, Tensor]) -> None:
    model, cache, ids = filled
    assert cache.pin(model, ids) == 40
    cache.prune(0)
    assert computed(model, cache, ids) == 3


def test_a_damaged_checkpoint_is_reported_and_an_earlier_one_resumed(filled: tuple[Any, PrefixCache, Tensor]) -> None:
    model, cache, ids = filled
    name = checkpoints(cache)[5].key.hex()
    path = cache.local.directory / "blocks" / name[:2] / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert computed(model, cache, ids) == 43 - 32
    assert cache.stats().blocks_damaged == 1
    assert computed(model, cache, ids) == 3, "and stored again"
    name = checkpoints(cache)[4].parent.hex()
    block = cache.local.directory / "blocks" / name[:2] / name
    block.write_bytes(block.read_bytes()[:-1])
    assert computed(model, cache, ids) == 43 - 16
    same(model, cache, ids)


def test_a_hostile_checkpoint_is_refused(filled: tuple[Any, PrefixCache, Tensor]) -> None:
    model, cache, _ = filled
    row = checkpoints(cache)[2]
    good = cache.protection.parse(cache.local.get(row.key) or b"", row.key)
    shapes = continuation_of(model).shapes
    assert decode_checkpoint(good, shapes, "model").tokens == 16
    table = json.loads(good.side)
    changes: list[tuple[dict[str, Any], type[Exception]]] = [
        ({"side": b"no json"}, ManifestError),
        ({"side": b"[]"}, ManifestError),
        ({"side": json.dumps([1] * len(table)).encode()}, ManifestError),
        ({"side": json.dumps([{**table[0], "shape": [1 << 40]}, *table[1:]]).encode()}, LimitError),
        ({"side": json.dumps([{**entry, "tokens": 8} for entry in table]).encode()}, CorruptError),
        ({"side": json.dumps(table[1:]).encode(), "parts": good.parts[1:]}, WrongModelError),
        ({"parts": (good.parts[0][:-1], *good.parts[1:])}, ArtifactError),
    ]
    for change, error in changes:
        with pytest.raises(error):
            decode_checkpoint(replace(good, **change), shapes, "model")


def test_rows_of_different_documents(tmp_path: Path, own_cache: None) -> None:
    model, cache = state_models.shared("qwen3_next"), small(tmp_path / "p")
    first, second, third = text(40, 1), text(40, 2), text(40, 3)
    same(model, cache, first)
    same(model, cache, second[:, :20])
    ids = torch.cat([first, second, third, first])
    same(model, cache, ids)
    same(model, cache, ids[:3], num_return_sequences=2, do_sample=True)
    assert cache.stats().errors == 0
    assert cache.stats().hits == 2
    assert computed_rows(model, cache, ids) == 4 * 8
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), first], 1)
    same(model, cache, padded, attention_mask=(padded != 0).long())
    assert cache.stats().unsupported == 1, "a pad may change the states"


def computed_rows(model: Any, cache: PrefixCache, ids: Tensor) -> int:
    before = cache.stats().tokens_computed
    seeded(generate, model, ids, prefix_cache=cache, attention_mask=torch.ones_like(ids), **OPTIONS)
    return cache.stats().tokens_computed - before


def test_another_machine_resumes_from_a_location(tmp_path: Path, own_cache: None) -> None:
    fsspec.filesystem("memory").store.clear()
    model, ids = state_models.shared("qwen3_next"), text(43)
    same(model, small(tmp_path / "1", remote="memory://team", state_every=16), ids)
    reader = small(tmp_path / "2", shared=["memory://team"], state_every=16)
    assert computed(model, reader, ids) == 3
    assert reader.stats().blocks == 8, "the blocks and the checkpoint are kept; the answer adds one of each"
    fetched = reader.stats().bytes_fetched
    assert computed(model, reader, ids) == 3
    assert reader.stats().bytes_fetched == fetched


def test_a_budget_bounds_the_checkpoints_of_a_call(tmp_path: Path, own_cache: None) -> None:
    model, ids = state_models.shared("qwen3_next"), text(43)
    size = continuation_of(model).state_bytes
    cache = small(tmp_path / "p", state_every=8, state_budget=2 * size)
    same(model, cache, ids)
    assert sorted(checkpoints(cache)) == [5, 6]
    with pytest.raises(ConfigError, match="state_every"):
        small(tmp_path / "p", state_every=0)


@pytest.mark.slow
def test_artifacts_with_states_are_imported_and_exported(tmp_path: Path, own_cache: None) -> None:
    model, cache, ids = state_models.shared("qwen3_next"), small(tmp_path / "p"), text(40)
    lossless = CacheGenConfig(lossless=True)
    made = CacheGenCache.from_context(state_models.make("qwen3_next"), ids, lossless, state_every=8)
    made.save_pretrained(tmp_path / "artifact")
    assert import_artifact(cache, tmp_path / "artifact") == 40
    assert sorted(checkpoints(cache)) == [1, 2, 3, 4]
    assert computed(model, cache, ids) == 8
    export_artifact(cache, checkpoints(cache)[4].key.hex(), tmp_path / "exported")
    loaded = CacheGenCache.from_pretrained(tmp_path / "exported", model=state_models.make("qwen3_next"))
    assert loaded.checkpoints.tokens == (32,)
    assert torch.equal(loaded.input_ids, ids[:, :32])


def test_what_no_checkpoint_holds_is_refused(tmp_path: Path, own_cache: None) -> None:
    for name in REFUSED:
        if state_models.known(name):
            with pytest.raises(UnsupportedModelError):
                attach(state_models.make(name), prefix_cache=small(tmp_path / "p"))
    model, ids = state_models.shared("qwen3_next"), text(20)
    cache = small(tmp_path / "p")
    with pytest.raises(ValueError):  # of the stock generate, which cannot roll back a state either
        generate(model, ids, prefix_cache=cache, assistant_model=state_models.make("qwen3_next", 1), max_new_tokens=3)
    assert cache.stats().unsupported == 1
    same(model, cache, ids, cache_implementation="static")
    assert cache.stats().unsupported == 2
