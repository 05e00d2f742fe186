"""Open an artifact, and validate it against the model and the tokens before any work is done.

`open_manifest` reads the manifest alone; `validate` checks what it says. Between the two a stream begins to fetch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor

from hf_cachegen.artifact import MEDIA_FEATURE, TOKENS_FILE, Limits, Store
from hf_cachegen.artifact.artifact import Artifact
from hf_cachegen.errors import ConfigError, CorruptError, ManifestError, TensorError, WrongDtypeError
from hf_cachegen.models.compat import unwrapped
from hf_cachegen.models.continuation import continuation_of
from hf_cachegen.models.encoder_decoder import EncoderState, require_decoder, require_encoder_decoder
from hf_cachegen.models.fingerprint import Fingerprint, hash_tokens
from hf_cachegen.models.identity import Verify, forget
from hf_cachegen.models.kinds import holds_states
from hf_cachegen.models.layers import KVTensors, dtype_name
from hf_cachegen.models.recurrent import Checkpoints
from hf_cachegen.models.requirements import (
    require_geometry,
    require_instance,
    require_length,
    require_model,
    require_vocabulary,
)
from hf_cachegen.models.running import kv_devices, layer_devices

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

@dataclass(frozen=True)
class OpenContext:
    """A validated artifact.

    Attributes:
        artifact: The artifact, opened by its manifest.
        fingerprint: The model, dtype and tokenizer that it belongs to.
        input_ids: The context, int64 [1, tokens], on the CPU.
        devices: The device of each layer with keys and values of the model that it was validated against; None where
            there was none.
        checkpoints: The states of recurrent layers; empty for a model without them.
        encoder: What is kept of an encoder beside keys and values; None for a decoder-only model.
    """

    artifact: Artifact
    fingerprint: Fingerprint
    input_ids: Tensor
    devices: list[torch.device] | None
    checkpoints: Checkpoints
    encoder: EncoderState | None


def open_manifest(
    store: Store,
    limits: Limits | None = None,
) -> Artifact:
    """Open the artifact in a store by its manifest. Nothing else is fetched, and nothing is compared with the model.

    Args:
        store: The store of the artifact.
        limits: Limits for the manifest.

    Raises:
        ArtifactError: There is no artifact, or its manifest is damaged or above the limits.
        StoreError: The store cannot be read.
    """
    return Artifact(store, limits=limits)


def validate(
    artifact: Artifact,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    likely: Sequence[int] = (),
    verify: Verify = "probe",
) -> OpenContext:
    """Validate an artifact against the model and the tokens.

    Args:
        artifact: An artifact from `open_manifest`.
        model: The model; None to compare the manifest and the tokens alone.
        tokenizer: If given, it is compared with the fingerprint.
        likely: Token ids that may begin with the context. Where they do, the stored ones are not fetched.
        verify: "probe" also runs the first tokens through the model and compares them with what the artifact recorded
            (docs/identity.md); "weights" does not. "all" is "probe" and reads every byte of the weights again.

    Raises:
        ManifestError: The artifact has no fingerprint or no tokens, or contradicts itself.
        MismatchError: It belongs to another model or tokenizer.
        ArtifactError: The tokens or the states are damaged.
        StoreError: The tokens or the states cannot be read.
    """
    if verify not in get_args(Verify):
        raise ConfigError(f"verify must be one of {get_args(Verify)}, got {verify!r}")
    store = artifact.store
    if artifact.fingerprint is None or TOKENS_FILE not in artifact.manifest.files:
        raise ManifestError(
            f"{store}: expected a context, found tensors without fingerprint or tokens; decode them with "
            "hf_cachegen.artifact.Artifact(hf_cachegen.stores.open_store(path)).decode()"
        )
    fingerprint = Fingerprint.from_dict(artifact.fingerprint)
    if bool(fingerprint.media) != (MEDIA_FEATURE in artifact.manifest.required):
        raise ManifestError(
            f"{store}: the fingerprint has {len(fingerprint.media)} media, which the required features "
            f"{list(artifact.manifest.required)} contradict"
        )
    if fingerprint.media and fingerprint.media[-1].end > artifact.geometry.tokens:
        raise ManifestError(f"{store}: a medium ends behind the {artifact.geometry.tokens} tokens of the context")
    if artifact.geometry.batch != 1:
        raise ManifestError(f"{store}: expected a context of one row, it holds {artifact.geometry.batch} rows")
    if artifact.geometry.dtype != fingerprint.dtype:
        raise ManifestError(
            f"{store}: the geometry is of {artifact.geometry.dtype}, the fingerprint of {fingerprint.dtype:.40}"
        )
    if model is not None:
        require_instance(model)
    devices, identity, apart = None, None, model is not None and model.config.is_encoder_decoder
    if model is not None:
        (require_encoder_decoder if apart else require_model)(model)
        if verify == "all":
            forget(model)
        identity = fingerprint.check(model, tokenizer)
        if not apart:
            require_geometry(model.config, artifact.geometry)
        devices = layer_devices(model, len(artifact.geometry.layers)) if apart else kv_devices(model)
    input_ids = _tokens(artifact, fingerprint, likely)
    if model is not None and not apart:
        check_tokens(fingerprint, model, input_ids)
    if model is not None and verify != "weights":
        fingerprint.check_probe(model, input_ids[0].tolist(), identity)
    tensors = artifact.tensors()
    checkpoints = Checkpoints.from_named(tensors, artifact.geometry.tokens)
    encoder = EncoderState.from_named(tensors, artifact.geometry)
    if model is not None and apart:
        require_decoder(model, artifact.geometry, encoder)
    elif model is not None:
        check_states(checkpoints, model)
    return OpenContext(artifact, fingerprint, input_ids, devices, checkpoints, encoder)


def _tokens(artifact: Artifact, fingerprint: Fingerprint, likely: Sequence[int]) -> Tensor:
    count = artifact.geometry.tokens
    ids = list(likely[:count])
    if len(ids) < count or hash_tokens(ids) != fingerprint.tokens:
        ids = artifact.input_ids or []
        if hash_tokens(ids) != fingerprint.tokens:
            raise CorruptError(f"{artifact.store}: the stored tokens are not those of the fingerprint; fetch it again")
    return torch.tensor([ids])


def check_tokens(fingerprint: Fingerprint, model: PreTrainedModel, input_ids: Tensor) -> None:
    """Raise CorruptError or UnsupportedModelError unless a model of this fingerprint can read these tokens."""
    if fingerprint.media:  # what stands for them need not be in the vocabulary
        return
    require_length(model, input_ids.shape[1])
    try:
        require_vocabulary(model, input_ids)
    except TensorError as error:
        raise CorruptError(f"the tokens of this context contradict its fingerprint: {error}") from error


def check_states(checkpoints: Checkpoints, model: PreTrainedModel) -> None:
    """Raise WrongModelError unless the checkpoints have the states of a model."""
    expected = continuation_of(model).shapes if holds_states(model.config) else {}
    checkpoints.check(expected, type(unwrapped(model)).__name__)


def checked_kv(kv: KVTensors, model: PreTrainedModel, ids: Tensor) -> KVTensors:
    """Return `kv` after comparing it with the context and the model.

    Args:
        kv: the keys and values.
        model: the model that computed them.
        ids: the context, int64 [1, tokens].

    Raises:
        TensorError: the number of tokens differs.
        WrongDtypeError: the dtype is not that of the model.
    """
    if kv.geometry.tokens != ids.shape[1]:
        raise TensorError(
            f"expected a cache of {ids.shape[1]} tokens as in input_ids, it holds {kv.geometry.tokens}; after "
            "generate() a cache lacks the last token of the sequence: pass sequences[:, :-1]"
        )
    if kv.geometry.dtype != dtype_name(model.dtype):
        raise WrongDtypeError(
            f"the cache is {kv.geometry.dtype}, the model runs in {dtype_name(model.dtype)}: run it without autocast, "
            "in the dtype of the cache"
        )
    return kv
