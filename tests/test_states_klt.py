"""Profiles of hybrid models: the attention layers go through klt, the states of the others through their own coder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hf_cachegen import CacheGenCache, CacheGenConfig, learn_profile
from hf_cachegen.artifact import Reader
from hf_cachegen.errors import TensorError
from hf_cachegen.profiles.learning import find_rotary
from hf_cachegen.profiles.learning.running import Sample
from hf_cachegen.stores import LocalStore
from tests import state_models

CONTEXT = torch.randint(3, 97, (1, 40), generator=torch.Generator().manual_seed(1))


def samples(count: int = 6) -> list[Sample]:
    draws = torch.Generator().manual_seed(5)
    return [
        (torch.randint(3, 97, (1, 48), generator=draws), torch.randint(3, 97, (1, 6), generator=draws))
        for _ in range(count)
    ]


@pytest.mark.parametrize(("name", "style"), [("qwen3_next", "half"), ("lfm2", "half"), ("jamba", "none")])
def test_the_rotation_is_found_behind_recurrent_layers(name: str, style: str) -> None:
    assert find_rotary(state_models.shared(name)).style == style


@pytest.mark.parametrize("name", ["qwen3_next", "falcon_h1", "jamba"])
def test_a_hybrid_is_encoded_with_its_profile(name: str, tmp_path: Path) -> None:
    model = state_models.shared(name)
    profile = learn_profile(model, samples(), config=CacheGenConfig(chunk_tokens=16))
    cache = CacheGenCache.from_context(model, CONTEXT, CacheGenConfig(chunk_tokens=16), profile=profile)
    cache.save_pretrained(tmp_path)
    assert set(Reader(LocalStore(tmp_path)).manifest.required) >= {"klt", "states"}
    loaded = CacheGenCache.from_pretrained(tmp_path, model, profile=profile)
    assert len(profile.layers) == len(loaded.kv.keys)
    options = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(CONTEXT, pad_token_id=0, **options).logits[0].log_softmax(-1)
    got = model.generate(CONTEXT, cache=loaded, pad_token_id=0, **options).logits[0].log_softmax(-1)
    assert float((expected.exp() * (expected - got)).sum()) < 0.02, "nats; the profile's target is 0.001 on average"


def test_a_model_without_keys_has_no_profile() -> None:
    with pytest.raises(TensorError, match="expected a layer with keys and values"):
        learn_profile(state_models.shared("mamba2"), samples())
