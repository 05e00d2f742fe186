"""The state of a model object: changes whenever something that determines keys and values may have changed.

It is taken before every reuse of a cache, so it must be cheap: one walk over the modules reads version counters and
addresses of tensors, a few values of each, and the plain settings and hooks of modules. Equal states let the checks of
`models.weights`, `models.adapters` and `models.probe` be skipped; a changed one costs those checks and says nothing by
itself.

Values are sampled because some writers go past the version counter: `parameter.data`, through which PEFT merges
adapters, and fused optimisers. A write past the counter that changes none of the sampled values is not seen.
"""

from __future__ import annotations

from ctypes import string_at
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from hf_cachegen.models.storage import PLAIN, rewritten, stored

SAMPLE_BYTES = 64
"""Bytes read at the beginning and in the middle of a tensor on the CPU."""
SAMPLES = 8
"""Values read of a tensor elsewhere, evenly spread (at most one more for each, where they do not divide its size)."""
_PLAIN = frozenset(PLAIN)
_SCALARS = frozenset([int, float, bool, str, type(None)])


@dataclass(frozen=True, eq=False)
class ModelState:
    """tensors: which memory the weights are, and how often each was written; settings: the attributes of modules;
    others: hooks, adapters and weights that are not plain tensors; samples: a hash of values of the weights.
    """

    tensors: list[tuple[Any, ...]]
    settings: list[Any]
    others: list[Any]
    samples: str

    def same(self, other: ModelState) -> bool:
        """Compare; within one process, the same state means an unchanged model."""
        return (
            self.samples == other.samples
            and self.tensors == other.tensors
            and self.others == other.others
            and len(self.settings) == len(other.settings)
            and (all(map(is_, self.settings, other.settings)) or _equal(self.settings, other.settings))
        )


def _equal(one: list[Any], two: list[Any]) -> bool:
    """Whether attributes that are plain values are equal; others (the module's own dictionaries) are seen elsewhere."""
    return all(
        a is b or a == b
        for a, b in zip(one, two, strict=True)
        if type(a) in _SCALARS or type(b) in _SCALARS
    )


@torch.no_grad()
def model_state(model: nn.Module) -> ModelState:
    """Take the state of `model`. Raises UnsupportedModelError for a weight that cannot be identified."""
    tensors: dict[int, Tensor] = {}
    settings: list[Any] = []
    others: list[Any] = []
    odd, wrappers = False, dict[type[nn.Module], bool]()
    modules, seen = [model], {model}
    for module in modules:
        own = module.__dict__
        # A prepared model (hf_cachegen.attach) has a `generate` of its own, which changes no key or value.
        settings.extend(own.values() if "generate" not in own else [own[name] for name in own if name != "generate"])
        if "forward" in own or own["_forward_hooks"] or own["_forward_pre_hooks"]:
            others += [own.get("forward"), *own["_forward_hooks"].values(), *own["_forward_pre_hooks"].values()]
        kind = type(module)
        if kind not in wrappers:
            wrappers[kind] = hasattr(kind, "merged_adapters")
        if wrappers[kind] or "merged_adapters" in own:
            others += adapter_state(module)
        buffers = own["_buffers"]
        if "rope_type" in own:
            buffers = {name: buffer for name, buffer in buffers.items() if not rewritten(module, name)}
        for tensor in (*own["_parameters"].values(), *buffers.values()):
            if type(tensor) in _PLAIN and not tensor.is_meta:
                tensors[id(tensor)] = tensor
            elif tensor is not None:
                odd = True
        for inner in own["_modules"].values():
            if inner is not None and inner not in seen:
                seen.add(inner)
                modules.append(inner)
    others += [kind.forward for kind in wrappers]
    if odd:
        others += _odd(model, tensors)
    weights = list(tensors.values())
    return ModelState([tensor_state(tensor) for tensor in weights], settings, others, sampled(weights))


def tensor_state(tensor: Tensor) -> tuple[Any, ...]:
    """Describe which memory a tensor is and how often it was written; never equal where torch does not count."""
    try:
        return (id(tensor), tensor._version, tensor.data_ptr(), tensor.shape)
    except RuntimeError:  # made in inference mode
        return (object(),)


def adapter_state(module: Any) -> list[str]:
    """Describe what one of PEFT's tuner layers keeps beside tensors: which adapters take part, and their settings."""
    settings = [f"{name}={value}" for name, value in vars(module).items() if isinstance(value, dict) and name[0] != "_"]
    taking_part = module.active_adapters, module.disable_adapters, module.merged_adapters
    return [str(taking_part), *settings]


def _odd(model: nn.Module, tensors: dict[int, Tensor]) -> list[Any]:
    """Weights that are not plain tensors of this process: adds the tensors that they are stored in to `tensors`."""
    found: list[Any] = []
    for path, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and (type(tensor) not in _PLAIN or tensor.is_meta):
                kept = stored(module, path, name, tensor)
                tensors.update((id(inner), inner) for inner in kept.tensors)
                found += [kept.source, kept.settings]
    return found


def sampled(tensors: list[Tensor]) -> str:
    """A hash of a few values of each tensor; at most one transfer for each dtype of a device."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    found = xxhash.xxh3_128()
    for tensor in tensors:
        size = tensor.nbytes
        if size and tensor.is_cpu and tensor.is_contiguous():
            # Much cheaper than an operation of torch; the tensor's memory has `size` bytes from its address on.
            address, part = tensor.data_ptr(), min(SAMPLE_BYTES, size // 2 + 1)
            found.update(string_at(address, part) + string_at(address + size // 2, min(part, size - size // 2)))
        elif size:
            # Not every operation knows every float of 8 bits.
            values = tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
            values = values.view(-1) if values.is_contiguous() else values[(0,) * (values.dim() - 1)]
            groups.setdefault((values.device, values.dtype), []).append(values[:: max(1, len(values) // SAMPLES)])
    for values_of in groups.values():
        found.update(torch.cat(values_of).view(torch.uint8).cpu().numpy().tobytes())
    return found.hexdigest()
