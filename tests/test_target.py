"""A target of divergence: the step is chosen for each context, by probing the model within a budget."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval.reference import CALIBRATION_SEED, HELD_OUT_SEED, MODEL_PATH, document, sample
from hf_cachegen import CacheGenCache, CacheGenConfig, PrefixCache, Profile, encode_kv, learn_profile
from hf_cachegen.errors import ConfigError, TensorError
from hf_cachegen.models import target
from hf_cachegen.models.continuation import continuation_logits
from hf_cachegen.models.layers import capture
from hf_cachegen.models.stepping import StepSearch
from tests.klt_support import samples
from tests.tiny_models import VOCABULARY, make

SMALL = CacheGenConfig(chunk_tokens=32, protect_first=2, protect_last=8)
TRANSFORMS = ("delta", "identity", "klt")
TARGET = 0.01


@pytest.fixture(scope="module")
def model() -> Any:
    return make("llama")


@pytest.fixture(scope="module")
def profile(model) -> Profile:
    return learn_profile(model, samples(), config=replace(SMALL, transform="klt"))


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (1, 70), generator=torch.Generator().manual_seed(5))


def divergences(model, exact: CacheGenCache, decoded: CacheGenCache, continuation: torch.Tensor) -> float:
    with torch.no_grad():
        found = [
            continuation_logits(model, cache.kv.keys, cache.kv.values, continuation).log_softmax(-1)
            for cache in (exact, decoded)
        ]
    return float((found[0].exp() * (found[0] - found[1])).sum(-1).mean())


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_largest_step_within_the_target_is_chosen(model, profile, ids, transform, tmp_path, monkeypatch) -> None:
    searches: list[StepSearch] = []

    class Watched(StepSearch):
        def __init__(self, *args: Any):
            super().__init__(*args)
            searches.append(self)

    monkeypatch.setattr(target, "StepSearch", Watched)
    config = replace(SMALL, transform=transform, target_kl=TARGET)
    exact = CacheGenCache.from_context(model, ids, config, profile)
    assert exact.config is not None
    assert (exact.config.transform, exact.config.target_kl) == (transform, None)
    exact.save_pretrained(tmp_path)
    decoded = CacheGenCache.from_pretrained(tmp_path, model, profile=profile)
    found = decoded.report.encoding["target_kl"]
    assert found == exact.measured
    assert found["kl"][-1] <= TARGET == found["target"]
    assert found["kl"] == sorted(found["kl"], reverse=True)
    assert all(low < kl < high for low, kl, high in zip(found["low"], found["kl"], found["high"], strict=True))
    assert found["passes"] <= config.probe_passes
    # The step a quarter octave larger misses the target on the same continuations.
    known = searches[0].known[:, :, 0]
    code = int((known.mean(1) <= TARGET).nonzero().max())
    assert float(known[code].mean()) == pytest.approx(found["kl"][-1], rel=1e-4)
    assert float(known[code + 1].nansum()) > TARGET * target.DRAWN
    # The stored cache diverges as measured, on continuations of its own.
    own = [divergences(model, exact, decoded, torch.randint(3, VOCABULARY, (1, 16))) for _ in range(8)]
    assert sum(own) / 8 < 3 * TARGET


def test_bytes_without_an_offset_are_those_of_before(model, profile, ids, tmp_path) -> None:
    cache = CacheGenCache.from_context(model, ids, replace(SMALL, transform="klt"), profile)
    cache.save_pretrained(tmp_path / "plain")
    manifest = json.loads((tmp_path / "plain" / "cachegen.json").read_bytes())
    assert "klt-step" not in manifest["required"]
    assert not {"step_offset", "target_kl", "probe_passes"} & set(manifest["codec"]["config"])
    assert "profile_kl" in manifest["report"]
    cache.save_pretrained(tmp_path / "finer", replace(SMALL, transform="klt", step_offset=-4))
    manifest = json.loads((tmp_path / "finer" / "cachegen.json").read_bytes())
    assert "klt-step" in manifest["required"]
    assert manifest["codec"]["config"]["step_offset"] == -4
    assert "profile_kl" not in manifest["report"]  # it was measured at another step
    loaded = [CacheGenCache.from_pretrained(tmp_path / name, model, profile=profile) for name in ("plain", "finer")]
    errors = [float((found.kv.keys[0] - cache.kv.keys[0]).norm()) for found in loaded]
    assert errors[1] < 0.7 * errors[0]


def test_the_cache_of_a_model_is_chosen_for_too(model, ids) -> None:
    stock = model(ids, use_cache=True)
    cache = stock["cache"] if "cache" in stock else stock["past_key_values"]
    found = CacheGenCache.from_cache(cache, ids, model, replace(SMALL, transform="identity", target_kl=TARGET), None)
    assert found.measured is not None
    assert found.measured["kl"][-1] <= TARGET


def test_saving_with_a_target_needs_the_model(model, ids, tmp_path) -> None:
    cache = CacheGenCache.from_context(model, ids, replace(SMALL, transform="identity"), None)
    config = replace(SMALL, transform="identity", target_kl=TARGET)
    with pytest.raises(ConfigError, match=r"needs the model.*save_pretrained\(\.\.\., model=model\)"):
        cache.save_pretrained(tmp_path, config)
    cache.save_pretrained(tmp_path, config, model=model)
    assert CacheGenCache.from_pretrained(tmp_path, model).report.encoding["target_kl"]["target"] == TARGET
    with pytest.raises(ConfigError, match="needs the model"):
        encode_kv(cache.kv.keys, cache.kv.values, config)
    assert capture(cache.to_dynamic(), model.config)


def test_given_continuations_are_probed_too(model, ids) -> None:
    config = replace(SMALL, transform="identity", target_kl=TARGET)
    given = [torch.randint(3, VOCABULARY, (1, 20)), torch.randint(3, VOCABULARY, (12,))]
    alone = CacheGenCache.from_context(model, ids, config, None).measured
    found = CacheGenCache.from_context(model, ids, config, None, continuations=given).measured
    assert alone is not None
    assert found is not None
    assert found["continuations"] == alone["continuations"] + 2
    assert found["tokens"] == alone["tokens"] + 32
    with pytest.raises(TensorError):
        CacheGenCache.from_context(model, ids, config, None, continuations=[torch.zeros(2, 3)])
    with pytest.raises(ConfigError, match="continuations are for"):
        CacheGenCache.from_context(model, ids, SMALL, None, continuations=given)


@pytest.mark.parametrize("passes", [128, 160, 256, 1000])
def test_the_budget_holds(model, ids, passes, monkeypatch) -> None:
    calls: list[int] = []
    run, logits = target.run, target.continuation_logits
    monkeypatch.setattr(target, "run", lambda *args, **kwargs: (calls.append(1), run(*args, **kwargs))[1])
    monkeypatch.setattr(target, "continuation_logits", lambda *args: (calls.append(1), logits(*args))[1])
    config = replace(SMALL, transform="identity", target_kl=TARGET, probe_passes=passes)
    found = CacheGenCache.from_context(model, ids, config, None)
    assert found.measured is not None
    assert found.measured["passes"] == len(calls) <= passes
    assert found.measured["kl"][-1] <= TARGET


def test_a_target_that_no_step_meets(model, profile, ids, monkeypatch) -> None:
    with pytest.raises(ConfigError, match=r"at most 1e-06 nats per token.*the best of \d+ steps reaches"):
        CacheGenCache.from_context(
            model.to(torch.bfloat16), ids, replace(SMALL, transform="delta", target_kl=1e-6), None
        )
    model.to(torch.float32)
    with pytest.raises(ConfigError, match="probe_passes must be at least"):
        CacheGenCache.from_context(
            model, ids, replace(SMALL, transform="klt", target_kl=1.0, probe_passes=128), profile,
            continuations=[ids[:, :4]] * 30,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_kl": 0}, "target_kl must be"), ({"target_kl": float("nan")}, "target_kl must be"),
        ({"target_kl": "small"}, "target_kl must be"), ({"target_kl": True}, "target_kl must be"),
        ({"target_kl": 0.1, "lossless": True}, "lossless=True has none"), ({"probe_passes": 1}, "probe_passes must be"),
        ({"step_offset": 65}, "step_offset must be"), ({"step_offset": 1, "transform": "delta"}, "use steps="),
    ],
)  # fmt: skip
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CacheGenConfig(**options)


def test_an_offset_beyond_the_codes(model, profile, ids, tmp_path) -> None:
    low = replace(profile, step_code=3)
    cache = CacheGenCache.from_context(model, ids, replace(SMALL, step_offset=-4), low)
    with pytest.raises(ConfigError, match="step_offset must be from -3 to 252"):
        cache.save_pretrained(tmp_path)


def test_options_round_trip() -> None:
    for config in (CacheGenConfig(), CacheGenConfig(step_offset=3), CacheGenConfig(target_kl=0.1, probe_passes=200)):
        assert CacheGenConfig.from_dict(config.to_dict()) == config


def test_a_prefix_cache_has_no_target(tmp_path) -> None:
    with pytest.raises(ConfigError, match="serve many contexts"):
        PrefixCache(tmp_path, config=CacheGenConfig(target_kl=TARGET))


@pytest.mark.slow
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_target_is_met_on_a_task_unlike_the_samples(transform: str) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL_PATH), AutoTokenizer.from_pretrained(MODEL_PATH)
    seen = [sample(tokenizer, "stories", CALIBRATION_SEED + n, 400) for n in range(10)]
    profile = learn_profile(model, seen) if transform == "klt" else None
    ids = tokenizer(document("lines", HELD_OUT_SEED, 600).text, return_tensors="pt").input_ids
    config = CacheGenConfig(transform=transform, target_kl=TARGET)
    cache = CacheGenCache.from_context(model, ids, config, profile)
    assert cache.measured is not None
    assert cache.measured["kl"][-1] <= TARGET
    if profile is not None:  # the profile's own step promises nothing for this task
        plain = CacheGenCache.from_context(model, ids, CacheGenConfig(transform="klt"), profile).config
        assert plain is not None
        assert cache.config != plain
