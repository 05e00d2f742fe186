"""The compiled coder as torch custom ops, on the CPU or a CUDA device.

Shapes and dtypes are those of codec/rans.py. `tables` is the result of native.build_tables, and streams are uint8
[bytes]. All are on one device; only tile_bytes int64 [tiles] is on the CPU:

    torch.ops.cachegen.encode(symbols, tables, table_ids, contexts?, isa=0) -> (streams, tile_bytes)
    torch.ops.cachegen.decode(streams, tile_bytes, tables, table_ids, contexts?, tokens, isa=0) -> symbols

The ops check every value that could make the library access memory outside a buffer. They are safe to call directly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_cachegen.codec import abi, native
from hf_cachegen.errors import CorruptError, TensorError, TruncatedError

TILE_COLUMNS = 256
"""CG_TILE_COLUMNS: channels of a tile."""
_DEVICES = ("cpu", "cuda")


def tile_count(tokens: int, columns: int) -> int:
    """Return the number of tiles of a section."""
    return 0 if tokens == 0 else -(-columns // TILE_COLUMNS)


class Section:
    """The C view of a section, with the tensors that must outlive it. Raises TensorError."""

    def __init__(
        self, tables: Tensor, table_ids: Tensor, contexts: Tensor | None, tokens: int, tables_per_tile: int = 0
    ):
        for name, tensor, dims in (("tables", tables, 1), ("table_ids", table_ids, 2), ("contexts", contexts, 2)):
            if tensor is not None and (tensor.dtype != torch.uint8 or tensor.dim() != dims):
                raise TensorError(
                    f"{name} must be uint8 with {dims} dimensions, got {tensor.dtype} {list(tensor.shape)}"
                )
            if tensor is not None and tensor.device != tables.device:
                raise TensorError(f"{name} must be on {tables.device} like the tables, got {tensor.device}")
        if tokens < 0:
            raise TensorError(f"tokens must be at least 0, got {tokens}")
        shape = (tokens, table_ids.shape[0])
        if contexts is not None and tuple(contexts.shape) != shape:
            raise TensorError(f"contexts must be {list(shape)}, got {list(contexts.shape)}")
        self.kept = [tensor.contiguous() for tensor in (tables, table_ids, contexts) if tensor is not None]
        where = [tensor.data_ptr() for tensor in self.kept] + [None]
        ids_per_column = table_ids.shape[1]
        addresses = (where[1], where[2], where[0])
        self.view = abi.Section(*shape, ids_per_column, *addresses, tables.numel(), tables_per_tile)
        self.tiles = tile_count(*shape)


def offsets_of(tile_bytes: Tensor, tiles: int, streams: Tensor) -> Tensor:
    """Return where each stream begins, and where the last one ends: int64 [tiles + 1], on the streams' device.

    Raises:
        TensorError: The tensors have another dtype or shape.
        CorruptError: The sizes do not fit the section.
        TruncatedError: The streams are shorter than the sum of their sizes.
    """
    if streams.dtype != torch.uint8 or streams.dim() != 1 or tile_bytes.dtype != torch.int64 or tile_bytes.dim() != 1:
        raise TensorError("streams must be uint8 [bytes] and tile_bytes int64 [tiles]")
    if len(tile_bytes) != tiles or not bool(((tile_bytes >= 0) & (tile_bytes <= streams.numel())).all()):
        found = tile_bytes[:8].tolist()
        raise CorruptError(f"expected the sizes of {tiles} tiles, each of 0 to {streams.numel()} bytes, got {found}")
    offsets = torch.zeros(tiles + 1, dtype=torch.int64)
    torch.cumsum(tile_bytes, 0, out=offsets[1:])
    if int(offsets[-1]) > streams.numel():
        raise TruncatedError(f"streams of {int(offsets[-1])} bytes expected, {streams.numel()} found")
    return offsets.to(streams.device, non_blocking=True)


@torch.library.custom_op("cachegen::encode", mutates_args=(), device_types=_DEVICES)
def encode(
    symbols: Tensor, tables: Tensor, table_ids: Tensor, contexts: Tensor | None, isa: int = 0
) -> tuple[Tensor, Tensor]:
    """Encode symbols uint8 [tokens, channels] to (streams, one after the other; bytes of each).

    Raises:
        TensorError: The arguments do not fit together, or a symbol has no frequency.
        NativeError: The library failed.
    """
    if symbols.dtype != torch.uint8 or symbols.dim() != 2 or symbols.device != tables.device:
        found = f"{symbols.dtype} {list(symbols.shape)} on {symbols.device}"
        raise TensorError(f"symbols must be uint8 [tokens, channels] on {tables.device}, got {found}")
    section, device = Section(tables, table_ids, contexts, len(symbols)), symbols.device
    if section.view.columns != symbols.shape[1]:
        raise TensorError(f"expected the table ids of {symbols.shape[1]} channels, got {section.view.columns}")
    slot_bytes = native.slot_bytes(len(symbols))
    # Most of it is never touched, so on the CPU it takes no memory.
    slots = torch.empty(section.tiles * slot_bytes, dtype=torch.uint8, device=device)
    sizes = torch.empty(section.tiles, dtype=torch.int64, device=device)
    statuses = torch.empty(section.tiles, dtype=torch.int32, device=device)
    buffers = (symbols.contiguous(), slots, slots.numel(), sizes, statuses)
    native.call("cg_encode", section.view, *buffers, device=device, isa=isa)
    native.check_encoded(statuses.tolist())
    tile_bytes = sizes.cpu()
    streams = torch.empty(int(tile_bytes.sum()), dtype=torch.uint8, device=device)
    native.call("cg_pack", slots, slot_bytes, sizes, section.tiles, streams, streams.numel(), device=device, isa=isa)
    return streams, tile_bytes if device.type != "cpu" else sizes


@encode.register_fake
def _(
    symbols: Tensor, tables: Tensor, table_ids: Tensor, contexts: Tensor | None, isa: int = 0
) -> tuple[Tensor, Tensor]:
    streams = symbols.new_empty(torch.library.get_ctx().new_dynamic_size())
    tiles = tile_count(symbols.shape[0], symbols.shape[1])
    return streams, torch.empty(tiles, dtype=torch.int64, device="cpu")


@torch.library.custom_op("cachegen::decode", mutates_args=(), device_types=_DEVICES)
def decode(
    streams: Tensor,
    tile_bytes: Tensor,
    tables: Tensor,
    table_ids: Tensor,
    contexts: Tensor | None,
    tokens: int,
    isa: int = 0,
) -> Tensor:
    """Decode streams to uint8 [tokens, channels]. Inverse of `encode`. Raises TruncatedError, CorruptError,
    TensorError.
    """
    section, device = Section(tables, table_ids, contexts, tokens), streams.device
    if device != tables.device:
        raise TensorError(f"streams must be on {tables.device} like the tables, got {device}")
    offsets, streams = offsets_of(tile_bytes, section.tiles, streams), streams.contiguous()
    symbols = torch.empty(tokens, table_ids.shape[0], dtype=torch.uint8, device=device)
    statuses = torch.empty(section.tiles, dtype=torch.int32, device=device)
    buffers = (streams, streams.numel(), offsets, symbols, statuses)
    native.call("cg_decode", section.view, *buffers, device=device, isa=isa)
    native.check_decoded(statuses.tolist())
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
