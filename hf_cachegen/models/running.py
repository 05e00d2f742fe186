"""How a model is run: in evaluation mode, and with the tensors of each layer on the device where it computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from hf_cachegen.models.compat import unwrapped

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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


def layer_devices(model: PreTrainedModel, layers: int) -> list[torch.device]:
    """Where each decoder layer computes: accelerate's execution device where it placed the model, else its weights'."""
    base = unwrapped(model)
    # A model that accelerate offloads says that it is on the meta device; its inputs may come from anywhere.
    device = base.device if base.device.type != "meta" else torch.device("cpu")
    for module in base.modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers:
            return [_device(layer, device) for layer in module]
    return [device] * layers


def _device(layer: nn.Module, otherwise: torch.device) -> torch.device:
    for module in layer.modules():
        place = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if place is not None:
            return torch.device(place)
    return next((p.device for p in layer.parameters() if p.device.type != "meta"), otherwise)
