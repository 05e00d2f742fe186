"""Bytes that are filled after they were made, so that no copy is needed.

Note: new bytes may be written to until another object sees them. CPython's own C code fills them in this way.
"""

from __future__ import annotations

import ctypes

_make = ctypes.pythonapi.PyBytes_FromStringAndSize
_make.restype, _make.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_ssize_t]
_address_of = ctypes.pythonapi.PyBytes_AsString
_address_of.restype, _address_of.argtypes = ctypes.c_void_p, [ctypes.py_object]


def new_bytes(size: int) -> bytes:
    """Return bytes of that length whose values are not set."""
    found: bytes = _make(None, size)
    return found


def address(data: bytes) -> int:
    """Return the address of these bytes."""
    return int(_address_of(data))
