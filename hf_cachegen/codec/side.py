"""The side information of an artifact, which all its chunks share: steps, means and table entries.

At most 6 bytes for each channel, with 3 levels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_cachegen.codec.section import Cursor
from hf_cachegen.codec.tables import shipped_codebooks
from hf_cachegen.config import CacheGenConfig
from hf_cachegen.errors import CorruptError


@dataclass(frozen=True)
class Side:
    """The side information of one artifact. Every tensor is [channels]; refine_entries is [levels - 1, channels].

    Attributes:
        step_codes: uint8: the finest steps (`quantize.steps_of`).
        means: int16, in 1/16 of the coarsest step; zero where there are anchors.
        anchor_entries: uint8 entries of the shipped codebook; zero where there are no anchors.
        base_entries: uint8 entries of the shipped codebook.
        refine_entries: uint8 entries of the shipped codebook.
    """

    step_codes: Tensor
    means: Tensor
    anchor_entries: Tensor
    base_entries: Tensor
    refine_entries: Tensor

    @classmethod
    def read(cls, cursor: Cursor, channels: int, config: CacheGenConfig, *, anchors: bool) -> Side:
        """Read the bytes that `to_bytes` wrote. Raises TruncatedError or CorruptError for bytes that no encoder writes.
        """
        steps = cursor.tensor(channels, torch.uint8)
        means, peaks = torch.zeros(channels, dtype=torch.int16), torch.zeros(channels, dtype=torch.uint8)
        if anchors:
            peaks = cursor.tensor(channels, torch.uint8)
        else:
            means = cursor.tensor(channels, torch.int16)
        base = cursor.tensor(channels, torch.uint8)
        refine = cursor.tensor(channels * (config.levels - 1), torch.uint8).reshape(config.levels - 1, channels)
        cursor.finish()
        values, digits = shipped_codebooks(config.prob_bits)
        for entries, book in ((peaks, values), (base, values), (refine, digits)):
            if bool((entries >= book.entries).any()):
                raise CorruptError("a table entry of the side information is outside the codebook")
        return cls(steps, means, peaks, base, refine)

    def to_bytes(self, *, anchors: bool) -> bytes:
        """Return the tensors one after the other.

        With anchors, the entries of the anchors' tables are written instead of the means: the differences have no mean.
        """
        own = self.anchor_entries if anchors else self.means
        parts = (self.step_codes, own, self.base_entries, self.refine_entries)
        return b"".join(part.contiguous().numpy().tobytes() for part in parts)
