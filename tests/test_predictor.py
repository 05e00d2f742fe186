"""Prediction from the model's first layers: what is stored, what a loader needs, and how little roundings matter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hf_cachegen import CacheGenCache, CacheGenConfig, Profile, decode_kv, encode_kv, learn_profile
from hf_cachegen.artifact import PROFILE_FILE
from hf_cachegen.artifact.artifact import Artifact, write
from hf_cachegen.artifact.manifest import loads
from hf_cachegen.codec import basis
from hf_cachegen.codec.context import Encoder
from hf_cachegen.codec.predictor import Known
from hf_cachegen.errors import ConfigError, ProfileError, TensorError, UnsupportedFormatError
from hf_cachegen.models.first_layers import first_layers, known_of
from hf_cachegen.profiles.learning import continuation_logits, divergence, prefill
from hf_cachegen.stores import LocalStore
from hf_cachegen.streaming import loader
from hf_cachegen.streaming.loader import Loader
from hf_cachegen.streaming.prefill_speed import PrefillSpeed
from tests.golden_cache import (
    digests,
    golden_known,
    golden_kv,
    golden_predicting,
    golden_profile,
    record,
    recorded,
    require_same_files,
)
from tests.klt_support import LEVELS, samples, stating
from tests.tiny_models import SUPPORTED, make, shared, tokens

CONFIG = CacheGenConfig(transform="klt", chunk_tokens=32, protect_last=8)
LAYERS = (0, 2)
GOLDEN = Path(__file__).with_name("golden") / "version-1" / "klt-predict"


@pytest.fixture(scope="module")
def profile() -> Profile:
    return learn_profile(shared("llama"), samples(30), config=CONFIG, predict_layers=LAYERS, target_kl=0.01)


@pytest.fixture(params=LAYERS, ids=lambda layer: f"m{layer}")
def config(request: pytest.FixtureRequest) -> CacheGenConfig:
    return replace(CONFIG, predict_layers=request.param)


@pytest.mark.parametrize("name", [*SUPPORTED, "gpt2"])
@pytest.mark.parametrize("layer", [0, 1])
def test_the_first_layers_are_those_of_a_prefill(name: str, layer: int) -> None:
    model, ids = make(name), tokens(40)
    found = first_layers(model, ids, layer)
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states[layer][0]
    keys, values, _ = prefill(model, ids)
    torch.testing.assert_close(found.hidden, hidden, rtol=1e-4, atol=1e-5)
    assert len(found.keys) == len(found.values) == layer + 1
    for mine, exact in zip((*found.keys, *found.values), (*keys[: layer + 1], *values[: layer + 1]), strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-5)


def test_long_contexts_are_run_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = first_layers(shared("llama"), tokens(50), 2)
    monkeypatch.setattr("hf_cachegen.models.first_layers.RUN_TOKENS", 16)
    parts = first_layers(shared("llama"), tokens(50), 2)
    torch.testing.assert_close(parts.hidden, whole.hidden, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts.keys[2], whole.keys[2], rtol=1e-4, atol=1e-5)


def test_a_model_is_as_before_after_its_first_layers() -> None:
    model = make("llama").train()
    first_layers(model, tokens(10), 1)
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_prediction_saves_bits_at_no_more_divergence(profile: Profile, config: CacheGenConfig) -> None:
    bits, nats = {}, {}
    for one in (replace(CONFIG, predict_layers=None), config):
        layer, size = one.predict_layers, 0
        for context, _ in samples(4, seed=1):
            keys, values, _ = prefill(shared("llama"), context)
            known = None if layer is None else known_of(shared("llama"), context, profile, layer)
            size += sum(len(x) for part in encode_kv(keys, values, one, profile, known=known).parts for x in part)
        bits[layer], nats[layer] = size, divergence(shared("llama"), profile, samples(4, seed=1), one)
    assert bits[config.predict_layers] < 0.95 * bits[None]
    assert all(a < 1.2 * b for a, b in zip(nats[config.predict_layers], nats[None], strict=True))


def test_profiles_state_each_predictor(profile: Profile) -> None:
    read = Profile.from_bytes(profile.to_bytes())
    assert read.digest == profile.digest
    assert [one.layer for one in read.predictors] == list(LAYERS)
    for mine, other in zip(profile.predictors, read.predictors, strict=True):
        assert mine.about == other.about
        assert torch.equal(mine.directions, other.directions)
        for a, b in zip(mine.groups, other.groups, strict=True):
            assert torch.equal(a.synthesis, b.synthesis)
            assert torch.equal(a.sensitivity, b.sensitivity)
            assert a.prediction is not None
            assert b.prediction is not None
            assert torch.equal(a.prediction, b.prediction)
        assert profile.divergences_at(mine.layer) == [row["kl"] for row in mine.about["measured"]]
    assert profile.usable(0) == 0
    assert replace(profile, predictors=()).usable(0) is None
    assert replace(profile, predictors=()).to_bytes() != profile.to_bytes()


def test_artifacts_are_loaded_with_their_model(profile: Profile, config: CacheGenConfig, tmp_path: Path) -> None:
    ids = tokens(70)
    cache = CacheGenCache.from_context(shared("llama"), ids, config, profile)
    cache.save_pretrained(tmp_path)
    artifact = Artifact(LocalStore(tmp_path))
    assert "predict" in artifact.manifest.required
    assert artifact.config.predict_layers == config.predict_layers
    with pytest.raises(UnsupportedFormatError, match="predict"):
        loads((tmp_path / "cachegen.json").read_bytes(), features={"klt", "klt-tables", "sinks"})
    loaded = CacheGenCache.from_pretrained(tmp_path, shared("llama"), profile=profile)
    for layer, (mine, exact) in enumerate(zip(loaded.kv.keys, cache.kv.keys, strict=True)):
        error = float((mine - exact).norm() / exact.norm())
        assert error < (1e-5 if layer <= (config.predict_layers or 0) else 0.2)
    with pytest.raises(ConfigError, match="pass model="):
        CacheGenCache.from_pretrained(tmp_path, profile=profile)
    with pytest.raises(ProfileError):
        CacheGenCache.from_pretrained(tmp_path, shared("llama"), profile=replace(profile, predictors=()))
    loaded.save_pretrained(tmp_path / "copy")  # without encoding a second time
    assert (tmp_path / "copy" / "base.safetensors").read_bytes() == (tmp_path / "base.safetensors").read_bytes()


def test_streams_predict(profile: Profile, config: CacheGenConfig, tmp_path: Path) -> None:
    CacheGenCache.from_context(shared("llama"), tokens(70), config, profile).save_pretrained(tmp_path)
    whole = CacheGenCache.from_pretrained(tmp_path, shared("llama"), profile=profile)
    streamed = CacheGenCache.stream(tmp_path, shared("llama"), profile=profile)
    for mine, other in zip(streamed.kv.values, whole.kv.values, strict=True):
        torch.testing.assert_close(mine, other)


def test_a_stream_knows_the_time_of_the_first_layers(
    profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, first = tokens(70), []
    config = replace(CONFIG, predict_layers=2)
    CacheGenCache.from_context(shared("llama"), ids, config, profile).save_pretrained(tmp_path)
    monkeypatch.setattr(PrefillSpeed, "seconds", lambda self, first, count: 0.1 * count)
    monkeypatch.setattr(PrefillSpeed, "known", True)
    set_deadline = Loader._set_deadline

    def watched(self: Loader) -> None:
        set_deadline(self)
        first.append(self._schedule.first_seconds)

    monkeypatch.setattr(Loader, "_set_deadline", watched)
    CacheGenCache.stream(tmp_path, shared("llama"), profile=profile, slo=60.0)
    assert first[0] == pytest.approx(0.5 * 7.0)  # two of four layers over 70 tokens
    assert first[-1] == 0.0  # they have run


@pytest.mark.parametrize("slo", [0.001, 60.0])
def test_a_stream_that_recomputes_all_runs_no_first_layers(
    profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slo: float
) -> None:
    """Whatever the deadline: a decode that needs the first layers would run them."""
    model, ids = shared("llama"), tokens(70)
    CacheGenCache.from_context(model, ids, replace(CONFIG, predict_layers=2), profile).save_pretrained(tmp_path)
    ran: list[int] = []
    monkeypatch.setattr(loader, "known_of", lambda *given: ran.append(1))
    streamed = CacheGenCache.stream(tmp_path, model, profile=profile, level="text", slo=slo)
    assert ran == []
    keys, _, _ = prefill(model, ids)
    for mine, exact in zip(streamed.kv.keys, keys, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-5)


def test_the_default_predicts_where_the_profile_can(profile: Profile, tmp_path: Path) -> None:
    cases = {"a": (None, profile, 0), "b": (CacheGenConfig(predict_layers=None), profile, None),
             "c": (None, replace(profile, predictors=()), None), "d": (CacheGenConfig(lossless=True), profile, None),
             "e": (CacheGenConfig(transform="delta"), profile, None)}  # fmt: skip
    for name, (config, given, layer) in cases.items():
        CacheGenCache.from_context(shared("llama"), tokens(70), config, given).save_pretrained(tmp_path / name)
        artifact = Artifact(LocalStore(tmp_path / name))
        assert artifact.config.predict_layers == layer
        assert ("predict" in artifact.manifest.required) == (layer is not None)
        assert ("predict_layers" in artifact.manifest.codec["config"]) == (layer is not None)


def test_a_loaded_cache_is_copied_with_the_config_that_it_was_made_with(profile: Profile, tmp_path: Path) -> None:
    """The default of `predict_layers` is stored as None where the profile has no predictor."""
    plain = replace(profile, predictors=())
    for name, given in (("plain", plain), ("predicted", profile)):
        CacheGenCache.from_context(shared("llama"), tokens(70), CONFIG, given).save_pretrained(tmp_path / name)
        loaded = CacheGenCache.from_pretrained(tmp_path / name, shared("llama"), profile=given)
        loaded.save_pretrained(tmp_path / name / "copy", CONFIG)
        with pytest.raises(ConfigError, match="second encoding"):
            loaded.save_pretrained(tmp_path / name / "other", replace(CONFIG, predict_layers=2))


def test_a_cache_of_the_user_predicts(profile: Profile, tmp_path: Path) -> None:
    from transformers import DynamicCache

    from hf_cachegen.models.compat import run

    past, ids = DynamicCache(), tokens(70)
    with torch.no_grad():
        run(shared("llama"), ids, past)
    CacheGenCache.from_cache(past, ids, shared("llama"), CONFIG, profile).save_pretrained(tmp_path)
    assert Artifact(LocalStore(tmp_path)).config.predict_layers == 0


def test_what_cannot_be_predicted_is_refused(profile: Profile, tmp_path: Path) -> None:
    context = samples()[0][0]
    keys, values, _ = prefill(shared("llama"), context)
    with pytest.raises(ConfigError, match="predict_layers=2"):
        encode_kv(keys, values, replace(CONFIG, predict_layers=2), profile)
    with pytest.raises(ProfileError, match="predict_layers=1"):
        CacheGenCache.from_context(shared("llama"), context, replace(CONFIG, predict_layers=1), profile)
    assert encode_kv(keys, values, CONFIG, profile).config.predict_layers is None  # the default, without a model
    cache = CacheGenCache.from_context(shared("llama"), context, CONFIG, profile)
    with pytest.raises(ConfigError, match="predict_layers=2"):
        cache.save_pretrained(tmp_path, replace(CONFIG, predict_layers=2))
    with pytest.raises(ProfileError, match="features"):
        known_of(make("qwen3"), context, _other_features(profile), 0)
    known = known_of(shared("llama"), context, profile, 0)
    for scores in (known.scores[:-1], known.scores[:, :-1]):
        with pytest.raises(TensorError, match="scores"):
            encode_kv(keys, values, CONFIG, profile, known=replace(known, scores=scores))
    for wrong in (-1, 1.5, True, "0", 1 << 20):
        with pytest.raises(ConfigError, match="predict_layers"):
            CacheGenConfig(predict_layers=wrong)  # type: ignore[arg-type]


def _other_features(profile: Profile) -> Profile:
    one = profile.predictors[0]
    wide = replace(one, mean=torch.cat([one.mean, one.mean]), directions=torch.cat([one.directions, one.directions]))
    return replace(profile, predictors=(wide,))


@pytest.mark.parametrize(
    "options", [{"predict_layers": (0, 0)}, {"predict_layers": (3,)}, {"predict_layers": (-1,)}, {"predict_rank": 0},
                {"predict_layers": (0.0,)}], ids=str,
)  # fmt: skip
def test_learning_refuses_other_predictors(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="predict_"):
        learn_profile(shared("llama"), samples(), config=CONFIG, **options)  # type: ignore[arg-type]


@torch.no_grad()
def test_roundings_of_features_move_values_by_a_rounding(profile: Profile, config: CacheGenConfig) -> None:
    """Symbols do not depend on the prediction, so other roundings cannot break a stream, and cost little."""
    model, layer = shared("llama"), config.predict_layers or 0
    context, continuation = samples(1, seed=5)[0]
    keys, values, _ = prefill(model, context)
    known = known_of(model, context, profile, layer)
    encoded = encode_kv(keys, values, config, profile, known=known)
    hidden = first_layers(model, context, layer).hidden
    rounded = replace(known, scores=profile.predictor(layer).scores(hidden.bfloat16()))
    assert not torch.equal(rounded.scores, known.scores)
    exact = continuation_logits(model, keys, values, continuation).log_softmax(-1)
    for level in (1, 2, 3):
        near, far = (decode_kv(encoded, level, known=one) for one in (known, rounded))
        moved = torch.stack([(a - b).norm() / b.norm() for a, b in zip(far[0], near[0], strict=True)])
        assert float(moved.max()) < 2**-8
        lossy = [continuation_logits(model, *kv, continuation).log_softmax(-1) for kv in (near, far)]
        kl = [float((exact.exp() * (exact - one)).sum(-1).mean()) for one in lossy]
        assert abs(kl[1] - kl[0]) < 0.1 * kl[0] + 1e-4


@pytest.mark.parametrize("narrow", [False, True], ids=["float32 product", "bfloat16 product"])
def test_products_add_the_prediction(narrow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(basis, "multiplies_bfloat16", lambda: narrow)
    profile, known = golden_predicting(), golden_known()
    keys, values = golden_kv()
    config = CacheGenConfig(transform="klt", chunk_tokens=32, protect_last=8)
    decoded = decode_kv(encode_kv(keys, values, config, profile, known=known), 3, known=known)
    moved = replace(known, scores=known.scores + 1)
    other = decode_kv(encode_kv(keys, values, config, profile, known=known), 3, known=moved)
    expected = profile.predictors[0].groups[0].prediction.sum(0).reshape(2, 12)
    shift = (other[0][1] - decoded[0][1])[0].float().mean(1)
    torch.testing.assert_close(shift, expected, rtol=0.05, atol=0.05)
    assert torch.equal(other[1][1], decoded[1][1])  # values are not predicted by this profile
    assert torch.equal(decoded[0][0], keys[0])  # layer 0 is the loader's own


def test_old_predicted_artifacts_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The digest of each level was stored when the artifact was made. Its manifest requires the feature."""
    monkeypatch.setattr(basis, "multiplies_bfloat16", lambda: False)
    profile = Profile.load(GOLDEN)
    assert profile.to_bytes() == golden_predicting().to_bytes() == (GOLDEN / PROFILE_FILE).read_bytes()
    artifact = Artifact(LocalStore(GOLDEN), profile)
    assert artifact.manifest.required == ("klt", "predict", "klt-tables")
    expected = recorded(GOLDEN)
    assert digests(artifact, golden_known()) == expected
    assert len(expected) == artifact.levels


