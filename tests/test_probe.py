"""A probe finds differences that no hash can find, and accepts differences by rounding."""

from __future__ import annotations

import base64
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from hf_cachegen import CacheGenCache, generate
from hf_cachegen.errors import ConfigError, ManifestError, WrongWeightsError
from hf_cachegen.models import identity, probe
from hf_cachegen.models.causality import TRIED_TOKENS
from hf_cachegen.models.fingerprint import Fingerprint, _warn_once
from tests import tiny_models

TOKENS = tiny_models.tokens(40)
MODELS = tiny_models.SUPPORTED


def saved(folder: Path, name: str = "llama", tokens: torch.Tensor = TOKENS) -> Path:
    CacheGenCache.from_context(tiny_models.shared(name), tokens, profile=None).save_pretrained(folder / "a")
    return folder / "a"


def count_passes(model: Any) -> list[int]:
    """Return a list to which each forward pass appends its number of tokens."""
    found: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, given: found.append(given[0].shape[1]))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_the_same_model_passes_in_one_pass_of_16_tokens(name: str, tmp_path: Path) -> None:
    path, model = saved(tmp_path, name), tiny_models.make(name)
    passes = count_passes(model)
    cache = CacheGenCache.from_pretrained(path, model)
    assert passes == [probe.PROBE_TOKENS]
    cache.check(model)
    CacheGenCache.from_pretrained(path, model)
    assert passes == [probe.PROBE_TOKENS], "an unchanged model is not probed again"


def test_a_context_shorter_than_a_probe_is_probed_whole(tmp_path: Path) -> None:
    model = tiny_models.make("llama")
    passes = count_passes(model)
    CacheGenCache.from_pretrained(saved(tmp_path, tokens=tiny_models.tokens(3)), model).check(model)
    assert passes == [3]


def test_the_model_that_computed_a_cache_is_not_probed() -> None:
    model = tiny_models.make("llama")
    passes = count_passes(model)
    cache = CacheGenCache.from_context(model, TOKENS, profile=None)
    cache.check(model)
    assert [tokens for tokens in passes if tokens != TRIED_TOKENS] == [40], "the others try whether it is causal"


def _hook(model: Any) -> None:
    model.model.layers[1].self_attn.k_proj.register_forward_hook(lambda module, given, out: out * 1.001)


def _steering(model: Any) -> None:
    model.model.layers[0].register_forward_hook(lambda module, given, out: out + 1e-3)


def _attribute(model: Any) -> None:
    model.model.layers[1].self_attn.scaling *= 1.01


def _patched(model: Any) -> None:
    norm = model.model.layers[2].input_layernorm
    stock = norm.forward
    norm.forward = lambda states: stock(states) * 1.001


def _last_value(model: Any) -> None:
    model.model.layers[3].self_attn.v_proj.register_forward_hook(lambda module, given, out: out * 1.001)


CHANGES = {"hook": _hook, "steering": _steering, "attribute": _attribute, "patched": _patched, "last": _last_value}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_no_hash_finds_is_refused(change: str, tmp_path: Path) -> None:
    path, model = saved(tmp_path), tiny_models.make("llama")
    CHANGES[change](model)
    with pytest.raises(WrongWeightsError, match=r"its (keys|values) of layer \d for the first 16 tokens differ"):
        CacheGenCache.from_pretrained(path, model)
    loaded = CacheGenCache.from_pretrained(path, model, verify="weights")
    loaded.check(model)
    generate(model, TOKENS, cache=loaded, max_new_tokens=1)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_after_loading_is_refused_by_generate(change: str, tmp_path: Path) -> None:
    model = tiny_models.make("llama")
    cache = CacheGenCache.from_pretrained(saved(tmp_path), model)
    generate(model, TOKENS, cache=cache, max_new_tokens=1)
    CHANGES[change](model)
    with pytest.raises(WrongWeightsError, match="look for forward hooks"):
        generate(model, TOKENS, cache=cache, max_new_tokens=1)


def test_a_model_is_looked_at_once_per_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, model = saved(tmp_path), tiny_models.make("llama")
    CacheGenCache.from_pretrained(path, model)  # identified and probed
    looks, before = [], identity.model_state
    monkeypatch.setattr(identity, "model_state", lambda *given: looks.append(1) or before(*given))
    for use in (CacheGenCache.from_pretrained, CacheGenCache.stream):
        cache = use(path, model)
        assert len(looks) == 1
        looks.clear()
    cache.check(model)
    assert len(looks) == 1


