"""Profiles and the klt transform: the learnt arrays, their exact inverse, and the check for the right profile."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from transformers import GlmConfig, GlmForCausalLM

from hf_cachegen import CacheGenCache, CacheGenConfig, Profile, decode_kv, encode_kv, learn_profile
from hf_cachegen.artifact import PROFILE_FILE
from hf_cachegen.artifact.artifact import Artifact
from hf_cachegen.codec.chunk import Span
from hf_cachegen.codec.geometry import Geometry
from hf_cachegen.codec.profile import Rotary
from hf_cachegen.codec.transforms.klt import Klt
from hf_cachegen.errors import (
    ArtifactExistsError,
    ConfigError,
    ProfileError,
    TensorError,
    UnsupportedFormatError,
    WrongModelError,
)
from hf_cachegen.profiles import finding
from hf_cachegen.profiles.finding import profile_of
from hf_cachegen.profiles.learning import DEFAULT_TARGETS, divergence, find_rotary, prefill
from hf_cachegen.stores import LocalStore
from tests.klt_support import samples
from tests.tiny_models import VOCABULARY, make

CONFIG = CacheGenConfig(transform="klt", chunk_tokens=32, protect_last=8)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return make("llama")


@pytest.fixture(scope="module")
def profile(model) -> Profile:
    return learn_profile(model, samples(), config=CONFIG)


def test_the_rotation_is_found_and_undone(model) -> None:
    rotary = find_rotary(model)
    assert rotary.style == "half"
    keys, _, _ = prefill(model, torch.full((1, 20), 9))
    rows = keys[0][0].transpose(0, 1)
    undone = rotary.apply(rows, torch.arange(20), -1)
    torch.testing.assert_close(undone, undone[:1].expand_as(undone), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(rotary.apply(undone, torch.arange(20), 1), rows, rtol=1e-4, atol=1e-5)


def test_models_without_a_known_rotation_keep_their_keys() -> None:
    for name in ("deepseek", "gemma3"):  # latent keys; two rotations in one model
        assert find_rotary(make(name)).style == "none"


def test_a_partial_rotation_is_found() -> None:
    model = make("gpt_neox")
    rotary = find_rotary(model)
    assert rotary.style == "half"
    _, _, layers = prefill(model, torch.full((1, 20), 9))
    assert 2 * len(rotary.inv_freq) < layers[0].k_dim


def test_an_interleaved_partial_rotation_is_found() -> None:
    torch.manual_seed(0)
    config = GlmConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, pad_token_id=0, eos_token_id=0,
    )  # fmt: skip
    rotary = find_rotary(GlmForCausalLM(config).eval())
    assert (rotary.style, len(rotary.inv_freq)) == ("interleaved", 4)


@pytest.mark.parametrize("style", ["half", "interleaved"])
def test_rotations_invert(style) -> None:
    rotary = Rotary(style, torch.tensor([1.0, 0.1, 0.01], dtype=torch.float64), scaling=1.3)
    x = torch.randn(50, 2, 8)
    back = rotary.apply(rotary.apply(x, torch.arange(50) + 1000, 1), torch.arange(50) + 1000, -1)
    torch.testing.assert_close(back, x, rtol=1e-4, atol=1e-5)
    assert torch.equal(rotary.apply(x, torch.arange(50), -1)[..., 6:], x[..., 6:])


def test_coefficients_invert(model, profile: Profile) -> None:
    whole = learn_profile(
        model, samples(), config=replace(CONFIG, levels=1), target_kl=1e-4, across_layers="joint"
    )  # every component is kept
    keys, values, layers = prefill(model, samples()[0][0])
    codec = Klt(Geometry(layers, tokens=60, batch=1, dtype="float32"), replace(CONFIG, levels=1), whole)
    pairs = (x for pair in zip(keys, values, strict=True) for x in pair)
    rows = torch.cat([x[0].transpose(0, 1).flatten(1) for x in pairs], 1)
    span = Span(100, 60, 300)
    back = codec.basis.rows(codec.coefficients(rows, span), span)
    assert (back - rows).norm() < 0.003 * rows.norm()  # the basis is stored in float16


def test_levels_meet_their_targets(model, profile: Profile) -> None:
    found = divergence(model, profile, samples(6, seed=1), CONFIG)
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.003
    measured = profile.about["measured"]
    assert [row["kl"] <= target for row, target in zip(measured, DEFAULT_TARGETS, strict=True)] == [True] * 3
    assert any(row["kl"] > target / 2 for row, target in zip(measured, DEFAULT_TARGETS, strict=True))  # one binds
    assert [m["bits_per_element"] for m in measured] == sorted(m["bits_per_element"] for m in measured)


def test_round_trip_at_every_level(model, profile: Profile) -> None:
    keys, values, _ = prefill(model, samples()[0][0])
    encoded = encode_kv(keys, values, CONFIG, profile)
    assert len(encoded.side) == 16
    errors = []
    for level in (1, 2, 3):
        decoded = decode_kv(encoded, level)
        errors.append(sum(float((a - b).square().sum()) for a, b in zip(decoded[1], values, strict=True)))
    assert errors == sorted(errors, reverse=True)
    assert encode_kv(keys, values, CONFIG, profile) == encoded
    assert encode_kv(keys, values, None, profile).config.transform == "klt"


def test_files_round_trip(profile: Profile, tmp_path: Path) -> None:
    path = profile.save(tmp_path)
    assert path.name == PROFILE_FILE
    for place in (path, tmp_path):
        loaded = Profile.load(place)
        assert loaded.digest == profile.digest
        assert loaded.about == profile.about
    with pytest.raises(ProfileError):
        Profile.load(tmp_path / "nowhere")


def test_another_profile_is_replaced_only_with_overwrite(profile: Profile, tmp_path: Path) -> None:
    path, other = profile.save(tmp_path), replace(profile, step_code=profile.step_code + 1)
    assert profile.save(tmp_path) == path  # the same bytes
    with pytest.raises(ArtifactExistsError):
        other.save(tmp_path)
    assert path.read_bytes() == profile.to_bytes()
    other.save(path, overwrite=True)
    assert path.read_bytes() == other.to_bytes()
    assert list(tmp_path.iterdir()) == [path]


def test_concurrent_writers_do_not_mix(profile: Profile, tmp_path: Path) -> None:
    both = [profile, replace(profile, step_code=profile.step_code + 1)]
    with ThreadPoolExecutor(8) as pool:
        written = [pool.submit(both[n % 2].save, tmp_path, overwrite=True) for n in range(40)]
    paths = {job.result() for job in written}
    assert list(tmp_path.iterdir()) == list(paths)
    assert paths.pop().read_bytes() in [one.to_bytes() for one in both]


def test_an_artifact_needs_its_own_profile(model, profile: Profile, tmp_path: Path) -> None:
    ids = samples()[1][0]
    cache = CacheGenCache.from_context(model, ids, CONFIG, profile)
    cache.save_pretrained(tmp_path / "a")
    loaded = CacheGenCache.from_pretrained(tmp_path / "a", model, profile=profile)
    assert loaded.kv.geometry == cache.kv.geometry
    with pytest.raises(ProfileError, match=profile.digest):
        CacheGenCache.from_pretrained(tmp_path / "a", model)
    other = replace(profile, step_code=profile.step_code + 1)
    with pytest.raises(ProfileError, match=other.digest):
        CacheGenCache.from_pretrained(tmp_path / "a", model, profile=other)
    profile.save(tmp_path / "a")  # it is found beside the artifact
    CacheGenCache.from_pretrained(tmp_path / "a", model).save_pretrained(tmp_path / "b")
    assert (tmp_path / "b" / "base.safetensors").read_bytes() == (tmp_path / "a" / "base.safetensors").read_bytes()
    assert Artifact(LocalStore(tmp_path / "a")).manifest.required == ("klt", "klt-chain")


def test_only_the_right_profile_is_taken_from_a_folder(model, profile: Profile, tmp_path: Path) -> None:
    cache = CacheGenCache.from_context(model, samples()[1][0], CONFIG, profile)
    cache.save_pretrained(tmp_path / "klt")
    cache.save_pretrained(tmp_path / "delta", replace(CONFIG, transform="delta"))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / PROFILE_FILE).write_bytes(b"damaged")
    # It needs none, and reads none.
    assert profile_of(Artifact(LocalStore(tmp_path / "delta")), model_folder=str(folder)) is None
    replace(profile, step_code=profile.step_code + 1).save(tmp_path / "klt")
    profile.save(folder, overwrite=True)
    assert profile_of(Artifact(LocalStore(tmp_path / "klt")), model_folder=str(folder)).digest == profile.digest
    with pytest.raises(ProfileError):
        profile_of(Artifact(LocalStore(tmp_path / "klt")), None, str(folder))


def test_profiles_are_parsed_only_under_their_digest(
    model, profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    CacheGenCache.from_context(model, samples()[1][0], CONFIG, profile).save_pretrained(tmp_path / "klt")
    profile.save(tmp_path / "model")
    for data in (b"damaged", replace(profile, step_code=profile.step_code + 1).to_bytes()):
        (tmp_path / "klt" / PROFILE_FILE).write_bytes(data)
        artifact = Artifact(LocalStore(tmp_path / "klt"))
        assert profile_of(artifact, model_folder=str(tmp_path / "model")).digest == profile.digest
        finding._known.clear()  # the last one is still in use
        monkeypatch.setattr(Profile, "from_bytes", lambda *_: pytest.fail("it was parsed"))
        with pytest.raises(ProfileError, match=profile.digest):
            profile_of(Artifact(LocalStore(tmp_path / "klt")))
        monkeypatch.undo()


def test_readers_without_klt_refuse_it(model, profile: Profile, tmp_path: Path) -> None:
    from hf_cachegen.artifact.manifest import loads

    CacheGenCache.from_context(model, samples()[1][0], CONFIG, profile).save_pretrained(tmp_path / "a")
    with pytest.raises(UnsupportedFormatError):
        loads((tmp_path / "a" / "cachegen.json").read_bytes(), features=())


def test_another_models_profile_is_refused(profile: Profile) -> None:
    with pytest.raises(WrongModelError):
        CacheGenCache.from_context(make("qwen3"), samples()[0][0], CONFIG, profile)
    keys, values, _ = prefill(make("gpt_neox"), samples()[0][0])
    with pytest.raises(ProfileError):
        encode_kv(keys, values, CONFIG, profile)


def test_unsupported_configurations_are_refused(model, profile: Profile) -> None:
    keys, values, _ = prefill(model, samples()[0][0])
    with pytest.raises(ConfigError, match="profile"):
        encode_kv(keys, values, CONFIG)
    with pytest.raises(ConfigError, match="batch"):
        encode_kv([k.expand(2, -1, -1, -1) for k in keys], [v.expand(2, -1, -1, -1) for v in values], CONFIG, profile)
    with pytest.raises(ConfigError, match="levels"):
        encode_kv(keys, values, replace(CONFIG, levels=2), profile)
    for strange in (float("nan"), 3e38):
        keys[0][0, 0, 3, 3] = strange
        with pytest.raises(TensorError):
            encode_kv(keys, values, CONFIG, profile)


def test_learning_refuses_few_samples_and_wrong_options(model) -> None:
    with pytest.raises(ConfigError):
        learn_profile(model, samples(3))
    with pytest.raises(ConfigError):
        learn_profile(model, samples(), floor=0)
    for target_kl in (-1, (), (0.1, 0), (0.1, float("nan"), 0.001), 10):
        with pytest.raises(ConfigError, match="target_kl"):
            learn_profile(model, samples(), target_kl=target_kl)

    for group_layers in (0, -1, 1.5):
        with pytest.raises(ConfigError, match="group_layers"):
            learn_profile(model, samples(), group_layers=group_layers)


IDS = torch.ones(1, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    "sample",
    [(IDS, IDS[:, :0]), (IDS[:, :1], IDS), (IDS[0], IDS), (IDS.expand(2, -1), IDS), ([[1, 2]], IDS),
     (IDS.float(), IDS), (IDS, IDS, IDS), IDS, None],
    ids=["no continuation", "one token", "one axis", "two rows", "a list", "floats", "three", "a tensor", "nothing"],
)  # fmt: skip
def test_invalid_samples_are_refused(model, sample) -> None:
    with pytest.raises(TensorError, match="sample 3"):
        learn_profile(model, [*samples(3), sample, *samples(6)])


def test_learning_is_deterministic_and_in_eval_mode(profile: Profile) -> None:
    model = make("llama").train()
    model.lm_head.eval()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    modes = [module.training for module in model.modules()]
    assert learn_profile(model, samples(), config=CONFIG).digest == profile.digest
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(ProfileError):
        learn_profile(model, samples(), config=CONFIG, target_kl=1e-12)
    assert [module.training for module in model.modules()] == modes


def damaged(profile: Profile) -> dict[str, bytes]:
    data = profile.to_bytes()
    tensors = load(data)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    described = json.loads(header["cachegen_profile"])

    def again(changed_tensors=None, **changes) -> bytes:
        return save({**tensors, **(changed_tensors or {})}, {"cachegen_profile": json.dumps({**described, **changes})})

    return {
        "nothing": b"",
        "no safetensors": b"hello, world, this is not a profile",
        "cut short": data[:-1],
        "no metadata": save(tensors),
        "later version": again(version=2),
        "groups overlap": again(groups=[[0, 0, 1]] * len(described["groups"])),
        "groups out of range": again(groups=[[0, 0, 1 << 40]] * len(described["groups"])),
        "fewer layers": again(layers=described["layers"][:-1]),
        "no such rotation": again(rotary={"style": "spiral", "scaling": 1.0}),
        "step out of range": again(step_code=300),
        "means of another width": again({"means": tensors["means"][:-1].clone()}),
        "not finite": again({"means": tensors["means"] * float("nan")}),
        "entries of another number": again({"base_entries": tensors["base_entries"][:-1].clone()}),
        "a step beyond numbers": again(step_code=float("inf")),
        "a group beyond numbers": again(groups=[[0, float("inf"), 1]] * len(described["groups"])),
        "a huge step": again(step_code=10**400),
        "a huge scaling": again(rotary={"style": "half", "scaling": 10**400}),
        **{
            f"scaling {scaling}": again(rotary={"style": "half", "scaling": scaling})
            for scaling in (0, -1, 1e-4, 1e4, float("nan"), float("inf"))
        },
        "no layers": again({"means": tensors["means"][:0].clone()}, layers=[], groups=[]),
        "basis of no dimension": again({"synthesis-0": torch.tensor(1.0).half()}),
        "basis of another dtype": again({"synthesis-0": tensors["synthesis-0"].float()}),
        "absurd means": again({"means": tensors["means"] + 1e16}),
        "absurd sensitivity": again({"sensitivity-0": tensors["sensitivity-0"] * 1e20}),
        "rotation of two dimensions": again({"inv_freq": tensors["inv_freq"][None].clone()}),
        "rotation of no dimension": again({"inv_freq": tensors["inv_freq"][0].clone()}),
        "rotation wider than keys": again({"inv_freq": tensors["inv_freq"].repeat(2)}),
        "rotation not finite": again({"inv_freq": tensors["inv_freq"] / 0}),
        "basis of another shape": again({"synthesis-0": tensors["synthesis-0"][:, :-1].clone()}),
    }


def test_damaged_profiles_are_refused(profile: Profile) -> None:
    for name, data in damaged(profile).items():
        try:
            Profile.from_bytes(data)
        except ProfileError:
            continue
        pytest.fail(f"{name} was accepted")
