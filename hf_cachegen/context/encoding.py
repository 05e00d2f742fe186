"""Encode a context to save it: choose the step for a target, then encode its tensors, or copy the artifact that they
were decoded from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from hf_cachegen.artifact import Store
from hf_cachegen.artifact.artifact import Artifact
from hf_cachegen.artifact.encoded import EncodedContext, encode_no_kv
from hf_cachegen.codec.context import Encoder
from hf_cachegen.config import AUTO_LAYERS, CacheGenConfig, require_config
from hf_cachegen.context.cached import CachedContext
from hf_cachegen.errors import ConfigError
from hf_cachegen.models.inputs import Tokens, one_row
from hf_cachegen.models.kinds import is_plain
from hf_cachegen.models.requirements import require_vocabulary
from hf_cachegen.models.target import meet_target
from hf_cachegen.profiles.finding import profile_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def aimed(
    context: CachedContext,
    model: PreTrainedModel,
    config: CacheGenConfig | None,
    continuations: Sequence[Tokens] = (),
) -> CachedContext:
    """Return the context with the step that meets the target of `config`; without a target, the same object.

    Args:
        context: With its exact keys and values.
        model: That computed them.
        config: Options of the encoder.
        continuations: Token ids that are likely to follow, to probe with.

    Raises:
        ConfigError: No step meets the target; or there are continuations without a target.
    """
    config = _as_chosen(context, config)
    if config is None or config.target_kl is None:
        if continuations:
            raise ConfigError("continuations are for CacheGenConfig(target_kl=...): set it, or leave them out")
        return context
    if not is_plain(model.config) or context.encoder is not None or context.fingerprint.media:
        raise ConfigError(
            "target_kl needs a context of tokens alone and a decoder whose layers hold keys and values alone: set "
            "steps= or step_offset= instead"
        )
    ids = [one_row(found) for found in continuations]
    for found in ids:
        require_vocabulary(model, found)
    last = int(context.input_ids[0, -1])
    chosen = meet_target(model, context.kv, last, config, context.profile, ids, context.known)
    return CachedContext(**{**context.parts(), "config": chosen.config, "measured": chosen.measured})


def encoded(
    context: CachedContext, config: CacheGenConfig | None, model: PreTrainedModel | None, progress: bool
) -> Encoder | EncodedContext:
    """Return what `artifact.write` takes. Arguments and errors are those of `CacheGenCache.save_pretrained`."""
    require_config(config)
    config = _as_chosen(context, config)
    if context.source is not None:
        return _copied(context, context.source, config)
    layers = context.kv.geometry.layers
    kv, measured = context.kv, context.measured if config is None else None
    config = config or context.config
    if model is not None and (found := aimed(context, model, config)) is not context:
        config, measured = found.config, found.measured
    if not layers:
        return encode_no_kv(kv.geometry, config)
    return Encoder(
        kv.keys, kv.values, config, context.profile, layers=layers, known=context.known, progress=progress,
        measured=measured,
    )  # fmt: skip


def _as_chosen(context: CachedContext, config: CacheGenConfig | None) -> CacheGenConfig | None:
    """Replace predict_layers="auto" by what was chosen for the context when it was computed."""
    if config is None or config.predict_layers != AUTO_LAYERS:
        return config
    layer = None if context.known is None else context.known.layer
    if context.source is not None and context.config is not None:
        layer = context.config.predicted
    return config.predicting(layer)


def _copied(context: CachedContext, source: Store, config: CacheGenConfig | None) -> EncodedContext:
    """Return the encoded context of the artifact that a context was loaded from. Raises ConfigError."""
    if config is not None and config.predict_layers == 0 and context.config is not None:
        # The default: 0 was encoded as None where the profile has no predictor.
        config = replace(config, predict_layers=context.config.predict_layers)
    if config is not None and config != context.config:
        raise ConfigError(
            f"this cache was decoded from {source}, and a second encoding would add a second loss: save it "
            "without config="
        )
    # A stream that recomputed every chunk has loaded no profile.
    artifact = Artifact(source)
    if (artifact.fingerprint, artifact.config) != (context.fingerprint.to_dict(), context.config):
        raise ConfigError(f"{source} is no longer the artifact that this cache was loaded from: load it again")
    taken = profile_of(artifact, "auto" if context.profile is None else context.profile)
    return artifact.with_profile(taken).read()
