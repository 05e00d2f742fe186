"""Layers of stock quantised caches: their keys and values in the dtype of the model, as attention reads them.

The layout of the quantised tensors belongs to the library behind a layer (quanto, hqq, fp8), so the layer itself
dequantises them. Some keep the last tokens exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

QUANTISED = ("_quantized_keys", "_quantized_values")
"""Attributes of quantised layers, beside the exact tokens in `keys` and `values`."""


def is_quantised(layer: Any) -> bool:
    """Report whether a filled layer keeps quantised keys and values."""
    return all(getattr(layer, name, None) is not None for name in QUANTISED)


def dequantised(layer: Any) -> tuple[Tensor, Tensor]:
    """Return the keys and values of all tokens of a quantised layer: [rows, heads, tokens, dim]."""
    found = []
    order = getattr(layer, "_pending_beam_idx", None)
    for name, exact in zip(QUANTISED, (layer.keys, layer.values), strict=True):
        tensor: Tensor = layer._dequantize(getattr(layer, name))
        tensor = tensor if order is None else tensor.index_select(0, order.to(tensor.device))
        found.append(torch.cat([tensor, exact], dim=2) if exact.ndim == 4 and exact.numel() else tensor)
    return found[0], found[1]
