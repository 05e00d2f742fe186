"""What a context is saved as: an encoder of its tensors, or the artifact that it was loaded from."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from hf_cachegen.artifact import Store
from hf_cachegen.artifact.artifact import Artifact
from hf_cachegen.artifact.encoded import EncodedContext, encode_no_kv
from hf_cachegen.codec.context import Encoder
from hf_cachegen.config import CacheGenConfig
from hf_cachegen.context.cached import CachedContext
from hf_cachegen.errors import ConfigError
from hf_cachegen.profiles.finding import profile_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def encoding_of(
    context: CachedContext, config: CacheGenConfig | None, model: PreTrainedModel | None, progress: bool
) -> Encoder | EncodedContext:
    """Return what `artifact.write` stores of a context.

    Args:
        context: the context.
        config: options of the encoder; None for those of the context.
        model: the model, for a config with `target_kl`.
        progress: show a progress bar.

    Raises:
        ConfigError: the context was loaded from an artifact that `config` differs from, or that has changed since; or
            `config` has a target that is not met, or for which the model is missing.
    """
    if context.source is None:
        return _encoder(context, config, model, progress)
    return _loaded(context, context.source, config)


def _encoder(
    context: CachedContext, config: CacheGenConfig | None, model: PreTrainedModel | None, progress: bool
) -> Encoder | EncodedContext:
    kv, measured = context.kv, context.measured if config is None else None
    config = config or context.config
    if model is not None and (aimed := context.aimed(model, config)) is not context:
        config, measured = aimed.config, aimed.measured
    if not kv.geometry.layers:
        return encode_no_kv(kv.geometry, config)
    return Encoder(
        kv.keys, kv.values, config, context.profile, layers=kv.geometry.layers, known=context.known,
        progress=progress, measured=measured,
    )  # fmt: skip


def _loaded(context: CachedContext, store: Store, config: CacheGenConfig | None) -> EncodedContext:
    if config is not None and config.predict_layers == 0 and context.config is not None:
        # The default: 0 was encoded as None where the profile has no predictor.
        config = replace(config, predict_layers=context.config.predict_layers)
    if config is not None and config != context.config:
        raise ConfigError(
            f"this cache was decoded from {store}, and a second encoding would add a second loss: save it "
            "without config="
        )
    # A stream that recomputed every chunk has loaded no profile.
    artifact = Artifact(store)
    if (artifact.fingerprint, artifact.config) != (context.fingerprint.to_dict(), context.config):
        raise ConfigError(f"{store} is no longer the artifact that this cache was loaded from: load it again")
    taken = profile_of(artifact, "auto" if context.profile is None else context.profile)
    return artifact.with_profile(taken).read()
