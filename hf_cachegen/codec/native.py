"""The compiled code: find its libraries, check them, and call their functions.

Rules:
1. The libraries are optional: one for tensors on the CPU, one for tensors on a CUDA device. `available()` returns
   whether a library exists. It logs a warning, once, if there is none for the CPU: the reference coder is then used,
   which is slow. A tensor on a device without a library, or on a device that cannot run it (an old driver, a GPU that
   it was not compiled for), is coded on the CPU. A warning gives the reason, once.
2. The libraries do not use torch. ctypes passes addresses and sizes (the contract is cuda_ext/include/cachegen.h) and
   releases the interpreter's lock during a call. On CUDA they run on torch's current stream of the tensors' device.
3. The CPU's instruction set is chosen at each call: the best one of the machine, or the one that the environment
   variable CACHEGEN_CPU names (scalar, avx2, avx512 or neon). All give the same bytes, and so does CUDA.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from enum import IntEnum
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_cachegen.codec.abi import BATCH, CPU_PROTOTYPES, PROTOTYPES, Run
from hf_cachegen.errors import CorruptError, NativeError, TensorError, TruncatedError
from hf_cachegen.new_bytes import address, new_bytes

ABI_VERSION = 8
"""The CG_ABI_VERSION of the header that this file matches."""
LIBRARY, CUDA_LIBRARY = (Path(__file__).parent.parent / f"_{name}.so" for name in ("cpu", "cuda"))
_log = logging.getLogger(__name__)


class Isa(IntEnum):
    """enum cg_isa: instruction sets of the CPU."""

    BEST = 0
    SCALAR = 1
    AVX2 = 2
    AVX512 = 3
    NEON = 4


class TileStatus(IntEnum):
    """enum cg_status: the result of a call, or of a tile."""

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
    TileStatus.BAD_ARGUMENT: "its bytes are outside the streams",
    TileStatus.BAD_TABLES: "the tables were not made by build_tables",
    TileStatus.TRUNCATED: "the stream ends before its last symbol",
    TileStatus.CORRUPT: "no encoder wrote this stream",
    TileStatus.BAD_TABLE_ID: "a table id is out of range",
    TileStatus.BAD_CONTEXT: "a context is not 0, 1 or 2",
    TileStatus.BAD_SYMBOL: "a symbol has no frequency in its table",
    TileStatus.FAILED: "out of memory",
}


def check_encoded(statuses: Iterable[int]) -> None:
    """Raise TensorError for the first tile that could not be encoded."""
    for tile, status in enumerate(map(int, statuses)):
        if status:
            raise TensorError(f"tile {tile} of the section cannot be encoded: {_FOUND[TileStatus(status)]}")


def check_decoded(statuses: Iterable[int]) -> None:
    """Raise TruncatedError or CorruptError for the first tile that could not be decoded."""
    for tile, status in enumerate(map(int, statuses)):
        if status:
            error = TruncatedError if status == TileStatus.TRUNCATED else CorruptError
            raise error(f"tile {tile} of the section cannot be decoded: {_FOUND[TileStatus(status)]}")


def load(path: Path) -> ctypes.CDLL:
    """Load the library at `path` and check its version. Raises NativeError."""
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in {**PROTOTYPES, **CPU_PROTOTYPES}.items():
            if name in (BATCH, *CPU_PROTOTYPES) and not hasattr(library, name):
                continue
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise NativeError(f"{path} cannot be loaded ({error}); rebuild it: pip install --force-reinstall .") from error
    version = library.cg_abi_version()
    if version != ABI_VERSION:
        raise NativeError(f"expected ABI version {ABI_VERSION} in {path}, got {version}; reinstall the package")
    return library


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    if not LIBRARY.exists():
        _log.warning(
            "hf_cachegen was installed without its compiled coder (%s is missing). The reference coder stands in for "
            "it, hundreds of times slower. Install a C++ compiler and reinstall the package.",
            LIBRARY.name,
        )
        return None
    library = load(LIBRARY)
    if hasattr(library, "cg_use_team"):
        library.cg_use_team(torch_team())
    return library


def torch_team() -> int | None:
    """Return the address of GOMP_parallel in the library that torch's threads are from; None where torch has others."""
    found = [str(path) for path in (Path(torch.__file__).parent / "lib").glob("libgomp*.so*")]
    if len(found) != 1 or "backend: OpenMP" not in torch.__config__.parallel_info():
        return None
    try:
        return ctypes.cast(ctypes.CDLL(found[0]).GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


@lru_cache(maxsize=1)
def _cuda_library() -> ctypes.CDLL | None:
    return load(CUDA_LIBRARY) if CUDA_LIBRARY.exists() else None


class Probe(NamedTuple):
    """Whether a device can run the library.

    Attributes:
        reason: Why it cannot; empty if it can.
        shared_bytes: Shared memory of a block, in bytes.
    """

    reason: str
    shared_bytes: int


def probe(library: ctypes.CDLL) -> Probe:
    """Run the library's empty kernel on the current device."""
    reason, shared = ctypes.create_string_buffer(256), ctypes.c_uint64()
    status = library.cg_probe(reason, len(reason), ctypes.byref(shared))
    text = reason.value.decode(errors="replace") or f"it answers {TileStatus(status).name}"
    return Probe(text if status else "", shared.value)


@lru_cache(maxsize=4)
def _cpu_probe(library: ctypes.CDLL) -> Probe:
    return probe(library)


@lru_cache(maxsize=64)
def _cuda_probe(index: int | None) -> Probe:
    """Probe a CUDA device, once. None: the current device."""
    library = _cuda_library()
    if library is None:
        return Probe(f"{CUDA_LIBRARY} is missing", 0)
    with nullcontext() if index is None or not torch.cuda.is_available() else torch.cuda.device(index):
        found = probe(library)
    if found.reason:
        name = "the current CUDA device" if index is None else f"cuda:{index}"
        _log.warning(
            "hf_cachegen's CUDA coder cannot run on %s: %s. The CPU codes instead, which is slower. Update the driver, "
            "or build the package for this GPU (TORCH_CUDA_ARCH_LIST).",
            name,
            found.reason,
        )
    return found


def available(device: torch.device | str = "cpu") -> bool:
    """Return whether a compiled coder exists for a device, and the device can run it. A warning gives the reason, once.

    Raises:
        NativeError: A library is damaged, or of another version.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return _cuda_library() is not None and not _cuda_probe(device.index).reason
    return device.type == "cpu" and _library() is not None


def offers(name: str, device: torch.device) -> bool:
    """Return whether the compiled coder exists for a device and has this function."""
    return available(device) and hasattr(_need_library(device), name)


def batch_shared_bytes(device: torch.device) -> int:
    """Return the shared memory that cg_decode_chunks can use on a device, in bytes; 0 if the library has no such
    function.
    """
    if not offers(BATCH, device):
        return 0
    library = _need_library(device)
    return (_cuda_probe(device.index) if device.type == "cuda" else _cpu_probe(library)).shared_bytes


def _need_library(device: torch.device | str = "cpu") -> ctypes.CDLL:
    device = torch.device(device)
    library = _library() if device.type == "cpu" else _cuda_library()
    if library is None:
        missing = LIBRARY if device.type == "cpu" else CUDA_LIBRARY
        raise NativeError(f"the compiled coder needs {missing}, which is missing; reinstall the package")
    if device.type == "cuda" and (reason := _cuda_probe(device.index).reason):
        raise NativeError(f"the CUDA coder cannot run on {device}: {reason}; use the CPU or update the driver")
    return library


def available_isas() -> list[Isa]:
    """Return the instruction sets that this machine supports, slowest first; none without a library."""
    library = _library()
    return [isa for isa in Isa if isa and library is not None and library.cg_isa_available(isa)]


def _run(isa: int = Isa.BEST, device: torch.device | str = "cpu") -> Run:
    if torch.device(device).type == "cuda":
        return Run(1, Isa.BEST, torch.cuda.current_stream(device).cuda_stream)
    name = os.environ.get("CACHEGEN_CPU")
    if name and isa == Isa.BEST:
        if name.upper() not in Isa.__members__:
            raise NativeError(f"CACHEGEN_CPU must be scalar, avx2, avx512 or neon, got {name!r}")
        isa = Isa[name.upper()]
    if not _need_library().cg_isa_available(isa):
        raise NativeError(f"this machine, or the compiled library, has no {Isa(isa).name.lower()} back-end")
    return Run(torch.get_num_threads(), isa, None)


def _guard(device: torch.device) -> AbstractContextManager[object]:
    """Make a CUDA device the current one, where the library launches its kernels."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def call(name: str, *arguments: object, device: torch.device | None = None, isa: int = Isa.BEST) -> None:
    """Call a function of cachegen.h. Its last argument, `run`, is added here.

    Args:
        name: The function.
        arguments: Tensors and structures are passed by address. The caller guarantees their shapes.
        device: Runs the function. Default: the device of the first tensor.
        isa: Instruction set of the CPU.

    Raises:
        TensorError: A tensor is not contiguous, or on another device.
        NativeError: The library is missing, or the function failed.
    """
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    device = device or tensors[0].device
    if any(not a.is_contiguous() or a.device != device for a in tensors):
        raise TensorError(f"{name}: all tensors must be contiguous and on {device}")
    addresses = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    pointers = [ctypes.byref(a) if isinstance(a, ctypes.Structure) else a for a in addresses]
    library = _need_library(device)
    with _guard(device):
        status = getattr(library, name)(*pointers, ctypes.byref(_run(isa, device)))
        if status == TileStatus.FAILED and device.type == "cuda" and (reason := probe(library).reason):
            raise NativeError(f"{device} failed before or in {name}: {reason}")
    _require_ok(status)


def segments_of(pieces: Sequence[bytes | memoryview]) -> np.ndarray:
    """Return the address and the size of each piece, uint64 [pieces, 2] (struct cg_segment)."""
    found = np.empty((len(pieces), 2), np.uint64)
    found[:, 1] = [len(piece) for piece in pieces]
    whole = [piece for piece in pieces if isinstance(piece, bytes)]
    if len(whole) == len(pieces):  # one call for all of them
        found[:, 0] = np.frombuffer(memoryview((ctypes.c_char_p * len(whole))(*whole)), np.uint64)
    else:
        found[:, 0] = [np.frombuffer(piece, np.uint8).__array_interface__["data"][0] for piece in pieces]
    return found


def joined(addresses: np.ndarray, sizes: np.ndarray) -> bytes:
    """Join pieces of memory into bytes, by several threads.

    Args:
        addresses: int64 [pieces].
        sizes: int64 [pieces]: the bytes of each piece.
    """
    ends = np.cumsum(sizes)
    size = int(ends[-1])
    pieces = np.stack([addresses, ends - sizes, sizes], 1)  # struct cg_piece
    found = new_bytes(size)
    to, host = address(found), torch.device("cpu")
    call("cg_gather", pieces.ctypes.data, len(pieces), to, size, device=host)
    return found


def slot_bytes(tokens: int) -> int:
    """Return the largest size of the stream of a tile with `tokens` tokens, in bytes."""
    return int(_need_library().cg_slot_bytes(tokens))


def build_tables(frequencies: Tensor, prob_bits: int) -> Tensor:
    """Build the coder's lookup tables.

    Args:
        frequencies: Integers [n_tables, n_symbols], each row summing to 2^prob_bits.
        prob_bits: 10 to 12.

    Returns:
        Opaque memory, uint8 [bytes].
    """
    library = _need_library()
    n_tables, n_symbols = frequencies.shape
    rows = frequencies.to(torch.int32).to(torch.uint16).contiguous()
    size = library.cg_tables_bytes(n_tables, n_symbols, prob_bits)
    memory = torch.empty(size, dtype=torch.uint8)
    _require_ok(library.cg_tables_build(rows.data_ptr(), n_tables, n_symbols, prob_bits, memory.data_ptr(), size))
    return memory


def _require_ok(status: int) -> None:
    if status:
        raise NativeError(f"the compiled coder failed: {TileStatus(status).name}")
