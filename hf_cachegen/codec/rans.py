"""Code symbols to streams and back: the interface to the entropy coders.

A *section* is a matrix of symbol indices, uint8 [tokens, channels]. It is coded as *tiles* of up to TILE_COLUMNS
adjacent channels and all tokens. Each tile is one stream. Every channel has one table, or three of which `contexts`
selects one per symbol. The format does not depend on the implementation: the native coder and `rans_reference.py`
(which defines a stream) produce the same bytes.

Errors: ConfigError and TensorError for arguments that cannot be coded; TruncatedError and CorruptError for streams that
no encoder wrote. Hostile streams, table ids and contexts end in one of these, never in undefined behaviour.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor

from hf_cachegen.codec import native, ops, rans_reference, torchac_coder
from hf_cachegen.codec.transfer import Resident, keep
from hf_cachegen.errors import ConfigError, CorruptError, TensorError, TruncatedError

Backend = Literal["native", "scalar", "avx2", "avx512", "neon", "reference"]
""""native" is the compiled coder with the best instruction set, the next four name one (codec/native.py), "reference"
is
the readable coder.
"""
_ISAS = {"native": native.Isa.BEST, **{isa.name.lower(): isa for isa in native.Isa if isa}}
_SLOW: dict[str, Any] = {"reference": rans_reference, "torchac": torchac_coder}
TILE_COLUMNS = ops.TILE_COLUMNS
_CPU = torch.device("cpu")
MAX_TABLES = 256
"""A table id is one byte."""
MAX_SYMBOLS = 256
"""A symbol is one byte."""
MAX_FREQUENCY = 4095
"""The decoder's table entry has 12 bits for a frequency."""


class Tables:
    """Integer frequencies shared by the coders. Compared by identity, because coders cache what they derive from them.

    Args:
        frequencies: Integers [n_tables, n_symbols], kept as int32. A row sums to 2^prob_bits, none is above
            MAX_FREQUENCY.
        prob_bits: 10 to 12.

    Raises:
        ConfigError: prob_bits is out of range.
        TensorError: The frequencies have another dtype, shape, range or sum.
    """

    def __init__(self, frequencies: Tensor, prob_bits: int):
        if prob_bits not in (10, 11, 12):
            raise ConfigError(f"prob_bits must be 10, 11 or 12, got {prob_bits!r}")
        shape, dtype = tuple(frequencies.shape), frequencies.dtype
        if dtype not in (torch.uint16, torch.int32, torch.int64):
            raise TensorError(f"frequencies must be uint16, int32 or int64, got {dtype}")
        if len(shape) != 2 or not (1 <= shape[0] <= MAX_TABLES and 1 <= shape[1] <= MAX_SYMBOLS):
            wanted = f"1 to {MAX_TABLES} tables, 1 to {MAX_SYMBOLS} symbols"
            raise TensorError(f"frequencies must be [{wanted}], got {list(shape)}")
        frequencies = frequencies.detach().to("cpu", torch.int64)
        least, most = int(frequencies.min()), int(frequencies.max())
        if least < 0 or most > MAX_FREQUENCY:
            raise TensorError(f"frequencies must be within 0..{MAX_FREQUENCY}, got {least}..{most}")
        wrong = (frequencies.sum(1) != 1 << prob_bits).nonzero().flatten().tolist()
        if wrong:
            total = int(frequencies[wrong[0]].sum())
            raise TensorError(f"the frequencies of table {wrong[0]} must sum to 2^{prob_bits}, got {total}")
        self.frequencies, self.prob_bits = frequencies.to(torch.int32), prob_bits

    @cached_property
    def native(self) -> Tensor:
        """The lookup tables of the compiled coder: opaque uint8 [bytes], built once; may be copied to a device."""
        return native.build_tables(self.frequencies, self.prob_bits)

    @cached_property
    def _resident(self) -> Resident:
        return Resident()

    def on(self, device: torch.device) -> Tensor:
        """Return `native` on a device, copied there once."""
        found: Tensor = self._resident.get(device, "native", lambda: keep(self.native, device))
        return found


