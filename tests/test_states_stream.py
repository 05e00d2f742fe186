"""Contexts with recurrent states under a deadline: the checkpoints are read first, and no chunk is recomputed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_cachegen import CacheGenCache, CacheGenConfig
from hf_cachegen.artifact import STATES_FILE
from hf_cachegen.errors import ArtifactError, UnsupportedModelError
from hf_cachegen.streaming import Fixed
from tests import state_models
from tests.small_artifact import contents

CONTEXT = torch.randint(3, 97, (1, 40), generator=torch.Generator().manual_seed(1))
PROMPT = torch.cat([CONTEXT, torch.randint(3, 97, (1, 7), generator=torch.Generator().manual_seed(2))], 1)
OPTIONS: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module", params=["qwen3_next", "falcon_h1", "mamba2"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    model, folder = state_models.shared(request.param), tmp_path_factory.mktemp(request.param)
    CacheGenCache.from_context(model, CONTEXT, CacheGenConfig(lossless=True, chunk_tokens=16)).save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize("options", [{}, {"slo": 5.0}, {"refine": "while_generating"}, {"slo": 0.001}], ids=str)
def test_a_stream_gives_the_tokens_of_the_stock_generate(saved: tuple[Any, Path], options: dict[str, Any]) -> None:
    model, folder = saved
    expected = model.generate(PROMPT, **OPTIONS)
    cache = CacheGenCache.stream(folder, model, **options)
    assert cache.report.checkpoints == cache.checkpoints.tokens == (23, 39)
    assert cache.report.state_bytes == cache.checkpoints.nbytes
    assert torch.equal(model.generate(PROMPT, cache=cache, **OPTIONS), expected)
    assert torch.equal(model.generate(PROMPT, cache=str(folder), **options, **OPTIONS), expected)


def test_refinements_reach_the_layers_with_keys(tmp_path: Path) -> None:
    model = state_models.shared("qwen3_next")
    CacheGenCache.from_context(model, CONTEXT, CacheGenConfig(chunk_tokens=16)).save_pretrained(tmp_path)
    cache = CacheGenCache.stream(tmp_path, model, policy=Fixed(1, refines=True), refine="while_generating")
    assert model.generate(PROMPT, cache=cache, **OPTIONS).shape == (1, PROMPT.shape[1] + 5)
    assert cache.refinement is not None
    cache.refinement.wait()
    finest = CacheGenCache.from_pretrained(tmp_path, model)
    assert all(torch.equal(*pair) for pair in zip(cache.kv.keys, finest.kv.keys, strict=True))


def test_text_cannot_replace_a_chunk(saved: tuple[Any, Path]) -> None:
    model, folder = saved
    with pytest.raises(UnsupportedModelError, match="recurrent states"):
        CacheGenCache.stream(folder, model, level="text")


def test_damaged_states_end_the_stream_or_the_next_location_has_them(saved: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = saved
    for name, data in contents(folder).items():
        damaged = data[:-1] + bytes([data[-1] ^ 1]) if name == STATES_FILE else data
        (tmp_path / name).write_bytes(damaged)
    with pytest.raises(ArtifactError, match=r"states\.safetensors"):
        CacheGenCache.stream(tmp_path, model)
    cache = CacheGenCache.stream(tmp_path, model, fallback=[str(folder)])
    assert torch.equal(model.generate(PROMPT, cache=cache, **OPTIONS), model.generate(PROMPT, **OPTIONS))
