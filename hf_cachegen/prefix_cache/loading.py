"""Stored blocks -> the keys and values of each row of a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_cachegen.codec.geometry import Geometry
from hf_cachegen.codec.rows import empty_kv
from hf_cachegen.errors import ArtifactError, MismatchError, WrongDtypeError
from hf_cachegen.models.requirements import require_geometry
from hf_cachegen.prefix_cache.binding import Binding, require_same_probe
from hf_cachegen.prefix_cache.block import Block
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


NOTHING = Loaded(0, [])


class Loader:
    """Reads and decodes blocks of one family for one model.

    Args:
        tiers: where blocks are.
        binding: whose they are, and how they are encoded.
        config: the configuration of the model, which every block must fit.
        dtype: name of the dtype that the model runs in.
        devices: the device of each layer.
        arrived: called with each block that came from elsewhere than the local tier, and the bytes of its file.
    """

    def __init__(
        self, tiers: Tiers, binding: Binding, config: PreTrainedConfig, dtype: str, devices: Sequence[torch.device],
        arrived: Callable[[Block, bytes], None],
    ) -> None:  # fmt: skip
        self.tiers, self.family, self.coding = tiers, binding.family, binding.coding
        self.config, self.dtype = config, dtype
        self.devices, self.arrived = list(devices), arrived

    def rows(
        self, chains: Sequence[Sequence[bytes]], found: Sequence[Found], wait: Callable[[int], float | None]
    ) -> tuple[list[Loaded], int]:
        """Load the prefixes of all rows; what several rows share is read and decoded once.

        Args:
            chains: the keys of each row's blocks.
            found: where they are; blocks beyond are not asked for.
            wait: seconds that a row's block of this number may be waited for.

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
                tokens = shared * self._block_tokens(source)
                loaded[row] = Loaded(shared, [tensor[:, :, :tokens] for tensor in source.tensors])
            else:
                loaded[row] = self._row(wanted[row], found[row], shared, source, wait)
                decoded += loaded[row].blocks - shared
            done.append(row)
        return loaded, decoded

    def _row(
        self, keys: Sequence[bytes], found: Found, shared: int, source: Loaded, wait: Callable[[int], float | None]
    ) -> Loaded:
        rest = _after(found, shared)
        tensors: list[Tensor] = []
        geometry: Geometry | None = None
        count = shared
        for block, data, foreign in self.tiers.read(keys[shared:], rest, lambda index: wait(shared + index)):
            try:
                checked = self._checked(block)
                if geometry is None:
                    geometry = checked
                    tensors = self._room(geometry, len(keys))
                    for target, known in zip(tensors, source.tensors, strict=False):
                        target[:, :, : shared * geometry.tokens] = known[:, :, : shared * geometry.tokens]
                if checked != geometry:
                    raise MismatchError("its geometry is not that of the block before it")
                self.coding.decode_into(block, geometry, tensors, count * geometry.tokens)
            except (ArtifactError, MismatchError) as error:
                self.tiers.damaged(block.key, str(error), local=not foreign)
                break
            if foreign:
                self.arrived(block, data)
            count += 1
        if geometry is None:
            return Loaded(shared, source.tensors) if shared else NOTHING
        cut = [tensor[:, :, : count * geometry.tokens] for tensor in tensors]
        return Loaded(count, self._placed(cut))

    def _checked(self, block: Block) -> Geometry:
        geometry = self.coding.geometry(block)
        if geometry.dtype != self.dtype:
            raise WrongDtypeError(f"a block holds {geometry.dtype}, the model runs in {self.dtype}")
        require_geometry(self.config, geometry)
        require_same_probe(block.family, self.family)
        return geometry

    def _room(self, geometry: Geometry, blocks: int) -> list[Tensor]:
        """Return tensors for so many blocks: on the layers' device, or on the CPU where there are several."""
        device = self.devices[0] if len(set(self.devices)) == 1 else torch.device("cpu")
        whole = Geometry(geometry.layers, blocks * geometry.tokens, 1, geometry.dtype)
        return empty_kv(whole, [device] * len(geometry.layers))

    def _placed(self, tensors: list[Tensor]) -> list[Tensor]:
        return [tensor.to(self.devices[index // 2]) for index, tensor in enumerate(tensors)]

    @staticmethod
    def _block_tokens(loaded: Loaded) -> int:
        return int(loaded.tensors[0].shape[2]) // loaded.blocks


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
