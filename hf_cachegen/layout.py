"""Transformers caches <-> plain keys and values: the one file that knows cache layer types.

`capture` takes a filled cache apart; `build_dynamic` and `build_static` make a fresh stock cache for ONE generation,
because generating changes the cache it is given. Built layers are views of the captured tensors: stock layers grow by
concatenation and never write into them. The captured tensors hold every token, also of sliding layers, so that a
cache can be cut to any prefix; a built sliding layer keeps the last window - 1 tokens and its cumulative length, as
the stock one does.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from hf_cachegen.codec.geometry import Geometry, LayerGeometry, LayerKind
from hf_cachegen.errors import TensorError, UnsupportedLayerError, UnsupportedModelError, WrongModelError
from hf_cachegen.prefix import Reuse

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class KVTensors:
    """All keys and values of a context. For layer i: keys [1, heads, tokens, k_dim], values [1, v_heads, tokens,
    v_dim].

    Raises TensorError where the tensors contradict the geometry.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    geometry: Geometry

    def __post_init__(self) -> None:
        geometry = self.geometry
        if not len(self.keys) == len(self.values) == len(geometry.layers):
            raise TensorError(
                f"{len(self.keys)} keys and {len(self.values)} values for {len(geometry.layers)} layers of geometry"
            )
        for index, (layer, keys, values) in enumerate(zip(geometry.layers, self.keys, self.values, strict=True)):
            rows = (geometry.batch, geometry.tokens)
            _require(index, "keys", keys, (rows[0], layer.heads, rows[1], layer.k_dim), geometry.dtype)
            _require(index, "values", values, (rows[0], layer.v_heads, rows[1], layer.v_dim), geometry.dtype)

    def to(self, devices: Sequence[torch.device]) -> KVTensors:
        """Layer i on devices[i]; no copy of a layer that is there already."""
        keys = tuple(tensor.to(device) for tensor, device in zip(self.keys, devices, strict=True))
        values = tuple(tensor.to(device) for tensor, device in zip(self.values, devices, strict=True))
        return KVTensors(keys, values, self.geometry)

    def clone(self) -> KVTensors:
        """The same numbers in memory of their own."""
        keys = tuple(tensor.detach().clone() for tensor in self.keys)
        return KVTensors(keys, tuple(tensor.detach().clone() for tensor in self.values), self.geometry)


def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def base_model(model: PreTrainedModel) -> PreTrainedModel:
    """The Transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def require_model(model: PreTrainedModel) -> None:
    """Raises UnsupportedModelError, or UnsupportedLayerError, for a model whose cache cannot be kept and reused."""
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name} is an encoder-decoder model: its decoder has no long context to keep")
    if getattr(model, "active_peft_config", None) is not None and model.active_peft_config.is_prompt_learning:
        raise UnsupportedModelError(f"{name} has a learnt prompt (prompt learning), which starts a cache of its own")
    layer_kinds(model.config)
    stateful = bool(getattr(model, "_is_stateful", False))
    if stateful or "past_key_values" not in inspect.signature(base_model(model).forward).parameters:
        raise UnsupportedModelError(
            f"{name} keeps a recurrent state, or no key-value cache that can be cut to a prefix"
        )


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Within it every module is in evaluation mode (no dropout); afterwards each is in the mode that it was in."""
    # Flags alone: an overridden train() may do more, such as merging an adapter.
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def layer_kinds(config: PreTrainedConfig) -> list[tuple[LayerKind, int | None]]:
    """(kind, window) of every layer that `config` describes, as the stock DynamicCache would build it.

    Raises UnsupportedLayerError, which names the first layer of another kind.
    """
    latent = getattr(config.get_text_config(decoder=True), "kv_lora_rank", None) is not None
    kinds: list[tuple[LayerKind, int | None]] = []
    try:
        layers = DynamicCache(config=config).layers
    except KeyError as error:
        raise UnsupportedLayerError(f"{config.model_type!r} has a layer of an unknown kind, {error}") from error
    for index, layer in enumerate(layers):
        if type(layer) is DynamicSlidingWindowLayer:
            kinds.append(("sliding", int(layer.sliding_window)))
        elif type(layer) is DynamicLayer:
            kinds.append(("mla" if latent else "full", None))
        else:
            raise UnsupportedLayerError(
                f"layer {index} of {config.model_type!r} is a {type(layer).__name__}; this version handles full "
                "attention, sliding windows and latent attention (MLA)"
            )
    return kinds


