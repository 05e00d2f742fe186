"""Small KV caches with the properties of real ones: channels differ in scale and offset, neighbouring tokens are
similar,
and the first token is very different.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sample_kv(
    layers: int = 3, tokens: int = 150, heads: int = 2, dim: int = 16, *, v_dim: int | None = None, batch: int = 1,
    dtype: torch.dtype = torch.bfloat16, seed: int = 0,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """Return (keys, values), lists of [batch, heads, tokens, dim]."""
    generator = torch.Generator().manual_seed(seed)

    def one(width: int) -> Tensor:
        shape = (batch, heads, tokens, width)
        slow = torch.randn(batch, heads, tokens // 5 + 1, width, generator=generator).repeat_interleave(5, 2)[
            :, :, :tokens
        ]
        x = slow + 0.3 * torch.randn(shape, generator=generator)
        x = x * torch.rand(1, heads, 1, width, generator=generator).mul(3).exp() * 0.1
        x = x + 2 * torch.randn(1, heads, 1, width, generator=generator)
        x[:, :, 0] *= 30
        return x.to(dtype)

    return [one(dim) for _ in range(layers)], [one(v_dim or dim) for _ in range(layers)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Return whether all tensors are equal bit for bit, NaNs included."""
    bits = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
    return all(
        x.dtype == y.dtype and torch.equal(x.view(bits[x.dtype]), y.view(bits[y.dtype]))
        for x, y in zip(a, b, strict=True)
    )
