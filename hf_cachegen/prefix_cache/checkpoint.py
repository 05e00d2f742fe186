"""A checkpoint of recurrent states <-> a file of the form of a block's.

A checkpoint stands at the end of a block. In the chain it is a child of that block without tokens, so it is counted,
evicted, pinned, sealed and published as any block: with its block or before it, and never is a chain broken by it. Its
side information is the table of its tensors (`artifact/entries.py`); each of them is one part. States are exact.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from hf_cachegen import strict_json
from hf_cachegen.artifact.entries import read_entries
from hf_cachegen.artifact.tensors import EncodedTensor, decode_tensors, encode_tensors
from hf_cachegen.errors import CorruptError, ManifestError
from hf_cachegen.models.recurrent import Checkpoint, Checkpoints, StateKey
from hf_cachegen.prefix_cache.block import Block
from hf_cachegen.prefix_cache.keys import Family, checkpoint_key

MAX_BYTES = 4 << 30
"""Limit on the states of one checkpoint where no model says more; one of Qwen3-Next-80B-A3B has 75 MiB."""
Shapes = Mapping[StateKey, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of each state of a model, for one row."""


def encode_checkpoint(family: Family, key: bytes, depth: int, checkpoint: Checkpoint) -> Block:
    """Encode the states at the end of a block.

    Args:
        family: what the block belongs to.
        key: the key of the block.
        depth: number of blocks up to its end.
        checkpoint: the states, [1, ...] each.

    Raises:
        TensorError: a state cannot be encoded.
    """
    encoded = encode_tensors(Checkpoints((checkpoint,)).named())
    table = json.dumps([item.entry.to_dict() for item in encoded], sort_keys=True, separators=(",", ":"))
    parts = tuple(item.data for item in encoded)
    return Block(checkpoint_key(key), key, depth, family, (), {}, {}, table.encode(), parts)


def decode_checkpoint(block: Block, expected: Shapes | None, model: str) -> Checkpoint:
    """Return the states of a stored checkpoint, on the CPU.

    Args:
        block: the contents of its file.
        expected: the states of the model; None where it is not at hand, and the states are written to an artifact.
        model: name of the model, for messages.

    Raises:
        ArtifactError: the bytes are not what an encoder writes.
        WrongModelError: the states are not those of the model.
    """
    tokens = block.depth * block.family.block_tokens
    try:
        table: Any = strict_json.loads(block.side)
    except ValueError as error:
        raise ManifestError(f"the table of a checkpoint's states is no JSON: {error}") from error
    if not isinstance(table, list) or len(table) != len(block.parts) or not all(isinstance(row, dict) for row in table):
        raise ManifestError(f"expected a table of {len(block.parts)} states in a checkpoint, found {str(table)[:80]!r}")
    limit = MAX_BYTES
    if expected is not None:
        limit = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in expected.values())
    segments = [(str(row.get("name")), len(part)) for row, part in zip(table, block.parts, strict=True)]
    entries = read_entries(table, segments, tokens, limit)
    encoded = (EncodedTensor(entry, part) for entry, part in zip(entries, block.parts, strict=True))
    found = Checkpoints.from_named(decode_tensors(encoded), tokens)
    if found.tokens != (tokens,):
        raise CorruptError(f"expected the states after {tokens} tokens, found those after {found.tokens[:8]}")
    if expected is not None:
        found.check(expected, model)
    return found.all[0]
