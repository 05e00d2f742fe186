"""What must belong together is held together before any work is done: an artifact's manifest and tokens and the model
that is to use it, tokens and the cache that they filled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor

from hf_cachegen.artifact import Artifact
from hf_cachegen.container import TOKENS_FILE, Limits, Store
from hf_cachegen.errors import ConfigError, CorruptError, ManifestError, TensorError, WrongDtypeError
from hf_cachegen.fingerprint import Fingerprint, hash_tokens
from hf_cachegen.layout import KVTensors, dtype_name, layer_devices, require_geometry, require_model
from hf_cachegen.models.identity import Verify

if TYPE_CHECKING:
    import os

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_cachegen.profile import Profile

Tokens = Tensor | Sequence[int]


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
    likely: Sequence[int] = (),
    verify: Verify = "probe",
    on_manifest: Callable[[Artifact], None] | None = None,
) -> OpenContext:
    """The context of the artifact in `store`: its manifest is held against the model, its tokens against the manifest.

    limits, profile: as for `Artifact`. likely: token ids that may begin with the context; where they do, the stored
    ones are not fetched. verify: "probe" also runs the first tokens through the model and compares them with what the
    artifact recorded; "weights" does not. on_manifest: called before anything but the manifest is fetched or checked.
    Raises ArtifactError, StoreError, and MismatchError where it is another model's.
    """
    if verify not in get_args(Verify):
        raise ConfigError(f"verify must be one of {get_args(Verify)}, got {verify!r}")
    folder = "" if model is None else str(getattr(model.config, "_name_or_path", ""))
    artifact = Artifact(store, limits, profile, folder)
    if on_manifest is not None:
        on_manifest(artifact)
    if artifact.fingerprint is None or TOKENS_FILE not in artifact.manifest.files:
        raise ManifestError(
            f"{store} holds tensors without fingerprint or tokens, so nothing tells what they belong to; decode "
            "them with hf_cachegen.artifact.Artifact(path).decode()"
        )
    fingerprint = Fingerprint.from_dict(artifact.fingerprint)
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
    input_ids = _tokens(artifact, fingerprint, likely)
    if model is not None and verify == "probe":
        fingerprint.check_probe(model, input_ids[0].tolist())
    return OpenContext(artifact, fingerprint, input_ids, places)


def _tokens(artifact: Artifact, fingerprint: Fingerprint, likely: Sequence[int]) -> Tensor:
    count = artifact.geometry.tokens
    ids = list(likely[:count])
    if len(ids) < count or hash_tokens(ids) != fingerprint.tokens:
        ids = artifact.input_ids or []
        if hash_tokens(ids) != fingerprint.tokens:
            raise CorruptError(f"{artifact.store}: the stored tokens are not those of the fingerprint")
    return torch.tensor([ids])


def one_row(input_ids: Tokens) -> Tensor:
    """A context's token ids as int64 [1, tokens], on the CPU. Raises TensorError for what is no such thing."""
    try:
        ids = torch.as_tensor(input_ids).detach().cpu()
    except (TypeError, ValueError, RuntimeError, KeyError, IndexError) as error:
        raise TensorError(
            f"a context is one row of token ids, [tokens] or [1, tokens]; got a {type(input_ids).__name__}: pass "
            'input_ids, such as tokenizer(text, return_tensors="pt").input_ids'
        ) from error
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] == 0 or ids.is_floating_point() or ids.dtype is torch.bool:
        raise TensorError(
            f"a context is one row of token ids, [tokens] or [1, tokens]; got {list(ids.shape)} {ids.dtype}"
        )
    return ids.long()


def checked_kv(kv: KVTensors, model: PreTrainedModel, ids: Tensor) -> KVTensors:
    """`kv`, which must have the tokens of `ids` and the dtype of `model`. Raises TensorError, WrongDtypeError."""
    if kv.geometry.tokens != ids.shape[1]:
        raise TensorError(
            f"the cache holds {kv.geometry.tokens} tokens, input_ids {ids.shape[1]}; after generate() a cache lacks "
            "the last token of the sequence: pass sequences[:, :-1]"
        )
    if kv.geometry.dtype != dtype_name(model.dtype):
        raise WrongDtypeError(
            f"the cache is {kv.geometry.dtype}, the model runs in {dtype_name(model.dtype)} (autocast?): make them one"
        )
    return kv
