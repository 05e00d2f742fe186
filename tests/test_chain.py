"""Chained layers: what is stored, that levels nest, every way to decode, and how far a rounding reaches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_cachegen import CacheGenCache, CacheGenConfig, Profile, decode_kv, encode_kv, learn_profile
from hf_cachegen.artifact import PROFILE_FILE
from hf_cachegen.artifact.artifact import Artifact, write
from hf_cachegen.artifact.manifest import loads
from hf_cachegen.codec import basis, batch, launching, matrices
from hf_cachegen.codec.chain import MAX_REACH, Chain, sources
from hf_cachegen.codec.chunk import Span
from hf_cachegen.codec.context import Encoder
from hf_cachegen.codec.geometry import Geometry
from hf_cachegen.codec.into import Target
from hf_cachegen.codec.rows import gather
from hf_cachegen.codec.transforms.klt import Klt
from hf_cachegen.errors import ConfigError, ProfileError, UnsupportedFormatError
from hf_cachegen.models.first_layers import known_of
from hf_cachegen.profiles.learning import chaining, continuation_logits, prefill
from hf_cachegen.profiles.learning.exact import Exact
from hf_cachegen.profiles.learning.sums import GroupSums
from hf_cachegen.stores import LocalStore
from tests.golden_cache import (
    digests,
    golden_chained,
    golden_known,
    golden_kv,
    golden_profile,
    recorded,
    require_same_files,
)
from tests.klt_support import samples
from tests.tiny_models import make, shared, tokens

CONFIG = CacheGenConfig(transform="klt", chunk_tokens=32, protect_first=2, protect_last=8)
PLAIN = replace(CONFIG, predict_layers=None)
GOLDEN = Path(__file__).with_name("golden") / "version-1" / "klt-chain"


@pytest.fixture(scope="module", params=[1, 2], ids=["layers", "groups"])
def profile(request: pytest.FixtureRequest) -> Profile:
    return learn_profile(
        shared("llama"), samples(20), config=CONFIG, predict_layers=[0], target_kl=0.01, across_layers="chained",
        group_layers=request.param,
    )  # fmt: skip


@pytest.fixture(scope="module")
def kv() -> tuple[list[Tensor], list[Tensor]]:
    keys, values, _ = prefill(shared("llama"), samples(1, seed=5)[0][0])
    return keys, values


def test_a_chain_saves_bits_and_adds_up_with_the_hidden_state(profile: Profile) -> None:
    layers = max(group.count for group in profile.groups)
    alone = learn_profile(
        shared("llama"), samples(20), config=CONFIG, target_kl=0.01, across_layers="joint", group_layers=layers
    )
    rows = [one.about["measured"] for one in (alone, profile, profile.predictors[0])]
    for apart, chained, both in zip(*rows, strict=True):
        step = 2 ** ((profile.step_code - alone.step_code) / 4)
        assert step <= 1
        assert chained["bits_per_element"] < 0.97 * apart["bits_per_element"]
        assert both["bits_per_element"] < 0.9 * chained["bits_per_element"]
        assert max(chained["kl"], both["kl"]) < 1.3 * apart["kl"]


def test_the_file_states_the_chain(profile: Profile) -> None:
    read = Profile.from_bytes(profile.to_bytes())
    assert read.to_bytes() == profile.to_bytes()
    assert (read.reach, read.predictors[0].reach) == (3, 3)
    assert read.about["chain"]["reach"] == 3
    layers = read.groups[0].count
    assert (layers, read.version) in ((1, 2), (2, 3))
    assert [(g.kind, g.first) for g in read.groups[:3]] == [(0, 0), (1, 0), (0, layers)]
    assert [(g.kind, g.first) for g in read.predictors[0].groups[:2]] == [(0, 1), (1, 1)]
    for mine, other in zip(profile.groups, read.groups, strict=True):
        for name in ("sensitivity", "synthesis", "summary"):
            assert torch.equal(getattr(mine, name), getattr(other, name))
    assert read.groups[0].prediction is None
    assert len(read.groups[-1].summary) == 0  # nothing reads it
    assert b"chain" not in golden_profile().to_bytes()


def test_what_a_prediction_reads() -> None:
    order = [(kind, layer, 1) for layer in range(6) for kind in (0, 1)]
    assert sources(order, 0, 3) == []
    assert sources(order, 1, 3) == [0]  # V reads K of its layer
    assert sources(order, 11, 3) == [4, 5, 6, 7, 8, 9, 10]
    assert sources(order, 11, 0) == []


@pytest.mark.parametrize("layer", [None, 0])
def test_levels_nest(profile: Profile, kv: tuple[list[Tensor], list[Tensor]], layer: int | None) -> None:
    """The summaries that predictions read are the same, to the bit, at every level and in the encoder."""
    config = replace(CONFIG, predict_layers=layer)
    codec, rows, span = coded(profile, kv, config)
    seen: list[Tensor] = []

    def kept(self: Chain, *arguments: Any) -> Tensor:
        found = original(self, *arguments)
        seen.append(found.clone())
        return found

    original = Chain.summary
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Chain, "summary", kept)
        parts = codec.encode(rows, span)
        for level in (1, 2, 3):
            codec.decode(parts[:level], span)
    count = len(codec.learnt.groups)
    runs = [torch.cat(seen[first : first + count], 1) for first in range(0, 4 * count, count)]
    assert all(torch.equal(run, runs[0]) for run in runs)
    for mine, other in zip(codec.approximations(rows, span), (1, 2, 3), strict=True):
        decoded = codec.decode(parts[:other], span)
        first = codec.basis.slices[1].stop if layer == 0 else 0  # a loader computes layer 0 itself
        torch.testing.assert_close(mine[:, first:], decoded[:, first:], rtol=1e-4, atol=1e-4)


def coded(
    profile: Profile, kv: tuple[list[Tensor], list[Tensor]], config: CacheGenConfig
) -> tuple[Klt, Tensor, Span]:
    count = kv[0][0].shape[2]
    context = samples(1, seed=5)[0][0]
    known = known_of(shared("llama"), context, profile, 0) if config.predict_layers == 0 else None
    codec = Klt(
        Geometry(profile.layers, tokens=count, batch=1, dtype="float32"), config, profile,
        sinks=torch.tensor([0, 7]), known=known,
    )  # fmt: skip
    span = Span(0, count, count)
    return codec, gather(*kv, span), span


@pytest.mark.parametrize("layer", [None, 0])
def test_batches_give_the_values_of_the_sections(
    profile: Profile, kv: tuple[list[Tensor], list[Tensor]], layer: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Learnt profiles have a table for every component, with a predictor or without."""
    codec, rows, span = coded(profile, kv, replace(CONFIG, predict_layers=layer))
    parts = codec.encode(rows, span)
    assert bool((codec.entries > 0).all())
    assert batch.serves(codec.inner, Target.matrix(Target.memory(1, codec.entries.shape[1], rows.device)))
    found = [codec.decode(parts[:level], span) for level in (1, 2, 3)]
    monkeypatch.setattr(launching, "serves", lambda *_: False)
    for level, together in enumerate(found, 1):
        assert torch.equal(codec.decode(parts[:level], span), together)


