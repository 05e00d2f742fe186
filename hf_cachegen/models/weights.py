"""The identity of a model's weights: every byte of every parameter and buffer that takes part.

Parameters, persistent buffers and buffers of integers count bit by bit. Floating-point buffers that no checkpoint holds
are left to `models.buffers`, and so are the frequencies that a model rewrites while it runs. Names are those of the
model without wrappers: PEFT's layers and torch.compile change no weight. The weights of adapters belong to
`models.adapters`.

A checksum is kept for each tensor and computed again when the tensor was written or moved, so tied weights are read
once, and an unchanged model not at all.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from hf_cachegen.models.checksum import checksum_of_text, checksums
from hf_cachegen.models.compat import unwrapped
from hf_cachegen.models.compressed import stored_weights
from hf_cachegen.models.object_state import tensor_state
from hf_cachegen.models.samples import Samples
from hf_cachegen.models.storage import Stored, has_adapters, rewritten

WRAPPED = ("_orig_mod", "base_layer", "original_module", "token_adapter")
"""Children that torch.compile and PEFT put a module into."""

_known: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""The first tensor that a weight is stored in -> (state of all of them, checksum)."""
_on_disk: dict[Hashable, tuple[list[Any], str]] = {}
"""Source of an offloaded weight -> the same."""


@dataclass(frozen=True)
class Weight:
    """A tensor of a model: its name without wrappers, and how it is stored.

    computed: it is a floating-point buffer that no checkpoint holds.
    """

    name: str
    stored: Stored
    computed: bool


def weights_checksum(model: nn.Module) -> str:
    """Compute the checksum of all weights of `model`, those of adapters excluded.

    Returns:
        32 hexadecimal digits, the same for every way in which the weights can be stored.

    Raises:
        UnsupportedModelError: A weight cannot be identified; the message names it.
    """
    found = [weight for weight in weights(model) if not weight.computed]
    digests = checksums_of([weight.stored for weight in found])
    lines = (f"{weight.name} {digest}" for weight, digest in zip(found, digests, strict=True))
    return checksum_of_text(sorted(lines))


def forget_checksums(model: nn.Module) -> None:
    """Forget the checksums of all weights of `model`, adapters included."""
    for path, module in unwrapped(model).named_modules():
        for _, kept in stored_weights(module, path):
            _on_disk.pop(kept.source, None)
            for tensor in kept.tensors:
                _known.pop(tensor, None)


def weights(model: nn.Module) -> Iterator[Weight]:
    """Walk over the weights of `model`; adapters and what the model rewrites while it runs are left out."""
    stack: list[tuple[str, str, nn.Module]] = [("", "", unwrapped(model))]
    while stack:
        path, name, module = stack.pop()
        for local, kept in stored_weights(module, path):
            if not rewritten(module, local):
                buffer = module._buffers.get(local) if local in module._non_persistent_buffers_set else None
                yield Weight(f"{name}.{local}", kept, buffer is not None and buffer.is_floating_point())
        adapters = adapter_children(module) if has_adapters(module) else frozenset()
        for local, inner in module._modules.items():
            if inner is not None and local not in adapters:
                wrapped = local in WRAPPED
                stack.append((f"{path}.{local}".lstrip("."), name if wrapped else f"{name}.{local}", inner))


def adapter_children(module: nn.Module) -> frozenset[str]:
    """The children of one of PEFT's layers that hold its adapters."""
    names = (*getattr(module, "adapter_layer_names", ()), *getattr(module, "other_param_names", ()))
    return frozenset(name for name in names if "." not in name)


@torch.no_grad()
def checksums_of(found: Sequence[Stored]) -> list[str]:
    """Compute checksums of stored weights, in their canonical form; a weight that was not written is not read again."""
    keys = [one.source if one.source is not None else id(one.tensors[0]) for one in found]
    states = [[one.settings, *((tensor_state(t), Samples([t]).read([t])) for t in one.tensors)] for one in found]
    digests: dict[Hashable, str] = {}
    todo: dict[Hashable, tuple[Stored, list[Any]]] = {}
    for key, one, state in zip(keys, found, states, strict=True):
        known = _on_disk.get(one.source) if one.source is not None else _known.get(one.tensors[0])
        if known is not None and known[0] == state:
            digests[key] = known[1]
        else:
            todo[key] = one, state
    texts: list[tuple[Hashable, str]] = []

    def parts() -> Iterator[Tensor]:
        for key, (one, _) in todo.items():
            for suffix, tensor in one.parts():
                texts.append((key, f"{suffix} {tensor.dtype} {list(tensor.shape)}"))
                yield tensor

    read: dict[Hashable, list[str]] = {key: [one.settings] for key, (one, _) in todo.items()}
    values = checksums(parts())
    for (key, text), value in zip(texts, values, strict=True):
        read[key] += [text, value]
    for key, (one, state) in todo.items():
        digests[key] = checksum_of_text(read[key])
        if one.source is not None:
            _on_disk[one.source] = state, digests[key]
        else:
            _known[one.tensors[0]] = state, digests[key]
    return [digests[key] for key in keys]
