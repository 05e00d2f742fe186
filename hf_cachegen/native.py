"""The compiled code: finds its library, checks it, and gives the coder's functions as torch custom ops.

Twists:
1. The library is optional. `available()` says whether there is one, and logs a warning, once, when there is none: the
   coder's reference then does the same, slowly.
2. The library knows no torch: ctypes hands it addresses and sizes (the contract is cuda_ext/include/cachegen.h), and
   lets go of the interpreter's lock meanwhile.
3. The ops check whatever could take the library outside a buffer, so they are safe to call directly. Shapes and dtypes
   are those of codec/rans.py, with `tables` from build_tables, streams uint8 [bytes] and tile_bytes int64 [tiles]:

       torch.ops.cachegen.encode(symbols, tables, table_ids, contexts?, isa=0) -> (streams, tile_bytes)
       torch.ops.cachegen.decode(streams, tile_bytes, tables, table_ids, contexts?, tokens, isa=0) -> symbols

4. The instruction set is chosen when a function is called: the best that the machine has, or the one that the
   environment variable CACHEGEN_CPU names (scalar, avx2 or avx512). All give the same bytes.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Iterable
from enum import IntEnum
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from hf_cachegen.errors import CorruptError, NativeError, TensorError, TruncatedError

ABI_VERSION = 2
"""CG_ABI_VERSION of the header that this file was written for."""
LIBRARY = Path(__file__).with_name("_cpu.so")
_TILE_COLUMNS = 256
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


_FOUND = {
    TileStatus.TRUNCATED: "the stream ends before its last symbol",
    TileStatus.CORRUPT: "the stream is not one that an encoder wrote",
    TileStatus.BAD_TABLE_ID: "a table id names no table",
    TileStatus.BAD_CONTEXT: "a context is none of 0, 1, 2",
    TileStatus.BAD_SYMBOL: "a symbol has no frequency in its table",
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


class _Section(ctypes.Structure):
    """struct cg_section."""

    _fields_ = [
        ("tokens", ctypes.c_uint64),
        ("columns", ctypes.c_uint64),
        ("ids_per_column", ctypes.c_uint64),
        ("table_ids", ctypes.c_void_p),
        ("contexts", ctypes.c_void_p),
        ("tables", ctypes.c_void_p),
        ("tables_bytes", ctypes.c_uint64),
    ]


class _Run(ctypes.Structure):
    """struct cg_run."""

    _fields_ = [("threads", ctypes.c_uint32), ("isa", ctypes.c_uint32), ("queue", ctypes.c_void_p)]


class Chunk(ctypes.Structure):
    """struct cg_chunk; the addresses are those of tensors that must outlive it."""

    _fields_ = [
        ("tokens", ctypes.c_uint64),
        ("columns", ctypes.c_uint64),
        ("group_tokens", ctypes.c_uint64),
        ("anchors", ctypes.c_void_p),
        ("means", ctypes.c_void_p),
        ("steps", ctypes.c_void_p),
        ("dtype", ctypes.c_uint32),
    ]


_POINTER, _U32, _U64, _STATUS = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_int32
_PROTOTYPES = {
    "cg_abi_version": (_U32, []),
    "cg_tables_bytes": (_U64, [_U32, _U32, _U32]),
    "cg_tables_build": (_STATUS, [_POINTER, _U32, _U32, _U32, _POINTER, _U64]),
    "cg_slot_bytes": (_U64, [_U64]),
    "cg_isa_available": (_STATUS, [_U32]),
    "cg_encode": (_STATUS, [_POINTER, _POINTER, _POINTER, _U64, _POINTER, _POINTER, _POINTER]),
    "cg_pack": (_STATUS, [_POINTER, _U64, _POINTER, _U64, _POINTER, _U64, _POINTER]),
    "cg_decode": (_STATUS, [_POINTER, _POINTER, _U64, _POINTER, _POINTER, _POINTER, _POINTER]),
    "cg_moments": (_STATUS, [_POINTER, _POINTER, _U64, _U64, _POINTER, _POINTER, _POINTER]),
    "cg_quantise": (_STATUS, [_POINTER, _POINTER, _U32, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER]),
    "cg_restore": (_STATUS, [_POINTER, _U64, _U64, _POINTER, _POINTER, _U32, _POINTER, _POINTER]),
    "cg_contexts": (_STATUS, [_POINTER, ctypes.c_uint8, _POINTER, _U64, _POINTER, _POINTER]),
    "cg_clamp": (_STATUS, [_POINTER, _POINTER, _U64, _U64, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER]),
    "cg_count": (_STATUS, [_POINTER, _POINTER, _U64, _U64, _U32, _POINTER, _POINTER]),
}


def load(path: Path) -> ctypes.CDLL:
    """The library at `path`, its version checked. Raises NativeError for one that cannot be used."""
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in _PROTOTYPES.items():
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


def available() -> bool:
    """Whether there is a compiled coder. Raises NativeError if there is one that cannot be used."""
    return _library() is not None


def _need_library() -> ctypes.CDLL:
    library = _library()
    if library is None:
        raise NativeError(f"the compiled coder was asked for, but {LIBRARY} is missing")
    return library


def available_isas() -> list[Isa]:
    """The instruction sets that can be asked for on this machine, slowest first; none without a library."""
    library = _library()
    return [isa for isa in Isa if isa and library is not None and library.cg_isa_available(isa)]


def _run(isa: int = Isa.BEST) -> _Run:
    name = os.environ.get("CACHEGEN_CPU")
    if name and isa == Isa.BEST:
        if name.upper() not in Isa.__members__:
            raise NativeError(f"CACHEGEN_CPU must be scalar, avx2 or avx512, got {name!r}")
        isa = Isa[name.upper()]
    if not _need_library().cg_isa_available(isa):
        raise NativeError(f"this machine, or the compiled library, has no {Isa(isa).name.lower()} back-end")
    return _Run(torch.get_num_threads(), isa, None)


def call(name: str, *arguments: object) -> None:
    """Calls a function of the passes over values (cachegen.h); its last argument, `run`, is added here.

    Tensors and structures are passed by address; the caller vouches for their shapes. Raises TensorError, NativeError.
    """
    if any(isinstance(a, Tensor) and not a.is_contiguous() for a in arguments):
        raise TensorError(f"{name} needs contiguous tensors")
    addresses = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    pointers = [ctypes.byref(a) if isinstance(a, ctypes.Structure) else a for a in addresses]
    _require_ok(getattr(_need_library(), name)(*pointers, ctypes.byref(_run())))


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


def _section(tables: Tensor, table_ids: Tensor, contexts: Tensor | None, tokens: int) -> tuple[_Section, list[Tensor]]:
    """The C view of a section, and the tensors that must outlive it."""
    for name, tensor, dims in (("tables", tables, 1), ("table_ids", table_ids, 2), ("contexts", contexts, 2)):
        if tensor is not None and (tensor.dtype != torch.uint8 or tensor.dim() != dims):
            raise TensorError(f"{name} must be uint8 with {dims} dimensions, got {tensor.dtype} {list(tensor.shape)}")
    shape = (tokens, table_ids.shape[0])
    if tokens < 0:
        raise TensorError(f"tokens must be at least 0, got {tokens}")
    if contexts is not None and tuple(contexts.shape) != shape:
        raise TensorError(f"contexts must be {list(shape)}, got {list(contexts.shape)}")
    tables, table_ids = tables.contiguous(), table_ids.contiguous()
    kept = [tables, table_ids]
    if contexts is not None:
        contexts = contexts.contiguous()
        kept.append(contexts)
    ids_per_column = table_ids.shape[1]
    where = None if contexts is None else contexts.data_ptr()
    return _Section(*shape, ids_per_column, table_ids.data_ptr(), where, tables.data_ptr(), tables.numel()), kept


@torch.library.custom_op("cachegen::encode", mutates_args=(), device_types="cpu")
def encode(
    symbols: Tensor, tables: Tensor, table_ids: Tensor, contexts: Tensor | None, isa: int = 0
) -> tuple[Tensor, Tensor]:
    """symbols uint8 [tokens, columns] to (streams back to back, bytes of each). Raises TensorError, NativeError."""
    library, run = _need_library(), _run(isa)
    if symbols.dtype != torch.uint8 or symbols.dim() != 2:
        raise TensorError(f"symbols must be uint8 [tokens, columns], got {symbols.dtype} {list(symbols.shape)}")
    symbols = symbols.contiguous()
    tokens, columns = symbols.shape
    section, kept = _section(tables, table_ids, contexts, tokens)
    if section.columns != columns:
        raise TensorError(f"symbols of {columns} columns need as many table ids, got {section.columns}")
    tiles = _tiles(tokens, columns)
    slot_bytes = library.cg_slot_bytes(tokens)
    slots = torch.empty(tiles * slot_bytes, dtype=torch.uint8)  # mostly never touched, so never in memory
    tile_bytes, statuses = torch.empty(tiles, dtype=torch.int64), torch.empty(tiles, dtype=torch.int32)
    _require_ok(
        library.cg_encode(
            ctypes.byref(section),
            symbols.data_ptr(),
            slots.data_ptr(),
            slots.numel(),
            tile_bytes.data_ptr(),
            statuses.data_ptr(),
            ctypes.byref(run),
        )
    )
    del kept
    check_encoded(statuses.tolist())
    streams = torch.empty(int(tile_bytes.sum()), dtype=torch.uint8)
    _require_ok(
        library.cg_pack(
            slots.data_ptr(),
            slot_bytes,
            tile_bytes.data_ptr(),
            tiles,
            streams.data_ptr(),
            streams.numel(),
            ctypes.byref(run),
        )
    )
    return streams, tile_bytes


@encode.register_fake
def _(
    symbols: Tensor, tables: Tensor, table_ids: Tensor, contexts: Tensor | None, isa: int = 0
) -> tuple[Tensor, Tensor]:
    tiles = _tiles(symbols.shape[0], symbols.shape[1])
    streams = symbols.new_empty(torch.library.get_ctx().new_dynamic_size())
    return streams, symbols.new_empty(tiles, dtype=torch.int64)


@torch.library.custom_op("cachegen::decode", mutates_args=(), device_types="cpu")
def decode(
    streams: Tensor,
    tile_bytes: Tensor,
    tables: Tensor,
    table_ids: Tensor,
    contexts: Tensor | None,
    tokens: int,
    isa: int = 0,
) -> Tensor:
    """The inverse of `encode`: uint8 [tokens, columns]. Raises TruncatedError, CorruptError, TensorError."""
    library, run = _need_library(), _run(isa)
    if streams.dtype != torch.uint8 or streams.dim() != 1 or tile_bytes.dtype != torch.int64 or tile_bytes.dim() != 1:
        raise TensorError("streams must be uint8 [bytes] and tile_bytes int64 [tiles]")
    section, kept = _section(tables, table_ids, contexts, tokens)
    tiles = _tiles(tokens, table_ids.shape[0])
    if len(tile_bytes) != tiles or not bool(((tile_bytes >= 0) & (tile_bytes <= streams.numel())).all()):
        found = tile_bytes[:8].tolist()
        raise CorruptError(f"{tiles} tiles need as many sizes, of 0 to {streams.numel()} bytes, got {found}")
    offsets = torch.zeros(tiles + 1, dtype=torch.int64)
    torch.cumsum(tile_bytes, 0, out=offsets[1:])
    if int(offsets[-1]) > streams.numel():
        raise TruncatedError(f"streams of {int(offsets[-1])} bytes expected, {streams.numel()} found")
    streams = streams.contiguous()
    symbols = torch.empty(tokens, table_ids.shape[0], dtype=torch.uint8)
    statuses = torch.empty(tiles, dtype=torch.int32)
    _require_ok(
        library.cg_decode(
            ctypes.byref(section),
            streams.data_ptr(),
            streams.numel(),
            offsets.data_ptr(),
            symbols.data_ptr(),
            statuses.data_ptr(),
            ctypes.byref(run),
        )
    )
    del kept
    check_decoded(statuses.tolist())
    return symbols


@decode.register_fake
def _(
    streams: Tensor,
    tile_bytes: Tensor,
    tables: Tensor,
    table_ids: Tensor,
    contexts: Tensor | None,
    tokens: int,
    isa: int = 0,
) -> Tensor:
    return streams.new_empty(tokens, table_ids.shape[0])


def _tiles(tokens: int, columns: int) -> int:
    return 0 if tokens == 0 else -(-columns // _TILE_COLUMNS)
