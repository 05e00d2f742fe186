"""Weights that compressed-tensors keeps compressed until the first forward pass, which decompresses them for good.

The canonical form of such a weight is the decompressed one, the only form that is known both before and after. It is
computed by the library's own function, weight by weight, and the model is left as it is. The scheme belongs to the
model's configuration.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from hf_cachegen.errors import UnsupportedModelError
from hf_cachegen.models.storage import Parts, Stored, stored

COMPRESSED = "compressed"
"""Value of a module's `quantization_status` until its first forward pass."""


def stored_weights(module: nn.Module, path: str) -> Iterator[tuple[str, Stored]]:
    """Find how the parameters and buffers that `module` owns are stored, under the names that a forward pass leaves.

    Args:
        module: The module.
        path: Its name, for messages.

    Raises:
        UnsupportedModelError: A weight cannot be identified; the message names it.
    """
    named = {**module._parameters, **module._buffers}
    tensors: dict[str, Tensor] = {name: tensor for name, tensor in named.items() if tensor is not None}
    status = vars(module).get("quantization_status")
    if getattr(status, "value", status) != COMPRESSED or any(tensor.is_meta for tensor in tensors.values()):
        for name, tensor in tensors.items():
            yield name, stored(module, path, name, tensor)
        return
    for name, tensor in _decompressed(module, path, tensors).items():
        if tensors.get(name) is tensor:
            yield name, stored(module, path, name, tensor)
        else:
            yield name, _computed(module, path, tensors, name)


def _computed(module: nn.Module, path: str, tensors: dict[str, Tensor], name: str) -> Stored:
    """A tensor that decompression computes: it is known by the tensors that it is computed from, its own one first."""
    own = next((tensors[key] for key in (name, f"{name}_packed") if key in tensors), None)
    others = [tensor for tensor in tensors.values() if tensor is not own]

    def parts() -> Parts:
        return [("", _decompressed(module, path, tensors)[name])]

    return Stored((*(() if own is None else (own,)), *others), parts)


def _decompressed(module: Any, path: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the first forward pass replaces the tensors of a module with."""
    scheme = module.quantization_scheme
    try:
        compressors = import_module("compressed_tensors.compressors")
        infer = import_module("compressed_tensors.compressors.format").infer_module_format
        form = scheme.format or infer(type(module), scheme)
        compressor = compressors.BaseCompressor.get_value_from_registry(getattr(form, "value", form))
        found: dict[str, Tensor] = compressor.decompress(tensors, scheme)
    except (ImportError, AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UnsupportedModelError(
            f"the weights of {path} are compressed in a form that this release of compressed-tensors does not "
            f"decompress by itself ({error}): run one forward pass first, or load the model with dequantize=True"
        ) from error
    return found