@pytest.mark.parametrize("offset", [0, 5])
def test_errors_are_those_of_the_step(profile: Profile, kv: tuple[list[Tensor], list[Tensor]], offset: int) -> None:
    """Each finer level is closer, at the profile's step and at another one."""
    encoded = encode_kv(*kv, replace(PLAIN, step_offset=offset), profile)
    errors = []
    for level in (1, 2, 3):
        keys, values = decode_kv(encoded, level)
        pairs = zip((*keys, *values), (*kv[0], *kv[1]), strict=True)
        errors.append(sum(float((a - b).square().sum()) for a, b in pairs))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_tables_tell_how_many_coefficients_are_zero(profile: Profile, kv: tuple[list[Tensor], list[Tensor]]) -> None:
    """This decides which of them are multiplied densely (`sparse.dense_width`)."""
    codec, rows, span = coded(profile, kv, replace(PLAIN, protect_first=0, protect_last=0))
    parts, found = codec.encode(rows, span), []
    for level in (1, 2, 3):
        y = torch.empty(span.tokens, codec.entries.shape[1])
        launching.launch(codec.inner, [(parts[:level], span, 0)], Target.matrix(y))()
        found.append(float((y != 0).float().mean()))
        assert float(codec.inner.shares[level - 1].mean()) == pytest.approx(found[-1], abs=0.05)
    assert found[0] < found[1] < found[2]


