"""CacheGenCache: the KV cache of one context, made once, saved small, used by many generations.

It is read-only. A stock cache grows while a model generates, so a second use of it starts from another text. Here every
generation gets a stock cache of its own. Making a CacheGenCache prepares its model, so that the stock call
`model.generate(..., cache=cache)` does so (`hf_cachegen.attach`).
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from hf_cachegen.artifact import Limits, Reader
from hf_cachegen.artifact.artifact import Artifact, write
from hf_cachegen.artifact.encoded import EncodedContext
from hf_cachegen.codec.context import Encoder
from hf_cachegen.config import CacheGenConfig
from hf_cachegen.context import CachedContext, compute_context, load_context, stream_to_context, wrap_cache
from hf_cachegen.errors import ConfigError, ReadOnlyCacheError
from hf_cachegen.generation import attach as attach_to
from hf_cachegen.models.identity import Verify
from hf_cachegen.models.layers import build_dynamic
from hf_cachegen.models.opening import Tokens
from hf_cachegen.models.prefix import Reuse
from hf_cachegen.profiles.finding import ProfileLike, profile_of, profile_to_push
from hf_cachegen.stores import LocalStore
from hf_cachegen.stores.publishing import publish_artifact

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PREFILL_CHUNK_TOKENS = 4096
"""Tokens per forward pass of a prefill: bounds the memory of activations, at full speed on any device."""


def _refuse(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
    raise ReadOnlyCacheError(
        "a CacheGenCache is read-only, since many generations share it, and this model was not prepared for one: call "
        "hf_cachegen.attach(model) and then model.generate(..., cache=cache), or take a copy with cache.to_dynamic()"
    )


class _ReadOnlyLayer(DynamicLayer):
    """A filled layer that refuses to change; the cache's own methods all go through those of its layers."""

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        super().lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    lazy_initialization = update = crop = reset = reorder_cache = offload = prefetch = _refuse
    batch_repeat_interleave = batch_select_indices = _refuse


