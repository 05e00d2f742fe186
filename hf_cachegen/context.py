"""The KV cache of one context, with its fingerprint: computed by a model, loaded, or streamed.

`CacheGenCache` adds the interface for users. `generate` needs the attributes and methods in this file alone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache

from hf_cachegen.artifact import ContextText, Limits, Reader, Store, read_text
from hf_cachegen.artifact.tensors import NamedTensor
from hf_cachegen.codec.geometry import Geometry
from hf_cachegen.codec.predictor import Known
from hf_cachegen.config import CacheGenConfig
from hf_cachegen.errors import ConfigError, CorruptError, TensorError, UnsupportedModelError
from hf_cachegen.models.adapters import require_inactive
from hf_cachegen.models.causality import require_causal
from hf_cachegen.models.compat import run, unwrapped
from hf_cachegen.models.encoder_decoder import (
    EncoderState,
    context_input,
    encode,
    require_decoder,
    require_encoder_decoder,
)
from hf_cachegen.models.fingerprint import Fingerprint
from hf_cachegen.models.first_layers import known_of
from hf_cachegen.models.identity import Verify, identify
from hf_cachegen.models.inputs import ContextInputs, context_inputs
from hf_cachegen.models.kinds import empty_cache, holds_states, layer_contents
from hf_cachegen.models.layers import KVTensors, capture, dtype_name
from hf_cachegen.models.media_prompt import prefill_media
from hf_cachegen.models.opening import check_states, checked_kv, open_manifest, validate
from hf_cachegen.models.prefill import StateOptions, prefill
from hf_cachegen.models.recurrent import Checkpoints, capture_states
from hf_cachegen.models.requirements import (
    positions_change,
    require_geometry,
    require_length,
    require_model,
)
from hf_cachegen.models.running import evaluation_mode, layer_devices
from hf_cachegen.models.state import fresh_state
from hf_cachegen.models.state_divergence import state_divergence
from hf_cachegen.profiles.files import Profile
from hf_cachegen.profiles.finding import ProfileLike, for_encoding, model_folder, profile_of
from hf_cachegen.report import CacheReport
from hf_cachegen.stores import Access, open_store
from hf_cachegen.streaming import Refinement, StreamOptions, stream_context

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class CachedContext:
    """The keys and values of one context, read-only, with their fingerprint.

    Attributes:
        kv: the keys and values, all tokens of all layers.
        input_ids: int64 [1, tokens] on the CPU, the context.
        fingerprint: the model, dtype and tokenizer that the cache belongs to.
        config: options of the encoder; None for the defaults.
        profile: the profile of its model, if any.
        source: the store of the artifact that it was loaded from, if any.
        verify: what `check` compares: "probe" runs the first tokens through the model again, "weights" does not.
        text: the text of the context, where it is known and not in `source`.
        checkpoints: the states of recurrent layers at some positions; empty for a model without such layers.
        encoder: of an encoder-decoder model, what is kept beside the keys and values of cross-attention.
        measured: the divergences that `config` was chosen by, if it had a target.
        known: what a loader computes from the tokens, for a profile that predicts; None where nothing is predicted.
        refinement: the refinement of a streamed context, which may still improve it; None if it was not streamed.

    Raises:
        TensorError: the keys and values are not one row of as many tokens as `input_ids`.
    """

    def __init__(
        self,
        kv: KVTensors,
        input_ids: Tensor,
        fingerprint: Fingerprint,
        report: CacheReport,
        *,
        config: CacheGenConfig | None = None,
        profile: Profile | None = None,
        source: Store | None = None,
        refinement: Refinement | None = None,
        verify: Verify = "probe",
        text: ContextText | None = None,
        checkpoints: Checkpoints | None = None,
        encoder: EncoderState | None = None,
        measured: dict[str, Any] | None = None,
        known: Known | None = None,
    ):
        if kv.geometry.batch != 1 or tuple(input_ids.shape) != (1, kv.geometry.tokens):
            raise TensorError(f"expected input_ids [1, {kv.geometry.tokens}] for one row, got {list(input_ids.shape)}")
        self.kv, self.input_ids, self.fingerprint, self._report = kv, input_ids, fingerprint, report
        self.config, self.profile, self.source, self.refinement = config, profile, source, refinement
        self.verify, self._text, self.checkpoints = verify, text, checkpoints or Checkpoints()
        self.encoder, self.measured, self.known = encoder, measured, known

    @property
    def report(self) -> CacheReport:
        """Return the sizes and times of the context; for a streamed one a StreamReport of its present state."""
        found = self._report if self.refinement is None else self.refinement.report
        return replace(found, checkpoints=self.checkpoints.tokens, state_bytes=self.checkpoints.nbytes)

    def check(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Raise MismatchError unless this cache belongs to `model`."""
        if model.config.is_encoder_decoder:
            require_encoder_decoder(model)
            self.fingerprint.check(model, tokenizer)
            require_decoder(model, self.kv.geometry, self.encoder)
        else:
            require_model(model)
            self.fingerprint.check(model, tokenizer)
            require_geometry(model.config, self.kv.geometry)
            check_states(self.checkpoints, model)
        if self.verify == "probe":
            self.fingerprint.check_probe(model, self.input_ids[0].tolist())

    def parts(self) -> dict[str, Any]:
        """Return the arguments that create another object of the same context."""
        return {
            "kv": self.kv, "input_ids": self.input_ids, "fingerprint": self.fingerprint, "report": self._report,
            "config": self.config, "profile": self.profile, "source": self.source, "refinement": self.refinement,
            "verify": self.verify, "text": self._text, "checkpoints": self.checkpoints,
            "encoder": self.encoder, "measured": self.measured, "known": self.known,
        }  # fmt: skip

    def named_tensors(self) -> list[NamedTensor]:
        """Return the tensors to store beside keys and values: states of recurrent layers, the output of an encoder."""
        return [*self.checkpoints.named(), *([] if self.encoder is None else self.encoder.named())]

    def read_text(self) -> ContextText | None:
        """Return the text or the chat of the context, which for a loaded context is read from its artifact.

        Returns:
            The text; None where it is not known.

        Raises:
            ArtifactError: the artifact is gone, was replaced, or its text is damaged.
            StoreError: the artifact cannot be read.
        """
        if self._text is not None or self.source is None:
            return self._text
        reader = Reader(self.source)
        if reader.manifest.fingerprint != self.fingerprint.to_dict():
            raise CorruptError(
                f"{self.source} is no longer the artifact that this cache was loaded from: load it again"
            )
        return read_text(reader)