def test_a_stream_is_probed(tmp_path: Path) -> None:
    path, model = saved(tmp_path), tiny_models.make("llama")
    _hook(model)
    with pytest.raises(WrongWeightsError, match="differ from the recorded ones"):
        CacheGenCache.stream(path, model)
    CacheGenCache.stream(path, model, verify="weights")


def test_a_hook_that_changes_nothing_passes(tmp_path: Path) -> None:
    path, model = saved(tmp_path), tiny_models.make("llama")
    model.model.layers[1].register_forward_hook(lambda *_: None)
    CacheGenCache.from_pretrained(path, model)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_kernels_are_within_the_tolerance(implementation: str, dtype: torch.dtype) -> None:
    def make(kernel: str) -> Any:
        model = tiny_models.make("llama").to(dtype)
        model.set_attn_implementation(kernel)
        return model

    known = CacheGenCache.from_context(make("sdpa"), TOKENS, profile=None).fingerprint
    known.check_probe(make(implementation), TOKENS[0].tolist())


def test_a_cache_of_other_tokens_is_noticed() -> None:
    """from_cache relies on its caller for the tokens that filled a cache."""
    model, past = tiny_models.make("llama"), DynamicCache()
    with torch.no_grad():
        model(tiny_models.tokens(40, seed=1), past_key_values=past)
    cache = CacheGenCache.from_cache(past, TOKENS, model, profile=None)
    with pytest.raises(WrongWeightsError, match="for the first 16 tokens differ"):
        generate(model, TOKENS, cache=cache, max_new_tokens=1)


def test_frequencies_that_depend_on_the_length_are_accepted(tmp_path: Path) -> None:
    """The first tokens of a long context are rotated differently from those tokens alone."""
    def make() -> Any:
        model = tiny_models.make("llama")
        model.config.max_position_embeddings = 32
        model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
        return model

    CacheGenCache.from_context(make(), TOKENS, profile=None).save_pretrained(tmp_path / "a")
    CacheGenCache.from_pretrained(tmp_path / "a", make())


def test_verify_has_three_values(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"verify must be one of \('probe', 'weights', 'all'\), got 'nothing'"):
        CacheGenCache.from_pretrained(saved(tmp_path), tiny_models.shared("llama"), verify="nothing")  # type: ignore[arg-type]


def test_a_record_is_small_and_fixed() -> None:
    keys = [torch.arange(2 * 20 * 3, dtype=torch.float32).view(1, 2, 20, 3).sin() for _ in range(2)]
    recorded = probe.record(keys, keys)
    assert len(base64.b64decode(recorded)) == 4 * 2 * 2 * probe.PROBE_TOKENS
    signs = [1 - 2 * (probe.words(1, probe.SIGN_SEED)[0] >> channel & 1) for channel in range(6)]
    first = float((keys[0][0, :, 0].flatten() * torch.tensor(signs)).sum())
    assert torch.frombuffer(bytearray(base64.b64decode(recorded)), dtype=torch.float32)[0] == pytest.approx(first)
    found = probe.distance(recorded, keys, [keys[0], keys[1] * 1.5])
    assert (found.layer, found.side) == (1, "values")
    assert 0.05 < found.value < 0.7


@pytest.mark.parametrize("damage", ["not base64!", "AAAA", ""])
def test_damaged_records_are_refused(damage: str) -> None:
    model = tiny_models.shared("llama")
    known = Fingerprint.from_dict({**Fingerprint.of(model, [1]).to_dict(), "probe": damage})
    with pytest.raises(ManifestError, match="fingerprint: the probe"):
        known.check_probe(model, [3, 4, 5])


def test_nan_is_a_difference() -> None:
    keys = [torch.ones(1, 1, 4, 2)]
    recorded = base64.b64encode(torch.full((8,), torch.nan).numpy().tobytes()).decode()
    assert not probe.distance(recorded, keys, keys).value <= 1


def test_earlier_artifacts_are_read_with_a_warning_once(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_models.make("llama")
    new = Fingerprint.of(model, [1]).to_dict()
    later = ("checksum", "buffers", "adapter_checksums", "probe")
    old = Fingerprint.from_dict({name: value for name, value in new.items() if name not in later})
    assert old.to_dict().keys() == new.keys() - set(later)
    _warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, "hf_cachegen"):
        for _ in range(2):
            old.check(model)
            old.check_probe(model, [1])
    assert len(caplog.records) == 1
    for part in ("checksums of all weights", "adapters", "first tokens", "computed buffers"):
        assert part in caplog.text
    with torch.no_grad():
        model.model.norm.weight.mul_(1.01)
    with pytest.raises(WrongWeightsError, match="other weights"):
        old.check(model)
