"""What a cache belongs to: a cache reused with anything else gives fluent, wrong answers, so it is checked before
every use.

A Fingerprint holds the model's configuration field by field (rope included), checksums of every weight and adapter, a
summary of the buffers that are computed, hashes of the tokenizer and of the tokens, the dtype, and what the model
computes for the first tokens (`models.probe`). Names and revisions are kept for messages only: the same weights in
another folder are the same model.

Artifacts of earlier releases have hashes of a few values of every weight instead of its checksum, and names of adapters
instead of theirs. They are compared as far as they go, and a warning says once what is missing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import transformers
from torch import Tensor

from hf_cachegen.errors import (
    ManifestError,
    WrongDtypeError,
    WrongModelError,
    WrongTokenizerError,
    WrongWeightsError,
)
from hf_cachegen.models import probe
from hf_cachegen.models.buffers import MAX_BUFFERS, wrong_buffers
from hf_cachegen.models.identity import ModelIdentity, identify
from hf_cachegen.models.kinds import holds_states
from hf_cachegen.models.layers import KVTensors, dtype_name
from hf_cachegen.models.media import Medium, media_from_list, outside
from hf_cachegen.models.requirements import positions_change, require_tokenizer
from hf_cachegen.models.sampled_weights import sampled_weights

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

VOLATILE = frozenset(
    [
        "_name_or_path",
        "_commit_hash",
        "gguf_file",
        "quantization_status",
        "_attn_implementation",
        "_experts_implementation",
        "transformers_version",
        "dtype",
        "torch_dtype",
        "use_cache",
        "architectures",
        "auto_map",
        "id2label",
        "label2id",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
        "gradient_checkpointing",
        "chunk_size_feed_forward",
        "problem_type",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "sep_token_id",
    ]
)
"""Configuration keys that change no key or value. (The dtype is compared by itself.)"""
MAX_FIELD = 160
"""Characters of a configuration value kept as text; a longer one is kept by its hash."""
MAX_CONFIG_FIELDS = 4096
PROBE_TEXT = (
    "The quick brown fox: 12,345.67 \u00e9\u00df\u6f22\u5b57\n\n\tdef f(x):  return x_1 != 'y'  \U0001f600 </s> <|eot|>"
)
"""Letters, digits, punctuation, white space, several scripts and marks that look special: where tokenizers differ."""
LATER_FIELDS = {
    "checksum": "checksums of all weights",
    "buffers": "computed buffers, such as rotary frequencies",
    "adapter_checksums": "settings and weights of adapters",
    "probe": "what the model computes for the first tokens",
}
"""Fields that artifacts of earlier releases lack, and what they are."""
LOG = logging.getLogger("hf_cachegen.models.fingerprint")


@dataclass(frozen=True)
class Fingerprint:
    """`of` makes one, `check` compares one with a model at hand.

    weights: a hash of a few values of every weight, for readers that know no checksum. adapters: names of the active
    ones, for messages and for the same readers. checksum, buffers, adapter_checksums and probe are None in artifacts of
    earlier releases, and the probe also where there are no keys and values yet. media: pictures, videos and audio of
    the context, in the order of their tokens.
    """

    model_id: str
    commit: str | None
    config: dict[str, str]
    weights: str
    dtype: str
    adapters: tuple[str, ...]
    tokens: str
    tokenizer: str | None
    transformers: str
    checksum: str | None = None
    buffers: dict[str, str] | None = None
    adapter_checksums: tuple[str, ...] | None = None
    probe: str | None = None
    media: tuple[Medium, ...] = ()

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        input_ids: Sequence[int],
        tokenizer: PreTrainedTokenizerBase | None = None,
        kv: KVTensors | None = None,
        *,
        own: bool = False,
        media: Sequence[Medium] = (),
    ) -> Fingerprint:
        """The fingerprint of `model` (and of the tokenizer, where given) and a context's token ids.

        kv: the keys and values of the context, of which a probe is recorded; own: `model`, as it is now, computed them,
        so that they need not be compared with it; media: those of the context.
        Raises UnsupportedModelError for a weight or an adapter that cannot be identified.
        """
        identity = identify(model)
        return cls(
            model_id=str(getattr(model.config, "_name_or_path", "")),
            commit=getattr(model.config, "_commit_hash", None),
            config=_config(model.config),
            weights=sampled_weights(model),
            dtype=dtype_name(model.dtype),
            adapters=identity.adapter_names,
            tokens=hash_tokens(input_ids),
            tokenizer=None if tokenizer is None else _tokenizer(tokenizer),
            transformers=transformers.__version__,
            checksum=identity.checksum,
            buffers=identity.buffers,
            adapter_checksums=identity.adapters,
            probe=None if kv is None else _probe_of(model, input_ids, kv, own, media),
            media=tuple(media),
        )

    def check_probe(
        self, model: PreTrainedModel, input_ids: Sequence[int], identity: ModelIdentity | None = None
    ) -> None:
        """Compare what `model` computes for the first tokens with the probe; nothing happens where it was compared and
        the model has not changed, or there is none. `identity`: of the model, if it was just found. Raises
        WrongWeightsError.
        """
        identity = identity or identify(model)
        if self.probe is not None and self.probe not in identity.probed:
            probe.check(model, outside(input_ids, self.media), self.probe, self.dtype)
            # The first forward pass may have changed how weights are stored.
            for known in (identity, identify(model)):
                known.probed.add(self.probe)

    def check(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> ModelIdentity:
        """Raises WrongModelError, WrongDtypeError, WrongWeightsError or WrongTokenizerError if the cache is not this
        model's, else returns the identity of the model. The tokenizer is compared where both sides have one.
        """
        self.check_config(model)
        if (dtype := dtype_name(model.dtype)) != self.dtype:
            raise WrongDtypeError(
                f"the cache was made in {self.dtype}, {self._name(model)} runs in {dtype}: load the model with "
                f"dtype={self.dtype!r}, or make the cache again"
            )
        identity = identify(model)
        self._check_weights(model, identity)
        if tokenizer is not None and self.tokenizer is not None and _tokenizer(tokenizer) != self.tokenizer:
            raise WrongTokenizerError(
                f"the cache was made with another tokenizer or chat template than {tokenizer.name_or_path!r}: its "
                "tokens may not be those of the same text"
            )
        return identity

    def _check_weights(self, model: PreTrainedModel, identity: ModelIdentity) -> None:
        if self.checksum is None:
            missing = (text for name, text in LATER_FIELDS.items() if getattr(self, name) is None)
            _warn_once(self.model_id, tuple(missing))
        adapters = identity.adapter_names
        alike = self.adapters == adapters if self.adapter_checksums is None else (
            self.adapter_checksums == identity.adapters
        )  # fmt: skip
        if not alike:
            same_names = " with other weights or settings (scaling, rank)" if adapters == self.adapters else ""
            raise WrongWeightsError(
                f"the cache was made with adapters {list(self.adapters)}, {self._name(model)} has {list(adapters)}"
                f"{same_names}"
            )
        if (sampled_weights(model) != self.weights) if self.checksum is None else (identity.checksum != self.checksum):
            raise WrongWeightsError(
                f"the cache was made by {self.model_id or 'a model'!r} (revision {self.commit}); {self._name(model)} "
                "has the same configuration but other weights"
            )
        if wrong := [] if self.buffers is None else wrong_buffers(self.buffers, identity.buffers):
            raise WrongWeightsError(
                f"the cache was made with other values of the buffers {wrong[:4]} than {self._name(model)} has: they "
                "were edited, or rounded by a cast of the model (load it with dtype= instead)"
            )

    def check_config(self, model: PreTrainedModel) -> None:
        """Raises WrongModelError if the model is configured otherwise."""
        # Another release writes other defaults into a configuration; what both have must agree.
        self._compare(model.config, self._name(model), shared=self.transformers != transformers.__version__)

    def check_saved_config(self, config: PreTrainedConfig) -> None:
        """Raises WrongModelError if a model with this configuration is another one. What both have must agree: making
        the model may complete it.
        """
        name = getattr(config, "_name_or_path", "") or "unnamed"
        self._compare(config, f"the model of type {config.model_type} ({name})", shared=True)

    def _compare(self, config: PreTrainedConfig, what: str, *, shared: bool) -> None:
        expected, got = self.config, _config(config)
        if expected == got:
            return
        names = set(expected) & set(got) if shared else set(expected) | set(got)
        wrong = sorted(name for name in names if expected.get(name) != got.get(name))
        if wrong:
            shown = "; ".join(f"{name}: expected {expected.get(name)}, got {got.get(name)}" for name in wrong[:4])
            more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
            raise WrongModelError(
                f"the cache was made by {self.model_id or 'a model'!r}; {what} is configured otherwise: {shown}{more}"
            )

    @staticmethod
    def _name(model: PreTrainedModel) -> str:
        return f"this {type(model).__name__} ({getattr(model.config, '_name_or_path', '') or 'unnamed'})"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the manifest."""
        found = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        if not self.media:
            del found["media"]
        return {name: value for name, value in found.items() if value is not None or name not in LATER_FIELDS}

    @classmethod
    def from_dict(cls, values: Any) -> Fingerprint:
        """The inverse of `to_dict`, for untrusted JSON; unknown keys are ignored. Raises ManifestError."""
        if not isinstance(values, dict):
            raise ManifestError(f"fingerprint must be an object, got {type(values).__name__}")
        known: dict[str, Any] = {field.name: values.get(field.name) for field in fields(cls)}
        texts = [known[name] for name in ("model_id", "weights", "dtype", "tokens", "transformers")]
        optional = [
            known[name] for name in ("commit", "tokenizer", "checksum", "probe") if known[name] is not None
        ]  # fmt: skip
        config, adapters = known["config"], known["adapters"]
        if not isinstance(config, dict) or not isinstance(adapters, list) or len(config) > MAX_CONFIG_FIELDS:
            raise ManifestError("fingerprint: config must be an object and adapters a list, of ordinary size")
        buffers, checksums = known["buffers"], known["adapter_checksums"]
        if not isinstance(buffers, dict | None) or not isinstance(checksums, list | None):
            raise ManifestError("fingerprint: buffers must be an object and adapter_checksums a list")
        if len(buffers or {}) > MAX_BUFFERS or len(checksums or []) > MAX_CONFIG_FIELDS:
            raise ManifestError("fingerprint: more buffers or adapters than a model has")
        texts += [*optional, *config.values(), *adapters, *(buffers or {}).values(), *(checksums or [])]
        if not all(isinstance(text, str) for text in texts):
            raise ManifestError("fingerprint: a value that must be text is not")
        return cls(**{
            **known,
            "adapters": tuple(adapters),
            "adapter_checksums": None if checksums is None else tuple(checksums),
            "media": media_from_list(known["media"]),
        })  # fmt: skip


