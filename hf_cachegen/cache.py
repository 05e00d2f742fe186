"""CacheGenCache: the KV cache of one context, computed once, saved compressed, used by many generations.

It is read-only. A stock cache grows while a model generates, so a second use of it starts from another text. Here every
generation gets a stock cache of its own. Creating a CacheGenCache prepares its model, so that the stock call
`model.generate(..., cache=cache)` works (`hf_cachegen.attach`).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache

from hf_cachegen.artifact import ContextText, Limits, Reader
from hf_cachegen.artifact.artifact import Artifact, write
from hf_cachegen.config import CacheGenConfig
from hf_cachegen.context import (
    CachedContext,
    aimed,
    compute_context,
    encoded,
    load_context,
    stream_to_context,
    wrap_cache,
)
from hf_cachegen.errors import ConfigError
from hf_cachegen.generation import attach as attach_to
from hf_cachegen.models.identity import Verify
from hf_cachegen.models.inputs import ContextInputs, Tokens
from hf_cachegen.models.kinds import is_plain, layer_contents
from hf_cachegen.models.layers import build_by_config, build_dynamic
from hf_cachegen.models.prefill import STATE_BUDGET, StateOptions
from hf_cachegen.models.prefix import Reuse
from hf_cachegen.models.read_only import ReadOnlyLayer, refuse
from hf_cachegen.models.running import layer_devices
from hf_cachegen.models.text import prompt_ids
from hf_cachegen.profiles.finding import ProfileLike, profile_to_push
from hf_cachegen.stores import LocalStore
from hf_cachegen.stores.publishing import publish_artifact

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PREFILL_CHUNK_TOKENS = 4096
"""Tokens per forward pass of a prefill: large enough for full speed, and a bound on the memory of activations."""


class CacheGenCache(CachedContext, DynamicCache):
    """The KV cache of one context of one model, made by `from_context`, `from_cache`, `from_pretrained` or `stream`.

    Its attributes are those of `CachedContext`: kv, input_ids, fingerprint, config, profile, source, refinement.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        DynamicCache.__init__(self)
        CachedContext.__init__(self, *args, **kwargs)
        self.layers = [ReadOnlyLayer(*pair) for pair in zip(self.kv.keys, self.kv.values, strict=True)]

    update = early_initialization = update_conv_state = update_recurrent_state = refuse
    has_previous_state = get_conv_state = get_recurrent_state = refuse
    # The first method that a forward pass calls: some prompts would fail with another error before they reach update.
    get_mask_sizes = refuse

    def __repr__(self) -> str:
        geometry = self.kv.geometry
        return f"CacheGenCache({geometry.tokens} tokens, {len(geometry.layers)} layers, {geometry.dtype})"

    @classmethod
    def _of(cls, context: CachedContext, model: PreTrainedModel | None, attach: bool) -> CacheGenCache:
        """Return the cache of `context`; prepare the model if `attach` is true."""
        if attach and model is not None:
            attach_to(model)
        return cls(**context.parts())

    @classmethod
    def from_context(
        cls,
        model: PreTrainedModel,
        input_ids: ContextInputs,
        config: CacheGenConfig | None = None,
        profile: ProfileLike = "auto",
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        prefill_chunk_tokens: int = PREFILL_CHUNK_TOKENS,
        state_every: int | None = None,
        state_budget: int = STATE_BUDGET,
        state_bits: int | None = None,
        progress: bool = False,
        attach: bool = True,
        continuations: Sequence[Tokens] = (),
    ) -> CacheGenCache:
        """Run a model, in evaluation mode, over a context and keep its exact keys and values.

        Args:
            model: the model, or a wrapper of it (torch.compile, PEFT, accelerate).
            input_ids: the context, int64 [tokens] or [1, tokens]; or model inputs by name, such as a processor's whole
                output (docs/how-to/media.md), or the encoder's input (docs/how-to/encoder_decoder.md).
            config: options of the encoder for `save_pretrained` (default: CacheGenConfig()).
            profile: the profile of the model, its location (a path, a repository, a URL), "auto" (the one in the
                model's folder or repository, if there is one: docs/stores.md) or None.
            tokenizer: if given, its hash becomes a part of the fingerprint.
            prefill_chunk_tokens: tokens per forward pass.
            state_every: tokens between two checkpoints of recurrent states; None for the end and a few positions
                before it (docs/how-to/recurrent.md).
            state_budget: largest size of all checkpoints in bytes; above it some are left out.
            state_bits: bits per value of a recurrent state in an artifact, 2 to 8; None to store it exactly.
            progress: show a progress bar.
            attach: prepare the model, so that `model.generate(..., cache=cache)` works (`hf_cachegen.attach`).
            continuations: token ids that are likely to follow, to probe `config.target_kl` with, besides drawn ones.

        Raises:
            ConfigError: no step meets `config.target_kl`.
            UnsupportedModelError: the model keeps no cache that can be reused, or the context exceeds its positions.
            UnsupportedLayerError: a layer of its cache is of an unknown kind.
            TensorError: input_ids are not one row of token ids, or media do not fit their placeholders.
            WrongDtypeError: the cache has another dtype than the model.
            ProfileError: the profile cannot be read.
            WrongModelError: the profile is of another model.
        """
        states = StateOptions(state_every, state_budget, state_bits)
        context = compute_context(
            model, input_ids, config, profile, tokenizer, prefill_chunk_tokens, progress, states=states
        )
        return cls._of(aimed(context, model, config, continuations), model, attach)

    @classmethod
    def from_text(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        text: str | ContextText,
        config: CacheGenConfig | None = None,
        profile: ProfileLike = "auto",
        *,
        prefill_chunk_tokens: int = PREFILL_CHUNK_TOKENS,
        state_every: int | None = None,
        state_budget: int = STATE_BUDGET,
        state_bits: int | None = None,
        progress: bool = False,
        attach: bool = True,
        keep_text: bool = True,
        continuations: Sequence[Tokens] = (),
    ) -> CacheGenCache:
        """Tokenize a text as `generate_text` does, and keep its exact keys and values, as `from_context` does.

        The other arguments are those of `from_context`.

        Args:
            tokenizer: the tokenizer of the model. Its hash becomes a part of the fingerprint.
            text: the text of the context; or a chat, as `ContextText(messages=...)` of `hf_cachegen.artifact`.
            keep_text: store the text, so that a question can be tokenized together with it. A cache reveals it anyway.

        Raises:
            ConfigError: the tokenizer has no chat template, or the template refuses the messages.
            CacheGenError: one of the errors of `from_context`.
        """
        source = text if isinstance(text, ContextText) else ContextText(text)
        ids = prompt_ids(tokenizer, source, answer=False)
        context = compute_context(
            model, ids, config, profile, tokenizer, prefill_chunk_tokens, progress, source if keep_text else None,
            StateOptions(state_every, state_budget, state_bits),
        )  # fmt: skip
        return cls._of(aimed(context, model, config, continuations), model, attach)

    @classmethod
    def from_cache(
        cls,
        cache: Cache,
        input_ids: ContextInputs,
        model: PreTrainedModel,
        config: CacheGenConfig | None = None,
        profile: ProfileLike = "auto",
        *, tokenizer: PreTrainedTokenizerBase | None = None, verify: Verify = "probe", attach: bool = True,
    ) -> CacheGenCache:  # fmt: skip
        """Copy a cache that `model` filled with `input_ids`; the original may grow afterwards.

        The number of tokens, the dtype and the shapes are checked. The tokens themselves are not: a cache does not
        hold them.

        Args:
            cache: the filled cache, of one row.
            input_ids: the context, as for `from_context`, of a decoder-only model.
            model: the model that filled it.
            config: options of the encoder for `save_pretrained` (default: CacheGenConfig()).
            profile: a profile, its location, "auto" or None, as for `from_context`.
            tokenizer: if given, its hash becomes a part of the fingerprint.
            verify: "probe" compares the first tokens with those that the model computes. "weights" does not: pass it
                for a cache that holds other values on purpose, such as quantised ones.
            attach: prepare the model, so that `model.generate(..., cache=cache)` works (`hf_cachegen.attach`).

        Raises:
            UnsupportedModelError: the model keeps no cache that can be reused.
            UnsupportedLayerError: a layer of the cache is of an unknown kind.
            TensorError: the cache is empty, has several rows or another number of tokens, or its sliding layers have
                dropped tokens already.
            WrongDtypeError: the cache has another dtype than the model.
            ProfileError: the profile cannot be read.
            WrongModelError: the profile is of another model.
        """
        context = wrap_cache(cache, input_ids, model, config, profile, tokenizer, verify)
        return cls._of(aimed(context, model, config), model, attach)

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
        attach: bool = True,
        **access: Any,
    ) -> CacheGenCache:
        """Load an artifact, to `device`, else each layer to its device in `model`, after checking that it fits `model`.

        Args:
            path: a folder, a repository on the Hub ("user/name") or a URL (https://, s3://, hf://, ...).
            model: the model that the cache is for.
            level: 1 (coarsest) to the number of levels (default: the finest).
            device: device of all tensors (default: the devices of the model, else the CPU).
            profile: for an artifact that needs one: a Profile, its location, None (the one beside the artifact alone)
                or "auto" (searched by its hash: docs/stores.md).
            tokenizer: if given, it must be the one of the artifact.
            progress: show a progress bar.
            limits: limits for the counts and sizes in the artifact.
            verify: "probe" also runs the first tokens through the model and compares them with what the artifact
                recorded (docs/identity.md); "weights" does not. "all" is "probe" and reads every byte of the weights
                again, for a model whose weights were written through `.data`.
            attach: prepare the model, so that `model.generate(..., cache=cache)` works (`hf_cachegen.attach`).
            access: revision, token, cache_dir, local_files_only, force_download, subfolder and repo_type as in
                Transformers, and the other fields of hf_cachegen.stores.Access.

        Raises:
            MismatchError: the artifact belongs to another model, dtype, adapter or tokenizer.
            ArtifactError: the artifact is missing, damaged or of an unsupported format.
            StoreError: its location cannot be read.
            ProfileError: its profile is missing, or the given profile is another one.
        """
        context = load_context(path, model, access, level, device, profile, tokenizer, limits, progress, verify)
        return cls._of(context, model, attach)

    @classmethod
    def stream(
        cls, path: str | os.PathLike[str], model: PreTrainedModel, *, attach: bool = True, **options: Any
    ) -> CacheGenCache:
        """Load an artifact so that the first token comes within the SLO, counted from this call, at any network speed
        (docs/streaming.md; section 5.3 of the paper). A chunk that no source delivers in time is recomputed.

        Args:
            path: A folder, a repository on the Hub or a URL, as for `from_pretrained`.
            model: The model. Every layer is loaded to its device.
            attach: Prepare the model, so that `model.generate(..., cache=cache)` works (`hf_cachegen.attach`).
            **options: The fields of `hf_cachegen.streaming.StreamOptions`: slo, level, policy, refine, prompt_tokens,
                prompt, fallback, profile, tokenizer, limits, on_event, stall_seconds, connections, link, cancel; and
                those of `hf_cachegen.stores.Access`.

        Returns:
            The cache. Its report is a StreamReport. With refine="while_generating" its `refinement` continues.

        Raises:
            ConfigError: An option is out of its range.
            StreamCancelledError: `cancel` was set.
            PromptMismatchError: `prompt` does not begin with a token of the context.
            MismatchError: The artifact belongs to another model, dtype, adapter or tokenizer.
            ArtifactError: The artifact is missing, damaged or of an unsupported format.
            StoreError: No location can be read.
            ProfileError: Its profile is missing, or the given profile is another one.
        """
        return cls._of(stream_to_context(path, model, **options), model, attach)

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        config: CacheGenConfig | None = None,
        *,
        overwrite: bool = False,
        progress: bool = False,
        model: PreTrainedModel | None = None,
    ) -> None:
        """Encode into a folder. A cache that was loaded from an artifact copies it, without encoding a second time.

        Args:
            directory: the folder; created if needed.
            config: options of the encoder (default: the ones given to `from_context`, else CacheGenConfig()).
            overwrite: replace an artifact in the folder.
            progress: show a progress bar.
            model: the model, for a config with `target_kl`.

        Raises:
            ArtifactExistsError: the folder holds an artifact, and `overwrite` is false.
            ConfigError: the cache was loaded from an artifact that `config` differs from, or that has changed since; or
                `config` has a target that is not met, or for which the model is missing.
        """
        write(
            encoded(self, config, model, progress),
            directory,
            input_ids=self.input_ids[0].tolist(),
            fingerprint=self.fingerprint.to_dict(),
            text=self.read_text(),
            tensors=[] if self.source is not None else self.named_tensors(),
            overwrite=overwrite,
        )
        if self.source is None:
            self._report = replace(self._report, encoding=Artifact(LocalStore(directory)).report)

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
        """Encode, and push the artifact with a card to a repository on the Hub in one commit.

        The repository is created if needed. A KV cache reveals its text: think before private=False.

        Args:
            repo_id: "user/name".
            config: options of the encoder, as for `save_pretrained`.
            description: what the context is, for the card.
            private: refuse a public repository.
            token: token for the Hub (default: the one logged in with).
            revision: branch (default: main); created if needed.
            subfolder: folder within the repository.
            repo_type: "dataset", "model" or "space".
            commit_message: message of the commit.
            create_pr: open a pull request instead of committing.
            with_profile: push the profile with the artifact; None to push it unless the artifact names a location on
                the Hub.

        Returns:
            The URL of the commit or the pull request.

        Raises:
            ConfigError: `private` and the repository is public; `config` does not fit, as for `save_pretrained`.
            ConflictError: this artifact was changed in the repository at the same time.
            StoreError: the Hub could not be reached, or refused.
        """
        with tempfile.TemporaryDirectory(prefix="hf_cachegen-") as folder:
            self.save_pretrained(folder, config)
            codec = Reader(LocalStore(folder)).manifest.codec
            pushed = publish_artifact(
                folder, repo_id, profile=profile_to_push(self.profile, codec, with_profile), description=description,
                private=private, token=token, revision=revision, subfolder=subfolder, repo_type=repo_type,
                commit_message=commit_message, create_pr=create_pr,
            )  # fmt: skip
        return pushed.url

    def to_dynamic(self, model: PreTrainedModel | None = None) -> DynamicCache:
        """Return a stock DynamicCache with copies of the keys and values; sliding layers keep their window.

        Of a stream it is a copy of the present state, which later refinements do not change. Of a model with recurrent
        states it holds the tokens up to the last checkpoint, `report.checkpoints[-1]`.

        Args:
            model: the model, which is needed if it has recurrent states, index keys, or layers without keys.

        Raises:
            ConfigError: the model is needed and not given, or it is an encoder-decoder model.
        """
        if self.encoder is not None:
            raise ConfigError("a context of an encoder-decoder model has no keys of its tokens: use model.generate")
        kv = self.kv if self.refinement is None else self.refinement.snapshot()[0]
        kv = kv.clone() if kv is self.kv else kv
        last = self.checkpoints.all[-1] if self.checkpoints.all else None
        tokens = kv.geometry.tokens if last is None else last.tokens
        reuse = Reuse(pads=(0,), length=tokens, whole=tokens == kv.geometry.tokens)
        if last is None and not kv.geometry.indexed and (model is None or is_plain(model.config)):
            return build_dynamic(kv, reuse, 1, [keys.device for keys in self.kv.keys])
        if model is None:
            raise ConfigError("a cache with recurrent states or index keys needs the model: call to_dynamic(model)")
        self.check(model)
        devices = layer_devices(model, len(layer_contents(model.config)))
        return build_by_config(kv, last, reuse, 1, devices, model.config)
