"""Sections to code: tables, ids, contexts and symbols drawn from a seed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_cachegen.codec import rans
from hf_cachegen.codec.rans import Tables


@dataclass
class Section:
    symbols: Tensor
    tables: Tables
    table_ids: Tensor
    contexts: Tensor | None

    def encode(self, **options: str) -> list[bytes]:
        return rans.encode(self.symbols, self.tables, self.table_ids, self.contexts, **options)

    def decode(self, streams: list[bytes], **options: str) -> Tensor:
        sizes = [len(stream) for stream in streams]
        tokens = len(self.symbols)
        return rans.decode(b"".join(streams), sizes, tokens, self.tables, self.table_ids, self.contexts, **options)

    def used_tables(self) -> Tensor:
        """Return the table of every symbol, [tokens, channels]."""
        ids = self.table_ids.long()[None].expand(len(self.symbols), -1, -1)
        if self.contexts is None:
            return ids[:, :, 0]
        return ids.gather(2, self.contexts.long()[:, :, None])[:, :, 0]

    def entropy_bytes(self) -> float:
        """Return the cross-entropy of the symbols under their tables."""
        chosen = self.tables.frequencies[self.used_tables(), self.symbols.long()]
        return float((self.tables.prob_bits - chosen.double().log2()).sum()) / 8


def frequencies_of(weights: Tensor, prob_bits: int) -> Tensor:
    """Convert rows of weights to rows of frequencies; every symbol of positive weight keeps at least 1."""
    rows = []
    for row in weights.double():
        f = (row / row.sum() * (1 << prob_bits)).floor().long().clamp(max=4095)
        f = torch.where(row > 0, f.clamp(min=1), 0)
        while (excess := int(f.sum()) - (1 << prob_bits)) != 0:
            if excess > 0:
                f[f.argmax()] -= min(excess, int(f.max()) - 1)
            else:
                f[f.masked_fill(f == 4095, 0).argmax()] += 1
        rows.append(f)
    return torch.stack(rows).to(torch.int32)


def laplace_tables(scales: list[float], prob_bits: int, n_symbols: int = 32) -> Tables:
    distance = (torch.arange(n_symbols) - n_symbols // 2).abs()
    return Tables(frequencies_of(torch.stack([torch.exp(-distance / s) for s in scales]), prob_bits), prob_bits)


def draw_section(seed: int, tokens: int, channels: int, tables: Tables, contexts: int) -> Section:
    """Draw symbols that follow their tables."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    ids = draw(len(tables.frequencies), channels, contexts).to(torch.uint8)
    chosen = draw(3, tokens, channels).to(torch.uint8) if contexts == 3 else None
    section = Section(torch.empty(tokens, channels, dtype=torch.uint8), tables, ids, chosen)
    symbol_of = torch.stack([torch.arange(len(f)).repeat_interleave(f) for f in tables.frequencies.long()])
    section.symbols = symbol_of[section.used_tables(), draw(1 << tables.prob_bits, tokens, channels)].to(torch.uint8)
    return section
