"""What each kind of stock cache layer holds. Capturing and building a cache go through this file.

A layer holds some of two sorts of tensors, which are found from the attributes that its class declares:

- *token tensors* have one row for each token, and can be cut to a prefix: keys and values;
- *states* have a fixed size, summarise all tokens before a position, and cannot be cut.

To add a kind: put its class into KINDS, and the names of its tensors into TOKEN_TENSORS or STATE_TENSORS. A class or an
attribute that is not listed ends in an error that names both, so that a new release of Transformers is never captured
in part.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from hf_cachegen.codec.geometry import LayerKind
from hf_cachegen.errors import UnsupportedLayerError
from hf_cachegen.models import compat
from hf_cachegen.models.compat import EMPTY_LAYERS
from hf_cachegen.models.indexed import INDEX_TENSORS, POSITIONS
from hf_cachegen.models.quantised import is_quantised

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.cache_utils import Cache

TOKEN_TENSORS = ("keys", "values")
"""Attributes of layers that hold a row for each token."""
STATE_TENSORS = ("conv_states", "recurrent_states")
"""Attributes of layers that hold states: a dictionary from the number of a state to a tensor [rows, ...] or None."""
INDEXED_KINDS = ("DynamicIndexedLayer", "StaticIndexedLayer", "MiniMaxM3VLSparseCacheLayer")
"""Names of the classes of layers with index keys (`indexed.py`); some releases lack some of them."""
SETTINGS = ("device", "dtype", "conv_kernel_size", "cumulative_length", "_sliding_window_tensor")
"""Attributes of layers that may be None or a tensor, and belong to no content."""
KINDS = (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    *EMPTY_LAYERS,
)
"""The classes of layers that the stock DynamicCache builds and this version handles, each with all its subclasses left
out: a subclass may keep something else in the same attributes."""
CAPTURED = (*KINDS, StaticLayer, StaticSlidingWindowLayer)
"""The classes of layers that can be captured from a filled cache."""


PLAIN_VALUES = (type(None), bool, int, float, str, list, tuple, dict, set, torch.dtype)
"""Values of a configuration that can be copied and compared."""
MOST_KNOWN = 64


@dataclass(frozen=True)
class LayerContent:
    """What one layer of a stock cache holds.

    Attributes:
        kind: the kind of its keys and values in a geometry; None if it holds none.
        window: its sliding window in tokens; None without one.
        states: names of its attributes with states, a part of STATE_TENSORS.
        indexed: it may keep an index key for each token.
    """

    kind: LayerKind | None
    window: int | None = None
    states: tuple[str, ...] = ()
    indexed: bool = False


_known: dict[int, tuple[type | None, dict[str, Any] | None, list[LayerContent]]] = {}
"""By the id of a configuration: its type, a copy of its values, and what the layers hold."""


def layer_contents(config: PreTrainedConfig) -> list[LayerContent]:
    """Return what every layer holds that the stock DynamicCache builds for a configuration.

    A call asks several times, and building the layers takes longer than comparing a configuration with the one known.

    Raises:
        UnsupportedLayerError: a layer is of an unknown kind.
    """
    text = config.get_text_config(decoder=True)
    kind, values, found = _known.get(id(text), (None, None, []))
    if kind is type(text) and values == vars(text):
        return list(found)
    found = _built(config, text)
    if all(isinstance(value, PLAIN_VALUES) for value in vars(text).values()):
        if len(_known) >= MOST_KNOWN:
            _known.clear()
        _known[id(text)] = type(text), deepcopy(vars(text)), found
    return list(found)


def _built(config: PreTrainedConfig, text: PreTrainedConfig) -> list[LayerContent]:
    """Return what the layers of a fresh cache hold. text: the part of the configuration for the decoder."""
    latent = getattr(text, "kv_lora_rank", None) is not None
    try:
        layers = DynamicCache(config=config).layers
        layers += compat.layers_of_loops(text, layers)
    except KeyError as error:
        raise UnsupportedLayerError(f"{config.model_type!r} has a layer of an unknown kind, {error}") from error
    return [_content(index, layer, config.model_type, latent) for index, layer in enumerate(layers)]


def empty_cache(config: PreTrainedConfig) -> DynamicCache:
    """Return the stock DynamicCache for a prefill: its sliding layers keep all tokens, for a cut to a shorter prefix.

    Raises:
        UnsupportedLayerError: a layer is of an unknown kind.
    """
    if is_plain(config):
        return DynamicCache()  # without a config every layer keeps all tokens
    cache = DynamicCache(config=config)
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicSlidingWindowLayer:
            cache.layers[index] = DynamicLayer()
        elif type(layer) is LinearAttentionAndSlidingWindowAttentionLayer:
            cache.layers[index] = LinearAttentionAndFullAttentionLayer(number_of_states=layer.number_of_states)
    return cache


def is_plain(config: PreTrainedConfig) -> bool:
    """Report whether every layer of the model's cache holds keys and values and nothing else."""
    return all(c.kind is not None and not c.states and not c.indexed for c in layer_contents(config))