def require_geometry(config: PreTrainedConfig, geometry: Geometry) -> None:
    """Raises WrongModelError unless a cache of this geometry is one that `config` describes: layers, kinds, windows,
    and heads and dims as far as the configuration tells them.
    """
    kinds, layers = layer_kinds(config), geometry.layers
    if len(layers) != len(kinds):
        raise WrongModelError(f"the cache has {len(layers)} layers, the model has {len(kinds)}")
    heads, dim = _heads_and_dim(config)
    for index, (layer, (kind, window)) in enumerate(zip(layers, kinds, strict=True)):
        got = {"kind": layer.kind, "window": layer.window}
        expected: dict[str, Any] = {"kind": kind, "window": window}
        if kind != "mla" and heads is not None:
            got |= {"heads": layer.heads, "v_heads": layer.v_heads}
            expected |= {"heads": heads, "v_heads": heads}
        if kind != "mla" and dim is not None:
            got |= {"k_dim": layer.k_dim, "v_dim": layer.v_dim}
            expected |= {"k_dim": dim, "v_dim": dim}
        if got != expected:
            wrong = "; ".join(
                f"{name}: expected {expected[name]}, got {value}"
                for name, value in got.items()
                if value != expected[name]
            )
            raise WrongModelError(f"layer {index} of the cache is not what {config.model_type!r} has: {wrong}")


def _heads_and_dim(config: PreTrainedConfig) -> tuple[int | None, int | None]:
    """Heads and dim of every layer's keys and values; None where the configuration does not say, or has several."""
    # Read from the dictionary: a configuration whose layers differ may refuse to be asked for an attribute of all.
    fields = config.get_text_config(decoder=True).to_dict()
    names = [name for name, value in fields.items() if value is not None]
    # Another name of the sort tells of layers, or of values, that are not like the rest.
    if fields.get("per_layer_config") or any(
        re.search(r"(key_value_heads|kv_heads|head_dim)$", name)
        for name in names
        if name not in ("num_key_value_heads", "head_dim")
    ):
        return None, None
    heads, dim = fields.get("num_key_value_heads"), fields.get("head_dim")
    return heads if isinstance(heads, int) else None, dim if isinstance(dim, int) else None


def capture(cache: Cache, config: PreTrainedConfig) -> KVTensors:
    """The keys and values of a filled cache of one row, all tokens of every layer; views, not copies.

    Raises UnsupportedLayerError for a layer of another kind, TensorError for a cache that is empty, has several rows or
    layers of different length, or whose sliding layers have dropped tokens already.
    """
    kinds = layer_kinds(config)
    layers = getattr(cache, "layers", [])
    if len(layers) != len(kinds):
        raise TensorError(f"the model has {len(kinds)} cache layers, this {type(cache).__name__} has {len(layers)}")
    pairs = [_all_tokens(index, layer) for index, layer in enumerate(layers)]
    first = pairs[0][0]
    if first.shape[0] != 1:
        raise TensorError(
            f"a context is one row; this cache has {first.shape[0]} (keep one row of each layer's tensors)"
        )
    geometry = Geometry(
        layers=tuple(_geometry(kind, window, *pair) for (kind, window), pair in zip(kinds, pairs, strict=True)),
        tokens=int(first.shape[2]),
        batch=1,
        dtype=dtype_name(first.dtype),
    )
    return KVTensors(tuple(keys for keys, _ in pairs), tuple(values for _, values in pairs), geometry)


def build_dynamic(kv: KVTensors, reuse: Reuse, repeats: int, devices: Sequence[torch.device]) -> DynamicCache:
    """A stock DynamicCache which holds the first `reuse.columns` columns of a batch, every row `repeats` times.

    Row r holds the context from column reuse.pads[r] on; what stands before it is zeros that the attention mask hides.
    """
    cache = DynamicCache()
    # Without a config the stock cache would append full layers as they come; these are all there is.
    cache.layer_class_to_replicate = None
    for layer, keys, values, device in zip(kv.geometry.layers, kv.keys, kv.values, devices, strict=True):
        stock = DynamicLayer() if layer.window is None else DynamicSlidingWindowLayer(sliding_window=layer.window)
        first = 0 if layer.window is None else max(0, reuse.columns - (layer.window - 1))
        rows = _columns(keys, first, reuse, repeats, device), _columns(values, first, reuse, repeats, device)
        stock.lazy_initialization(*rows)
        stock.keys, stock.values = rows
        if layer.window is not None:
            stock.cumulative_length = reuse.columns
        cache.layers.append(stock)
    return cache


