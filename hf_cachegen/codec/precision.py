"""Matrix products at full precision, independent of the settings of the process and of its threads.

A user can let torch multiply float32 as TF32, or add bfloat16 products in bfloat16. Decoded values would then be wrong
by more than a rounding of the cache's dtype, on one device and not on another. These settings belong to the process. So
they are changed for the products alone, and the last thread that multiplies restores them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch

_lock = threading.Lock()
_users = 0
_before: _Values | None = None


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
            _set(_EXACT, _before)
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0 and _before is not None:
                _set(_before, _before)


@contextmanager
def without_autocast() -> Iterator[None]:
    """Multiply tensors in their own dtype inside this context. Autocast belongs to the model that a caller runs, and
    would multiply float32 in 16 bits here.
    """
    with ExitStack() as entered:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                entered.enter_context(torch.autocast(kind, enabled=False))
        yield


_settings = torch.backends.cuda.matmul
_cpu: Any = getattr(torch.backends.mkldnn, "matmul", None)
_NEW = hasattr(_settings, "fp32_precision")
"""Whether torch has the setting that replaces allow_tf32 and set_float32_matmul_precision.

Torch keeps both. Where they disagree, reading the old one is an error, in any thread. So a user's old setting is
changed by the old function, which sets both, and a user's new one by the new name.
"""


class _Values(NamedTuple):
    """The settings. `old` is "" where the user has set the new ones alone. The old function sets `cpu` too."""

    old: str
    new: Any
    cpu: Any
    reduced: Any


_EXACT = _Values("highest", "ieee" if _NEW else None, None, False)


def _get() -> _Values:
    try:
        old = torch.get_float32_matmul_precision()
    except RuntimeError:
        old = ""
    new, cpu = (_settings.fp32_precision, _cpu.fp32_precision) if _NEW else (None, None)
    return _Values(old, new, cpu, _settings.allow_bf16_reduced_precision_reduction)


def _set(values: _Values, of_user: _Values) -> None:
    if of_user.old not in ("", _EXACT.old):
        torch.set_float32_matmul_precision(values.old)
    if values.cpu is not None:
        _cpu.fp32_precision = values.cpu
    if values.new is not None:
        _settings.fp32_precision = values.new
    _settings.allow_bf16_reduced_precision_reduction = values.reduced
