"""learn_profile: moments of the training samples, then the step by the divergence of held-out ones, then the tables.

The first of every five samples is held out, 8 at most. The divergence and the bits of each level that a profile states
are measured on these. The tables come from 8 of the other samples: they need the shape of a distribution, not a basis.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from torch import Tensor

from hf_cachegen.codec.fit import Counts
from hf_cachegen.codec.predictor import Predictor
from hf_cachegen.codec.quantize import steps_of
from hf_cachegen.codec.tables import shipped_codebooks
from hf_cachegen.config import CacheGenConfig
from hf_cachegen.errors import ConfigError, ProfileError
from hf_cachegen.models.fingerprint import Fingerprint
from hf_cachegen.models.requirements import require_model, require_vocabulary
from hf_cachegen.models.running import evaluation_mode
from hf_cachegen.models.sampled_weights import coarse_weights
from hf_cachegen.models.stepping import StepSearch
from hf_cachegen.profiles.files import Profile
from hf_cachegen.profiles.learning.chaining import AcrossLayers, Chaining, grouping, require_across
from hf_cachegen.profiles.learning.exact import Exact
from hf_cachegen.profiles.learning.journal import Journal, unknown
from hf_cachegen.profiles.learning.measuring import Coded, Measured
from hf_cachegen.profiles.learning.moments import SUMS, Moments, Sums
from hf_cachegen.profiles.learning.options import ranks_of, targets_of
from hf_cachegen.profiles.learning.predictor import DEFAULT_RANK, Target, regressed
from hf_cachegen.profiles.learning.predictor import blank as blank_predictor
from hf_cachegen.profiles.learning.progress import shown, timed
from hf_cachegen.profiles.learning.running import (
    NO_ROTATION,
    Sample,
    find_rotary,
    require_sample,
)
from hf_cachegen.profiles.learning.sums import FeatureSums

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEFAULT_TARGETS = (0.1, 0.01, 0.001)
"""Divergence of levels 1, 2 and 3, in nats per token."""
HELD_OUT_EVERY = 5
MAX_HELD_OUT = 8
"""The mean divergence of 8 samples of 128 tokens has a standard error of about a tenth, half the distance of two codes.
"""
MAX_PREDICTOR_HELD_OUT = 4
"""Held-out samples that a predictor is measured on. Its ratio to the profile itself differs little between samples."""
MAX_TABLE_SAMPLES = 8
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
        return _Learning(model, samples, config, targets, seed, predicting, journal, progress).profile(
            floor, group_layers, across_layers, undo_rotation
        )


class _Learning:
    """One learning run: the state that its stages share."""

    def __init__(
        self, model: PreTrainedModel, samples: Sequence[Sample], config: CacheGenConfig, targets: tuple[float, ...],
        seed: int, predicting: dict[int, int], journal: str | os.PathLike[str] | None, progress: bool,
    ):  # fmt: skip
        self.model, self.config, self.targets, self.seed, self.progress = model, config, targets, seed, progress
        self.samples, self.predicting, self.path = samples, predicting, journal
        indices = range(len(samples))[::HELD_OUT_EVERY][:MAX_HELD_OUT]
        self.held_out = [samples[index] for index in indices]
        self.training = [sample for index, sample in enumerate(samples) if index not in indices]
        self.for_tables = self.training[:: max(1, len(self.training) // MAX_TABLE_SAMPLES)][:MAX_TABLE_SAMPLES]
        self.exact = Exact(model, [*self.held_out, *self.for_tables], list(predicting))
        self.fingerprint = Fingerprint.of(model, []).to_dict()
        self.chaining: Chaining | None = None

    def profile(
        self, floor: float, group_layers: int | None, across_layers: AcrossLayers, undo_rotation: bool
    ) -> Profile:
        group_layers, reach = grouping(self.exact, self.samples[0], across_layers, group_layers)
        options = {"floor": floor, "target_kl": list(self.targets), "seed": self.seed, "samples": len(self.samples)}
        key = self._key({
            **options, "group_layers": group_layers, "reach": reach, "undo_rotation": undo_rotation,
            "predict": list(self.predicting.items()),
        })  # fmt: skip
        journal = Journal(self.path, key, progress=self.progress)
        rotary = find_rotary(self.model) if undo_rotation else NO_ROTATION
        moments = Moments(self.exact, self.training, rotary, group_layers, self.seed, journal, reach)
        held_out = self._held_out(moments)
        about = {
            "model": str(self.model.config.name_or_path),
            "fingerprint": self.fingerprint,
            "weights": coarse_weights(self.model),
            "weights_float16": coarse_weights(self.model, torch.float16),
            "group_layers": moments.group_layers,
            **options,
        }
        with timed("bases"):
            groups = moments.groups(floor)
        if reach:
            self.chaining = Chaining(moments.training.groups, held_out.groups, groups)
        nothing = torch.zeros(sum(len(group.synthesis) for group in groups), dtype=torch.uint8)
        finer = nothing.expand(self.config.levels - 1, -1)
        blank = Profile(moments.layers, rotary, moments.means.float(), groups, 0, nothing, finer, about)
        # The target of the finest level almost always decides, so the others are measured at its step alone.
        profile, measured = self._at_code(blank, self._step(blank, self.targets[-1:], journal), journal)
        if self._beyond(measured, self.config.levels - 1):
            profile, measured = self._at_code(blank, self._step(blank, self.targets, journal), journal)
        while reach and self._beyond(measured, self.config.levels) and profile.step_code > 1:
            profile, measured = self._at_code(blank, profile.step_code - 1, journal)  # it was searched without a chain
        profile = replace(profile, about={**profile.about, "measured": measured.means()})
        predictors = []
        for seen, unseen in zip(moments.training.features, held_out.features, strict=True):
            targets = moments.targets(groups, seen, unseen)
            predictors.append(self._predictor(profile, measured, seen, unseen, targets, journal))
        return replace(profile, predictors=tuple(predictors))

    def _held_out(self, moments: Moments) -> Sums:
        """Return the sums of the held-out samples. Their caches are needed later, so they are not in the journal."""
        found = moments.empty()
        for context, _ in shown(self.held_out, "held out", len(self.held_out), bar=self.progress):
            computed = self.exact.prefill(context)
            found.add(computed, moments.rows_of(computed))
        return found

    def _predictor(
        self, profile: Profile, beside: Measured, training: FeatureSums, held_out: FeatureSums,
        targets: Sequence[Target], journal: Journal,
    ) -> Predictor:  # fmt: skip
        """Learn the predictor of one layer, after the profile itself, which measures `beside`."""
        layer, rank = training.layer, self.predicting[training.layer]
        with timed(f"regression on layer {layer}"):
            if self.chaining is None:
                found = regressed(training, held_out, targets, rank)
            else:
                found = self.chaining.regressed(training, held_out, targets, rank, profile)
        predictor = blank_predictor(layer, found, profile.step_code, profile.levels, profile.reach)
        predictor = replace(predictor, **self._entries(replace(profile, predictors=(predictor,)), layer, journal))
        some = self.held_out[:MAX_PREDICTOR_HELD_OUT]
        measured = self._measured(replace(profile, predictors=(predictor,)), some, layer).means(beside)
        return replace(predictor, about={**predictor.about, "measured": measured})

    def _measured(self, profile: Profile, samples: Sequence[Sample], layer: int | None) -> Measured:
        stage = "measure" if layer is None else f"measure layer {layer}"
        shown_samples = shown(samples, stage, len(samples), bar=self.progress)
        return Measured.of(self.exact, profile, shown_samples, replace(self.config, predict_layers=layer))

    def _beyond(self, measured: Measured, levels: int) -> bool:
        """Return whether a divergence of the first levels is larger than its target."""
        rows = measured.means()[:levels]
        return any(row["kl"] > target for row, target in zip(rows, self.targets, strict=False))

    def _at_code(self, blank: Profile, code: int, journal: Journal) -> tuple[Profile, Measured]:
        """Return the profile with this step, and what it measures."""
        profile = replace(blank, step_code=code)
        if self.chaining is not None:
            with timed(f"chain at {code}"):
                profile = self.chaining.applied(profile, self.config.levels)
        profile = replace(profile, **self._entries(profile, None, journal))
        return profile, self._measured(profile, self.held_out, None)

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
        coefficients: dict[int, Tensor] = {}  # they do not depend on the step

        def measured(code: int, sample: int, level: int) -> dict[int, float]:
            at, config = replace(profile, step_code=code), self.config
            if level == levels - 1:  # the symbols of the finest level alone
                at, config = replace(at, refine_entries=at.refine_entries[:0]), replace(config, levels=1)
            context, continuation = self.held_out[sample]
            coded = Coded(self.exact, at, context, config, coefficients.get(sample))
            coefficients[sample] = coded.coefficients
            found = coded.divergences(continuation)
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
            coded = Coded(self.exact, profile, context, config)
            counts.add(coded.codec.inner.symbols(coded.coefficients)[0])
            torch.maximum(peaks, coded.coefficients.abs().amax(0), out=peaks)
        values, digits = shipped_codebooks(self.config.prob_bits)
        entries, _ = counts.choose(values, digits)
        widths = [len(group.synthesis) for group in learnt.groups]
        kept = peaks >= KEPT_PEAK * float(steps_of(torch.tensor(learnt.step_code, dtype=torch.uint8)))
        kept[torch.tensor([0, *widths[:-1]]).cumsum(0)] = True  # a group needs at least one component
        pairs = zip(learnt.groups, kept.split(widths), strict=True)
        groups = [
            group if bool(mine.all()) else replace(group, synthesis=group.synthesis[mine]) for group, mine in pairs
        ]  # what a group has derived stays with it
        entries = entries[:, kept]
        return {"groups": tuple(groups), "base_entries": entries[0], "refine_entries": entries[1:]}
