"""Stored blocks -> the keys and values of each row of a prompt."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from hf_cachegen.codec.geometry import Geometry
from hf_cachegen.codec.rows import empty_kv
from hf_cachegen.codec.spread import Destination
from hf_cachegen.codec.transfer import Check, Timer
from hf_cachegen.errors import ArtifactError, MismatchError, WrongDtypeError
from hf_cachegen.models.requirements import require_geometry
from hf_cachegen.prefix_cache.binding import Binding, require_member
from hf_cachegen.prefix_cache.block import Block
from hf_cachegen.prefix_cache.levels import Time
from hf_cachegen.prefix_cache.tiers import Found, Tiers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Loaded:
    """What was loaded of one row.

    Attributes:
        blocks: number of blocks.
        tensors: layer 0's keys, its values, layer 1's keys, ..., [1, heads, tokens, dim], on the layers' devices.
    """

    blocks: int
    tensors: list[Tensor]

    def cut(self, blocks: int) -> Loaded:
        """Return the first so many blocks of these."""
        if blocks >= self.blocks:
            return self
        return Loaded(blocks, [tensor[:, :, : tensor.shape[2] // self.blocks * blocks] for tensor in self.tensors])


NOTHING = Loaded(0, [])


class _Opened(NamedTuple):
    """A block whose decoding is launched. data: the bytes of its file if it came from elsewhere than the local tier.
    """

    block: Block
    data: bytes | None
    check: Check
    timer: Timer


class Loader:
    """Reads and decodes blocks of one family for one model.

    Args:
        tiers: where blocks are.
        binding: whose they are, and how they are encoded.
        config: the configuration of the model, which every block must fit.
        dtype: name of the dtype that the model runs in.
        devices: the device of each layer.
        arrived: called with each block that came from elsewhere than the local tier, and the bytes of its file.

    Attributes:
        coarse: number of blocks that were decoded below their stored level.
        decode_seconds: time of decoding.
    """

    def __init__(
        self, tiers: Tiers, binding: Binding, config: PreTrainedConfig, dtype: str, devices: Sequence[torch.device],
        arrived: Callable[[Block, bytes], None],
    ) -> None:  # fmt: skip
        self.tiers, self.family, self.coding = tiers, binding.family, binding.coding
        self.config, self.dtype = config, dtype
        self.devices, self.arrived = list(devices), arrived
        self.coarse, self.decode_seconds = 0, 0.0

    def rows(
        self, chains: Sequence[Sequence[bytes]], found: Sequence[Found], left: Time
    ) -> tuple[list[Loaded], int]:
        """Load the prefixes of all rows; what several rows share is read and decoded once.

        Args:
            chains: the keys of each row's blocks.
            found: where they are; blocks beyond are not asked for.
            left: how long to wait for the blocks of a row.

        Returns:
            For each row what was loaded, which may be less than was found; and the number of blocks decoded.
        """
        wanted = [list(keys[: where.count]) for keys, where in zip(chains, found, strict=True)]
        loaded: list[Loaded] = [NOTHING] * len(wanted)
        done: list[int] = []
        decoded = 0
        for row in sorted(range(len(wanted)), key=lambda index: -len(wanted[index])):
            if not wanted[row]:
                continue
            shared, source = 0, NOTHING
            for other in done:
                common = min(_common(wanted[row], wanted[other]), loaded[other].blocks)
                if common > shared:
                    shared, source = common, loaded[other]
            if shared == len(wanted[row]):
                loaded[row] = source.cut(shared)
            else:
                loaded[row] = self._row(wanted[row], found[row], shared, source, left)
                decoded += loaded[row].blocks - shared
            done.append(row)
        return loaded, decoded

    def _row(
        self, keys: Sequence[bytes], found: Found, shared: int, source: Loaded, left: Time
    ) -> Loaded:
        """Load the blocks of a row after those that another row shares.

        Where a device decodes, a block is launched while some before it are not checked yet.
        """
        rest, tensors = _after(found, shared), list[Tensor]()
        geometry: Geometry | None = None
        destination: Destination | None = None
        opened, count, ahead, sound = deque[_Opened](), shared, 0, True
        for block, data, foreign in self.tiers.read(keys[shared:], rest, left.after(shared)):
            try:
                checked = self._checked(block, count + len(opened))
                if geometry is None:
                    geometry = checked
                    tensors = self._room(geometry, len(keys))
                    destination = Destination(tensors) if tensors else None
                    ahead = 0 if destination is None else destination.ahead
                    for target, known in zip(tensors, source.tensors, strict=False):
                        target[:, :, : shared * geometry.tokens] = known[:, :, : shared * geometry.tokens]
                if checked != geometry:
                    raise MismatchError("its geometry is not that of the block before it")
                timer = Timer(torch.device("cpu") if destination is None else destination.device)
                check = self.coding.launch(block, geometry, destination, (count + len(opened)) * geometry.tokens)
                timer.stop()
            except (ArtifactError, MismatchError) as error:
                self.tiers.damaged(block.key, str(error), local=not foreign)
                break
            opened.append(_Opened(block, data if foreign else None, check, timer))
            if len(opened) > ahead:
                sound = self._settled(opened.popleft())
                count += sound
            if not sound:
                break
        while sound and opened:
            sound = self._settled(opened.popleft())
            count += sound
        if geometry is None:
            return Loaded(shared, source.tensors) if shared else NOTHING
        return Loaded(count, [tensor[:, :, : count * geometry.tokens] for tensor in tensors])

    def _settled(self, opened: _Opened) -> bool:
        """Wait for a block. Return whether it is sound."""
        try:
            opened.check()
        except ArtifactError as error:
            self.tiers.damaged(opened.block.key, str(error), local=opened.data is None)
            return False
        self.decode_seconds += opened.timer.seconds()
        if opened.data is not None:
            self.arrived(opened.block, opened.data)
        self.coarse += opened.block.missing > 0
        return True

    def _checked(self, block: Block, depth: int) -> Geometry:
        geometry = self.coding.geometry(block)
        if geometry.dtype != self.dtype:
            raise WrongDtypeError(f"a block holds {geometry.dtype}, the model runs in {self.dtype}")
        require_geometry(self.config, geometry)
        require_member(block, depth, self.family)
        return geometry

    def _room(self, geometry: Geometry, blocks: int) -> list[Tensor]:
        """Return tensors for so many blocks, on the layers' devices."""
        whole = Geometry(geometry.layers, blocks * geometry.tokens, 1, geometry.dtype)
        return empty_kv(whole, self.devices[: len(geometry.layers)])


def _common(first: Sequence[bytes], second: Sequence[bytes]) -> int:
    """Return the number of leading keys that two rows share. Keys are chained: one equal key means equal prefixes."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[middle - 1] == second[middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low


def _after(found: Found, blocks: int) -> Found:
    """Return where the blocks after the first so many are."""
    runs = []
    for tier, count in found.runs:
        skipped = min(blocks, count)
        blocks -= skipped
        if count > skipped:
            runs.append((tier, count - skipped))
    return Found(tuple(runs))
