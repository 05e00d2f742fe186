"""A weight independent of how it is stored: the plain tensors that determine its value, in one canonical form.

A plain parameter is its own canonical form. A quantised one is several tensors, which the libraries keep in different
places and, some of them, rearrange at the first forward pass:

- bitsandbytes, 4 bits: `quant_state` beside the packed values. On a CPU with AVX512-BF16 the first forward pass packs
  the values in another order and rounds the scales to bfloat16, so the canonical form has the original order and
  bfloat16 scales with the second quantisation undone.
- bitsandbytes, 8 bits: the row scales are on the weight before the first forward pass and on the module's state after.
- torchao and other tensor subclasses: the inner tensors that `__tensor_flatten__` names, and its context.
- GGUF, compressed-tensors, FP8 and similar: plain parameters and buffers; a packed GGUF weight also has its type.
- accelerate: a weight on the meta device is read from the map (CPU or disk) that its module's hook loads from.

Nothing is imported from these libraries, and no weight is changed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_cachegen.errors import UnsupportedModelError

Parts = list[tuple[str, Tensor]]
PLAIN = (Tensor, nn.Parameter)
"""Types whose memory is all that they are."""
REWRITTEN_ROPE = ("dynamic", "longrope")
"""Kinds of rope whose modules replace their frequencies while the model runs."""
PACKED_ROWS = 32
"""Output rows of a block of bitsandbytes' CPU packing."""


@dataclass(frozen=True)
class Stored:
    """How a weight is stored.

    tensors: the plain tensors that it is stored in. parts: reads its canonical form, (suffix of the name, tensor) each.
    settings: what the tensors alone do not tell. source: identifies stored bytes that are not in `tensors`.
    """

    tensors: tuple[Tensor, ...]
    parts: Callable[[], Parts]
    settings: str = ""
    source: Hashable = None


def stored(module: nn.Module, path: str, name: str, tensor: Tensor) -> Stored:
    """Find how `module.<name>` is stored.

    Args:
        module: The module that owns the weight.
        path: The module's name, for messages and for accelerate's maps.
        name: The weight's name in the module.
        tensor: The weight.

    Raises:
        UnsupportedModelError: It cannot be identified.
    """
    label = f"{path}.{name}".lstrip(".")
    if tensor.device.type == "meta":
        return _offloaded(module, label, name)
    kind = type(tensor)
    if kind in PLAIN:
        settings = f"ggml_type={module.ggml_type}" if hasattr(module, "ggml_type") else ""
        return Stored((tensor,), lambda: [("", tensor)], settings)
    if getattr(tensor, "quant_state", None) is not None:
        return _bitsandbytes_4bit(tensor)
    if tensor.dtype is torch.int8 and hasattr(tensor, "SCB"):
        return _bitsandbytes_8bit(module, label, tensor)
    if kind.__name__ == "DTensor":
        raise UnsupportedModelError(
            f"weight {label} is a DTensor, of which this process holds a part: gather the model to identify it"
        )
    if hasattr(tensor, "__tensor_flatten__"):
        return _flattened(label, tensor)
    hidden = sorted(key for key, value in vars(tensor).items() if _holds_tensors(value))
    if hidden or hasattr(tensor, "ds_id") or nn.parameter.is_lazy(tensor):
        raise UnsupportedModelError(
            f"weight {label} is a {kind.__module__}.{kind.__qualname__}, whose value cannot be read"
            f"{f' (it also keeps tensors in {hidden})' if hidden else ''}: dequantise or gather the model"
        )
    return Stored((tensor,), lambda: [("", tensor)])


def has_adapters(module: nn.Module) -> bool:
    """Whether a module is one of PEFT's layers, which wrap a module of the model."""
    return "merged_adapters" in vars(module) or hasattr(type(module), "merged_adapters")


def rewritten(module: Any, name: str) -> bool:
    """Whether a buffer does not determine keys and values, or holds what the last input left there.

    A rotary module has `inv_freq` and `original_inv_freq`, both with the layer type as a prefix where there are
    several. Where the kind of rope depends on the length of the input, the model computes the first from the second;
    otherwise the second has no effect.
    """
    if not name.endswith("inv_freq"):
        return False
    original = name.endswith("original_inv_freq")
    prefix = name.removesuffix("inv_freq").removesuffix("original_")
    if f"{prefix}original_inv_freq" not in module._buffers:
        return False
    kind = getattr(module, "rope_type", None)
    kind = kind.get(prefix.removesuffix("_")) if isinstance(kind, dict) else kind
    return original != (kind in REWRITTEN_ROPE)


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_holds_tensors(inner) for inner in value.values())
    if isinstance(value, (list, tuple)):
        return any(_holds_tensors(inner) for inner in value)
    return isinstance(value, Tensor)


