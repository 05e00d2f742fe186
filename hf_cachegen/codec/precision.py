"""Matrix products on CUDA at full precision, independent of the settings of the process.

A user can let torch multiply float32 as TF32, or add bfloat16 products in bfloat16. Decoded values would then be wrong
by more than a rounding of the cache's dtype, on one device and not on another. These settings belong to the process. So
they are changed for the products alone, and the last thread that multiplies restores them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_lock = threading.Lock()
_users = 0
_before: tuple[Any, Any] = (None, None)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Multiply float32 as float32, and add bfloat16 products in float32, inside this context on a CUDA device.

    Products of other threads have full precision too, until the last user leaves.
    """
    global _users, _before
    if device.type != "cuda":
        yield
        return
    with _lock:
        if _users == 0:
            _before = _get()
            _set(_EXACT)
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _set(_before)


_settings = torch.backends.cuda.matmul
_NEW = hasattr(_settings, "fp32_precision")
"""Whether torch has the setting that replaces allow_tf32; they must not be mixed."""
_EXACT: tuple[Any, Any] = ("ieee" if _NEW else False, False)


def _get() -> tuple[Any, Any]:
    float32 = _settings.fp32_precision if _NEW else _settings.allow_tf32
    return float32, _settings.allow_bf16_reduced_precision_reduction


def _set(values: tuple[Any, Any]) -> None:
    if _NEW:
        _settings.fp32_precision = values[0]
    else:
        _settings.allow_tf32 = values[0]
    _settings.allow_bf16_reduced_precision_reduction = values[1]
