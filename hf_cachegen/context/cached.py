"""The KV cache of one context, with its fingerprint: what `generate` starts from.

`CacheGenCache` adds the interface for users.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hf_cachegen.artifact import ContextText, Reader, Store, read_text
from hf_cachegen.artifact.tensors import NamedTensor
from hf_cachegen.codec.predictor import Known
from hf_cachegen.config import CacheGenConfig
from hf_cachegen.errors import CorruptError, TensorError
from hf_cachegen.models.encoder_decoder import (
    EncoderState,
    require_decoder,
    require_encoder_decoder,
)
from hf_cachegen.models.fingerprint import Fingerprint
from hf_cachegen.models.identity import Verify
from hf_cachegen.models.layers import KVTensors
from hf_cachegen.models.opening import check_states, check_tokens
from hf_cachegen.models.recurrent import Checkpoints
from hf_cachegen.models.requirements import (
    require_geometry,
    require_instance,
    require_model,
)
from hf_cachegen.profiles.files import Profile
from hf_cachegen.report import CacheReport
from hf_cachegen.streaming import Refinement

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
        require_instance(model)
        if model.config.is_encoder_decoder:
            require_encoder_decoder(model)
            identity = self.fingerprint.check(model, tokenizer)
            require_decoder(model, self.kv.geometry, self.encoder)
        else:
            require_model(model)
            identity = self.fingerprint.check(model, tokenizer)
            require_geometry(model.config, self.kv.geometry)
            check_tokens(self.fingerprint, model, self.input_ids)
            check_states(self.checkpoints, model)
        if self.verify != "weights":
            self.fingerprint.check_probe(model, self.input_ids[0].tolist(), identity)

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


def report_of(kv: KVTensors, checkpoints: Checkpoints, **values: Any) -> CacheReport:
    """Return the report of a context. A stock cache would hold the keys and values, and the states once."""
    once = checkpoints.all[-1].nbytes if checkpoints.all else 0
    return CacheReport(
        kv.geometry.tokens, kv.geometry.nbytes + once, checkpoints=checkpoints.tokens, state_bytes=checkpoints.nbytes,
        **values,
    )  # fmt: skip