@torch.no_grad()
def compute_context(
    model: PreTrainedModel,
    input_ids: ContextInputs,
    config: CacheGenConfig | None,
    profile: ProfileLike,
    tokenizer: PreTrainedTokenizerBase | None,
    prefill_chunk_tokens: int,
    progress: bool,
    text: ContextText | None = None,
    states: StateOptions | None = None,
) -> CachedContext:
    """Prefill a context. Arguments and errors are those of `CacheGenCache.from_context`."""
    if prefill_chunk_tokens < 1:
        raise ConfigError(f"prefill_chunk_tokens must be at least 1, got {prefill_chunk_tokens}")
    if model.config.is_encoder_decoder:
        return _encoded_context(model, input_ids, config, profile, tokenizer, text)
    require_model(model)
    ids, media = context_inputs(model.config, input_ids)
    require_length(model, ids.shape[1])
    identify(model)
    require_inactive(model, ids[0].tolist())
    found = for_encoding(profile, model)
    states = states or StateOptions()
    start = time.perf_counter()
    if positions_change(model.config, 1, ids.shape[1]):
        # The rotation depends on the whole length, so the context must be computed in one forward pass.
        prefill_chunk_tokens = ids.shape[1]
    with evaluation_mode(model), fresh_state(model):
        if media is not None:
            require_causal(model)
            past, checkpoints = prefill_media(model, ids, media, prefill_chunk_tokens, states, progress)
        else:
            if not holds_states(model.config):
                _require_continuation(model, ids[:, :prefill_chunk_tokens])
            require_causal(model)
            past, checkpoints = prefill(model, ids, prefill_chunk_tokens, states, progress)
    _require_tokens(past, ids.shape[1], model)
    kv = checked_kv(_captured(past, model, ids), model, ids)
    found_media = () if media is None else media.media()
    fingerprint = Fingerprint.of(model, ids[0].tolist(), tokenizer, kv, own=True, media=found_media)
    seconds = time.perf_counter() - start
    budget = states.budget if checkpoints.all else None
    kl = None if checkpoints.bits is None else state_divergence(model, kv, ids, checkpoints)
    report = _report(kv, checkpoints, prefill_seconds=seconds, state_budget=budget, state_kl=kl)
    known = None if media is not None else _to_encode(model, ids, config, found)
    return CachedContext(
        kv, ids, fingerprint, report, config=config, profile=found, text=text, checkpoints=checkpoints, known=known
    )


