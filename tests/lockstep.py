"""The CUDA kernels on the CPU: the library that another compiler than nvcc makes of them, in lockstep."""

from __future__ import annotations

import atexit
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hf_cachegen.codec import native

ROOT = Path(__file__).resolve().parent.parent
COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
CPU_SOURCES = sorted(map(str, (ROOT / "cuda_ext" / "cpu").glob("*.cpp")))
KERNEL_SOURCES = sorted(map(str, (ROOT / "cuda_ext" / "cuda").glob("*.cu")))
STRICT = ["-std=c++17", "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wshadow", "-Werror", "-pthread"]
STRICT += ["-ffp-contract=off", "-x", "c++"]

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


@functools.cache
def library() -> Path:
    """The kernels' library, compiled once a process."""
    folder = tempfile.mkdtemp(prefix="lockstep-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = Path(folder) / "lockstep.so"
    subprocess.run([str(COMPILER), *STRICT, "-O2", "-fPIC", "-shared", *KERNEL_SOURCES, "-o", str(path)], check=True)
    return path


@contextmanager
def in_lockstep() -> Iterator[None]:
    """Whatever the package does with the compiled coder meanwhile, the kernels do."""
    own = native.LIBRARY
    try:
        native.LIBRARY = library()
        native._library.cache_clear()
        yield
    finally:
        native.LIBRARY = own
        native._library.cache_clear()
