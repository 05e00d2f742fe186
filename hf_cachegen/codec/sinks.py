"""Attention sinks: the few tokens that a model looks at whatever it is asked, the first of a context above all.

An error in a sink reaches every answer. On SmolLM2-135M the first token has three fifths of the sensitivity of a whole
context, and the few per cent of tokens whose keys are much shorter than others' have more than four fifths (that short
keys are looked at most is known from Devoto et al., "A simple and effective L2 norm-based strategy for KV cache
compression", 2024). So

- klt codes sinks with steps FINER times as fine, at every level, and lists them in the side information;
- identity, where the first token alone matters, keeps that one exactly, if it is a sink (`FirstToken`); for delta it is
  an anchor, which does as well.

Which tokens are sinks follows from the cache alone; in models without any, nothing is stored. Figures:
docs/rate_distortion.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hf_cachegen.codec.chunk import LossyCodec, Span
from hf_cachegen.codec.fit import Chunks
from hf_cachegen.codec.into import Target

FINER = 4.0
LEAST_GAP, GAP_DEVIATIONS = 0.17, 3.5
"""A sink's keys are shorter than the context's median by so much of a nat, and by so many deviations of the others."""
DEVIATION = 1.4826
"""Of a normal distribution, in units of the median distance from the median."""
LEAST_TOKENS = 16
"""Of shorter contexts one cannot tell."""


def find_sinks(keys: Sequence[Tensor]) -> Tensor:
    """Positions of the sinks, int64, rising, on the CPU. keys: of each layer, [1, heads, tokens, dim]."""
    tokens = keys[0].shape[2]
    if len(keys[0]) != 1 or tokens < LEAST_TOKENS:
        return torch.empty(0, dtype=torch.int64)
    total = torch.zeros(tokens)
    for x in keys:
        total += x[0].float().norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny).log().mean(0).cpu()
    below = total.median() - total
    gap = max(LEAST_GAP * len(keys), GAP_DEVIATIONS * DEVIATION * float(below.abs().median()))
    return (below > gap).nonzero().flatten()


class FirstToken:
    """A codec of chunks that keeps the first token of the context as it is.

    row [columns]: that token, in the cache's dtype. Its place is coded as if its neighbour stood there twice: a sink's
    values are not like those of any other token.
    """

    def __init__(self, inner: LossyCodec, row: Tensor):
        self.inner, self.row = inner, row

    @property
    def parts(self) -> int:
        return self.inner.parts

    @property
    def steps(self) -> Tensor:
        return self.inner.steps

    def side_bytes(self) -> bytes:
        return self.inner.side_bytes() + self.row.contiguous().view(torch.uint8).numpy().tobytes()

    def encode(self, rows: Tensor, span: Span) -> list[bytes]:
        """As the inner codec does."""
        return self.inner.encode(blanked(rows, span), span)

    def decode(self, parts: Sequence[bytes | memoryview], span: Span, dtype: torch.dtype = torch.float32) -> Tensor:
        """As the inner codec does."""
        return self._with_first(self.inner.decode(parts, span, dtype), span)

    def decode_into(self, parts: Sequence[bytes | memoryview], span: Span, target: Target, row: int = 0) -> None:
        """As the inner codec does."""
        self.inner.decode_into(parts, span, target, row)
        if span.first == 0:
            target.put(self.row[None].to(target.device), row)

    def approximations(self, rows: Tensor, span: Span) -> list[Tensor]:
        """As the inner codec does."""
        return [self._with_first(level, span) for level in self.inner.approximations(blanked(rows, span), span)]

    def _with_first(self, rows: Tensor, span: Span) -> Tensor:
        if span.first == 0:
            rows[0] = self.row
        return rows


def blanked(rows: Tensor, span: Span) -> Tensor:
    """Rows [tokens, columns] of a chunk, the context's first token like its neighbour, or zero where it has none."""
    if span.first:
        return rows
    rows = rows.clone()
    rows[0] = rows[1] if len(rows) > 1 else 0
    return rows


def without_first(chunks: Chunks) -> Chunks:
    """The same chunks, `blanked`."""

    def found() -> Iterator[tuple[Tensor, Span]]:
        return ((blanked(rows, span), span) for rows, span in chunks())

    return found
