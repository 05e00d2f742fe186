"""An artifact as the cache of one context: opened, and checked as far as can be before anything is decoded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_cachegen.artifact import Artifact
from hf_cachegen.container import Limits, Store
from hf_cachegen.errors import CorruptError, ManifestError
from hf_cachegen.fingerprint import Fingerprint, hash_tokens
from hf_cachegen.layout import layer_devices, require_geometry, require_model

if TYPE_CHECKING:
    import os

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_cachegen.profile import Profile


@dataclass(frozen=True)
class OpenContext:
    """artifact: its manifest read; input_ids int64 [1, tokens]: the context; fingerprint: what it belongs to.

    places: the device of each layer of the model that it was checked against, None where there was none.
    """

    artifact: Artifact
    fingerprint: Fingerprint
    input_ids: Tensor
    places: list[torch.device] | None


def open_context(
    store: Store,
    model: PreTrainedModel | None = None,
    limits: Limits | None = None,
    profile: Profile | str | os.PathLike[str] | None = "auto",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> OpenContext:
    """The context of the artifact in `store`, whose manifest and tokens are fetched and held against the model.

    limits, profile: as for `Artifact`. Raises ArtifactError, StoreError, and MismatchError where it is another model's.
    """
    folder = "" if model is None else str(getattr(model.config, "_name_or_path", ""))
    artifact = Artifact(store, limits, profile, folder)
    if artifact.fingerprint is None or (stored := artifact.input_ids) is None:
        raise ManifestError(
            f"{store} holds tensors without fingerprint or tokens, so nothing tells what they belong to; decode "
            "them with hf_cachegen.artifact.Artifact(path).decode()"
        )
    fingerprint = Fingerprint.from_dict(artifact.fingerprint)
    if hash_tokens(stored) != fingerprint.tokens:
        raise CorruptError(f"{store}: the stored tokens are not those of the fingerprint")
    if artifact.geometry.batch != 1:
        raise ManifestError(f"{store} holds {artifact.geometry.batch} rows; a context is one row")
    if artifact.geometry.dtype != fingerprint.dtype:
        raise ManifestError(
            f"{store}: the geometry is of {artifact.geometry.dtype}, the fingerprint of {fingerprint.dtype:.40}"
        )
    places = None
    if model is not None:
        require_model(model)
        fingerprint.check(model, tokenizer)
        require_geometry(model.config, artifact.geometry)
        places = layer_devices(model, len(artifact.geometry.layers))
    return OpenContext(artifact, fingerprint, torch.tensor([stored]), places)
