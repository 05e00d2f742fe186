"""CacheGenCache: the KV cache of one context, with what it belongs to; made once, saved small, used by many
generations.

It is read-only. A stock cache grows while a model generates, so that a second use of it starts from another text;
here every `hf_cachegen.generate` gets a stock cache of its own, and a CacheGenCache passed straight to a model
raises.
"""

from __future__ import annotations

import inspect
import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from hf_cachegen.artifact import Artifact, write
from hf_cachegen.card import card
from hf_cachegen.config import CacheGenConfig
from hf_cachegen.container import Limits, Reader, Store
from hf_cachegen.encoding import EncodedContext, Encoder
from hf_cachegen.errors import ConfigError, ReadOnlyCacheError, TensorError
from hf_cachegen.finding import ProfileLike, for_encoding, profile_to_push
from hf_cachegen.fingerprint import Fingerprint
from hf_cachegen.layout import (
    KVTensors,
    build_dynamic,
    capture,
    evaluation_mode,
    layer_devices,
    layer_kinds,
    positions_change,
    require_geometry,
    require_model,
)
from hf_cachegen.models.identity import Verify, identify
from hf_cachegen.opening import Tokens, checked_kv, one_row, open_context
from hf_cachegen.prefix import Reuse
from hf_cachegen.profile import Profile
from hf_cachegen.report import CacheReport
from hf_cachegen.stores import Access, LocalStore, open_store
from hf_cachegen.streaming import (
    CONNECTIONS,
    Event,
    Fallback,
    Link,
    Policy,
    Refine,
    Refinement,
    StreamOptions,
    policy_of,
    stream_context,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PREFILL_CHUNK_TOKENS = 4096
"""Tokens per forward pass of a prefill: bounds the memory of activations, at full speed on any device."""


def _refuse(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
    raise ReadOnlyCacheError(
        "a CacheGenCache is read-only, since many generations share it: call hf_cachegen.generate(model, input_ids, "
        "cache=cache), or hf_cachegen.attach(model) and model.generate(input_ids, cache=cache), or take a copy with "
        "cache.to_dynamic()"
    )


class _ReadOnlyLayer(DynamicLayer):
    """A filled layer that refuses to change; the cache's own methods all go through its layers'."""

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        super().lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    lazy_initialization = update = crop = reset = reorder_cache = offload = prefetch = _refuse
    batch_repeat_interleave = batch_select_indices = _refuse


class CacheGenCache(DynamicCache):
    """The KV cache of one context of one model. Make one by `from_context`, `from_cache` or `from_pretrained`.

    kv: the keys and values, all tokens of all layers; input_ids: the context [1, tokens], on the CPU; fingerprint: what
    model, dtype and tokenizer it belongs to; refinement: of a streamed cache, what may still improve it.
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
        verify: Verify = "probe",
    ):
        super().__init__()
        if kv.geometry.batch != 1 or tuple(input_ids.shape) != (1, kv.geometry.tokens):
            raise TensorError(f"expected input_ids [1, {kv.geometry.tokens}] for one row, got {list(input_ids.shape)}")
        self.kv, self.input_ids, self.fingerprint, self._report = kv, input_ids, fingerprint, report
        self.layers = [_ReadOnlyLayer(*pair) for pair in zip(kv.keys, kv.values, strict=True)]
        self._config, self._profile, self._source, self._verify = config, profile, source, verify
        self.refinement: Refinement | None = None

    update = early_initialization = update_conv_state = update_recurrent_state = _refuse
    # The first thing that a forward pass asks for: some prompts would fail, less clearly, before they come to update.
    get_mask_sizes = _refuse

    @property
    def report(self) -> CacheReport:
        """What it is and what it cost; of a streamed cache a StreamReport of how it stands now."""
        return self._report if self.refinement is None else self.refinement.report

    def __repr__(self) -> str:
        geometry = self.kv.geometry
        return f"CacheGenCache({geometry.tokens} tokens, {len(geometry.layers)} layers, {geometry.dtype})"

    @classmethod
    @torch.no_grad()
    def from_context(
        cls,
        model: PreTrainedModel,
        input_ids: Tokens,
        config: CacheGenConfig | None = None,
        profile: ProfileLike = "auto",
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        prefill_chunk_tokens: int = PREFILL_CHUNK_TOKENS,
        progress: bool = False,
    ) -> CacheGenCache:
        """Run `model`, in evaluation mode, over a context ([tokens] or [1, tokens]) and keep its exact keys and values.

        config: how `save_pretrained` will encode them (default: CacheGenConfig()). profile: the model's Profile, its
        place (a path, a repository, a URL), "auto" (the one in the model's folder or its repository, if there is one:
        docs/stores.md) or None. tokenizer: if given, its hash goes into
        the fingerprint. Raises UnsupportedModelError, UnsupportedLayerError, TensorError,
        WrongDtypeError, ProfileError, WrongModelError (another model's profile).
        """
        if prefill_chunk_tokens < 1:
            raise ConfigError(f"prefill_chunk_tokens must be at least 1, got {prefill_chunk_tokens}")
        require_model(model)
        identify(model)
        found = for_encoding(profile, model)
        ids = one_row(input_ids)
        start = time.perf_counter()
        if positions_change(model.config, 1, ids.shape[1]):
            # The rotation depends on the whole length, so the context must be seen at once.
            prefill_chunk_tokens = ids.shape[1]
        options = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        # Without a config it keeps all tokens of sliding layers too, which a cut to a shorter prefix needs.
        past = DynamicCache()
        device = layer_devices(model, len(layer_kinds(model.config)))[0]
        chunks = ids.to(device).split(prefill_chunk_tokens, dim=1)
        with evaluation_mode(model):
            for chunk in tqdm(chunks, "prefill", unit="chunk", disable=not progress):
                model(input_ids=chunk, past_key_values=past, use_cache=True, return_dict=True, **options)
        kv = checked_kv(capture(past, model.config), model, ids)
        fingerprint = Fingerprint.of(model, ids[0].tolist(), tokenizer, kv, own=True)
        report = CacheReport(ids.shape[1], kv.geometry.nbytes, prefill_seconds=time.perf_counter() - start)
        return cls(kv, ids, fingerprint, report, config=config, profile=found)

    @classmethod
    def from_cache(
        cls,
        cache: Cache,
        input_ids: Tokens,
        model: PreTrainedModel,
        config: CacheGenConfig | None = None,
        profile: ProfileLike = "auto",
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> CacheGenCache:
        """Wrap a cache that `model` filled with `input_ids`. Its tensors are copied: the cache may go on growing.

        That the tokens are those of the cache cannot be seen from it; their number, dtype and shapes are checked.
        Other arguments and errors as for `from_context`.
        """
        require_model(model)
        found = for_encoding(profile, model)
        ids = one_row(input_ids)
        kv = checked_kv(capture(cache, model.config), model, ids).clone()
        fingerprint = Fingerprint.of(model, ids[0].tolist(), tokenizer, kv)
        return cls(kv, ids, fingerprint, CacheReport(ids.shape[1], kv.geometry.nbytes), config=config, profile=found)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        model: PreTrainedModel | None = None,
        level: int | None = None,
        device: torch.device | str | None = None,
        profile: ProfileLike = "auto",
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        progress: bool = False,
        limits: Limits | None = None,
        verify: Verify = "probe",
        **access: Any,
    ) -> CacheGenCache:
        """Load an artifact at `level` (default: the finest), each layer to its device of `model`, else to `device`.

        With a model the fingerprint and the geometry are checked before anything is decoded; `generate` checks again.
        path: a folder, a repository on the Hub ("user/name") or a URL (https://, s3://, hf://, ...).
        profile: for an artifact that needs one: a Profile, its place, None (the one beside the artifact alone), or
        "auto": the right one, from wherever it is found (docs/stores.md).
        limits: how large an artifact may claim to be. verify: "probe" also runs the first tokens through the model and
        compares them with what the artifact recorded (docs/identity.md), "weights" does not. access: revision, token,
        cache_dir, local_files_only, force_download, subfolder and repo_type as in Transformers, and the other fields of
        hf_cachegen.stores.Access.
        Raises MismatchError, ArtifactError, StoreError, ProfileError (see hf_cachegen.errors).
        """
        start = time.perf_counter()
        store = open_store(path, Access(**access), limits)
        found = open_context(store, model, limits, profile, tokenizer=tokenizer, verify=verify)
        artifact, places = found.artifact, found.places
        if device is None and places is not None and len(set(places)) == 1:
            device = places[0]
        keys, values = artifact.decode(level, device, progress=progress)
        kv = KVTensors(tuple(keys), tuple(values), artifact.geometry)
        level = artifact.levels if level is None else level
        report = CacheReport(
            context_tokens=kv.geometry.tokens,
            exact_bytes=kv.geometry.nbytes,
            loaded_bytes=artifact.nbytes_at(level),
            level=level,
            load_seconds=time.perf_counter() - start,
            encoding=artifact.report,
        )
        kv = kv if device is not None or places is None else kv.to(places)
        return cls(
            kv,
            found.input_ids,
            found.fingerprint,
            report,
            config=artifact.config,
            profile=artifact.profile(),
            source=artifact.store,
            verify=verify,
        )

    @classmethod
    def stream(
        cls,
        path: str | os.PathLike[str],
        model: PreTrainedModel,
        *,
        slo: float | None = None,
        level: int | Literal["text"] | None = None,
        policy: Policy | str = "adaptive",
        refine: Refine = "before",
        prompt_tokens: int = 0,
        fallback: Sequence[Fallback] = (),
        profile: ProfileLike = "auto",
        tokenizer: PreTrainedTokenizerBase | None = None,
        limits: Limits | None = None,
        on_event: Callable[[Event], None] | None = None,
        stall_seconds: float | None = None,
        connections: int = CONNECTIONS,
        link: Link | None = None,
        cancel: threading.Event | None = None,
        prompt: tuple[Tensor, Tensor] | None = None,
        verify: Verify = "probe",
        **access: Any,
    ) -> CacheGenCache:
        """Load an artifact so that the first token comes within `slo` seconds from this call, whatever the network
        does (docs/streaming.md; section 5.3 of the paper). The report is a StreamReport.

        path, profile, tokenizer, limits, verify, access: as for `from_pretrained`. Layers go to their devices.
        slo: None takes the time that it takes. level: the same for all chunks, or "text" to recompute all, instead of a
        policy. policy: "adaptive", "paper" or an object (hf_cachegen.streaming.Policy).
        refine: what is done with finer levels than the first that was fetched: "off" nothing, "before" fetch them
        while time is left before the SLO, "while_generating" go on after this call returns (`cache.refinement`).
        prompt_tokens: how many tokens will follow the context: their prefill is part of the SLO. prompt: in their stead
        the input_ids and attention_mask, [rows, tokens] each, that will be asked, context included.
        fallback: other places with the same artifact; (place, {...}) gives one its own `access`.
        on_event: called with each hf_cachegen.streaming.Event.
        stall_seconds: a source that is silent for so long has failed (default: a quarter of the SLO, at least 0.5; 10
        without one). connections: requests at a time. link: which streams share a link (default: those to one host).
        cancel: set, it ends the stream.

        A chunk that no source gives is recomputed. Raises what `from_pretrained` does; ConfigError,
        StreamCancelledError, and PromptMismatchError where `prompt` has nothing of the context.
        """
        options = StreamOptions(
            slo, policy_of(policy, level), refine, prompt_tokens, fallback, on_event, stall_seconds, connections,
            link, cancel, prompt, verify,
        )  # fmt: skip
        found, kv, refinement = stream_context(path, model, options, profile, tokenizer, limits, access)
        artifact = found.artifact
        cache = cls(
            kv, found.input_ids, found.fingerprint, refinement.report, config=artifact.config,
            profile=refinement.profile, source=artifact.store, verify=verify,
        )  # fmt: skip
        cache.refinement = refinement
        return cache

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        config: CacheGenConfig | None = None,
        *,
        overwrite: bool = False,
        progress: bool = False,
    ) -> None:
        """Encode into `directory`; a cache that was loaded from an artifact copies that one, so that nothing is lost
        twice.

        config: default the one given to `from_context`, else CacheGenConfig().
        Raises ArtifactExistsError, ConfigError.
        """
        source: Encoder | EncodedContext
        if self._source is not None:
            if config is not None and config != self._config:
                raise ConfigError(f"this cache was decoded from {self._source}; encoding it anew would lose twice")
            # What was recomputed throughout has taken no profile.
            artifact = Artifact(self._source, profile="auto" if self._profile is None else self._profile)
            if (artifact.fingerprint, artifact.config) != (self.fingerprint.to_dict(), self._config):
                raise ConfigError(f"{self._source} is no longer the artifact that this cache was loaded from")
            source = artifact.read()
        else:
            layers = list(self.kv.geometry.layers)
            kv, config = self.kv, config or self._config
            source = Encoder(kv.keys, kv.values, config, self._profile, layers=layers, progress=progress)
        write(
            source,
            directory,
            input_ids=self.input_ids[0].tolist(),
            fingerprint=self.fingerprint.to_dict(),
            overwrite=overwrite,
        )
        if self._source is None:
            self._report = replace(self._report, encoding=Artifact(directory).report)

    def push_to_hub(
        self,
        repo_id: str,
        config: CacheGenConfig | None = None,
        *,
        description: str = "",
        private: bool = True,
        token: str | bool | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
        repo_type: str = "dataset",
        commit_message: str = "Upload a KV cache",
        create_pr: bool = False,
        with_profile: bool | None = None,
    ) -> str:
        """Encode as `save_pretrained` does and put the artifact, with a card, into a repository on the Hub, in one
        commit; the repository is made if need be. Returns the URL of the commit.

        description: what the context is, for the card. A KV cache reveals its text: think before private=False.
        with_profile: whether the profile that reading takes goes along; None: unless it was loaded from the Hub or
        pushed there, and the artifact says where.
        Raises ConfigError, ConflictError and other StoreErrors.
        """
        from hf_cachegen.stores import hub, pushing

        place = hub.HubPlace(repo_id, repo_type, subfolder, revision or hub.DEFAULT_REVISION)
        with tempfile.TemporaryDirectory(prefix="hf_cachegen-") as folder:
            self.save_pretrained(folder, config)
            reader = Reader(LocalStore(folder))
            text = card(reader, repo_id, subfolder=subfolder, description=description)
            pushed = pushing.push(
                Path(folder), place, text, profile=profile_to_push(self._profile, reader.manifest.codec, with_profile),
                token=token, private=private, commit_message=commit_message, create_pr=create_pr,
            )  # fmt: skip
        return pushed.url

    def to_dynamic(self) -> DynamicCache:
        """A stock DynamicCache with copies of the keys and values, to do with as you like (sliding layers keep their
        window). Of a stream, what has come by now; refinements that come later do not reach the copy.
        """
        reuse = Reuse(pads=(0,), columns=self.kv.geometry.tokens, whole=True)
        kv = self.kv if self.refinement is None else self.refinement.snapshot()[0]
        return build_dynamic(kv.clone() if kv is self.kv else kv, reuse, 1, [keys.device for keys in self.kv.keys])

    def check(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Raises MismatchError unless this cache is `model`'s."""
        require_model(model)
        self.fingerprint.check(model, tokenizer)
        require_geometry(model.config, self.kv.geometry)
        if self._verify == "probe":
            self.fingerprint.check_probe(model, self.input_ids[0].tolist())
