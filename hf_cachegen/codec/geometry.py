"""The shape of a context's KV cache: all that must be known before a byte of it is decoded.

Plain numbers without torch, so that a manifest can be checked before anything is allocated. For layer i the keys are
[batch, heads, tokens, k_dim] and the values [batch, v_heads, tokens, v_dim]. K and V differ where attention is latent
(MLA: K is the latent, V the rotated key), and where it is sparse and keeps an index key for each token, the end of V.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from hf_cachegen.errors import LimitError, ManifestError, TensorError

LayerKind = Literal["full", "sliding", "mla", "indexed"]
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
"""The dtypes that a cache may have, with bytes per element."""

MAX_LAYERS = 1 << 12
MAX_HEADS = 1 << 14
MAX_DIM = 1 << 16
MAX_TOKENS = 1 << 24
MAX_BATCH = 1 << 12
MAX_ELEMENTS = 1 << 42
"""Limits far above any real model. They keep products of untrusted counts small."""


@dataclass(frozen=True)
class LayerGeometry:
    """Heads and dims of one layer's keys and values.

    `window` is the sliding window in tokens, for kind "sliding" only. `index_dim` is the number of channels at the end
    of the values that are an index key, for kind "indexed" only; the values then are one head.

    Raises:
        TensorError: No cache has such a value.
        LimitError: A value is above its limit.
    """

    kind: LayerKind
    heads: int
    k_dim: int
    v_heads: int
    v_dim: int
    window: int | None = None
    index_dim: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in get_args(LayerKind):
            raise TensorError(f"a layer's kind must be one of {get_args(LayerKind)}, got {self.kind!r}")
        for name, ceiling in (("heads", MAX_HEADS), ("k_dim", MAX_DIM), ("v_heads", MAX_HEADS), ("v_dim", MAX_DIM)):
            _require_count(name, getattr(self, name), ceiling)
        if (self.window is not None) != (self.kind == "sliding"):
            raise TensorError(
                f"a layer has a window if and only if it is sliding, got kind {self.kind!r}, window {self.window!r}"
            )
        if self.window is not None:
            _require_count("window", self.window, MAX_TOKENS)
        if (self.index_dim is not None) != (self.kind == "indexed"):
            raise TensorError(
                f"a layer has an index key if and only if it is indexed, got kind {self.kind!r}, index_dim "
                f"{self.index_dim!r}"
            )
        if self.index_dim is not None:
            _require_count("index_dim", self.index_dim, MAX_DIM)
            if self.v_heads != 1 or self.index_dim > self.v_dim or (self.v_dim - self.index_dim) % self.heads:
                raise TensorError(
                    f"an indexed layer has one head of values: {self.heads} times some channels and the index key, got "
                    f"v_heads {self.v_heads}, v_dim {self.v_dim}, index_dim {self.index_dim}"
                )

    @property
    def k_channels(self) -> int:
        """Number of channels of the layer's keys, for one row of the batch."""
        return self.heads * self.k_dim

    @property
    def v_channels(self) -> int:
        """Number of channels of the layer's values, for one row of the batch."""
        return self.v_heads * self.v_dim

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for the manifest."""
        values = asdict(self)
        if self.index_dim is None:  # as written before there were indexed layers
            del values["index_dim"]
        return values

    @classmethod
    def from_dict(cls, values: Any) -> LayerGeometry:
        """Read the result of `to_dict` from untrusted JSON. Unknown keys are ignored. Raises ManifestError, LimitError.
        """
        names = ("kind", "heads", "k_dim", "v_heads", "v_dim")
        fields = _require_fields("a layer of the geometry", values, names)
        try:
            return cls(**fields, window=values.get("window"), index_dim=values.get("index_dim"))
        except TensorError as error:
            raise ManifestError(f"geometry: {error}") from error


@dataclass(frozen=True)
class Geometry:
    """The geometry of all layers that hold keys and values, the number of tokens, the batch size, and the name of the
    dtype ("bfloat16"). A model that keeps states alone has no such layer.

    Raises:
        TensorError: No cache has such a value.
        LimitError: A value is above its limit.
    """

    layers: tuple[LayerGeometry, ...]
    tokens: int
    batch: int
    dtype: str

    def __post_init__(self) -> None:
        if not isinstance(self.layers, tuple) or not all(isinstance(layer, LayerGeometry) for layer in self.layers):
            raise TensorError("layers must be a tuple of LayerGeometry")
        if len(self.layers) > MAX_LAYERS:
            raise LimitError(f"number of layers must be at most {MAX_LAYERS}, got {len(self.layers)}")
        _require_count("tokens", self.tokens, MAX_TOKENS)
        _require_count("batch", self.batch, MAX_BATCH)
        if not isinstance(self.dtype, str) or self.dtype not in DTYPE_BYTES:
            raise TensorError(f"dtype must be one of {sorted(DTYPE_BYTES)}, got {self.dtype!r}")
        if self.elements > MAX_ELEMENTS:
            raise LimitError(f"a cache may have at most {MAX_ELEMENTS} elements, this geometry has {self.elements}")

    @property
    def channels(self) -> int:
        """Number of channels of all layers' keys and values, for all rows of the batch."""
        return self.batch * sum(layer.k_channels + layer.v_channels for layer in self.layers)

    @property
    def indexed(self) -> bool:
        """Whether a layer keeps index keys."""
        return any(layer.kind == "indexed" for layer in self.layers)

    @property
    def elements(self) -> int:
        """Number of elements of all keys and values."""
        return self.tokens * self.channels

    @property
    def nbytes(self) -> int:
        """Bytes of the exact cache."""
        return self.elements * DTYPE_BYTES[self.dtype]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for the manifest."""
        return {**asdict(self), "layers": [layer.to_dict() for layer in self.layers]}

    @classmethod
    def from_dict(cls, values: Any) -> Geometry:
        """Read the result of `to_dict` from untrusted JSON. Unknown keys are ignored. Raises ManifestError, LimitError.
        """
        fields = _require_fields("geometry", values, ("layers", "tokens", "batch", "dtype"))
        if not isinstance(fields["layers"], list):
            raise ManifestError(f"geometry: layers must be a list, got {type(fields['layers']).__name__}")
        if len(fields["layers"]) > MAX_LAYERS:
            raise LimitError(f"geometry: at most {MAX_LAYERS} layers are allowed, got {len(fields['layers'])}")
        layers = tuple(LayerGeometry.from_dict(layer) for layer in fields.pop("layers"))
        try:
            return cls(layers=layers, **fields)
        except TensorError as error:
            raise ManifestError(f"geometry: {error}") from error


def _require_count(name: str, value: Any, ceiling: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise TensorError(f"{name} must be an integer of at least 1, got {value!r:.80}")
    if value > ceiling:
        raise LimitError(f"{name} must be at most {ceiling}, got a larger number")


def _require_fields(where: str, values: Any, names: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ManifestError(f"{where} must be an object, got {type(values).__name__}")
    missing = [name for name in names if name not in values]
    if missing:
        raise ManifestError(f"{where} lacks {missing}")
    return {name: values[name] for name in names}
