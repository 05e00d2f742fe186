"""The sensitivity-weighted transform: rows -> coefficients of a profile's basis -> nested symbols, and back.

Keys are turned back to position zero where the model's rotation is known (a third fewer bits), means are taken off,
and each group of layers goes through one matrix product. Coefficients are coded as `LossyCodec` codes the identity's
values: with one step for all, no means, and the profile's table entries, so an artifact carries no side information
but the profile's digest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hf_cachegen.codec import quantize
from hf_cachegen.codec.chunk import Columns, LossyCodec, Side, Span
from hf_cachegen.codec.tables import shipped_codebooks
from hf_cachegen.config import CacheGenConfig
from hf_cachegen.errors import ConfigError, ProfileError, TensorError
from hf_cachegen.geometry import Geometry
from hf_cachegen.profile import Profile, require_layers


class KltCodec:
    """Encodes and decodes the chunks of one artifact by a profile. Raises ProfileError where the profile does not fit.
    """

    def __init__(self, geometry: Geometry, config: CacheGenConfig, profile: Profile):
        require_layers(profile, geometry.layers)
        if geometry.batch != 1:
            raise ConfigError(f"the klt transform codes one row of the batch, got {geometry.batch}")
        if config.levels != profile.levels:
            raise ConfigError(f"the profile has {profile.levels} levels, the configuration {config.levels}")
        values, digits = shipped_codebooks(config.prob_bits)
        if bool((profile.base_entries >= values.entries).any()) or bool(
            (profile.refine_entries >= digits.entries).any()
        ):
            raise ProfileError("the profile names a table that the codebook does not have")
        self.geometry, self.profile = geometry, profile
        components = len(profile.base_entries)
        nothing = torch.zeros(components, dtype=torch.uint8)
        side = Side(
            torch.full((components,), profile.step_code, dtype=torch.uint8),
            torch.zeros(components, dtype=torch.int16),
            nothing,
            profile.base_entries,
            profile.refine_entries,
        )
        columns = Columns(torch.zeros(components, dtype=torch.int64), torch.zeros(components, dtype=torch.int64))
        self.inner = LossyCodec(columns, replace(config, transform="identity"), side)
        self._slices = _slices(geometry)

    @property
    def parts(self) -> int:
        return self.inner.parts

    def side_bytes(self) -> bytes:
        return bytes.fromhex(self.profile.digest)

    def encode(self, rows: Tensor, span: Span) -> list[bytes]:
        """Raises TensorError for values so large that the profile's step cannot express them."""
        y = self.coefficients(rows, span)
        if y.numel() and not float(y.abs().max()) < quantize.LARGEST_SYMBOL * float(self.inner.steps[0]):
            raise TensorError("a value is too large for the profile's step; only lossless=True keeps such values")
        return self.inner.encode(y, span)

    def decode(self, parts: Sequence[bytes | memoryview], span: Span, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.rows(self.inner.decode(parts, span), span).to(dtype)

    def approximations(self, rows: Tensor, span: Span) -> list[Tensor]:
        return [self.rows(y, span) for y in self.inner.approximations(self.coefficients(rows, span), span)]

    def coefficients(self, rows: Tensor, span: Span) -> Tensor:
        """rows [tokens, columns] to float32 [tokens, components]."""
        x = self._turn(rows.float(), span, -1) - self.profile.means.to(rows.device)
        return torch.cat([self._columns(x, group) @ group.analysis.to(x.device) for group in self.profile.groups], 1)

    def rows(self, y: Tensor, span: Span) -> Tensor:
        """float32 [tokens, components] to rows float32 [tokens, columns]."""
        rows = torch.empty(len(y), len(self.profile.means))
        for group, part in zip(
            self.profile.groups, y.split([len(g.synthesis) for g in self.profile.groups], 1), strict=True
        ):
            places = [self._slices[2 * layer + group.kind] for layer in range(group.first, group.first + group.count)]
            back = (part @ group.synthesis).split([place.stop - place.start for place in places], 1)
            for place, columns in zip(places, back, strict=True):
                rows[:, place] = columns
        return self._turn(rows.add_(self.profile.means), span, 1)

    def _columns(self, x: Tensor, group) -> Tensor:  # type: ignore[no-untyped-def]
        layers = range(group.first, group.first + group.count)
        return torch.cat([x[:, self._slices[2 * layer + group.kind]] for layer in layers], 1)

    def _turn(self, rows: Tensor, span: Span, sign: int) -> Tensor:
        """Keys with their rotation undone (-1) or done (1)."""
        rotary = self.profile.rotary
        if rotary.style == "none":
            return rows
        rows = rows.clone()
        positions = torch.arange(span.first, span.first + span.tokens, device=rows.device)
        for layer, place in zip(self.geometry.layers, self._slices[::2], strict=True):
            keys = rows[:, place].reshape(span.tokens, layer.heads, layer.k_dim)
            rows[:, place] = rotary.apply(keys, positions, sign).reshape(span.tokens, -1)
        return rows


def _slices(geometry: Geometry) -> list[slice]:
    """Columns of layer 0's K, layer 0's V, layer 1's K, ..."""
    found, at = [], 0
    for layer in geometry.layers:
        for width in (layer.k_channels, layer.v_channels):
            found.append(slice(at, at + width))
            at += width
    return found