def _flattened(name: str, tensor: Any) -> Stored:
    """A tensor subclass by its inner tensors, which may be subclasses themselves."""
    inner: Parts = []
    settings = []

    def visit(suffix: str, value: Any) -> None:
        if type(value) in PLAIN:
            inner.append((suffix, value))
            return
        if not hasattr(value, "__tensor_flatten__"):
            raise UnsupportedModelError(f"weight {name}{suffix} is a {type(value).__qualname__}, which cannot be read")
        names, context = value.__tensor_flatten__()
        settings.append(f"{suffix}:{type(value).__qualname__}:{_stable(context)}")
        for attribute in names:
            visit(f"{suffix}.{attribute}", getattr(value, attribute))

    visit("", tensor)
    return Stored(tuple(value for _, value in inner), lambda: inner, ";".join(settings))


def _stable(context: Any) -> str:
    """A context as text that is the same in every process: no addresses."""
    if isinstance(context, Mapping):
        return "{" + ",".join(f"{key}={_stable(context[key])}" for key in sorted(context, key=str)) + "}"
    if isinstance(context, (list, tuple)):
        return "[" + ",".join(map(_stable, context)) + "]"
    text = str(context)
    return type(context).__qualname__ if " at 0x" in text else text


def _bitsandbytes_4bit(tensor: Any) -> Stored:
    state = tensor.quant_state
    second = getattr(state, "state2", None) if state.nested else None
    scales = (state.absmax, state.code, *(() if second is None else (second.absmax, second.code, state.offset)))
    packed = bool(getattr(state, "packing_format_for_cpu", False))

    def parts() -> Parts:
        absmax = state.absmax
        if second is not None:
            # One operation, one rounding: the numbers of bitsandbytes' own dequantisation on every device.
            rows = second.code.float()[absmax.long()].split(second.blocksize)
            absmax = torch.cat([row * scale for row, scale in zip(rows, second.absmax, strict=True)]) + state.offset
        absmax = absmax.T.contiguous().view(-1) if packed else absmax.reshape(-1).to(torch.bfloat16)
        values = _unpacked(tensor, state.shape) if packed else tensor.reshape(-1).view(torch.uint8)
        return [("", values), (".absmax", absmax), (".code", state.code.float())]

    settings = f"{state.quant_type} {tuple(state.shape)} blocks of {state.blocksize}"
    return Stored((tensor, *(scale for scale in scales if isinstance(scale, Tensor))), parts, settings)


def _unpacked(tensor: Tensor, shape: Any) -> Tensor:
    """The bytes of a weight that bitsandbytes packed for the CPU, in the order of the checkpoint.

    Packed, 32 rows are interleaved: byte j of [rows / 32, columns / 2, 2 x 16] pairs nibble j (low) with j + 32 (high)
    of the [32 rows, 2 columns] that belong to one column pair.
    """
    rows, columns = shape
    data = tensor.detach().as_subclass(Tensor).reshape(-1, PACKED_ROWS)
    nibbles = torch.cat([data & 0xF, data >> 4], dim=1)
    nibbles = nibbles.view(rows // PACKED_ROWS, columns // 2, PACKED_ROWS, 2).transpose(1, 2)
    pairs = nibbles.reshape(-1, 2)
    return pairs[:, 0] << 4 | pairs[:, 1]


def _bitsandbytes_8bit(module: nn.Module, name: str, tensor: Any) -> Stored:
    scales = tensor.SCB if tensor.SCB is not None else getattr(getattr(module, "state", None), "SCB", None)
    if scales is None:
        raise UnsupportedModelError(f"weight {name} has 8 bits and no scales (SCB): load the model again")
    return Stored((tensor, scales), lambda: [("", tensor), (".SCB", scales)])


def _offloaded(module: nn.Module, label: str, name: str) -> Stored:
    """A weight that accelerate keeps on the CPU or on disk, read through the map of the module's hook."""
    hook = getattr(module, "_hf_hook", None)
    maps = (getattr(inner, "weights_map", None) for inner in getattr(hook, "hooks", (hook,)))
    weights: Any = next((found for found in maps if found is not None), None)
    # The map of a module adds the module's name; below it is the map of the whole model.
    prefix, whole = getattr(weights, "prefix", ""), getattr(weights, "dataset", weights)
    key = prefix + name
    memory = getattr(whole, "state_dict", whole)
    if isinstance(memory, Mapping) and key in memory:
        held = memory[key]
        return Stored((held,), lambda: [("", held)])
    index = getattr(whole, "index", {})
    if weights is None or key not in index:
        raise UnsupportedModelError(
            f"weight {label} is on the meta device and accelerate holds no value of it: load the model's weights"
        )
    file = index[key].get("safetensors_file") or os.path.join(str(whole.save_folder), f"{key}.dat")
    try:
        status = os.stat(file)
    except OSError as error:
        raise UnsupportedModelError(f"weight {label} is offloaded to {file}, which cannot be read") from error
    source = (str(file), key, status.st_mtime_ns, status.st_size)
    return Stored((), lambda: [("", weights[name])], source=source)
