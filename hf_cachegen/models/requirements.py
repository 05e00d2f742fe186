"""The requirements on a model and its configuration for keeping and reusing its cache."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from hf_cachegen.codec.geometry import Geometry, LayerKind
from hf_cachegen.errors import ConfigError, TensorError, UnsupportedModelError, WrongModelError
from hf_cachegen.models.compat import takes_cache, text_decoder, unwrapped
from hf_cachegen.models.kinds import holds_states, layer_contents

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

WINDOW_MASKS = ("create_sliding_window_causal_mask", "create_chunked_causal_mask", "create_masks_for_generate")
"""Functions of Transformers with which a model masks the tokens outside a window; its module imports one."""

WHOLE_PROMPT = {
    "paligemma": "it attends in both directions over the whole prompt, so the keys of a context depend on the question",
}
"""Reasons for refusing models whose keys and values of a context depend on what follows it, by model type."""

POSITION_TABLE = re.compile(r"^wpe$|^(?!.*rel).*(pos(ition)?s?_|_pos(ition)?s?$)")
"""Names of the embeddings of absolute positions: wpe, embed_positions, position_embeddings, positions_embed."""


def require_instance(model: Any) -> None:
    """Raise ConfigError for anything but a model of Transformers or a wrapper of one, such as a model's path."""
    if not isinstance(unwrapped(model), nn.Module) or not hasattr(unwrapped(model), "config"):
        raise ConfigError(
            f"expected a model of Transformers, got {type(model).__name__}: load it with "
            "AutoModelForCausalLM.from_pretrained"
        )


def require_tokenizer(tokenizer: Any) -> None:
    """Raise ConfigError for anything but a tokenizer, such as its path."""
    if not callable(tokenizer):
        raise ConfigError(
            f"expected the tokenizer of the model, got {type(tokenizer).__name__}: load it with "
            "AutoTokenizer.from_pretrained"
        )


def require_model(model: PreTrainedModel) -> None:
    """Raise an error for a model whose cache cannot be kept and cut to a prefix.

    Raises:
        ConfigError: it is no model.
        UnsupportedModelError: the model keeps no such cache.
        UnsupportedLayerError: a layer of its cache is of another kind.
    """
    require_instance(model)
    name = type(unwrapped(model)).__name__
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{name} is an encoder-decoder model: only a whole input of its encoder can be kept, by "
            "CacheGenCache.from_context"
        )
    if getattr(model, "active_peft_config", None) is not None and model.active_peft_config.is_prompt_learning:
        raise UnsupportedModelError(f"{name} has a learnt prompt (prompt learning), which starts a cache of its own")
    if (reason := WHOLE_PROMPT.get(model.config.model_type)) is not None:
        raise UnsupportedModelError(f"the cache of {name} cannot be kept: {reason}")
    if bool(getattr(model, "_is_stateful", False)) and not holds_states(model.config):
        raise UnsupportedModelError(f"{name} keeps a recurrent state outside its cache, which cannot be kept")
    if not takes_cache(model):
        raise UnsupportedModelError(f"the forward pass of {name} takes no key-value cache")
    layer_kinds(model.config)


def masks_windows(model: PreTrainedModel) -> bool:
    """Report whether a model masks all tokens outside its windows; assume so for models from outside Transformers.

    One that does not reads the whole prompt in its first forward pass, and afterwards what its cache has kept.
    """
    if not any(kind == "sliding" for kind, _ in layer_kinds(model.config)):
        return True
    names = {type(module).__module__ for module in unwrapped(model).modules()}
    sources = [sys.modules[name] for name in names if name.startswith("transformers.models.")]
    return not sources or any(hasattr(source, mask) for source in sources for mask in WINDOW_MASKS)


def position_limit(model: PreTrainedModel) -> int | None:
    """Return the number of positions that a model has learnt or tabulated; None if it computes them."""
    limits = []
    for path, module in text_decoder(model).named_modules():
        name = path.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and POSITION_TABLE.search(name):
            limits.append(module.num_embeddings - int(getattr(module, "offset", 0)))
        if isinstance(table := module._buffers.get("embed_positions"), Tensor):
            limits.append(len(table))
    return min(limits, default=None)


