"""The tables of a section's channels are prepared once for all chunks."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from hf_cachegen.codec import passes
from hf_cachegen.codec.context import Encoder
from hf_cachegen.codec.source import Source
from hf_cachegen.config import CacheGenConfig
from tests.kv_samples import sample_kv


@pytest.mark.parametrize("transform", ["delta", "identity"])
def test_bounds_of_channels_are_made_once_for_all_chunks(
    transform: Literal["delta", "identity"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise every chunk would wait for a transposed copy on the device."""
    seen: dict[tuple[int, int], set[int]] = {}
    kept = []
    clamp = passes.clamp

    def spy(symbols: torch.Tensor, low: torch.Tensor, high: torch.Tensor, contexts: torch.Tensor | None) -> object:
        assert low.T.is_contiguous()
        assert high.T.is_contiguous()
        kept.append((low, high))
        seen.setdefault(tuple(low.shape), set()).add(low.data_ptr())
        return clamp(symbols, low, high, contexts)

    monkeypatch.setattr(passes, "clamp", spy)
    # The passes over rows, which run on devices and where there is no compiler.
    monkeypatch.setattr(Source, "of", classmethod(lambda cls, target, vectors: None))
    made = Encoder(*sample_kv(), CacheGenConfig(chunk_tokens=64, transform=transform))
    assert len(list(made.chunks())) > 2
    assert kept
    # At most one of the anchors, of the base and of each refinement.
    assert sum(map(len, seen.values())) <= 1 + 3
