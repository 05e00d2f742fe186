"""128-bit checksums of tensors' bytes, computed on each tensor's own device at memory speed.

A checksum covers every byte of a tensor in row-major order, whatever its strides. The bytes are read as little-endian
64-bit words w_0, w_1, ..., filled up with zeros, in blocks of BLOCK_WORDS words; word i of a block has the key k_i. A
block has two sums modulo 2^64:

    a = sum of w_i
    b = sum of low(x_i) * high(x_i),  x_i = w_i XOR k_i,  low and high: its halves as signed 32-bit integers

and the checksum is XXH3-128 of the number of bytes and of all a and b in order. The sum b is the NH hash (Black et al.,
UMAC, CRYPTO 1999): a change of several words goes unseen with probability 2^-32 if the keys are independent of it. The
sum a sees every change of a single word. Nothing depends on the order of the additions, so that a device can reduce a
block in parallel, and the products need no carry, so that plain torch operations compute them.

The definition is the same on every device: the compiled libraries compute it on the CPU and on a GPU in one pass;
elsewhere, and without a library, torch does in seven. Checksums find accidents; they do not resist an attacker.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import lru_cache

import torch
import xxhash
from torch import Tensor

from hf_cachegen.codec import native

BLOCK_WORDS = 2048
"""Words of a block: its keys (16 KiB) stay in a core's nearest cache, its sums are a thousandth of it."""
KEY_SEED = 0x6361_6368_6567_656E
SLAB_BYTES = {"cpu": 1 << 18}
"""Bytes that torch reduces at a time: on a CPU those that stay in a core's cache."""
SLAB_BYTES_ELSEWHERE = 1 << 26
"""On other devices: bounds the memory of temporaries to four times this."""
DEVICE_ALIGNMENT = 16
"""Alignment of the memory that the compiled code sums on a GPU, in bytes."""
MASK_64 = (1 << 64) - 1


def checksums(tensors: Iterable[Tensor]) -> list[str]:
    """Compute the checksum of each tensor.

    Args:
        tensors: Plain dense tensors of any shape, strides, dtype and device; not meta tensors. An iterator may make
            them one by one: none is kept.

    Returns:
        32 hexadecimal digits for each tensor. There is one transfer to the host per device.
    """
    sums: list[tuple[int, Tensor]] = [(tensor.nbytes, _block_sums(tensor)) for tensor in tensors]
    on_host: dict[int, Tensor] = {}
    for device in {found.device for _, found in sums}:
        of_device = {number: found for number, (_, found) in enumerate(sums) if found.device == device}
        flat = torch.cat(list(of_device.values())).cpu()
        on_host |= dict(zip(of_device, flat.split([len(found) for found in of_device.values()]), strict=True))
    return [_digest(nbytes, on_host[number].numpy().tobytes()) for number, (nbytes, _) in enumerate(sums)]


def checksum_of_text(parts: Iterable[str]) -> str:
    """Compute XXH3-128 of texts, each with its length, as 32 hexadecimal digits."""
    found = xxhash.xxh3_128()
    for part in parts:
        data = part.encode()
        found.update(len(data).to_bytes(8, "little") + data)
    return found.hexdigest()


def words(count: int, seed: int) -> list[int]:
    """Make pseudo-random 64-bit words by SplitMix64 (Steele et al., OOPSLA 2014), the same in every release."""
    found = []
    for _ in range(count):
        seed = (seed + 0x9E37_79B9_7F4A_7C15) & MASK_64
        mixed = ((seed ^ (seed >> 30)) * 0xBF58_476D_1CE4_E5B9) & MASK_64
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D0_49BB_1331_11EB) & MASK_64
        found.append(mixed ^ (mixed >> 31))
    return found


def signed(word: int) -> int:
    """Reinterpret an unsigned 64-bit word as a signed one, which torch.int64 holds."""
    return word - (1 << 64) if word >> 63 else word


@lru_cache(maxsize=16)
def _keys(device: torch.device) -> Tensor:
    return torch.tensor([signed(word) for word in words(BLOCK_WORDS, KEY_SEED)]).to(device)


def _digest(nbytes: int, sums: bytes) -> str:
    return xxhash.xxh3_128(nbytes.to_bytes(8, "little") + sums).hexdigest()


def _block_sums(tensor: Tensor) -> Tensor:
    """The sums a and b of every block: int64 [2 * blocks], on the tensor's device."""
    flat = _bytes(tensor)
    if sys.byteorder == "little" and native.offers("cg_block_sums", flat.device):
        if flat.device.type != "cpu" and flat.data_ptr() % DEVICE_ALIGNMENT:  # a view that begins inside its storage
            flat = flat.clone()
        sums = torch.empty(2 * -(-len(flat) // (8 * BLOCK_WORDS)), dtype=torch.int64, device=flat.device)
        native.call("cg_block_sums", flat, len(flat), _keys(flat.device), BLOCK_WORDS, sums)
        return sums
    return torch_block_sums(flat)


def _bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor in row-major order: uint8 [bytes], a view where it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def torch_block_sums(flat: Tensor) -> Tensor:
    """Compute the sums of every block by torch operations alone.

    Args:
        flat: uint8 [bytes], on any device.

    Returns:
        int64 [2 * ceil(bytes / 16384)]: a and b of the first block, then of the next.
    """
    if not len(flat):
        return flat.new_empty(0, dtype=torch.int64)
    slab = SLAB_BYTES.get(flat.device.type, SLAB_BYTES_ELSEWHERE)
    return torch.cat([_slab_sums(part) for part in flat.split(slab)])


def _slab_sums(part: Tensor) -> Tensor:
    whole = len(part) - len(part) % (8 * BLOCK_WORDS)
    sums = []
    if whole:
        sums.append(_sums(part[:whole]))
    if whole < len(part):
        rest = part.new_zeros(-(-(len(part) - whole) // 8) * 8)
        rest[: len(part) - whole] = part[whole:]
        sums.append(_sums(rest))
    return torch.cat(sums)


def _sums(part: Tensor) -> Tensor:
    """Sums of whole blocks, or of one shorter block; uint8 [bytes], a multiple of 8."""
    # An int64 view needs an address that is a multiple of 8.
    aligned = part if part.data_ptr() % 8 == 0 else part.clone()
    rows = aligned.view(torch.int64).view(-1, min(BLOCK_WORDS, len(part) // 8))
    mixed = (rows ^ _keys(part.device)[: rows.shape[1]]).view(torch.int32)
    products = mixed[:, 0::2].long().mul_(mixed[:, 1::2])
    return torch.stack([rows.sum(1), products.sum(1)], dim=1).view(-1)