def tile_count(channels: int) -> int:
    """Return the number of tiles of a section with tokens. A section without tokens has no tiles."""
    return -(-channels // TILE_COLUMNS)


def encode(
    symbols: Tensor,
    tables: Tables,
    table_ids: Tensor,
    contexts: Tensor | None = None,
    coder: str = "rans",
    backend: Backend | None = None,
) -> list[bytes]:
    """Encode a section to one stream per tile.

    Args:
        symbols: uint8 [tokens, channels], on any device.
        tables: The tables that the ids refer to.
        table_ids: uint8 [channels, 1 or 3], on the CPU.
        contexts: uint8 [tokens, channels], 0 to 2, on the symbols' device; given if and only if there are three ids.
        coder: "rans" or "torchac".
        backend: Name of the implementation of rans. None: the best one.

    Returns:
        The streams.

    Raises:
        TensorError: A symbol has no frequency in its table, or the arguments do not fit together.
        ConfigError: The coder or the backend is unknown.
    """
    if symbols.dim() != 2:
        raise TensorError(f"symbols must be [tokens, channels], got {tuple(symbols.shape)}")
    if not native.available(device := symbols.device):
        device, symbols, contexts = _CPU, symbols.cpu(), contexts if contexts is None else contexts.cpu()
    _require_bytes("symbols", symbols, (symbols.shape[0], symbols.shape[1]), device)
    _check_side(symbols.shape[0], symbols.shape[1], table_ids, contexts, device)
    if symbols.numel() == 0:
        return []
    chosen = _choose(coder, backend)
    if chosen in _ISAS:
        side = (tables.on(device), table_ids.to(device), contexts)
        packed, sizes = torch.ops.cachegen.encode(symbols, *side, _ISAS[chosen])
        return [stream.tobytes() for stream in _cut(memoryview(packed.cpu().numpy()), sizes.tolist())]
    return _SLOW[chosen].encode(symbols.cpu().numpy(), _side(tables, table_ids, contexts))


def decode(
    streams: bytes | bytearray | memoryview,
    tile_bytes: Sequence[int],
    tokens: int,
    tables: Tables,
    table_ids: Tensor,
    contexts: Tensor | None = None,
    coder: str = "rans",
    backend: Backend | None = None,
) -> Tensor:
    """Decode the streams of a section. Inverse of `encode`.

    Args:
        streams: The streams, one after the other.
        tile_bytes: Bytes of each stream.
        tokens: Number of tokens of the section.
        tables: The tables that the ids refer to.
        table_ids: uint8 [channels, 1 or 3], on the CPU.
        contexts: uint8 [tokens, channels], 0 to 2; given if and only if there are three ids.
        coder: "rans" or "torchac".
        backend: Name of the implementation of rans. None: the best one.

    Returns:
        uint8 [tokens, channels], on the CPU.

    Raises:
        TruncatedError, CorruptError: No encoder wrote these streams.
        TensorError: The arguments do not fit together.
        ConfigError: The coder or the backend is unknown.
    """
    if tokens < 0:
        raise TensorError(f"tokens must be at least 0, got {tokens}")
    channels = table_ids.shape[0] if table_ids.dim() else 0
    _check_side(tokens, channels, table_ids, contexts)
    tiles = tile_count(channels) if tokens else 0
    if len(tile_bytes) != tiles or any(size < 0 for size in tile_bytes):
        raise CorruptError(f"expected the sizes of {tiles} tiles for {channels} channels, got {list(tile_bytes)[:8]}")
    data = memoryview(streams).cast("B")
    if sum(tile_bytes) > len(data):
        raise TruncatedError(f"streams of {sum(tile_bytes)} bytes expected, {len(data)} found")
    if sum(tile_bytes) < len(data):
        raise CorruptError(f"streams of {sum(tile_bytes)} bytes expected, {len(data)} found")
    if tokens == 0 or channels == 0:
        return torch.empty(tokens, channels, dtype=torch.uint8)
    chosen = _choose(coder, backend)
    if chosen in _ISAS:
        writable = bytearray(data) if data.readonly else data  # torch.frombuffer needs a writable buffer
        packed = torch.frombuffer(writable or bytearray(1), dtype=torch.uint8)[: len(data)]
        sizes = torch.tensor(list(tile_bytes), dtype=torch.int64)
        isa = _ISAS[chosen]
        decoded: Tensor = torch.ops.cachegen.decode(packed, sizes, tables.native, table_ids, contexts, tokens, isa)
        return decoded
    return torch.from_numpy(_SLOW[chosen].decode(_cut(data, tile_bytes), tokens, _side(tables, table_ids, contexts)))


def _cut(data: memoryview, sizes: Sequence[int]) -> list[memoryview]:
    return [data[end - size : end] for size, end in zip(sizes, accumulate(sizes), strict=True)]


def _side(tables: Tables, table_ids: Tensor, contexts: Tensor | None) -> rans_reference.Side:
    chosen = None if contexts is None else contexts.cpu().numpy()
    return rans_reference.Side(tables.frequencies.numpy(), tables.prob_bits, table_ids.numpy(), chosen)


def _choose(coder: str, backend: str | None) -> str:
    if coder not in ("rans", "torchac"):
        raise ConfigError(f"coder must be 'rans' or 'torchac', got {coder!r}")
    if backend not in (None, "reference", *_ISAS):
        raise ConfigError(f"backend must be None, 'reference' or one of {list(_ISAS)}, got {backend!r}")
    if coder == "torchac":
        return coder
    return backend or ("native" if native.available() else "reference")


def _check_side(
    tokens: int, channels: int, table_ids: Tensor, contexts: Tensor | None, device: torch.device = _CPU
) -> None:
    if table_ids.dim() != 2 or table_ids.shape[1] not in (1, 3):
        raise TensorError(f"table_ids must be [channels, 1 or 3], got {tuple(table_ids.shape)}")
    _require_bytes("table_ids", table_ids, (channels, table_ids.shape[1]), _CPU)
    if (contexts is not None) != (table_ids.shape[1] == 3):
        raise TensorError("contexts must be given if and only if every channel has three table ids")
    if contexts is not None:
        _require_bytes("contexts", contexts, (tokens, channels), device)


def _require_bytes(name: str, tensor: Tensor, shape: tuple[int, int], device: torch.device) -> None:
    if tensor.dtype != torch.uint8 or tuple(tensor.shape) != shape or tensor.device != device:
        found = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        raise TensorError(f"{name} must be uint8 {list(shape)} on {device}, got {found}")