def _probe_of(
    model: PreTrainedModel, input_ids: Sequence[int], kv: KVTensors, own: bool, media: Sequence[Medium]
) -> str | None:
    if media or model.config.is_encoder_decoder:
        # The first tokens are often a picture. So a probe is of the text alone, which a loader has without its media.
        # An encoder reads in both directions: its first tokens alone have other keys.
        input_ids = outside(input_ids, media)
        if not input_ids:
            return None
        recorded = probe.record(*probe.run(model, input_ids))
        identify(model).probed.add(recorded)
        return recorded
    pair: tuple[Sequence[Tensor], Sequence[Tensor]] = kv.keys, kv.values
    if positions_change(model.config, min(probe.PROBE_TOKENS, kv.geometry.tokens), kv.geometry.tokens):
        # The first tokens of a longer context are rotated otherwise than those tokens alone.
        pair, own = probe.run(model, input_ids), True
    elif holds_states(model.config):
        # A filled cache no longer has the states after its first tokens.
        keys, values = probe.run(model, input_ids)
        pair = [*kv.keys, *keys[len(kv.keys) :]], [*kv.values, *values[len(kv.values) :]]
    recorded = probe.record(*pair)
    if own:
        identify(model).probed.add(recorded)
    return recorded


@lru_cache(maxsize=64)
def _warn_once(model_id: str, missing: tuple[str, ...]) -> None:
    LOG.warning(
        "a cache of %r does not record %s, as caches of earlier releases do not: a difference there goes unseen. Make "
        "the cache again to have it compared.", model_id or "a model", ", ".join(missing),
    )  # fmt: skip


def hash_tokens(input_ids: Sequence[int]) -> str:
    """SHA-256 of token ids as little-endian 64-bit integers."""
    return hashlib.sha256(struct.pack(f"<{len(input_ids)}q", *input_ids)).hexdigest()


def _config(config: PreTrainedConfig) -> dict[str, str]:
    return {name: _text(value) for name, value in _stable(config.to_dict()).items()}


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _stable(inner) for name, inner in value.items() if str(name) not in VOLATILE}
    if isinstance(value, (list, tuple)):
        return [_stable(inner) for inner in value]
    return value


def _text(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return text if len(text) <= MAX_FIELD else "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def _tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the vocabulary, the special tokens, the chat template and how PROBE_TEXT is split."""
    require_tokenizer(tokenizer)
    parts = [
        sorted(tokenizer.get_vocab().items()),
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        getattr(tokenizer, "chat_template", None),
        tokenizer(PROBE_TEXT)["input_ids"],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