def test_chunks_decode_alone(profile: Profile, kv: tuple[list[Tensor], list[Tensor]]) -> None:
    encoded = encode_kv(*kv, PLAIN, profile)
    whole = decode_kv(encoded, 2)
    codec = Klt.from_side(encoded.side, encoded.geometry, encoded.config, profile)
    rows = codec.decode([part[1] for part in encoded.parts[:2]], Span(32, 28, 60))
    assert torch.equal(rows, gather(*whole, Span(32, 28, 60)))


def test_artifacts_and_streams(profile: Profile, tmp_path: Path) -> None:
    ids = tokens(70)
    CacheGenCache.from_context(shared("llama"), ids, PLAIN, profile).save_pretrained(tmp_path)
    artifact = Artifact(LocalStore(tmp_path), profile)
    assert "klt-chain" in artifact.manifest.required
    with pytest.raises(UnsupportedFormatError, match="klt-chain"):
        loads((tmp_path / "cachegen.json").read_bytes(), features={"klt", "klt-tables", "sinks"})
    loaded = CacheGenCache.from_pretrained(tmp_path, profile=profile)  # needs no model
    for level in (1, 3):
        streamed = CacheGenCache.stream(tmp_path, shared("llama"), profile=profile, level=level)
        direct = CacheGenCache.from_pretrained(tmp_path, profile=profile, level=level)
        for mine, other in zip(streamed.kv.keys, direct.kv.keys, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    with pytest.raises(ProfileError):
        CacheGenCache.from_pretrained(tmp_path, profile=replace(profile, predictors=()))
    loaded.save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy" / "base.safetensors").read_bytes() == (tmp_path / "base.safetensors").read_bytes()


@torch.no_grad()
@pytest.mark.parametrize("layer", [None, 0])
def test_a_rounding_does_not_grow_along_the_layers(
    profile: Profile, kv: tuple[list[Tensor], list[Tensor]], layer: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Symbols do not depend on summaries. With all that is read rounded to bfloat16, the last layer moves little more
    than the first that reads anything, and the divergence hardly changes.
    """
    model, continuation = shared("llama"), samples(1, seed=5)[0][1]
    codec, rows, span = coded(profile, kv, replace(CONFIG, predict_layers=layer))
    parts = codec.encode(rows, span)
    exact = continuation_logits(model, *kv, continuation).log_softmax(-1)
    original = Chain.read

    def rounded(self: Chain, *given: object) -> Tensor | None:
        found = original(self, *given)  # type: ignore[arg-type]
        return None if found is None else found.bfloat16().float()

    for level in (1, 2, 3):
        near = codec.decode(parts[:level], span)
        with monkeypatch.context() as patch:
            patch.setattr(Chain, "read", rounded)
            far = codec.decode(parts[:level], span)
        moved = [float((far[:, s] - near[:, s]).norm() / near[:, s].norm()) for s in codec.basis.slices]
        assert 0 < max(moved) < 2**-7
        assert max(moved[-2:]) < 2**-7
        kl = []
        for decoded in (near, far):
            split = [part.reshape(len(rows), 2, -1).transpose(0, 1)[None] for part in decoded.split(widths(codec), 1)]
            lossy = continuation_logits(model, split[::2], split[1::2], continuation).log_softmax(-1)
            kl.append(float((exact.exp() * (exact - lossy)).sum(-1).mean()))
        assert abs(kl[1] - kl[0]) < 0.1 * kl[0] + 1e-4


def widths(codec: Klt) -> list[int]:
    return [part.stop - part.start for part in codec.basis.slices]


@pytest.mark.parametrize("level", [1, 3])
def test_bfloat16_products_read_the_summaries(
    profile: Profile, kv: tuple[list[Tensor], list[Tensor]], level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = [[x.bfloat16() for x in side] for side in kv]
    encoded = encode_kv(*narrow, PLAIN, profile)
    found = []
    for fast in (False, True):
        monkeypatch.setattr(basis, "multiplies_bfloat16", lambda fast=fast: fast)
        found.append(decode_kv(encoded, level))
    for mine, other in zip((*found[0][0], *found[0][1]), (*found[1][0], *found[1][1]), strict=True):
        assert float((mine.float() - other.float()).norm() / mine.float().norm()) < 2**-7


def test_bases_in_8_bits_are_inverted(profile: Profile) -> None:
    """W makes up for the rounding of U: what the basis spans is restored exactly but for the step."""
    group = next(one for one in profile.groups if len(one.synthesis) == one.synthesis.shape[1])
    torch.testing.assert_close(group.synthesis @ group.analysis, torch.eye(len(group.synthesis)), rtol=0, atol=1e-4)


def test_matrices_in_8_bits_keep_their_bytes() -> None:
    x = torch.randn(50, 30, generator=torch.Generator().manual_seed(0)) * torch.logspace(-8, 6, 50)[:, None]
    x[3] = 0
    numbers, codes = matrices.packed(x)
    again = matrices.packed(matrices.unpacked(numbers, codes))
    assert torch.equal(numbers, again[0])
    assert torch.equal(codes, again[1])
    error = (matrices.unpacked(numbers, codes) - x).abs().amax(1)
    assert bool((error <= x.abs().amax(1) / 127 * 0.6).all())


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="across_layers"):
        learn_profile(shared("llama"), samples(), config=CONFIG, across_layers="apart")  # type: ignore[arg-type]


def test_wide_layers_have_bases_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    exact, sample = Exact(make("llama")), samples(1)[0]
    _, layers = exact.geometry(sample[0])
    width = max(layer.k_channels for layer in layers)
    joint = chaining.DEFAULT_GROUP_CHANNELS // width
    assert chaining.grouping(exact, sample, "auto", None) == (joint, MAX_REACH)
    assert chaining.grouping(exact, sample, "auto", 2) == (2, 0)
    assert chaining.grouping(exact, sample, "chained", 5) == (5, 5)
    assert chaining.grouping(exact, sample, "joint", None) == (joint, 0)
    monkeypatch.setattr(chaining, "CHAINED_CHANNELS", width)
    assert chaining.grouping(exact, sample, "auto", None) == (1, 3)
    assert chaining.grouping(exact, sample, "joint", None) == (joint, 0)


def test_sums_of_the_last_layers_of_groups() -> None:
    """Learnt from a chain's sums or from rows of these layers alone, the sums of a predictor's chain are the same."""
    generator = torch.Generator().manual_seed(0)
    order, widths = [(0, 0, 2), (1, 0, 2), (0, 2, 2), (1, 2, 2)], [8, 4, 8, 4]
    rows = [torch.randn(30, width, generator=generator) for width in widths]
    later, kept = [(0, 1, 1), (1, 1, 1), (0, 2, 2), (1, 2, 2)], [4, 2, 8, 4]
    whole, alone = GroupSums(order, widths, 3), GroupSums(later, kept, 3)
    whole.add(rows)
    alone.add([x[:, -width:] for x, width in zip(rows, kept, strict=True)])
    found = whole.after(later, kept)
    assert found.products.keys() == alone.products.keys()
    for name, x in alone.sums.items():
        torch.testing.assert_close(found.sums[name], x)

def test_old_chained_artifacts_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The digest of each level was stored when the artifact was made. Its manifest requires the feature."""
    monkeypatch.setattr(basis, "multiplies_bfloat16", lambda: False)
    profile = Profile.load(GOLDEN)
    assert profile.to_bytes() == golden_chained().to_bytes() == (GOLDEN / PROFILE_FILE).read_bytes()
    artifact = Artifact(LocalStore(GOLDEN), profile)
    assert artifact.manifest.required == ("klt", "klt-chain", "predict", "klt-tables")
    expected = recorded(GOLDEN)
    assert digests(artifact, golden_known()) == expected
    assert len(expected) == artifact.levels == 3


def test_this_encoder_writes_the_same_chained_bytes(tmp_path: Path) -> None:
    write_golden(tmp_path / "new")
    require_same_files(tmp_path / "new", GOLDEN)


def write_golden(directory: Path) -> None:
    config = CacheGenConfig(transform="klt", chunk_tokens=32, protect_last=8)
    source = Encoder(*golden_kv(), config, golden_chained(), known=golden_known())
    write(source, directory, input_ids=list(range(50)), fingerprint={"model": "golden"})
