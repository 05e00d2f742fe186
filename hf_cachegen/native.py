"""The compiled code: finds its libraries, checks them, and calls their functions.

Twists:
1. The libraries are optional: one for tensors on the CPU, one for those on a CUDA device. `available()` says whether
   there is one, and logs a warning, once, when there is none for the CPU: the coder's reference then does the same,
   slowly. A tensor on a device that has no library, or cannot run it (an old driver, a GPU it was not compiled for), is
   coded on the CPU, and a warning says why, once.
2. The libraries know no torch: ctypes hands them addresses and sizes (the contract is cuda_ext/include/cachegen.h), and
   lets go of the interpreter's lock meanwhile. On CUDA they run on torch's current stream of the tensors' device.
3. The CPU's instruction set is chosen when a function is called: the best that the machine has, or the one that the
   environment variable CACHEGEN_CPU names (scalar, avx2 or avx512). All give the same bytes, and so does CUDA.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from enum import IntEnum
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from hf_cachegen.errors import CorruptError, NativeError, TensorError, TruncatedError

ABI_VERSION = 4
"""CG_ABI_VERSION of the header that this file was written for."""
LIBRARY, CUDA_LIBRARY = (Path(__file__).with_name(f"_{name}.so") for name in ("cpu", "cuda"))
_log = logging.getLogger(__name__)


class Isa(IntEnum):
    """enum cg_isa: instruction sets of the CPU."""

    BEST = 0
    SCALAR = 1
    AVX2 = 2
    AVX512 = 3


class TileStatus(IntEnum):
    """enum cg_status: what became of a call, or of a tile."""

    OK = 0
    BAD_ARGUMENT = 1
    BAD_FREQUENCIES = 2
    BAD_TABLES = 3
    TRUNCATED = 4
    CORRUPT = 5
    BAD_TABLE_ID = 6
    BAD_CONTEXT = 7
    BAD_SYMBOL = 8
    FAILED = 9


_FOUND = {
    TileStatus.BAD_ARGUMENT: "its bytes do not lie within the streams",
    TileStatus.BAD_TABLES: "the tables are not such as build_tables makes",
    TileStatus.TRUNCATED: "the stream ends before its last symbol",
    TileStatus.CORRUPT: "the stream is not one that an encoder wrote",
    TileStatus.BAD_TABLE_ID: "a table id names no table",
    TileStatus.BAD_CONTEXT: "a context is none of 0, 1, 2",
    TileStatus.BAD_SYMBOL: "a symbol has no frequency in its table",
    TileStatus.FAILED: "there is no memory for it",
}


def check_encoded(statuses: Iterable[int]) -> None:
    """Raises TensorError for the first tile that could not be encoded."""
    for tile, status in enumerate(map(int, statuses)):
        if status:
            raise TensorError(f"tile {tile} of the section cannot be encoded: {_FOUND[TileStatus(status)]}")


def check_decoded(statuses: Iterable[int]) -> None:
    """Raises TruncatedError or CorruptError for the first tile that could not be decoded."""
    for tile, status in enumerate(map(int, statuses)):
        if status:
            error = TruncatedError if status == TileStatus.TRUNCATED else CorruptError
            raise error(f"tile {tile} of the section cannot be decoded: {_FOUND[TileStatus(status)]}")


class Section(ctypes.Structure):
    """struct cg_section."""

    _fields_ = [
        ("tokens", ctypes.c_uint64),
        ("columns", ctypes.c_uint64),
        ("ids_per_column", ctypes.c_uint64),
        ("table_ids", ctypes.c_void_p),
        ("contexts", ctypes.c_void_p),
        ("tables", ctypes.c_void_p),
        ("tables_bytes", ctypes.c_uint64),
        ("tables_per_tile", ctypes.c_uint32),
    ]


class _Run(ctypes.Structure):
    """struct cg_run."""

    _fields_ = [("threads", ctypes.c_uint32), ("isa", ctypes.c_uint32), ("queue", ctypes.c_void_p)]


class Chunk(ctypes.Structure):
    """struct cg_chunk; here as below the addresses are those of tensors that must outlive it."""

    _fields_ = [
        ("tokens", ctypes.c_uint64),
        ("columns", ctypes.c_uint64),
        ("group_tokens", ctypes.c_uint64),
        ("anchors", ctypes.c_void_p),
        ("means", ctypes.c_void_p),
        ("steps", ctypes.c_void_p),
        ("dtype", ctypes.c_uint32),
    ]


class Output(ctypes.Structure):
    """struct cg_output."""

    _fields_ = [
        ("chunk", ctypes.POINTER(Chunk)),
        ("first", ctypes.c_uint64),
        ("gap_at", ctypes.c_uint64),
        ("gap", ctypes.c_uint64),
        ("row", ctypes.c_uint64),
        ("places", ctypes.c_void_p),
        ("columns", ctypes.c_void_p),
        ("coarser", ctypes.c_void_p * 2),
        ("n_coarser", ctypes.c_uint32),
    ]


MAX_BATCH = 8
"""CG_MAX_BATCH: chunks that one call decodes."""
MAX_BATCH_TOKENS = 1 << 20
"""CG_MAX_BATCH_TOKENS."""
BATCH_PROB_BITS = 11
"""CG_BATCH_PROB_BITS."""
VECTOR_COLUMNS = 8
"""CG_VECTOR_COLUMNS."""
BATCH_ALIGNMENT = 16
"""Of the addresses and strides that a batch is written to, in bytes."""


class Streams(ctypes.Structure):
    """struct cg_streams."""

    _fields_ = [("data", ctypes.c_void_p), ("bytes", ctypes.c_uint64), ("offsets", ctypes.c_void_p)]


class Batch(ctypes.Structure):
    """struct cg_batch."""

    _fields_ = [
        ("columns", ctypes.c_uint64),
        ("group_tokens", ctypes.c_uint64),
        ("base_ids", ctypes.c_void_p),
        ("digit_ids", ctypes.c_void_p * 2),
        ("base_tables", ctypes.c_void_p),
        ("base_tables_bytes", ctypes.c_uint64),
        ("digit_tables", ctypes.c_void_p),
        ("digit_tables_bytes", ctypes.c_uint64),
        ("means", ctypes.c_void_p),
        ("steps", ctypes.c_void_p),
        ("end_steps", ctypes.c_void_p),
        ("places", ctypes.c_void_p),
        ("tables_per_tile", ctypes.c_uint32),
        ("n_digits", ctypes.c_uint32),
        ("n_end_digits", ctypes.c_uint32),
        ("dtype", ctypes.c_uint32),
    ]


class Job(ctypes.Structure):
    """struct cg_job."""

    _fields_ = [
        ("tokens", ctypes.c_uint64),
        ("first", ctypes.c_uint64),
        ("last", ctypes.c_uint64),
        ("row", ctypes.c_uint64),
        ("anchors", ctypes.c_void_p),
        ("base", Streams),
        ("digits", Streams * 2),
        ("end_digits", Streams * 2),
        ("patches", ctypes.c_void_p),
        ("patch_offsets", ctypes.c_void_p),
        ("n_patches", ctypes.c_uint32),
        ("tile_status", ctypes.c_void_p),
    ]


_POINTER, _U32, _U64, _STATUS = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_int32
_PROTOTYPES = {
    "cg_abi_version": (_U32, []),
    "cg_probe": (_STATUS, [_POINTER, _U64, _POINTER]),
    "cg_tables_bytes": (_U64, [_U32, _U32, _U32]),
    "cg_tables_build": (_STATUS, [_POINTER, _U32, _U32, _U32, _POINTER, _U64]),
    "cg_slot_bytes": (_U64, [_U64]),
    "cg_isa_available": (_STATUS, [_U32]),
    "cg_encode": (_STATUS, [_POINTER, _POINTER, _POINTER, _U64, _POINTER, _POINTER, _POINTER]),
    "cg_pack": (_STATUS, [_POINTER, _U64, _POINTER, _U64, _POINTER, _U64, _POINTER]),
    "cg_decode": (_STATUS, [_POINTER, _POINTER, _U64, _POINTER, _POINTER, _POINTER, _POINTER]),
    "cg_decode_into": (_STATUS, [_POINTER, _POINTER, _U64, _POINTER, _POINTER, _POINTER, _POINTER]),
    "cg_decode_chunks": (_STATUS, [_POINTER, _POINTER, _U32, _POINTER]),
    "cg_fill_into": (_STATUS, [_U64, _U64, _POINTER, _POINTER]),
    "cg_patch_into": (_STATUS, [_U64, _POINTER, _POINTER, _U64, _POINTER, _POINTER]),
    "cg_rows_into": (_STATUS, [_POINTER, _U64, _U64, _U64, _POINTER, _POINTER]),
    "cg_moments": (_STATUS, [_POINTER, _POINTER, _U64, _U64, _POINTER, _POINTER, _POINTER]),
    "cg_quantise": (_STATUS, [_POINTER, _POINTER, _U32, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER]),
    "cg_restore": (_STATUS, [_POINTER, _U64, _U64, _POINTER, _POINTER, _U32, _POINTER, _POINTER]),
    "cg_contexts": (_STATUS, [_POINTER, ctypes.c_uint8, _POINTER, _U64, _POINTER, _POINTER]),
    "cg_clamp": (_STATUS, [_POINTER, _POINTER, _U64, _U64, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER]),
    "cg_count": (_STATUS, [_POINTER, _POINTER, _U64, _U64, _U32, _POINTER, _POINTER]),
}


_BATCH = "cg_decode_chunks"
"""The one function that the CPU's library does not have."""


