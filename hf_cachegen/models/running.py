"""Run a model: in evaluation mode, and with the tensors of each layer on the device where it computes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from hf_cachegen.models.compat import text_decoder, unwrapped
from hf_cachegen.models.kinds import layer_contents

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_lock = threading.Lock()
_evaluating: dict[nn.Module, int] = {}
"""Modules that were in training mode, and the number of blocks that hold each of them in evaluation mode."""


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode (no dropout) for the block, and restore its mode afterwards.

    Threads that share a model may run such blocks at the same time: the last one restores.
    """
    with _lock:
        held = [module for module in model.modules() if module.training or module in _evaluating]
        for module in held:
            _evaluating[module] = _evaluating.get(module, 0) + 1
            # Set the flags alone: an overridden train() may do more, such as merging an adapter.
            module.training = False
    try:
        yield
    finally:
        with _lock:
            for module in held:
                _evaluating[module] -= 1
                if not _evaluating[module]:
                    del _evaluating[module]
                    module.training = True


def layer_devices(model: PreTrainedModel, layers: int) -> list[torch.device]:
    """Return the device on which each decoder layer computes.

    This is accelerate's execution device where it dispatched the model, else the device of the layer's weights.

    Args:
        model: the model, or a wrapper of it.
        layers: number of decoder layers.
    """
    base = unwrapped(model)
    # A model that accelerate offloads reports the meta device; its inputs may be on any device.
    device = base.device if base.device.type != "meta" else torch.device("cpu")
    for module in text_decoder(model).modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers:
            return [_device(layer, device) for layer in module]
    return [device] * layers


def kv_devices(model: PreTrainedModel) -> list[torch.device]:
    """Return the device of each layer that holds keys and values, in the order of a geometry's layers."""
    contents = layer_contents(model.config)
    devices = layer_devices(model, len(contents))
    return [device for device, content in zip(devices, contents, strict=True) if content.kind is not None]


def _device(layer: nn.Module, otherwise: torch.device) -> torch.device:
    for module in layer.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next((p.device for p in layer.parameters() if p.device.type != "meta"), otherwise)