def _to_encode(
    model: PreTrainedModel, ids: Tensor, config: CacheGenConfig | None, profile: Profile | None
) -> Known | None:
    """Return the scores to encode a context with; None where its profile predicts nothing.

    They are computed together with the fingerprint, since the model may have changed when the context is saved.
    """
    config = config or CacheGenConfig()
    layer = None if profile is None or config.lossless else profile.usable(config.predict_layers)
    if profile is None or layer is None or config.transform not in ("auto", "klt"):
        return None
    return Known(layer, known_of(model, ids, profile, layer).scores)


def _encoded_context(
    model: PreTrainedModel, inputs: ContextInputs, config: CacheGenConfig | None, profile: ProfileLike,
    tokenizer: PreTrainedTokenizerBase | None, text: ContextText | None,
) -> CachedContext:  # fmt: skip
    """Encode a context of an encoder-decoder model. Arguments and errors are those of `compute_context`."""
    require_encoder_decoder(model)
    if profile not in ("auto", None):
        raise ConfigError("profiles are learnt for decoder-only models: leave out profile= for this model")
    given, decoder_ids = context_input(model, inputs)
    identify(model)
    start = time.perf_counter()
    kv, state = encode(model, given, decoder_ids)
    positions = kv.geometry.tokens
    # The positions of a sound have no tokens. Its digest identifies it.
    ids = given.value.cpu().long() if given.name == "input_ids" else torch.zeros(1, positions, dtype=torch.long)
    kv, media = checked_kv(kv, model, ids), given.media(positions)
    fingerprint = Fingerprint.of(model, ids[0].tolist(), tokenizer, kv, own=True, media=media)
    report = CacheReport(positions, kv.geometry.nbytes, prefill_seconds=time.perf_counter() - start)
    return CachedContext(kv, ids, fingerprint, report, config=config, text=text, encoder=state)


def _captured(cache: Cache, model: PreTrainedModel, ids: Tensor) -> KVTensors:
    """Return the keys and values of a filled cache, none of them for a model that has states alone."""
    empty = None
    if not any(content.kind for content in layer_contents(model.config)):
        empty = Geometry((), int(ids.shape[1]), 1, dtype_name(model.dtype))
    return capture(cache, model.config, empty)


def _report(kv: KVTensors, checkpoints: Checkpoints, **values: Any) -> CacheReport:
    """Return the report of a context. A stock cache would hold the keys and values, and the states once."""
    once = checkpoints.all[-1].nbytes if checkpoints.all else 0
    return CacheReport(
        kv.geometry.tokens, kv.geometry.nbytes + once, checkpoints=checkpoints.tokens, state_bytes=checkpoints.nbytes,
        **values,
    )  # fmt: skip


_continues: set[type] = set()
"""Classes of models that were tried successfully with several tokens after a cache."""


