"""Load the cache of a context, whole or under a deadline."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from hf_cachegen.artifact import Limits
from hf_cachegen.codec.context import Placement
from hf_cachegen.context.cached import CachedContext, report_of
from hf_cachegen.errors import UnsupportedModelError
from hf_cachegen.models.first_layers import known_of
from hf_cachegen.models.identity import Verify
from hf_cachegen.models.layers import KVTensors
from hf_cachegen.models.opening import open_manifest, validate
from hf_cachegen.models.requirements import require_instance
from hf_cachegen.profiles.finding import ProfileLike, finder
from hf_cachegen.stores import Access, open_store
from hf_cachegen.streaming import StreamOptions, stream_context

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_context(
    path: str | os.PathLike[str],
    model: PreTrainedModel | None,
    access: Mapping[str, Any],
    level: int | None = None,
    device: torch.device | str | None = None,
    profile: ProfileLike = "auto",
    tokenizer: PreTrainedTokenizerBase | None = None,
    limits: Limits | None = None,
    progress: bool = False,
    verify: Verify = "probe",
) -> CachedContext:
    """Load an artifact whole. Arguments and errors are those of `CacheGenCache.from_pretrained`."""
    start = time.perf_counter()
    store = open_store(path, Access.from_keywords(access), limits)
    found = validate(open_manifest(store, limits), model, tokenizer, verify=verify)
    taken = finder(profile, model)(found.artifact)
    artifact, devices = found.artifact.with_profile(taken), found.devices
    placement: Placement = device
    if device is None and devices:
        placement = devices[0] if len(set(devices)) == 1 else devices
    known, layer = None, artifact.config.predicted
    if layer is not None and taken is not None and model is not None:
        known = known_of(model, found.input_ids, taken, layer)
    keys, values = artifact.decode(level, placement, known=known, progress=progress)
    kv = KVTensors(tuple(keys), tuple(values), artifact.geometry)
    level = artifact.levels if level is None else level
    report = report_of(
        kv,
        found.checkpoints,
        loaded_bytes=artifact.nbytes_at(level),
        level=level,
        load_seconds=time.perf_counter() - start,
        encoding=artifact.report,
    )
    return CachedContext(
        kv, found.input_ids, found.fingerprint, report, config=artifact.config, profile=taken,
        source=artifact.store, verify=verify, checkpoints=found.checkpoints, encoder=found.encoder,
    )  # fmt: skip


def stream_to_context(path: str | os.PathLike[str], model: PreTrainedModel, **options: Any) -> CachedContext:
    """Load an artifact under a deadline. Arguments and errors are those of `CacheGenCache.stream`."""
    require_instance(model)
    chosen = StreamOptions.from_keywords(options)
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(
            "a context of an encoder-decoder model is not streamed: load it with CacheGenCache.from_pretrained"
        )
    found, kv, refinement = stream_context(path, model, chosen)
    artifact = found.artifact
    return CachedContext(
        kv, found.input_ids, found.fingerprint, refinement.report, config=artifact.config, profile=refinement.profile,
        source=artifact.store, refinement=refinement, verify=chosen.verify,
        checkpoints=found.checkpoints,
    )  # fmt: skip
