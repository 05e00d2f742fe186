"""The baseline of a loader of quantised caches: 8 bits for each value, chunk by chunk, over the same store.

A chunk is a segment: for each layer's keys, then its values, the symbols [heads, tokens, dim] as bytes, then scale and
offset of every vector [heads, tokens] as float16 (what `eval.uniform` rounds to, bit for bit). The segments with
their checksums are listed in `uniform8.json`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_cachegen.artifact import Segment
from hf_cachegen.artifact.manifest import digest
from hf_cachegen.codec.geometry import Geometry
from hf_cachegen.stores import RemoteStore

DATA_FILE, LIST_FILE = "uniform8.bin", "uniform8.json"
STEPS = 255


def pack(x: Tensor) -> bytes:
    """Pack x [heads, tokens, dim] of any float dtype."""
    exact = x.float()
    low, high = exact.amin(-1, keepdim=True), exact.amax(-1, keepdim=True)
    scale, low = ((high - low) / STEPS).half(), low.half()
    step = scale.float().clamp_min(torch.finfo(torch.float16).tiny)
    symbols = ((exact - low.float()) / step).round().clamp(0, STEPS).to(torch.uint8)
    return symbols.numpy().tobytes() + scale.numpy().tobytes() + low.numpy().tobytes()


def unpack(data: memoryview, out: Tensor) -> int:
    """Fill out [heads, tokens, dim] from the front of `data`; return the number of bytes used."""
    vectors = out.shape[0] * out.shape[1]
    shape = (*out.shape[:2], 1)
    symbols = torch.frombuffer(data, dtype=torch.uint8, count=out.numel()).view(out.shape)
    scale, low = (
        torch.frombuffer(data, dtype=torch.float16, count=vectors, offset=out.numel() + 2 * vectors * index).view(shape)
        for index in (0, 1)
    )
    step = scale.float().clamp_min_(torch.finfo(torch.float16).tiny)
    out.copy_(symbols.float().mul_(step).add_(low.float()))
    return out.numel() + 4 * vectors


def write(keys: Sequence[Tensor], values: Sequence[Tensor], chunk_tokens: int, folder: Path) -> int:
    """Write keys and values (lists of [1, heads, tokens, dim]) to `folder`; return the number of bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    segments, offset = [], 0
    with (folder / DATA_FILE).open("wb") as file:
        for first in range(0, keys[0].shape[2], chunk_tokens):
            data = b"".join(
                pack(x[0, :, first : first + chunk_tokens]) for pair in zip(keys, values, strict=True) for x in pair
            )
            segments.append([offset, len(data), digest(data)])
            offset += file.write(data)
    (folder / LIST_FILE).write_text(json.dumps({"chunk_tokens": chunk_tokens, "segments": segments}))
    return offset


def fetch(store: RemoteStore, geometry: Geometry) -> tuple[list[Tensor], list[Tensor], int]:
    """Return (keys, values, bytes fetched); each chunk is dequantised while the next ones are in transfer."""
    listed = store.read(LIST_FILE, 0, store.size(LIST_FILE))
    found: dict[str, Any] = json.loads(listed)
    segments = [Segment(DATA_FILE, str(n), *entry) for n, entry in enumerate(found["segments"])]
    store.prefetch(segments)
    dtype, tokens = getattr(torch, geometry.dtype), geometry.tokens
    keys = [torch.empty(1, layer.heads, tokens, layer.k_dim, dtype=dtype) for layer in geometry.layers]
    values = [torch.empty(1, layer.v_heads, tokens, layer.v_dim, dtype=dtype) for layer in geometry.layers]
    first = 0
    for segment in segments:
        # torch needs a writable buffer.
        view = memoryview(bytearray(store.read(segment.file, segment.offset, segment.length, segment.xxh3)))
        last = min(first + found["chunk_tokens"], tokens)
        for pair in zip(keys, values, strict=True):
            for x in pair:
                view = view[unpack(view, x[0, :, first:last]) :]
        first = last
    return keys, values, len(listed) + sum(segment.length for segment in segments)