class CacheGenCache(CachedContext, DynamicCache):
    """The KV cache of one context of one model.

    Make one by `from_context`, `from_cache`, `from_pretrained` or `stream`. The attributes are those of
    `CachedContext`: kv, input_ids, fingerprint, config, profile, source, refinement.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        DynamicCache.__init__(self)
        CachedContext.__init__(self, *args, **kwargs)
        self.layers = [_ReadOnlyLayer(*pair) for pair in zip(self.kv.keys, self.kv.values, strict=True)]

    update = early_initialization = update_conv_state = update_recurrent_state = _refuse
    # The first thing that a forward pass asks for: some prompts would fail, less clearly, before they come to update.
    get_mask_sizes = _refuse

    def __repr__(self) -> str:
        geometry = self.kv.geometry
        return f"CacheGenCache({geometry.tokens} tokens, {len(geometry.layers)} layers, {geometry.dtype})"

    @classmethod
    def _of(cls, context: CachedContext, model: PreTrainedModel | None, attach: bool) -> CacheGenCache:
        """Return the cache of `context`; prepare its model where that is asked for."""
        if attach and model is not None:
            attach_to(model)
        return cls(**context.parts())

    @classmethod
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
        attach: bool = True,
    ) -> CacheGenCache:
        """Run a model, in evaluation mode, over a context and keep its exact keys and values.

        Args:
            model: the model; wrappers of torch.compile, PEFT and accelerate are looked through.
            input_ids: the context, [tokens] or [1, tokens].
            config: how `save_pretrained` encodes it (default: CacheGenConfig()).
            profile: the profile of the model, its location (a path, a repository, a URL), "auto" (the one in the
                model's folder or repository, if there is one: docs/stores.md) or None.
            tokenizer: if given, its hash becomes a part of the fingerprint.
            prefill_chunk_tokens: tokens per forward pass.
            progress: show a progress bar.
            attach: prepare the model, so that `model.generate(..., cache=cache)` works (`hf_cachegen.attach`).

        Raises:
            UnsupportedModelError: the model keeps no cache that can be reused, or the context exceeds its positions.
            UnsupportedLayerError: a layer of its cache is of an unknown kind.
            TensorError: input_ids are no context.
            WrongDtypeError: the cache has another dtype than the model.
            ProfileError: the profile cannot be read.
            WrongModelError: the profile is another model's.
        """
        context = compute_context(model, input_ids, config, profile, tokenizer, prefill_chunk_tokens, progress)
        return cls._of(context, model, attach)

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
        attach: bool = True,
    ) -> CacheGenCache:
        """Copy a cache that `model` filled with `input_ids`; the original may go on growing.

        That the tokens are those of the cache cannot be seen from it; their number, dtype and shapes are checked.
        Other arguments and errors are those of `from_context`.
        """
        return cls._of(wrap_cache(cache, input_ids, model, config, profile, tokenizer), model, attach)

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
        """Load an artifact, each layer to its device of `model`, else to `device`.

        With a model, fingerprint and geometry are checked before anything is decoded; `generate` checks again.

        Args:
            path: a folder, a repository on the Hub ("user/name") or a URL (https://, s3://, hf://, ...).
            model: the model that the cache is for.
            level: 1 (coarsest) to the number of levels (default: the finest).
            device: where the tensors go without a model.
            profile: for an artifact that needs one: a Profile, its location, None (the one beside the artifact alone)
                or "auto": the right one, wherever it is found (docs/stores.md).
            tokenizer: if given, it must be the one of the artifact.
            progress: show a progress bar.
            limits: how large an artifact may claim to be.
            verify: "probe" also runs the first tokens through the model and compares them with what the artifact
                recorded (docs/identity.md); "weights" does not.
            attach: prepare the model, as `from_context` does.
            access: revision, token, cache_dir, local_files_only, force_download, subfolder and repo_type as in
                Transformers, and the other fields of hf_cachegen.stores.Access.

        Raises:
            MismatchError: the artifact belongs to another model, dtype, adapter or tokenizer.
            ArtifactError: it is missing, damaged or of an unsupported format.
            StoreError: its location cannot be read.
            ProfileError: its profile is missing or another one.
        """
        context = load_context(path, model, access, level, device, profile, tokenizer, limits, progress, verify)
        return cls._of(context, model, attach)

    @classmethod
    def stream(
        cls, path: str | os.PathLike[str], model: PreTrainedModel, *, attach: bool = True, **options: Any
    ) -> CacheGenCache:
        """Load an artifact so that the first token comes within the SLO, counted from this call, whatever the network
        does (docs/streaming.md; section 5.3 of the paper). A chunk that no source gives is recomputed.

        Args:
            path: A folder, a repository on the Hub or a URL, as for `from_pretrained`.
            model: The model. Every layer goes to its device.
            **options: The fields of `hf_cachegen.streaming.StreamOptions`: slo, level, policy, refine, prompt_tokens,
                prompt, fallback, profile, tokenizer, limits, on_event, stall_seconds, connections, link, cancel; and
                those of `hf_cachegen.stores.Access`.

        Returns:
            The cache. Its report is a StreamReport. With refine="while_generating" its `refinement` goes on.

        Raises:
            ConfigError: An option is out of its range.
            StreamCancelledError: `cancel` was set.
            PromptMismatchError: `prompt` has nothing of the context.
            MismatchError, ArtifactError, StoreError, ProfileError: As for `from_pretrained`.
        """
        return cls._of(stream_to_context(path, model, **options), model, attach)

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
        if self.source is not None:
            if config is not None and config != self.config:
                raise ConfigError(f"this cache was decoded from {self.source}; encoding it anew would lose twice")
            # What was recomputed throughout has taken no profile.
            artifact = Artifact(self.source)
            if (artifact.fingerprint, artifact.config) != (self.fingerprint.to_dict(), self.config):
                raise ConfigError(f"{self.source} is no longer the artifact that this cache was loaded from")
            taken = profile_of(artifact, "auto" if self.profile is None else self.profile)
            source = artifact.with_profile(taken).read()
        else:
            layers = list(self.kv.geometry.layers)
            kv, config = self.kv, config or self.config
            source = Encoder(kv.keys, kv.values, config, self.profile, layers=layers, progress=progress)
        write(
            source,
            directory,
            input_ids=self.input_ids[0].tolist(),
            fingerprint=self.fingerprint.to_dict(),
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
        """Encode as `save_pretrained` does and put the artifact, with a card, into a repository on the Hub, in one
        commit; the repository is made if need be. Returns the URL of the commit.

        description: what the context is, for the card. A KV cache reveals its text: think before private=False.
        with_profile: whether the profile that reading takes goes along; None: unless it was loaded from the Hub or
        pushed there, and the artifact says where.
        Raises ConfigError, ConflictError and other StoreErrors.
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

    def to_dynamic(self) -> DynamicCache:
        """A stock DynamicCache with copies of the keys and values, to do with as you like (sliding layers keep their
        window). Of a stream, what has come by now; refinements that come later do not reach the copy.
        """
        reuse = Reuse(pads=(0,), columns=self.kv.geometry.tokens, whole=True)
        kv = self.kv if self.refinement is None else self.refinement.snapshot()[0]
        return build_dynamic(kv.clone() if kv is self.kv else kv, reuse, 1, [keys.device for keys in self.kv.keys])