def with_dummies(config: PreTrainedConfig, layers: Iterable[Any]) -> list[Any]:
    """Return layers with keys and values in the order of the model's, with an empty one wherever it keeps none."""
    held = iter(layers)
    return [EMPTY_LAYERS[0]() if content.kind is None else next(held) for content in layer_contents(config)]


def holds_states(config: PreTrainedConfig) -> bool:
    """Report whether a layer of the model's cache holds states."""
    return any(content.states for content in layer_contents(config))


def kv_layers(cache: Cache) -> list[Any]:
    """Return the layers of a filled cache that hold keys and values."""
    return [layer for layer in cache.layers if isinstance(getattr(layer, "keys", None), Tensor)]


def require_captured(index: int, layer: Any, content: LayerContent) -> None:
    """Raise UnsupportedLayerError unless a filled layer can be captured and holds what the model's layer should."""
    held = [name for name in (*TOKEN_TENSORS, *STATE_TENSORS) if hasattr(layer, name)]
    expected = [*(TOKEN_TENSORS if content.kind is not None else ()), *content.states]
    indexed = content.indexed and type(layer).__name__ in INDEXED_KINDS
    if not (indexed or type(layer) in CAPTURED or is_quantised(layer)) or not set(expected).issubset(held):
        raise UnsupportedLayerError(
            f"layer {index} of the cache is a {type(layer).__name__}, which cannot be captured: expected one of the "
            f"stock layers that hold {expected or 'nothing'}"
        )


def _content(index: int, layer: Any, model: str, latent: bool) -> LayerContent:
    name, tensors = type(layer).__name__, _declared(layer)
    indexed = name in INDEXED_KINDS
    unknown = sorted(tensors - {*TOKEN_TENSORS, *STATE_TENSORS, *((*INDEX_TENSORS, POSITIONS) if indexed else ())})
    if not (indexed or type(layer) in KINDS) or unknown:
        held = f", which holds {unknown}" if unknown else ""
        raise UnsupportedLayerError(
            f"layer {index} of {model!r} is a {name}{held}: this version handles full, latent and indexed attention, "
            "sliding windows, states, and layers that share the keys of others"
        )
    if type(layer) in EMPTY_LAYERS:
        return LayerContent(None)
    states = tuple(tensor for tensor in STATE_TENSORS if tensor in tensors)
    if not tensors.issuperset(TOKEN_TENSORS):
        return LayerContent(None, None, states)
    if isinstance(layer, DynamicSlidingWindowLayer):
        return LayerContent("sliding", int(layer.sliding_window), states)
    return LayerContent("mla" if latent else "full", None, states, indexed)


def _declared(layer: Any) -> set[str]:
    """Return the names of the attributes in which a fresh layer will hold tensors."""
    found = set()
    for name, value in vars(layer).items():
        values = list(value.values()) if isinstance(value, dict) else [value]
        if name not in SETTINGS and all(item is None or isinstance(item, Tensor) for item in values):
            found.add(name)
    return found
