"""A step for each token: finer where the model minds an error more, coarser where less.

With s the sensitivity of a token (what it adds to the divergence per squared step), steps in proportion to s^(-1/2)
cost the fewest bits at one divergence, were all else alike. Nobody knows s when a context is encoded; the norms of a
token's keys, as its profile has seen them together with s, tell something of it, and on ordinary text that is worth a
quarter of the bits (docs/rate_distortion.md). All coefficients of a token are multiplied by 2^(code / 4) before they
are rounded, and divided by it again; codes are half a byte each, and stand before the base part of a chunk:

    u8 codes[ceil(tokens / 2)]      token i: code + 8 in bits 4 (i % 2) to 4 (i % 2) + 3 of byte i / 2, the rest 0
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_cachegen.codec.section import Cursor
from hf_cachegen.errors import CorruptError
from hf_cachegen.geometry import Geometry
from hf_cachegen.profile import LARGEST_TOKEN_CODE, LEAST_TOKEN_CODE, TokenSteps

PER_OCTAVE = 4
FLOOR = 0.5
"""Added to sensitivities in units of their mean: gradients are samples, and nothing is worth nothing."""
BINS = 16
FINER = torch.tensor([2.0 ** (code / PER_OCTAVE) for code in range(LEAST_TOKEN_CODE, LARGEST_TOKEN_CODE + 1)])


def key_norms(rows: Tensor, geometry: Geometry) -> Tensor:
    """What is looked at: the mean, over layers and heads, of the logarithm of the norm of a token's keys. rows [tokens,
    columns] to float32 [tokens].
    """
    found, at, heads = torch.zeros(len(rows), device=rows.device), 0, 0
    for layer in geometry.layers:
        keys = rows[:, at : at + layer.k_channels].float().unflatten(1, (layer.heads, layer.k_dim))
        found += keys.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny).log().sum(1)
        at, heads = at + layer.k_channels + layer.v_channels, heads + layer.heads
    return found / heads


def codes_of(rows: Tensor, geometry: Geometry, steps: TokenSteps) -> Tensor:
    """The code of each token, int8 [tokens]."""
    edges = torch.tensor(steps.edges, device=rows.device)
    codes = torch.tensor(steps.codes, dtype=torch.int8, device=rows.device)
    return codes[torch.bucketize(key_norms(rows, geometry), edges)]


def finer(codes: Tensor) -> Tensor:
    """What coefficients are multiplied by: float32 [tokens, 1]."""
    return FINER.to(codes.device)[codes.long() - LEAST_TOKEN_CODE, None]


def to_bytes(codes: Tensor) -> bytes:
    """int8 [tokens] as a chunk has them."""
    nibbles = torch.zeros(len(codes) + len(codes) % 2, dtype=torch.uint8)
    nibbles[: len(codes)] = (codes.cpu() - LEAST_TOKEN_CODE).to(torch.uint8)
    return (nibbles[::2] | nibbles[1::2] << 4).numpy().tobytes()


def from_bytes(cursor: Cursor, tokens: int) -> Tensor:
    """The inverse. Raises TruncatedError, CorruptError."""
    packed = cursor.tensor(-(-tokens // 2), torch.uint8)
    nibbles = torch.stack([packed & 15, packed >> 4], 1).flatten()
    if bool(nibbles[tokens:].any()):
        raise CorruptError("a chunk has a step for a token that it does not have")
    return nibbles[:tokens].to(torch.int8) + LEAST_TOKEN_CODE


def steps_by_norm(norms: Tensor, sensitivities: Tensor) -> TokenSteps | None:
    """Codes by norm, from float [n] of the samples' tokens, sensitivities in units of their sample's mean. None where
    all would be alike.
    """
    norms = norms.double()
    edges = norms.quantile(torch.arange(1, BINS, dtype=torch.float64) / BINS, interpolation="lower").unique()
    edges = edges[edges < norms.max()]  # so that there is somebody in every bin
    bins = torch.bucketize(norms, edges)
    counts = torch.bincount(bins)
    means = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, bins, sensitivities.double()) / counts
    codes = PER_OCTAVE * 0.5 * (means + FLOOR).log2()
    codes = (codes - (codes * counts).sum() / counts.sum()).round().clamp(LEAST_TOKEN_CODE, LARGEST_TOKEN_CODE)
    return TokenSteps(tuple(edges.tolist()), tuple(codes.int().tolist())) if bool(codes.any()) else None