def build_static(
    kv: KVTensors, reuse: Reuse, repeats: int, devices: Sequence[torch.device], config: PreTrainedConfig, length: int
) -> StaticCache:
    """Like `build_dynamic`, as a StaticCache with room for `length` tokens."""
    cache = StaticCache(config=config, max_cache_len=length)
    for stock, keys, values, device in zip(cache.layers, kv.keys, kv.values, devices, strict=True):
        stock.update(_columns(keys, 0, reuse, repeats, device), _columns(values, 0, reuse, repeats, device))
    return cache


def layer_devices(model: PreTrainedModel, layers: int) -> list[torch.device]:
    """Where each decoder layer computes: accelerate's execution device where it placed the model, else its weights'."""
    base = base_model(model)
    # A model that accelerate offloads says that it is on the meta device; its inputs may come from anywhere.
    device = base.device if base.device.type != "meta" else torch.device("cpu")
    for module in base.modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers:
            return [_device(layer, device) for layer in module]
    return [device] * layers


def positions_change(config: PreTrainedConfig, context: int, prompt: int) -> bool:
    """Whether a context of so many tokens is rotated otherwise than the same tokens in a prompt of another length.

    Two kinds of rope depend on the length of the whole sequence: "longrope" has one set of frequencies up to the
    original length and another above it; "dynamic" stretches its frequencies with every token above it.
    """
    text = config.get_text_config(decoder=True)
    parameters: Any = getattr(text, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    for rope in nested or [parameters]:
        kind = rope.get("rope_type")
        original = rope.get("original_max_position_embeddings") or getattr(
            text, "original_max_position_embeddings", None
        )
        original = original or getattr(text, "max_position_embeddings", None) or 0
        if kind == "dynamic" and max(context, prompt) > original:
            return True
        if kind == "longrope" and (context > original) != (prompt > original):
            return True
    return False


def _device(layer: nn.Module, otherwise: torch.device) -> torch.device:
    for module in layer.modules():
        place = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if place is not None:
            return torch.device(place)
    return next((p.device for p in layer.parameters() if p.device.type != "meta"), otherwise)


def _all_tokens(index: int, layer: Any) -> tuple[Tensor, Tensor]:
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer):
        raise UnsupportedLayerError(f"layer {index} of the cache is a {type(layer).__name__}, which cannot be captured")
    tokens = int(layer.get_seq_length())
    if tokens == 0:
        raise TensorError(f"layer {index} of the cache is empty")
    held = int(layer.keys.shape[2])
    if held < tokens:
        raise TensorError(
            f"layer {index} has kept {held} of {tokens} tokens: its sliding window was cut, and no prefix can be "
            "rebuilt from it; prefill with a config-less transformers.DynamicCache(), or use CacheGenCache.from_context"
        )
    return layer.keys[:, :, :tokens], layer.values[:, :, :tokens]


def _geometry(kind: LayerKind, window: int | None, keys: Tensor, values: Tensor) -> LayerGeometry:
    return LayerGeometry(kind, keys.shape[1], keys.shape[3], values.shape[1], values.shape[3], window)


def _require(index: int, name: str, tensor: Tensor, shape: tuple[int, ...], dtype: str) -> None:
    if tuple(tensor.shape) != shape or dtype_name(tensor.dtype) != dtype:
        raise TensorError(
            f"layer {index}: expected {name} {list(shape)} {dtype}, got {list(tensor.shape)} {dtype_name(tensor.dtype)}"
        )


def _columns(tensor: Tensor, first: int, reuse: Reuse, repeats: int, device: torch.device) -> Tensor:
    """[1, heads, tokens, dim] -> [rows * repeats, heads, reuse.columns - first, dim]; a view where no row is padded."""
    tensor = tensor.to(device)
    if not any(reuse.pads):
        return tensor[:, :, first : reuse.columns].expand(len(reuse.pads) * repeats, -1, -1, -1)
    _, heads, _, dim = tensor.shape
    rows = tensor.new_zeros(len(reuse.pads), heads, reuse.columns - first, dim)
    for row, pads in enumerate(reuse.pads):
        start = max(first, pads)
        rows[row, :, start - first :] = tensor[0, :, start - pads : max(0, reuse.columns - pads)]
    return rows if repeats == 1 else rows.repeat_interleave(repeats, dim=0)
