"""State that a model keeps outside its cache, and that an earlier call may have changed.

A dynamic-NTK rotary module keeps the frequencies of the longest input that it has seen, and returns to the original
ones only below the original length, not at it. A vision-language model keeps the position offsets (`rope_deltas`) of
the last prompt with a picture, which shift the positions of a text that follows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from hf_cachegen.models.compat import unwrapped


@contextmanager
def fresh_state(model: nn.Module, *, leave_offsets: bool = False) -> Iterator[None]:
    """Run the block as if `model` had never been called, then restore the state that earlier calls left.

    leave_offsets: keep the position offsets of the block, as a stock call does. The next call may continue its cache.
    """
    found: list[tuple[Any, dict[str, Any]]] = []
    for module in unwrapped(model).modules():
        rotary, offsets = _initial_rotary(module), _initial_offsets(module)
        if rotary or offsets:
            restored = rotary if leave_offsets else {**rotary, **offsets}
            found.append((module, {name: getattr(module, name) for name in restored}))
            _set(module, {**rotary, **offsets})
    try:
        yield
    finally:
        for module, earlier in found:
            _set(module, earlier)


def _initial_rotary(module: Any) -> dict[str, Any]:
    """Return the original frequencies of a rotary module that stretches them with its input, by attribute name."""
    kinds = getattr(module, "rope_type", None)
    initial: dict[str, Any] = {}
    for layer_type, kind in kinds.items() if isinstance(kinds, dict) else [(None, kinds)]:
        prefix = "" if layer_type is None else f"{layer_type}_"
        original = getattr(module, f"{prefix}original_inv_freq", None)
        if original is not None and "dynamic" in str(kind):
            current = getattr(module, f"{prefix}inv_freq")
            initial[f"{prefix}inv_freq"] = original.to(current.device)
            if hasattr(module, f"{prefix}max_seq_len_cached"):
                initial[f"{prefix}max_seq_len_cached"] = module.original_max_seq_len
    return initial


def _initial_offsets(module: Any) -> dict[str, Any]:
    """Return the position offsets of a model that has seen no picture, by attribute name."""
    return {"rope_deltas": None} if isinstance(getattr(module, "rope_deltas", ""), Tensor | None) else {}


def _set(module: nn.Module, values: dict[str, Any]) -> None:
    for name, value in values.items():
        if name in module._buffers:
            module.register_buffer(name, value, persistent=False)
        else:
            setattr(module, name, value)
