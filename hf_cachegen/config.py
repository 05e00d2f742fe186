"""The options of the encoder: one frozen object, checked when it is created."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from hf_cachegen.errors import ConfigError

TransformName = Literal["auto", "delta", "identity", "klt"]
"""The transforms that come with the package (`hf_cachegen.codec.transforms`), and the choice among them."""
_transform_names: set[str] = set(get_args(TransformName))
CoderName = Literal["rans", "torchac"]
MAX_STEP_OFFSET = 64
"""Largest change of a profile's step: by a factor of 2^16."""
MIN_PROBE_PASSES = 128
"""Half of them draw continuations, and the rest has to try some steps."""
MAX_CHUNK_TOKENS = 1 << 15
"""Largest chunk in tokens: keeps the counts of tokens and channels within the stream's 32-bit positions."""
AUTO_LAYERS = "auto"
"""`predict_layers` that is chosen for each context."""
MAX_PREDICT_LAYERS = 1 << 12
"""Largest value of `predict_layers`, above the number of layers of any model."""


@dataclass(frozen=True)
class CacheGenConfig:
    """The encoder's options. The defaults are the paper's where it gives one (CacheGen, SIGCOMM 2024, section 5).

    Attributes:
        transform: "delta" (the paper's: groups of tokens, anchors, differences to the decoded anchor), "identity"
            (values less their channel's mean), "klt" (coefficients in the basis of the model's Profile, with its steps
            and tables; needs one), "auto" (klt where there is a profile, else the smaller of the others), or the name
            of a transform that `hf_cachegen.codec.transforms.register` added.
        lossless: code the exact bytes of bf16, fp16 or fp32 values; gives one level.
        levels: number of nested levels in the artifact, 1 to 3; level 1 is the coarsest, `levels` the finest.
        steps: step of the finest-but-one level in units of the channel's standard deviation, for the first, middle and
            last third of the layers (paper: 0.5, 1, 1.5; the finest level is three times finer).
        chunk_tokens: tokens per chunk, the unit of fetching and decoding.
        group_tokens: tokens per group of the delta transform, its anchor included (paper: 10).
        protect_first: tokens at the beginning of the context that every level has at the finest step.
        protect_last: tokens at the end of the context that every level has at the finest step.
        coder: "rans", or "torchac" (the paper's arithmetic coder; needs the extra of that name).
        prob_bits: precision of the coder's probabilities, 10 to 12 bits.
        predict_layers: layers that a loader computes from the tokens, so that only the difference to a prediction is
            stored (klt; needs a profile with such a predictor, and the model to decode): 0 takes the embedding, where
            the profile has a predictor for it; None predicts nothing; "auto" takes what the profile offers with the
            earliest first token over a link of `bandwidth_gbps` (docs/predictor.md).
        bandwidth_gbps: throughput in Gbit/s of the link that loaders will have, for predict_layers="auto".
        prefill_tokens_per_second: the model's speed on a loader's machine, for predict_layers="auto". None: as measured
            when the context is computed here.
        measure: measure the relative error of each layer at each level for the report. klt computes it from the
            coefficients; the others decode while encoding.
        step_offset: quarter octaves that are added to the step of the profile (klt): 4 doubles it, -4 halves it.
        target_kl: divergence of the finest level from the exact cache, in nats per token. The largest step within it is
            found with the model, for each context (`CacheGenCache.from_context`). None keeps the given step.
        probe_passes: largest number of forward passes, of one to some tokens each, for `target_kl`.

    Raises:
        ConfigError: a value has another type, or is out of its range.
    """

    transform: str = "auto"
    lossless: bool = False
    levels: int = 3
    steps: tuple[float, float, float] = (0.5, 1.0, 1.5)
    chunk_tokens: int = 512
    group_tokens: int = 10
    protect_first: int = 4
    protect_last: int = 16
    coder: CoderName = "rans"
    prob_bits: int = 11
    predict_layers: int | Literal["auto"] | None = 0
    measure: bool = True
    step_offset: int = 0
    target_kl: float | None = None
    probe_passes: int = 256
    bandwidth_gbps: float | None = None
    prefill_tokens_per_second: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.transform, str) or self.transform not in _transform_names:
            raise ConfigError(f"transform must be one of {tuple(sorted(_transform_names))}, got {self.transform!r}")
        if self.coder not in ("rans", "torchac"):
            raise ConfigError(f"coder must be 'rans' or 'torchac', got {self.coder!r}")
        if not isinstance(self.steps, tuple) or len(self.steps) != 3 or not all(map(_is_step, self.steps)):
            raise ConfigError(f"steps must be three numbers from 0.001 to 100, got {self.steps!r}")
        self._require_range("levels", 1, 3)
        self._require_range("chunk_tokens", 1, MAX_CHUNK_TOKENS)
        self._require_range("group_tokens", 2, 1024)
        self._require_range("protect_first", 0, MAX_CHUNK_TOKENS)
        self._require_range("protect_last", 0, MAX_CHUNK_TOKENS)
        self._require_range("prob_bits", 10, 12)
        self._require_range("step_offset", -MAX_STEP_OFFSET, MAX_STEP_OFFSET)
        self._require_range("probe_passes", MIN_PROBE_PASSES, 1 << 20)
        self._require_link()
        if self.predict_layers is not None and self.predict_layers != AUTO_LAYERS:
            self._require_range("predict_layers", 0, MAX_PREDICT_LAYERS)
        for name in ("lossless", "measure"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.lossless and self.transform not in ("auto", "identity"):
            raise ConfigError(f"lossless=True codes the values themselves, without transform={self.transform!r}")
        if self.step_offset and (self.lossless or self.transform in ("delta", "identity")):
            raise ConfigError("step_offset changes the step of a profile (klt): use steps= for another transform")
        if self.target_kl is not None and not _is_target(self.target_kl):
            raise ConfigError(f"target_kl must be a number from 1e-6 to 10 nats per token, got {self.target_kl!r}")
        if self.target_kl is not None and self.lossless:
            raise ConfigError("target_kl chooses a step, and lossless=True has none: leave out one of them")

    def _require_link(self) -> None:
        """Check what predict_layers="auto" needs."""
        for name in ("bandwidth_gbps", "prefill_tokens_per_second"):
            value = getattr(self, name)
            if value is not None and not _is_speed(value):
                raise ConfigError(f"{name} must be a finite number above 0, got {value!r}")
            if value is not None and self.predict_layers != AUTO_LAYERS:
                raise ConfigError(f"{name} is for predict_layers='auto': set it, or leave out {name}")
        if self.predict_layers == AUTO_LAYERS and self.bandwidth_gbps is None:
            raise ConfigError("predict_layers='auto' needs bandwidth_gbps, the throughput of the link in Gbit/s")

    @property
    def predicted(self) -> int | None:
        """`predict_layers` once it is chosen. Raises ConfigError for "auto"."""
        if self.predict_layers == "auto":
            raise ConfigError(
                "predict_layers='auto' is chosen for a context while it is computed: pass this config to "
                "CacheGenCache.from_context, or give a number of layers"
            )
        return self.predict_layers

    def predicting(self, layer: int | None) -> CacheGenConfig:
        """Return these options with this choice of `predict_layers`."""
        return replace(self, predict_layers=layer, bandwidth_gbps=None, prefill_tokens_per_second=None)

    def _require_range(self, name: str, low: int, high: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ConfigError(f"{name} must be a whole number from {low} to {high}, got {value!r}")

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain values, for the manifest. Later options are left out where they have no effect:
        earlier readers refuse options that they do not know.
        """
        found = {**asdict(self), "steps": list(self.steps)}
        idle = ["step_offset"] * (self.step_offset == 0) + ["target_kl", "probe_passes"] * (self.target_kl is None)
        idle += ["predict_layers"] * (self.predict_layers is None)
        idle += ["bandwidth_gbps"] * (self.bandwidth_gbps is None)
        idle += ["prefill_tokens_per_second"] * (self.prefill_tokens_per_second is None)
        return {name: value for name, value in found.items() if name not in idle}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CacheGenConfig:
        """Build the options from the result of `to_dict`. Raises ConfigError for an unknown name or a wrong value."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ConfigError(f"expected options out of {sorted(f.name for f in fields(cls))}, got {unknown}")
        listed = isinstance(values.get("steps"), list)
        found = cls(**{"predict_layers": None, **values, **({"steps": tuple(values["steps"])} if listed else {})})
        if found.predict_layers == AUTO_LAYERS:
            raise ConfigError("predict_layers must be a number or null in an artifact, got 'auto'")
        return found


def require_config(config: Any) -> None:
    """Raise ConfigError for something else than a CacheGenConfig or None, such as a profile in its position."""
    if config is not None and not isinstance(config, CacheGenConfig):
        raise ConfigError(f"expected a CacheGenConfig or None as config, got {type(config).__name__}")


def add_transform_name(name: str) -> None:
    """Let configurations name this transform; `hf_cachegen.codec.transforms.register` calls this."""
    _transform_names.add(name)


def remove_transform_name(name: str) -> None:
    """Undo `add_transform_name`."""
    _transform_names.discard(name)


def _is_step(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0.001 <= value <= 100


def _is_speed(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _is_target(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 1e-6 <= value <= 10
