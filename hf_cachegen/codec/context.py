"""Convert a context's tensors to side information and the parts of its chunks, and back, one chunk in memory at a time.

Keys and values are per-layer lists of [batch, heads, tokens, head_dim]. An `Encoder` yields the bytes of one chunk
after the other. `decode_chunks` takes them in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from hf_cachegen.codec.chunk import Span
from hf_cachegen.codec.geometry import Geometry, LayerGeometry
from hf_cachegen.codec.predictor import Known
from hf_cachegen.codec.profile import Profile
from hf_cachegen.codec.rows import ContextRows, empty_kv, geometry_of, spans_of
from hf_cachegen.codec.spread import Destination
from hf_cachegen.codec.transforms import Transform, transform_of
from hf_cachegen.codec.transforms.choosing import resolved
from hf_cachegen.config import CacheGenConfig, require_config
from hf_cachegen.errors import ConfigError, CorruptError, LevelError, TruncatedError


class Encoder:
    """Encode one context: check and measure it in the constructor, then yield its chunks one by one.

    Args:
        keys: Of layer i [batch, heads, tokens, k_dim]; all bfloat16, all float16 or all float32, on any devices.
        values: Of layer i [batch, v_heads, tokens, v_dim], in the dtype of the keys.
        config: Default: CacheGenConfig().
        profile: Of the model, for the klt transform.
        layers: The layers' geometry, where they are not all of kind "full".
        known: What a loader computes from the tokens, for a profile with a predictor.
        progress: Show a progress bar.
        measured: The divergences that `config` was chosen by (`models.target`), for the report.

    Raises:
        TensorError: The tensors do not fit together, or a value is not finite (lossless accepts such values).
        ConfigError: The klt transform has no profile; or `config` has a target, which needs the model.
        ProfileError: The profile is of another model.
    """

    def __init__(
        self,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        config: CacheGenConfig | None = None,
        profile: Profile | None = None,
        *,
        layers: Sequence[LayerGeometry] | None = None,
        known: Known | None = None,
        progress: bool = False,
        measured: dict[str, Any] | None = None,
    ):
        require_config(config)
        config = config or CacheGenConfig()
        if config.target_kl is not None:
            raise ConfigError(
                f"target_kl={config.target_kl} needs the model, which is not at hand here: pass the configuration to "
                "CacheGenCache.from_context, from_text or from_cache, or save with save_pretrained(..., model=model)"
            )
        self._measured = measured
        self.geometry, self.progress = geometry_of(keys, values, layers), progress
        spans = spans_of(self.geometry.tokens, config.chunk_tokens)
        self.rows = ContextRows(keys, values, self.geometry, spans, known=known)
        self.config = resolved(self.rows, config, profile)
        transform = transform_of(self.config)
        self.profile = profile if transform.needs_profile else None
        self.codec, self._bits = transform.fit(self.rows, self.config, self.profile)
        levels, vectors = transform.levels(self.config), 2 * len(self.geometry.layers)
        self._bytes = [len(self.codec.side_bytes())] + [0] * (levels - 1)
        self._errors = torch.zeros(levels, vectors, dtype=torch.float64)
        self._energy = torch.zeros(vectors, dtype=torch.float64)

    def chunks(self) -> Iterator[list[bytes]]:
        """Yield the bytes of every part, chunk by chunk."""
        count = len(self.rows.spans)
        for span in tqdm(self.rows.spans, "encode", count, unit="chunk", disable=not self.progress):
            parts = self.codec.encode_chunk(self.rows, span)
            for part, data in enumerate(parts):
                self._bytes[part] += len(data)
            if self.config.measure:
                for total, own in zip((self._errors, self._energy), self.codec.squares(self.rows, span), strict=True):
                    total += own
            yield parts

    def report(self) -> dict[str, Any]:
        """Return the measured sizes and errors, complete once `chunks` is exhausted. Every list has one number per
        level.
        """
        elements = self.geometry.elements
        sizes = torch.tensor(self._bytes).cumsum(0).tolist()
        errors = (self._errors / self._energy.clamp_min(1e-300)).sqrt()
        bits = self._bits_by_vector()
        layers = []
        for index, layer in enumerate(self.geometry.layers):
            row: dict[str, Any] = {}
            for offset, kind, channels in ((0, "k", layer.k_channels), (1, "v", layer.v_channels)):
                count = channels * self.geometry.batch * self.geometry.tokens
                if bits is not None:
                    row[f"{kind}_bits"] = [round(b / count, 4) for b in bits[:, 2 * index + offset].tolist()]
                if self.config.measure:
                    row[f"{kind}_error"] = [round(e, 6) for e in errors[:, 2 * index + offset].tolist()]
            layers.append(row)
        found: dict[str, Any] = {
            "elements": elements,
            "bytes_per_level": sizes,
            "bits_per_element": [round(8 * size / elements, 4) for size in sizes],
            "layers": layers,
        }
        kl = None if self.profile is None else self.profile.divergences_at(self.config.predicted)
        if kl is not None and not self.config.step_offset:  # another step than the profile's has other divergences
            found["profile_kl"] = kl
        if self._measured is not None:
            found["target_kl"] = self._measured
        return found

    def _bits_by_vector(self) -> Tensor | None:
        """Return the bits up to each level, [levels, vectors]; None for a joint basis, whose bits belong to no single
        layer.
        """
        if self._bits is None:
            return None
        totals = torch.zeros(self._bits.shape[0], len(self._energy), dtype=torch.float64)
        return totals.index_add_(1, self.rows.channels.vectors, self._bits).cumsum(0)


def codec_of(
    geometry: Geometry, config: CacheGenConfig, side: bytes, profile: Profile | None, known: Known | None = None
) -> Transform:
    """Return the fitted transform that wrote this side information.

    Nothing is built for the channels before the length of the side information is checked.

    Raises:
        CorruptError, TruncatedError: The side information is damaged.
        ProfileError: The profile is another one.
    """
    transform = transform_of(config)
    lengths = transform.side_lengths(geometry, config)
    if len(side) not in lengths:
        message = f"the side information must have {lengths[0]} bytes or more for this geometry, got {len(side)}"
        raise (TruncatedError if len(side) < lengths[0] else CorruptError)(message)
    return transform.from_side(side, geometry, config, profile).knowing(known)


Placement = torch.device | str | None | Sequence[torch.device]
"""The device of all layers (None: the CPU), or that of each layer."""


def checked_level(level: int | None, levels: int) -> int:
    """Return `level`, or the finest for None. Raises LevelError."""
    if level is None:
        return levels
    if not isinstance(level, int) or isinstance(level, bool) or not 1 <= level <= levels:
        raise LevelError(f"level must be an integer from 1 to {levels} for this artifact, got {level!r}")
    return level


def decode_chunks(
    codec: Transform,
    geometry: Geometry,
    spans: Sequence[Span],
    parts_of: Callable[[int], list[bytes]],
    device: Placement,
    progress: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """Decode the parts of each chunk directly into new tensors, several chunks together where the device can.

    Args:
        codec: The fitted transform.
        geometry: Of the cache.
        spans: The chunks.
        parts_of: Returns the parts of a chunk, by its index.
        device: Of the new tensors, or of each layer. None: the CPU.
        progress: Show a progress bar.

    Returns:
        (keys, values): for each layer [batch, heads, tokens, dim], in the geometry's dtype.
    """
    if device is None or isinstance(device, (str, torch.device)):
        found = empty_kv(geometry, [device] * len(geometry.layers))
    else:
        found = empty_kv(geometry, device)
    chunks = enumerate(tqdm(spans, "decode", unit="chunk", disable=not progress))
    Destination(found).launch(codec, ((parts_of(index), span, span.first) for index, span in chunks))()
    return found[::2], found[1::2]
