"""The state of a model object: changes whenever something that determines keys and values may have changed.

It is taken before every reuse of a cache, so it must be cheap: one walk over the modules reads version counters and
addresses of tensors, a few values of each (`models.samples`), the plain settings and hooks of modules, and which code
the modules run. Equal states let the checks of `models.weights`, `models.adapters` and `models.probe` be skipped; a
changed one costs those checks and says nothing by itself.

What an unchanged state cannot tell, and a check therefore misses in the process in which it happens: a write past the
version counter that changes no sampled value; a change inside an object of another library that a module keeps; a
patched function that the modules' own file does not name.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from hf_cachegen.models.running_code import code_of
from hf_cachegen.models.samples import Samples
from hf_cachegen.models.storage import PLAIN, rewritten, stored

KNOWN = "_cachegen_identity"
"""Attribute of a model that keeps what is known of it."""
OWN = frozenset(["generate", KNOWN])
"""Attributes that hf_cachegen sets on a model, which change no key or value."""
_PLAIN = frozenset(PLAIN)
_SCALARS = frozenset([int, float, bool, str, type(None), torch.dtype, torch.device])


@dataclass(frozen=True, eq=False)
class ModelState:
    """walk: the modules, their children and attributes; tensors: which memory the weights are, and how often each was
    written; containers: the attributes that are lists and dictionaries of plain values; code: the functions that
    modules run; others: hooks, adapters, the values of containers, and weights that are not plain tensors; samples:
    where a few values of the weights are; sampled: their hash.
    """

    walk: _Walk
    tensors: list[tuple[Any, ...]]
    containers: list[Any]
    code: list[Any]
    others: list[Any]
    samples: Samples
    sampled: str

    def same(self, other: ModelState) -> bool:
        """Compare; within one process, the same state means an unchanged model."""
        return (
            self.sampled == other.sampled
            and self.tensors == other.tensors
            and self.others == other.others
            and _identical(self.code, other.code)
            and (self.walk.settings is other.walk.settings or _equal(self.walk.settings, other.walk.settings))
        )


def _identical(one: list[Any], two: list[Any]) -> bool:
    return len(one) == len(two) and all(map(is_, one, two))


def _equal(one: list[Any], two: list[Any]) -> bool:
    """Whether attributes that are plain values or functions are equal. Others are not compared: the module's own
    dictionaries are seen elsewhere, and models leave objects of a call (positions, masks) in attributes.
    """
    return len(one) == len(two) and all(
        a is b or a == b
        for a, b in zip(one, two, strict=True)
        if type(a) in _SCALARS or type(b) in _SCALARS or callable(a) or callable(b) or (_plain(a) and _plain(b))
    )


def _plain(value: Any) -> bool:
    """Whether a value is a scalar, or a list, tuple or dictionary of such values alone."""
    kind = type(value)
    if kind is list or kind is tuple:
        return all(map(_plain, value))
    if kind is dict:
        return all(map(_plain, value.values()))
    return kind in _SCALARS


@torch.no_grad()
def model_state(model: nn.Module, known: ModelState | None = None) -> ModelState:
    """Take the state of `model`.

    Args:
        model: The model, without wrappers.
        known: An earlier state of the same object; what has not changed since then is not found again.

    Raises:
        UnsupportedModelError: A weight cannot be identified; the message names it.
    """
    walk = None if known is None else _Walk(known.walk.modules)
    if walk is None or known is None or not _identical(walk.children, known.walk.children):
        walk = _Walk(list(model.modules()))
    kinds = dict.fromkeys(map(type, walk.modules))
    others = [*walk.hooks, *(text for module in walk.adapted for text in adapter_state(module))]
    weights = [tensor for tensor in walk.tensors if type(tensor) in _PLAIN and not tensor.is_meta]
    if len(weights) != len(walk.tensors):
        others += _odd(model, weights)
    states = [tensor_state(tensor) for tensor in weights]
    if known is not None and _identical(walk.settings, known.walk.settings):
        walk.settings, containers = known.walk.settings, known.containers
    else:
        containers = _containers(walk.modules)
    others.append(str(containers))
    if known is not None and known.tensors == states:
        states, samples = known.tensors, known.samples
    else:
        samples = Samples(weights)
    walk.tensors.clear()  # a state keeps no memory of weights alive
    return ModelState(walk, states, containers, code_of(kinds), others, samples, samples.read(weights))


class _Walk:
    """One walk over the modules of a model: their children, attributes, tensors, hooks and adapters."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules
        self.children: list[nn.Module | None] = []
        self.settings: list[Any] = []
        self.tensors: list[Tensor] = []
        self.hooks: list[Any] = []
        self.adapted: list[nn.Module] = []
        tensors: list[Tensor | None] = []
        adapted = {kind for kind in dict.fromkeys(map(type, modules)) if hasattr(kind, "merged_adapters")}
        for module in modules:
            own = module.__dict__
            if "generate" in own or KNOWN in own:
                self.settings += [value for name, value in own.items() if name not in OWN]
            else:
                self.settings += own.values()
            self.children += own["_modules"].values()
            tensors += own["_parameters"].values()
            if own["_buffers"]:
                # A rotary module writes some of its buffers while it runs.
                tensors += [buffer for name, buffer in own["_buffers"].items() if not rewritten(module, name)]
            if "merged_adapters" in own or (adapted and type(module) in adapted):
                self.adapted.append(module)
            if "forward" in own or own["_forward_hooks"] or own["_forward_pre_hooks"]:
                self.hooks += [own.get("forward"), *own["_forward_hooks"].values(), *own["_forward_pre_hooks"].values()]
        self.tensors += (tensor for tensor in tensors if tensor is not None)


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


def _containers(modules: list[nn.Module]) -> list[Any]:
    """The attributes of modules that can be edited without another value being set."""
    return [
        value
        for module in modules
        for name, value in module.__dict__.items()
        if (type(value) is list or (type(value) is dict and name[0] != "_")) and _plain(value)
    ]


def _odd(model: nn.Module, tensors: list[Tensor]) -> list[Any]:
    """Weights that are not plain tensors of this process: adds the tensors that they are stored in to `tensors`."""
    found: list[Any] = []
    for path, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and (type(tensor) not in _PLAIN or tensor.is_meta):
                kept = stored(module, path, name, tensor)
                tensors += kept.tensors
                found += [kept.source, kept.settings]
    return found
