"""learn_profile: moments of the training samples, then the step by the divergence of held-out ones, then the tables.

The first of every five samples is held out, 8 at most. The divergence and the bits of each level that a profile states
are measured on these. The tables come from 16 of the other samples: they need the shape of a distribution, not a basis.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from torch import Tensor

from hf_cachegen.codec.chunk import Span
from hf_cachegen.codec.fit import Counts
from hf_cachegen.codec.geometry import Geometry
from hf_cachegen.codec.group import Group
from hf_cachegen.codec.predictor import Predictor
from hf_cachegen.codec.quantize import steps_of
from hf_cachegen.codec.rows import empty_kv, gather, scatter
from hf_cachegen.codec.sinks import find_sinks
from hf_cachegen.codec.tables import shipped_codebooks
from hf_cachegen.codec.transforms.klt import Klt
from hf_cachegen.config import CacheGenConfig
from hf_cachegen.errors import ConfigError, ProfileError
from hf_cachegen.models.continuation import continuation_logits
from hf_cachegen.models.fingerprint import Fingerprint
from hf_cachegen.models.first_layers import known_of
from hf_cachegen.models.requirements import require_model, require_vocabulary
from hf_cachegen.models.running import evaluation_mode
from hf_cachegen.models.sampled_weights import coarse_weights
from hf_cachegen.models.stepping import StepSearch
from hf_cachegen.profiles.files import Profile
from hf_cachegen.profiles.learning.chaining import AcrossLayers, Chaining, grouping, require_across
from hf_cachegen.profiles.learning.exact import Exact
from hf_cachegen.profiles.learning.journal import Journal, unknown
from hf_cachegen.profiles.learning.moments import SUMS, Moments
from hf_cachegen.profiles.learning.options import ranks_of, targets_of
from hf_cachegen.profiles.learning.predictor import DEFAULT_RANK, FeatureSums, regressed
from hf_cachegen.profiles.learning.predictor import blank as blank_predictor
from hf_cachegen.profiles.learning.progress import shown
from hf_cachegen.profiles.learning.running import (
    NO_ROTATION,
    Sample,
    find_rotary,
    require_sample,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEFAULT_TARGETS = (0.1, 0.01, 0.001)
"""Divergence of levels 1, 2 and 3, in nats per token."""
HELD_OUT_EVERY = 5
MAX_HELD_OUT = 8
"""The mean divergence of 8 samples of 128 tokens has a standard error of about a tenth, half the distance of two codes.
"""
MAX_TABLE_SAMPLES = 16
STEP_CODES = 256
KEPT_PEAK = 0.25
"""A component is kept if a sample's coefficient reaches this fraction of the finest step. A symbol needs half a step,
and contexts of another kind have larger coefficients.
"""


def learn_profile(
    model: PreTrainedModel,
    samples: Sequence[Sample],
    *,
    config: CacheGenConfig | None = None,
    target_kl: float | Sequence[float] = DEFAULT_TARGETS,
    floor: float = 0.5,
    group_layers: int | None = None,
    across_layers: AcrossLayers = "auto",
    undo_rotation: bool = True,
    predict_layers: Sequence[int] = (),
    predict_rank: int = DEFAULT_RANK,
    seed: int = 0,
    progress: bool = False,
    journal: str | os.PathLike[str] | None = None,
) -> Profile:
    """Learn `model`'s profile from samples that mix the uses its caches are meant for.

    The model runs in eval mode, and its own mode is restored afterwards. Every fifth sample is held out and used for
    measuring. Levels differ by 3 in step, about 4 to 9 in divergence, so one target is binding and the other levels are
    better; `Profile.about["measured"]` has the measured divergence of each level.

    Args:
        model: The model.
        samples: (context_ids [1, tokens], continuation_ids [1, tokens]), int64.
        config: Its levels and the precision of the coder are used.
        target_kl: Largest divergence of each level, coarse to fine, in nats per token of a continuation. The step is
            the largest with which all hold. Fewer numbers than levels apply to the finest levels, one number to the
            finest.
        floor: Lower bound on the sensitivity, as a fraction of the mean of each layer's K or V.
        group_layers: Number of layers that share a basis. Default: as many as have DEFAULT_GROUP_CHANNELS channels, and
            in a chain one layer from CHAINED_CHANNELS channels on.
        across_layers: "joint": each group of layers is coded by itself. "chained": it is predicted from the groups
            before it, and matrices have 8 bits a number. "auto": chained, unless `group_layers` is given.
        undo_rotation: Rotate keys back to position zero, where the rotation is known.
        predict_layers: Values of `CacheGenConfig.predict_layers` to learn a predictor for: 0 predicts from a token's
            embedding, m from the hidden state after m layers. Each adds about as much to the file as the profile has.
        predict_rank: Largest rank of a predictor.
        seed: Random seed.
        progress: Show progress bars.
        journal: A file for the progress. The same call resumes from it after an interruption and returns the same
            profile. Remove it when the profile is saved.

    Returns:
        The profile.

    Raises:
        ConfigError: An option is out of its range, there are too few samples, or the journal is of another run.
        TensorError: A sample has no valid token ids.
        ProfileError: No step meets the targets.
        UnsupportedModelError: The model cannot reuse a cache.
    """
    require_model(model)
    config = replace(
        config or CacheGenConfig(), transform="klt", step_offset=0, target_kl=None, predict_layers=None
    )
    if len(samples) < HELD_OUT_EVERY:
        raise ConfigError(
            f"learning a profile needs at least {HELD_OUT_EVERY} samples, got {len(samples)}: pass more text, or make "
            "shorter contexts of it"
        )
    targets = targets_of(target_kl, config.levels)
    if not 0 < floor < 100:
        raise ConfigError(f"floor must be positive and below 100, got {floor}")
    if group_layers is not None and (not isinstance(group_layers, int) or group_layers < 1):
        raise ConfigError(f"group_layers must be an integer of at least 1, got {group_layers!r}")
    require_across(across_layers)
    predicting = ranks_of(model, predict_layers, predict_rank)
    for index, sample in enumerate(samples):
        require_sample(index, sample)
        for ids in sample:
            require_vocabulary(model, ids)
    with torch.inference_mode(False), evaluation_mode(model):  # sensitivities are gradients
        samples = [(context.clone(), continuation.clone()) for context, continuation in samples]
        return _Learning(model, samples, config, targets, seed, journal, progress).profile(
            floor, group_layers, across_layers, undo_rotation, predicting
        )


class _Learning:
    """One learning run: the state that its stages share."""

    def __init__(
        self, model: PreTrainedModel, samples: Sequence[Sample], config: CacheGenConfig, targets: tuple[float, ...],
        seed: int, journal: str | os.PathLike[str] | None, progress: bool,
    ):  # fmt: skip
        self.model, self.config, self.targets, self.seed, self.progress = model, config, targets, seed, progress
        self.samples, self.path, self.groups = samples, journal, tuple[Group, ...]()
        indices = range(len(samples))[::HELD_OUT_EVERY][:MAX_HELD_OUT]
        self.held_out = [samples[index] for index in indices]
        self.training = [sample for index, sample in enumerate(samples) if index not in indices]
        self.for_tables = self.training[:: max(1, len(self.training) // MAX_TABLE_SAMPLES)][:MAX_TABLE_SAMPLES]
        self.exact = Exact(model, [*self.held_out, *self.for_tables])
        self.fingerprint = Fingerprint.of(model, []).to_dict()
        self.chaining: Chaining | None = None

    def profile(
        self, floor: float, group_layers: int | None, across_layers: AcrossLayers, undo_rotation: bool,
        predicting: dict[int, int],
    ) -> Profile:  # fmt: skip
        group_layers, reach = grouping(self.exact, self.samples[0], across_layers, group_layers)
        options = {"floor": floor, "target_kl": list(self.targets), "seed": self.seed, "samples": len(self.samples)}
        key = self._key({
            **options, "group_layers": group_layers, "reach": reach, "undo_rotation": undo_rotation,
            "predict": list(predicting.items()),
        })  # fmt: skip
        journal = Journal(self.path, key, progress=self.progress)
        rotary = find_rotary(self.model) if undo_rotation else NO_ROTATION
        moments = Moments(self.exact, self.training, rotary, group_layers, self.seed, journal, list(predicting), reach)
        about = {
            "model": str(self.model.config.name_or_path),
            "fingerprint": self.fingerprint,
            "weights": coarse_weights(self.model),
            "group_layers": moments.group_layers,
            **options,
        }
        groups = self.groups = moments.groups(floor)
        if moments.chain is not None:
            self.chaining = Chaining(moments, moments.chain, groups, self.held_out, self.exact, journal)
        nothing = torch.zeros(sum(len(group.synthesis) for group in groups), dtype=torch.uint8)
        finer = nothing.expand(self.config.levels - 1, -1)
        blank = Profile(moments.layers, rotary, moments.means.float(), groups, 0, nothing, finer, about)
        # The target of the finest level almost always decides, so the others are measured at its step alone.
        profile, measured = self._at_code(blank, self._step(blank, self.targets[-1:], journal), journal)
        if self._beyond(measured[:-1]):
            profile, measured = self._at_code(blank, self._step(blank, self.targets, journal), journal)
        while self.chaining is not None and self._beyond(measured) and profile.step_code > 1:
            profile, measured = self._at_code(blank, profile.step_code - 1, journal)  # it was searched without a chain
        profile = replace(profile, about={**profile.about, "measured": measured})
        predictors = [self._predictor(profile, moments, sums, predicting[sums.layer], journal)
                      for sums in moments.features]  # fmt: skip
        return replace(profile, predictors=tuple(predictors))

    def _predictor(
        self, profile: Profile, moments: Moments, sums: FeatureSums, rank: int, journal: Journal
    ) -> Predictor:
        """Learn the predictor of one layer, after the profile itself."""
        held_out = moments.features_of(self.model, sums.layer)
        for context, _ in journal.each(f"features {sums.layer}", self.held_out, held_out.sums):
            keys, values, _ = self.exact.prefill(context)
            held_out.add(context, moments.rows_of(keys, values))
        targets = moments.targets(self.groups, sums, held_out)
        if self.chaining is None:
            found = regressed(sums, held_out, targets, rank)
        else:
            found = self.chaining.regressed(sums, held_out, targets, rank, profile)
        predictor = blank_predictor(sums.layer, found, profile.step_code, profile.levels, profile.reach)
        predictor = replace(predictor, **self._entries(replace(profile, predictors=(predictor,)), sums.layer, journal))
        measured = self._measured(replace(profile, predictors=(predictor,)), sums.layer)
        return replace(predictor, about={**predictor.about, "measured": measured})

    def _measured(self, profile: Profile, layer: int | None) -> list[dict[str, float]]:
        return measure(self.model, profile, self.held_out, replace(self.config, predict_layers=layer), self.exact)

    def _beyond(self, measured: Sequence[dict[str, float]]) -> bool:
        """Return whether a divergence is larger than its target."""
        return any(row["kl"] > target for row, target in zip(measured, self.targets, strict=False))

    def _at_code(self, blank: Profile, code: int, journal: Journal) -> tuple[Profile, list[dict[str, float]]]:
        """Return the profile with this step, and what it measures."""
        profile = replace(blank, step_code=code)
        if self.chaining is not None:
            profile = self.chaining.applied(profile, self.config.levels)
        profile = replace(profile, **self._entries(profile, None, journal))
        return profile, self._measured(profile, None)

    def _key(self, options: dict[str, object]) -> str:
        """Hash everything that the result depends on."""
        described = {"sums": SUMS, "options": options, "config": self.config.to_dict(), "fingerprint": self.fingerprint}
        found = xxhash.xxh3_128(json.dumps(described, sort_keys=True).encode())
        for sample in self.samples:
            for ids in sample:
                found.update(f"{ids.shape[1]}:".encode() + ids.cpu().to(torch.int64).contiguous().numpy().tobytes())
        return found.hexdigest()

    def _step(self, profile: Profile, targets: Sequence[float], journal: Journal) -> int:
        """Find the largest step code with which the finest levels are within these targets, one for each."""
        levels = self.config.levels
        targets = (math.inf,) * (levels - len(targets)) + tuple(targets)
        known = unknown(STEP_CODES, len(self.held_out), levels)
        done = journal.restore("step", {"divergence": known})
        counted = iter(shown(count(done), "step", None, done, bar=self.progress))

        def measured(code: int, sample: int, level: int) -> dict[int, float]:
            at, config = replace(profile, step_code=code), self.config
            if level == levels - 1:  # the symbols of the finest level alone
                at, config = replace(at, refine_entries=at.refine_entries[:0]), replace(config, levels=1)
            found = divergence(self.model, at, self.held_out[sample : sample + 1], config, self.exact)
            return {level: found[0]} if config.levels == 1 else dict(enumerate(found))

        def keep() -> None:
            journal.keep("step", {"divergence": known}, next(counted) + 1)

        code = StepSearch(known, targets, measured, keep).largest()
        if code == 0:
            raise ProfileError(
                f"no step keeps the divergence within {self.targets} nats: load the model in float32 (rounding alone "
                "may diverge more), or pass larger targets"
            )
        return code

    def _entries(self, profile: Profile, layer: int | None, journal: Journal) -> dict[str, Any]:
        """Return the groups of the profile, or of its predictor, and their entries, by the names of the fields.

        Each coefficient gets its cheapest tables. Components that stay near zero are left out.
        """
        learnt, config = profile.at(layer), replace(self.config, predict_layers=layer)
        components = len(learnt.base_entries)
        counts, peaks = Counts(components, self.config.levels), torch.zeros(components)
        sums = {f"part-{index}": part for index, part in enumerate(counts.parts)} | {"peaks": peaks}
        stage = f"tables at {learnt.step_code}" + ("" if layer is None else f", layer {layer}")
        for context, _ in journal.each(stage, self.for_tables, sums):
            rows, codec = _coded(self.exact, profile, context, config)
            y = codec.coefficients(rows, Span(0, len(rows), len(rows)))
            counts.add(codec.inner.symbols(y)[0])
            torch.maximum(peaks, y.abs().amax(0), out=peaks)
        values, digits = shipped_codebooks(self.config.prob_bits)
        entries, _ = counts.choose(values, digits)
        widths = [len(group.synthesis) for group in learnt.groups]
        kept = peaks >= KEPT_PEAK * float(steps_of(torch.tensor(learnt.step_code, dtype=torch.uint8)))
        kept[torch.tensor([0, *widths[:-1]]).cumsum(0)] = True  # a group needs at least one component
        pairs = zip(learnt.groups, kept.split(widths), strict=True)
        groups = [replace(group, synthesis=group.synthesis[mine]) for group, mine in pairs]
        entries = entries[:, kept]
        return {"groups": tuple(groups), "base_entries": entries[0], "refine_entries": entries[1:]}


def _coded(exact: Exact, profile: Profile, context: Tensor, config: CacheGenConfig) -> tuple[Tensor, Klt]:
    """Return a context's rows [tokens, channels], on the CPU, and the profile's codec for it."""
    keys, values, _ = exact.prefill(context)
    return _rows(keys, values), _codec(exact.model, profile, context, keys, config)


def _rows(keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    tokens = keys[0].shape[2]
    return gather(keys, values, Span(0, tokens, tokens)).float().cpu()


def _codec(
    model: PreTrainedModel, profile: Profile, context: Tensor, keys: Sequence[Tensor], config: CacheGenConfig
) -> Klt:
    dtype, layer = str(keys[0].dtype).removeprefix("torch."), profile.usable(config.predicted)
    geometry = Geometry(profile.layers, tokens=keys[0].shape[2], batch=1, dtype=dtype)
    known = None if layer is None else known_of(model, context, profile, layer)
    return Klt(geometry, config, profile, sinks=find_sinks(keys), known=known)


@torch.no_grad()
def divergence(
    model: PreTrainedModel, profile: Profile, samples: Sequence[Sample], config: CacheGenConfig,
    exact: Exact | None = None,
) -> list[float]:  # fmt: skip
    """Return the mean KL of each level, nats per token of the continuations, of the decoded against the exact cache."""
    totals, exact = [0.0] * config.levels, exact or Exact(model)
    for context, continuation in samples:
        keys, values, _ = exact.prefill(context)
        states = exact.states(context)
        expected = exact.log_probabilities((context, continuation))
        for level, decoded in enumerate(_levels(model, profile, context, (keys, values), config)):
            lossy = continuation_logits(model, *decoded, continuation, states).log_softmax(-1)
            totals[level] += float((expected.exp() * (expected - lossy)).sum(-1).mean())
    return [total / len(samples) for total in totals]


def _levels(
    model: PreTrainedModel, profile: Profile, context: Tensor, kv: tuple[list[Tensor], list[Tensor]],
    config: CacheGenConfig,
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:  # fmt: skip
    """Yield (keys, values) decoded at each level, on the devices of the given ones."""
    keys, values = kv
    codec, rows = _codec(model, profile, context, keys, config), _rows(keys, values)
    span = Span(0, len(rows), len(rows))
    for approximation in codec.approximations(rows, span):
        found = empty_kv(codec.geometry, [None] * len(codec.geometry.layers))
        scatter(approximation, found, span)
        moved = [x.to(exact.device) for x, exact in zip(found[::2], keys, strict=True)]
        yield moved, [x.to(exact.device) for x, exact in zip(found[1::2], values, strict=True)]


def measure(
    model: PreTrainedModel, profile: Profile, samples: Sequence[Sample], config: CacheGenConfig,
    exact: Exact | None = None,
) -> list[dict[str, float]]:  # fmt: skip
    """Return, for each level, its divergence on these samples and the bits per element of the chunks (without headers).
    """
    sizes, elements, exact = [0] * config.levels, 0, exact or Exact(model, samples)
    for context, _ in samples:
        rows, codec = _coded(exact, profile, context, config)
        for part, data in enumerate(codec.encode(rows, Span(0, len(rows), len(rows)))):
            sizes[part] += len(data)
        elements += rows.numel()
    bits = torch.tensor(sizes).cumsum(0).mul(8).div(elements).tolist()
    found = divergence(model, profile, samples, config, exact)
    return [{"kl": round(kl, 6), "bits_per_element": round(b, 4)} for kl, b in zip(found, bits, strict=True)]