def load(path: Path) -> ctypes.CDLL:
    """The library at `path`, its version checked. Raises NativeError for one that cannot be used."""
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in _PROTOTYPES.items():
            if name == _BATCH and not hasattr(library, name):
                continue
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise NativeError(f"{path} cannot be loaded ({error}); rebuild it: pip install --force-reinstall .") from error
    version = library.cg_abi_version()
    if version != ABI_VERSION:
        raise NativeError(f"{path} has ABI version {version}, this package needs {ABI_VERSION}; reinstall the package")
    return library


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    if not LIBRARY.exists():
        _log.warning(
            "hf_cachegen was installed without its compiled coder (%s is missing): the reference coder stands in, "
            "hundreds of times slower. Install a C++ compiler and reinstall the package.",
            LIBRARY.name,
        )
        return None
    return load(LIBRARY)


@lru_cache(maxsize=1)
def _cuda_library() -> ctypes.CDLL | None:
    return load(CUDA_LIBRARY) if CUDA_LIBRARY.exists() else None


class Probe(NamedTuple):
    """What a device says of the library: why it cannot run it, empty where it can; shared memory of a block, bytes."""

    reason: str
    shared_bytes: int


def probe(library: ctypes.CDLL) -> Probe:
    """Runs the library's empty kernel on the current device."""
    reason, shared = ctypes.create_string_buffer(256), ctypes.c_uint64()
    status = library.cg_probe(reason, len(reason), ctypes.byref(shared))
    text = reason.value.decode(errors="replace") or f"it answers {TileStatus(status).name}"
    return Probe(text if status else "", shared.value)