def test_this_encoder_writes_the_same_predicted_bytes(tmp_path: Path) -> None:
    write_golden(tmp_path / "new")
    require_same_files(tmp_path / "new", GOLDEN)


def write_golden(directory: Path) -> None:
    source = Encoder(*golden_kv(), CONFIG, golden_predicting(), known=golden_known())
    write(source, directory, input_ids=list(range(50)), fingerprint={"model": "golden"})


def test_auto_from_a_context_to_an_artifact(profile: Profile, tmp_path: Path) -> None:
    model, context = shared("llama"), samples()[0][0]
    auto = replace(CONFIG, predict_layers="auto", bandwidth_gbps=1e-6, prefill_tokens_per_second=1e6)
    stated = stating(profile, LEVELS)
    cache = CacheGenCache.from_context(model, context, auto, stated)
    cache.save_pretrained(tmp_path / "a")
    cache.save_pretrained(tmp_path / "b", auto)  # keeps the choice
    for name in "ab":
        config = Artifact(LocalStore(tmp_path / name)).config
        assert (config.predict_layers, config.bandwidth_gbps, config.prefill_tokens_per_second) == (2, None, None)
        loaded = CacheGenCache.from_pretrained(tmp_path / name, model=model, profile=stated)
        assert loaded.get_seq_length() == context.shape[1]
    keys, values, _ = prefill(model, context)
    with pytest.raises(ConfigError, match="predict_layers='auto' is chosen for a context"):
        encode_kv(keys, values, auto, profile)


def test_profiles_without_predictors_keep_their_bytes() -> None:
    assert b"predict" not in golden_profile().to_bytes()
    assert replace(golden_predicting(), predictors=()).digest == golden_profile().digest


def test_encoding_needs_scores_alone(profile: Profile) -> None:
    context = samples()[0][0]
    keys, values, _ = prefill(shared("llama"), context)
    known = known_of(shared("llama"), context, profile, 2)
    config = replace(CONFIG, predict_layers=2)
    encoded = encode_kv(keys, values, config, profile, known=Known(2, known.scores))
    assert encoded.parts == encode_kv(keys, values, config, profile, known=known).parts
    assert encoded.report["layers"][2]["k_error"] == [0.0] * 3


if __name__ == "__main__":  # python -m tests.test_predictor: once for each format version
    write_golden(GOLDEN)
    golden_predicting().save(GOLDEN)
    basis.multiplies_bfloat16 = lambda: False  # type: ignore[assignment]
    record(GOLDEN, Artifact(LocalStore(GOLDEN), golden_predicting()), golden_known())
