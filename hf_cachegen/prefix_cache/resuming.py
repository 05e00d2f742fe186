"""Stored checkpoints -> where the rows of a prompt resume, for models with recurrent states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_cachegen.errors import ArtifactError, MismatchError
from hf_cachegen.models.compat import unwrapped
from hf_cachegen.models.recurrent import Checkpoint
from hf_cachegen.prefix_cache.binding import require_member
from hf_cachegen.prefix_cache.block import Block
from hf_cachegen.prefix_cache.checkpoint import decode_checkpoint
from hf_cachegen.prefix_cache.keys import Family, checkpoint_key
from hf_cachegen.prefix_cache.levels import Time
from hf_cachegen.prefix_cache.loading import Loaded
from hf_cachegen.prefix_cache.stateful import Stateful
from hf_cachegen.prefix_cache.tiers import Found, Tiers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Resuming:
    """The checkpoints that the rows of one prompt resume from.

    Args:
        tiers: where checkpoints are.
        model: the model.
        family: what its blocks belong to.
        stateful: how it begins a call.
        tokens: length of the prompt.

    Attributes:
        found: for each row that was cut, its checkpoint; None where nothing is resumed.
        arrived: checkpoints that came from elsewhere than the folder, with the bytes of their files.
    """

    def __init__(
        self, tiers: Tiers, model: PreTrainedModel, family: Family, stateful: Stateful, tokens: int
    ) -> None:
        self.tiers, self.family, self.stateful, self.tokens = tiers, family, stateful, tokens
        self.model = type(unwrapped(model)).__name__
        self.found: dict[int, Checkpoint | None] = {}
        self.arrived: list[tuple[Block, bytes]] = []
        self._read: dict[bytes, Checkpoint | None] = {}

    def cut(self, row: int, keys: Sequence[bytes], where: Found, left: Time) -> Found:
        """Cut what is stored of a row to its last checkpoint that can be read, and keep that.

        Args:
            row: the row.
            keys: the keys of its blocks.
            where: where they are.
            left: how long to wait for its blocks.
        """
        keys = keys[: min(where.count, self.stateful.usable(self.tokens))]
        self.found[row] = None
        for blocks, tier in self.tiers.checkpoints(keys, self.stateful.every):
            if not self.stateful.pays(blocks * self.stateful.width, self.tokens):
                break
            key = checkpoint_key(keys[blocks - 1])
            if key not in self._read:
                self._read[key] = self._decoded(key, blocks, Found(((tier, 1),)), Time(left.after(blocks - 1).base))
            if (checkpoint := self._read[key]) is not None:
                self.found[row] = checkpoint
                return where.cut(blocks)
        return Found(())

    def settle(self, row: int, keys: Sequence[bytes], where: Found, loaded: Loaded, left: Time) -> Loaded:
        """Return what a row resumes from after loading, which may have ended before its checkpoint."""
        if loaded.blocks < where.count:
            loaded = loaded.cut(self.cut(row, keys, where.cut(loaded.blocks), left).count)
        return loaded

    def _decoded(self, key: bytes, blocks: int, where: Found, left: Time) -> Checkpoint | None:
        for block, data, foreign in self.tiers.read([key], where, left):
            try:
                require_member(block, blocks, self.family)
                found = decode_checkpoint(block, self.stateful.found.shapes, self.model)
            except (ArtifactError, MismatchError) as error:
                self.tiers.damaged(key, str(error), local=not foreign)
                return None
            if foreign:
                self.arrived.append((block, data))
            return found
        return None
