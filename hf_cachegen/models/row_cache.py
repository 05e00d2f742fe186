"""Stock caches for batches whose rows hold different texts, and the way back: a row's keys and values.

Row r of a batch begins with pads[r] masked tokens and goes on with a text of its own. The first `length` positions of
every row are filled: each row from its own keys and values, computed or loaded. Sliding layers work as the stock ones
do, but also keep what has left their window, so that every token of every layer can be taken out afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from hf_cachegen.codec.geometry import LayerGeometry
from hf_cachegen.errors import TensorError
from hf_cachegen.models.compat import EMPTY_LAYERS
from hf_cachegen.models.kinds import layer_contents
from hf_cachegen.models.recurrent import Checkpoint, put_states, states_of
from hf_cachegen.models.requirements import layer_kinds

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

RowTensors = Sequence[Tensor]
"""Layer 0's keys of one row, its values, layer 1's keys, ...: [1, heads, tokens, dim] each."""


class WholeSlidingLayer(DynamicSlidingWindowLayer):
    """A sliding layer that remembers the tokens that left its window.

    Beam search reorders the window alone, so what is remembered of generated tokens is right for other modes only.
    """

    def __init__(self, sliding_window: int, **kwargs: Any):
        super().__init__(sliding_window=sliding_window, **kwargs)
        self.past: list[tuple[Tensor, Tensor]] = []

    def fill(self, keys: Tensor, values: Tensor) -> None:
        """Hold these tokens, [rows, heads, tokens, dim], as if they had passed through."""
        self.lazy_initialization(keys, values)
        self.past, self.cumulative_length = [(keys, values)], keys.shape[2]
        first = max(0, keys.shape[2] - (self.sliding_window - 1))
        self.keys, self.values = keys[:, :, first:], values[:, :, first:]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append tokens, as the stock layer does."""
        self.past.append((key_states, value_states))
        found: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
        return found

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Remove tokens at the end, as the stock layer does."""
        super().crop(*args, **kwargs)
        keys, values = self.whole()
        self.past = [(keys, values)]

    def whole(self) -> tuple[Tensor, Tensor]:
        """Return the keys and values of all tokens, [rows, heads, tokens, dim]."""
        if len(self.past) > 1:
            keys, values = zip(*self.past, strict=True)
            self.past = [(torch.cat(keys, dim=2), torch.cat(values, dim=2))]
        length = int(self.get_seq_length())
        return self.past[0][0][:, :, :length], self.past[0][1][:, :, :length]


def dynamic_cache(
    config: PreTrainedConfig, rows: Sequence[RowTensors | None], pads: Sequence[int], length: int, repeats: int
) -> DynamicCache:
    """Return a stock DynamicCache whose rows are filled up to `length`, every row `repeats` times.

    Args:
        config: the model's configuration.
        rows: the keys and values of each row, at least length - pad tokens, on the layers' devices; None for a row
            whose first `length` positions are pads, or where length is 0.
        pads: masked tokens before each row's text.
        length: filled positions of every row; 0 makes an empty cache.
        repeats: copies of each row.
    """
    cache = DynamicCache()
    # Without a config the stock cache would append full layers as they come; these are all there is.
    cache.layer_class_to_replicate = None
    for index, (_, window) in enumerate(layer_kinds(config)):
        layer = DynamicLayer() if window is None else WholeSlidingLayer(sliding_window=window)
        if length:
            keys, values = _filled(rows, 2 * index, pads, length, repeats), _filled(
                rows, 2 * index + 1, pads, length, repeats
            )
            _fill_layer(layer, keys, values)
        cache.layers.append(layer)
    return cache


def static_cache(
    config: PreTrainedConfig, rows: Sequence[RowTensors | None], pads: Sequence[int], length: int, repeats: int,
    capacity: int,
) -> StaticCache:  # fmt: skip
    """Return a stock StaticCache with room for `capacity` tokens, filled as `dynamic_cache` fills its own."""
    cache = StaticCache(config=config, max_cache_len=capacity)
    if length:
        for index, layer in enumerate(cache.layers):
            layer.update(*(_filled(rows, 2 * index + part, pads, length, repeats) for part in (0, 1)))
    return cache


def state_cache(
    config: PreTrainedConfig, rows: Sequence[RowTensors], states: Checkpoint | None, length: int, repeats: int,
    devices: Sequence[torch.device],
) -> DynamicCache:  # fmt: skip
    """Return a stock DynamicCache of a model with recurrent states, whose rows all hold `length` tokens.

    Args:
        config: the model's configuration.
        rows: the keys and values of each row, at least `length` tokens; empty for a model with states alone.
        states: the states after `length` tokens, [rows, ...] each; None where length is 0.
        length: filled positions of every row; 0 makes an empty cache.
        repeats: copies of each row.
        devices: the device of each layer of the model.
    """
    cache, part = DynamicCache(config=config), 0
    for index, (content, device) in enumerate(zip(layer_contents(config), devices, strict=True)):
        if type(cache.layers[index]) is DynamicSlidingWindowLayer:
            cache.layers[index] = WholeSlidingLayer(sliding_window=content.window or 1)
        layer: Any = cache.layers[index]
        if content.kind is not None:
            if length:
                pair = [_filled(rows, part + side, [0] * len(rows), length, repeats) for side in (0, 1)]
                _fill_layer(layer, pair[0].to(device), pair[1].to(device))
            part += 2
        if states is not None and length:
            held = {name: state.repeat_interleave(repeats, 0) for name, state in states_of(states, index).items()}
            put_states(layer, held, len(rows) * repeats, device)
    return cache


def _fill_layer(layer: Any, keys: Tensor, values: Tensor) -> None:
    if isinstance(layer, WholeSlidingLayer):
        layer.fill(keys, values)
    else:
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values


def row_of(cache: Cache, row: int, first: int, last: int) -> list[Tensor]:
    """Return the keys and values of one row, positions [first, last), as views.

    Raises:
        TensorError: a layer no longer holds them.
    """
    found = []
    for index, layer in enumerate(cache.layers):
        if not holds_keys(layer):
            continue
        if isinstance(layer, WholeSlidingLayer):
            pair = layer.whole()
        else:
            pair = layer.keys, layer.values
            held = int(layer.get_seq_length())
            if layer.keys.shape[2] < held or last > held:
                raise TensorError(f"layer {index} holds {layer.keys.shape[2]} of {held} tokens, expected {last}")
        found += [tensor[row : row + 1, :, first:last] for tensor in pair]
    return found


def holds_keys(layer: Any) -> bool:
    """Report whether a layer of a cache holds keys and values; some hold states alone, or nothing."""
    return hasattr(layer, "keys") and not isinstance(layer, EMPTY_LAYERS)


def cached_rows(cache: Cache) -> tuple[int, int]:
    """Return the number of rows and of positions that a cache holds; (0, 0) for an empty one, or one of states alone.
    """
    layer = next((layer for layer in cache.layers if holds_keys(layer)), None)
    if layer is None or not layer.is_initialized:
        return 0, 0
    return int(layer.keys.shape[0]), int(layer.get_seq_length())


def row_geometry(config: PreTrainedConfig, row: RowTensors) -> tuple[LayerGeometry, ...]:
    """Return the geometry of the layers that these keys and values are of."""
    return tuple(
        LayerGeometry(kind, keys.shape[1], keys.shape[3], values.shape[1], values.shape[3], window)
        for (kind, window), keys, values in zip(layer_kinds(config), row[::2], row[1::2], strict=True)
    )


def _filled(rows: Sequence[RowTensors | None], part: int, pads: Sequence[int], length: int, repeats: int) -> Tensor:
    """Return [rows * repeats, heads, length, dim] of one layer's keys or values; a view where there is one row."""
    present = next(row for row in rows if row is not None)[part]
    if len(rows) == 1 and pads[0] == 0:
        return present[:, :, :length].expand(repeats, -1, -1, -1)
    _, heads, _, dim = present.shape
    filled = present.new_zeros(len(rows), heads, length, dim)
    for index, (row, pad) in enumerate(zip(rows, pads, strict=True)):
        if row is not None and pad < length:
            filled[index, :, pad:] = row[part][0, :, : length - pad]
    return filled if repeats == 1 else filled.repeat_interleave(repeats, dim=0)
