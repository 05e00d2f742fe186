"""Layers of sparse attention that keep an index key for each token beside its key and value (DeepSeek's DSA).

The codec knows two vectors of a layer, so the index key becomes the end of the value: of H heads of V channels and an
index key of D channels, the value of a token is one head of H V + D channels. It is cut to prefixes, coded, streamed
and recomputed with the value. The geometry says which channels it is (`LayerGeometry.index_dim`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_cachegen.codec.geometry import LayerGeometry
from hf_cachegen.errors import UnsupportedLayerError

INDEX_TENSORS = ("indexer_keys", "idx_keys")
"""Attributes of layers that hold index keys: [rows, tokens, dim] and [rows, 1, tokens, dim]."""
POSITIONS = "indexer_position_ids"
"""Attribute for positions of several dimensions, [dims, rows, tokens], which one layer of a model may keep."""


def index_of(layer: Any, tokens: int | None = None) -> Tensor | None:
    """Return the index keys of the first tokens (default: of all), [rows, 1, tokens, dim]; None if it keeps none."""
    for name in INDEX_TENSORS:
        held = getattr(layer, name, None)
        if held is not None:
            held = held[:, None] if held.ndim == 3 else held
            return held[:, :, :tokens]
    return None


def require_no_positions(index: int, layer: Any) -> None:
    """Raise UnsupportedLayerError if a layer keeps positions of several dimensions, which no artifact holds."""
    if getattr(layer, POSITIONS, None) is not None:
        raise UnsupportedLayerError(
            f"layer {index} of the cache, a {type(layer).__name__}, keeps positions in {POSITIONS}: expected keys, "
            "values and index keys alone, which this version handles"
        )


def joined(values: Tensor, index: Tensor) -> Tensor:
    """Join values [rows, heads, tokens, dim] and index keys to [rows, 1, tokens, heads dim + index dim]."""
    flat = values.transpose(1, 2).flatten(2)[:, None]
    return torch.cat([flat, index.to(flat.dtype)], dim=-1)


def with_index(layer: Any) -> Tensor:
    """Return the values of a filled dynamic layer, joined with its index keys if it keeps any."""
    values: Tensor = layer.values
    index = index_of(layer, values.shape[2])
    return values if index is None else joined(values, index)


def split(values: Tensor, heads: int, index_dim: int) -> tuple[Tensor, Tensor]:
    """Undo `joined`; return (values [rows, heads, tokens, dim], index keys [rows, 1, tokens, index_dim]), as views."""
    flat, index = values[..., :-index_dim], values[..., -index_dim:]
    return flat[:, 0].unflatten(-1, (heads, flat.shape[-1] // heads)).transpose(1, 2), index


def sides_of(geometry: LayerGeometry, values: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return a layer's values as the model has them, and its index keys if it keeps any."""
    if geometry.index_dim is None:
        return values, None
    return split(values, geometry.heads, geometry.index_dim)


def put_index(layer: Any, index: Tensor) -> None:
    """Append index keys [rows, 1, tokens, dim] to a stock layer."""
    if hasattr(layer, "update_indexer"):
        layer.update_indexer(index[:, 0])
    else:
        layer.update_index(index)