def require_vocabulary(model: PreTrainedModel, ids: Tensor) -> None:
    """Raise TensorError unless `model` has an embedding for each of these token ids, int64 of any shape.

    A look-up beyond the table ends a process's use of its GPU.
    """
    embedding = unwrapped(model).get_input_embeddings()
    sizes = getattr(model.config.get_text_config(), "vocab_size", None), getattr(embedding, "num_embeddings", None)
    count = max((size for size in sizes if type(size) is int), default=None)
    if count is None or not ids.numel():
        return
    least, largest = int(ids.min()), int(ids.max())
    if least < 0 or largest >= count:
        wrong = least if least < 0 else largest
        name = type(unwrapped(model)).__name__
        raise TensorError(f"expected token ids of 0 to {count - 1}, as {name} has, got {wrong}")


def require_length(model: PreTrainedModel, tokens: int) -> None:
    """Raise UnsupportedModelError unless `model` has positions for a context of `tokens` tokens and attends to all."""
    name = type(unwrapped(model)).__name__
    kept = getattr(model.config, "keep_window_size", None)
    if kept is not None and tokens > kept:
        raise UnsupportedModelError(
            f"{name} attends to {kept} tokens that it chooses, and its choice between equal tokens depends on the "
            f"length of the prompt: expected a context of at most {kept} tokens, it has {tokens}"
        )
    limit = position_limit(model)
    if limit is not None and tokens > limit:
        raise UnsupportedModelError(
            f"{name} has {limit} learnt positions, the context has {tokens} tokens: shorten "
            "the context, or use a model for longer texts"
        )


def layer_kinds(config: PreTrainedConfig) -> list[tuple[LayerKind, int | None]]:
    """Return (kind, window) of every layer that holds keys and values.

    Args:
        config: the configuration of the model.

    Returns:
        One pair for each layer with keys and values; the window is a number of tokens, None for a layer without one.

    Raises:
        UnsupportedLayerError: a layer is of an unknown kind.
    """
    return [(content.kind, content.window) for content in layer_contents(config) if content.kind is not None]


def require_geometry(config: PreTrainedConfig, geometry: Geometry) -> None:
    """Raise WrongModelError unless a geometry is that of the caches which `config` describes.

    The number of layers, their kinds and their windows are compared; heads and dims where the configuration has one
    value for all layers.
    """
    contents = [content for content in layer_contents(config) if content.kind is not None]
    layers = geometry.layers
    if len(layers) != len(contents):
        raise WrongModelError(f"expected {len(contents)} layers as in the model, the cache has {len(layers)}")
    heads, dim = _heads_and_dim(config)
    for index, (layer, content) in enumerate(zip(layers, contents, strict=True)):
        # Some indexed layers use the choice of another one and keep no index key.
        kind = "indexed" if content.indexed and layer.kind == "indexed" else content.kind
        got = {"kind": layer.kind, "window": layer.window}
        expected: dict[str, Any] = {"kind": kind, "window": content.window}
        if kind not in ("mla", "indexed") and heads is not None:
            got |= {"heads": layer.heads, "v_heads": layer.v_heads}
            expected |= {"heads": heads, "v_heads": heads}
        if kind not in ("mla", "indexed") and dim is not None:
            got |= {"k_dim": layer.k_dim, "v_dim": layer.v_dim}
            expected |= {"k_dim": dim, "v_dim": dim}
        if got != expected:
            wrong = "; ".join(
                f"{name}: expected {expected[name]}, got {value}"
                for name, value in got.items()
                if value != expected[name]
            )
            raise WrongModelError(f"layer {index} of the cache is not a layer of {config.model_type!r}: {wrong}")


def _heads_and_dim(config: PreTrainedConfig) -> tuple[int | None, int | None]:
    """Return the heads and the dim of all layers' keys and values; None where there is no value, or several."""
    # Read from the dictionary: a configuration whose layers differ may refuse access to a common attribute.
    fields = config.get_text_config(decoder=True).to_dict()
    names = [name for name, value in fields.items() if value is not None]
    # Another name of this form means that some layers, or their values, differ from the others.
    if fields.get("per_layer_config") or any(
        re.search(r"(key_value_heads|kv_heads|head_dim)$", name)
        for name in names
        if name not in ("num_key_value_heads", "head_dim")
    ):
        return None, None
    heads, dim = fields.get("num_key_value_heads"), fields.get("head_dim")
    return heads if isinstance(heads, int) else None, dim if isinstance(dim, int) else None


def positions_change(config: PreTrainedConfig, context: int, prompt: int) -> bool:
    """Report whether a prompt's length changes the rotation of the context's keys.

    Two kinds of rope depend on the length of the whole sequence: "longrope" has one set of frequencies up to the
    original length and another above it; "dynamic" stretches its frequencies with every token above it.

    Args:
        config: the configuration of the model.
        context: length of the context in tokens.
        prompt: length of the prompt in tokens, the context included.
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
