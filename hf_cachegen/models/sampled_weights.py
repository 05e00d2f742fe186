"""Hashes of a few values of every weight: what profiles are bound to, and what artifacts of earlier releases record
instead of checksums (`models.weights`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hf_cachegen.models.compressed import stored_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBES = 1024
"""Values read of each weight: enough that no training step, however small, leaves all of them as they were."""
GOLDEN_RATIO = 0.6180339887498949


def coarse_weights(model: PreTrainedModel, dtype: torch.dtype = torch.bfloat16) -> str:
    """SHA-256 of names, shapes and PROBES values of every weight, rounded to a dtype.

    Rounded to bfloat16, it is equal for a model in the dtype of its checkpoint, in float32 and in bfloat16. A model in
    float16 has lost small values of a bfloat16 checkpoint, so the hash to compare it with is rounded to float16.
    """
    digest = hashlib.sha256()
    for name, tensor, values in _probes(model):
        coarse = values.to(dtype) if values.is_floating_point() else values
        digest.update(f"{name} {list(tensor.shape)}\n".encode() + _bytes(coarse))
    return digest.hexdigest()


def sampled_weights(model: PreTrainedModel) -> str:
    """SHA-256 of names, shapes, dtypes and PROBES values of every weight."""
    digest = hashlib.sha256()
    for name, tensor, values in _probes(model):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode() + _bytes(values))
    return digest.hexdigest()


def _probes(model: PreTrainedModel) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, weight, PROBES of its values, on the CPU) of every weight; one transfer per device and dtype."""
    tensors = dict(_persistent(model))
    groups: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        groups.setdefault((tensor.device, tensor.dtype), {})[name] = _probe(tensor)
    found: dict[str, Tensor] = {}
    for probes in groups.values():
        values = torch.cat(list(probes.values())).cpu().split([len(probe) for probe in probes.values()])
        found.update(zip(probes, values, strict=True))
    return ((name, tensor, found[name]) for name, tensor in tensors.items())


@torch.no_grad()
def _persistent(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weights and persistent buffers, as they are stored. The others are left out: rope rewrites its own while the
    model runs.
    """
    for path, module in model.named_modules():
        # What torch.compile puts into names is no part of them.
        shown = path.replace("_orig_mod.", "").removesuffix("_orig_mod")
        for name, kept in stored_weights(module, path):
            if name not in module._non_persistent_buffers_set:
                for suffix, part in kept.parts():
                    yield f"{shown}.{name}{suffix}", part.detach()


def _probe(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1)
    return flat[_positions(len(flat)).to(flat.device)]


@lru_cache(maxsize=256)
def _positions(count: int) -> Tensor:
    """PROBES positions of `count`, all of them where there are no more. Steps of the golden ratio: spread over rows and
    columns alike, where equal steps would fall into one column of most matrices.
    """
    if count <= PROBES:
        return torch.arange(count)
    return ((torch.arange(PROBES, dtype=torch.float64) + 0.5) * GOLDEN_RATIO % 1.0 * count).long()


def _bytes(values: Tensor) -> bytes:
    return values.contiguous().view(torch.uint8).numpy().tobytes()