def _require_continuation(model: PreTrainedModel, ids: Tensor) -> None:
    """Raise UnsupportedModelError unless a model reads several tokens after a cache; try each class once."""
    kind = type(unwrapped(model))
    if kind in _continues:
        return
    ids = ids.to(layer_devices(model, len(layer_contents(model.config)))[0])
    past = empty_cache(model.config)
    try:
        for tokens in (ids[:, :1], ids[:, :1].expand(-1, 2)):
            run(model, tokens, past, last_logits_only=True)
    except (AssertionError, NotImplementedError) as error:
        message = f"{kind.__name__} cannot read a question after a cached context: {error}"
        raise UnsupportedModelError(message) from error
    _continues.add(kind)


def _require_tokens(past: DynamicCache, tokens: int, model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError unless every layer that has keys holds one for each token."""
    name = type(unwrapped(model)).__name__
    contents = layer_contents(model.config)
    for index, (layer, content) in enumerate(zip(past.layers, contents, strict=False)):
        if content.kind is None:
            continue
        held = int(layer.get_seq_length()) if layer.is_initialized else 0
        if held != tokens:
            why = "cross-attention, or keys of another layer" if held == 0 else "tokens of the model's own"
            raise UnsupportedModelError(
                f"layer {index} of {name} holds {held} tokens after a context of {tokens} ({why}), so its cache cannot "
                "be kept: use a model whose layers hold one key for each token"
            )


def wrap_cache(
    cache: Cache,
    input_ids: ContextInputs,
    model: PreTrainedModel,
    config: CacheGenConfig | None,
    profile: ProfileLike,
    tokenizer: PreTrainedTokenizerBase | None,
    verify: Verify,
) -> CachedContext:
    """Copy a cache that a model filled. Arguments and errors are those of `CacheGenCache.from_cache`."""
    require_model(model)
    found = for_encoding(profile, model)
    ids, media = context_inputs(model.config, input_ids)
    require_causal(model)
    kv = checked_kv(_captured(cache, model, ids), model, ids).clone()
    checkpoints = Checkpoints()
    if holds_states(model.config):
        checkpoints = Checkpoints((capture_states(cache, layer_contents(model.config), ids.shape[1]),))
        check_states(checkpoints, model)
    probed, found_media = kv if verify == "probe" else None, () if media is None else media.media()
    fingerprint = Fingerprint.of(model, ids[0].tolist(), tokenizer, probed, media=found_media)
    return CachedContext(
        kv, ids, fingerprint, _report(kv, checkpoints), config=config, profile=found, verify=verify,
        checkpoints=checkpoints, known=None if found_media else _to_encode(model, ids, config, found),
    )  # fmt: skip


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
    found = validate(open_manifest(open_store(path, Access(**access), limits), limits), model, tokenizer, verify=verify)
    taken = profile_of(found.artifact, profile, model_folder(model))
    artifact, devices = found.artifact.with_profile(taken), found.devices
    if device is None and devices is not None and len(set(devices)) == 1:
        device = devices[0]
    known, layer = None, artifact.config.predict_layers
    if layer is not None and taken is not None and model is not None:
        known = known_of(model, found.input_ids, taken, layer)
    keys, values = artifact.decode(level, device, known=known, progress=progress)
    kv = KVTensors(tuple(keys), tuple(values), artifact.geometry)
    level = artifact.levels if level is None else level
    report = _report(
        kv,
        found.checkpoints,
        loaded_bytes=artifact.nbytes_at(level),
        level=level,
        load_seconds=time.perf_counter() - start,
        encoding=artifact.report,
    )
    kv = kv if device is not None or devices is None else kv.to(devices)
    return CachedContext(
        kv, found.input_ids, found.fingerprint, report, config=artifact.config, profile=taken,
        source=artifact.store, verify=verify, checkpoints=found.checkpoints, encoder=found.encoder,
    )  # fmt: skip


def stream_to_context(path: str | os.PathLike[str], model: PreTrainedModel, **options: Any) -> CachedContext:
    """Load an artifact under a deadline. Arguments and errors are those of `CacheGenCache.stream`."""
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
