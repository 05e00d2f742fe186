"""Models with recurrent states: a prefix cache resumes from checkpoints, with the tokens of a call without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_cachegen import PrefixCache
from hf_cachegen.generation import generate
from tests import state_models
from tests.generation_support import MODES, fed, seeded
from tests.prefix_cache_support import small

REFUSED = ("minimax", "rwkv", "recurrent_gemma")
FAMILIES = [name for name in state_models.NAMES if name not in REFUSED and state_models.known(name)]
SINGLE = ("mamba", "falcon_mamba", "jamba", "zamba")
"""Families that read one token at a time after their states."""
OPTIONS: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
each_family = pytest.mark.parametrize("name", FAMILIES)
some = pytest.mark.parametrize("name", [n for n in ("qwen3_next", "falcon_h1", "jamba", "lfm2") if n in FAMILIES])


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


@some
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in ("guidance",)])
def test_every_mode(name: str, mode: str, tmp_path: Path, own_cache: None) -> None:
    model, cache, ids = state_models.shared(name), small(tmp_path / "p", state_every=16), text(40)
    for prompt in (ids, torch.cat([ids, text(9, 5)], 1), ids):
        same(model, cache, prompt, **MODES[mode])
    assert cache.stats().errors == 0
    if name == "jamba" and "chunked" in mode:
        return  # the stock call does not read its prompt in chunks either
    assert cache.stats().hits == 2