@lru_cache(maxsize=64)
def _cuda_probe(index: int | None) -> Probe:
    """That of a CUDA device, once; None: the current one."""
    library = _cuda_library()
    if library is None:
        return Probe(f"{CUDA_LIBRARY} is missing", 0)
    with nullcontext() if index is None or not torch.cuda.is_available() else torch.cuda.device(index):
        found = probe(library)
    if found.reason:
        name = "the current CUDA device" if index is None else f"cuda:{index}"
        _log.warning(
            "hf_cachegen's CUDA coder cannot run on %s: %s. The CPU codes instead, slower; update the driver, or build "
            "the package for this GPU (TORCH_CUDA_ARCH_LIST).",
            name,
            found.reason,
        )
    return found


def available(device: torch.device | str = "cpu") -> bool:
    """Whether there is a compiled coder for such a device, and the device runs it; a warning says once why it does not.

    Raises NativeError for a library that is damaged, or of another version.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return _cuda_library() is not None and not _cuda_probe(device.index).reason
    return device.type == "cpu" and _library() is not None


def batch_shared_bytes(device: torch.device) -> int:
    """Shared memory that cg_decode_chunks can use on a device, in bytes; 0 where there is no such function."""
    if not available(device):
        return 0
    library = _need_library(device)
    if not hasattr(library, _BATCH):
        return 0
    return _cuda_probe(device.index).shared_bytes if device.type == "cuda" else probe(library).shared_bytes


def _need_library(device: torch.device | str = "cpu") -> ctypes.CDLL:
    device = torch.device(device)
    library = _library() if device.type == "cpu" else _cuda_library()
    if library is None:
        missing = LIBRARY if device.type == "cpu" else CUDA_LIBRARY
        raise NativeError(f"the compiled coder was asked for, but {missing} is missing")
    if device.type == "cuda" and (reason := _cuda_probe(device.index).reason):
        raise NativeError(f"the CUDA coder was asked for, but cannot run on {device}: {reason}")
    return library


def available_isas() -> list[Isa]:
    """The instruction sets that can be asked for on this machine, slowest first; none without a library."""
    library = _library()
    return [isa for isa in Isa if isa and library is not None and library.cg_isa_available(isa)]


def _run(isa: int = Isa.BEST, device: torch.device | str = "cpu") -> _Run:
    if torch.device(device).type == "cuda":
        return _Run(1, Isa.BEST, torch.cuda.current_stream(device).cuda_stream)
    name = os.environ.get("CACHEGEN_CPU")
    if name and isa == Isa.BEST:
        if name.upper() not in Isa.__members__:
            raise NativeError(f"CACHEGEN_CPU must be scalar, avx2 or avx512, got {name!r}")
        isa = Isa[name.upper()]
    if not _need_library().cg_isa_available(isa):
        raise NativeError(f"this machine, or the compiled library, has no {Isa(isa).name.lower()} back-end")
    return _Run(torch.get_num_threads(), isa, None)


def _guard(device: torch.device) -> AbstractContextManager[object]:
    """Makes a CUDA device the current one: the library launches there."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def call(name: str, *arguments: object, device: torch.device | None = None, isa: int = Isa.BEST) -> None:
    """Calls a function of cachegen.h; its last argument, `run`, is added here.

    Tensors and structures are passed by address; the caller vouches for their shapes. device: where it runs; default
    that of the first tensor. Raises TensorError, NativeError.
    """
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    device = device or tensors[0].device
    if any(not a.is_contiguous() or a.device != device for a in tensors):
        raise TensorError(f"{name} needs contiguous tensors on {device}")
    addresses = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    pointers = [ctypes.byref(a) if isinstance(a, ctypes.Structure) else a for a in addresses]
    with _guard(device):
        _require_ok(getattr(_need_library(device), name)(*pointers, ctypes.byref(_run(isa, device))))


def slot_bytes(tokens: int) -> int:
    """The longest stream of a tile of so many tokens."""
    return int(_need_library().cg_slot_bytes(tokens))


def build_tables(frequencies: Tensor, prob_bits: int) -> Tensor:
    """Integers [n_tables, n_symbols], each row summing to 2^prob_bits, to the coder's opaque memory: uint8 [bytes]."""
    library = _need_library()
    n_tables, n_symbols = frequencies.shape
    rows = frequencies.to(torch.int32).to(torch.uint16).contiguous()
    size = library.cg_tables_bytes(n_tables, n_symbols, prob_bits)
    memory = torch.empty(size, dtype=torch.uint8)
    _require_ok(library.cg_tables_build(rows.data_ptr(), n_tables, n_symbols, prob_bits, memory.data_ptr(), size))
    return memory


def _require_ok(status: int) -> None:
    if status:
        raise NativeError(f"the compiled coder refused its arguments: {TileStatus(status).name}")
