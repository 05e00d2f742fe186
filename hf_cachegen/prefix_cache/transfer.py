"""Artifacts into a prefix cache, and stored prefixes out of it as artifacts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from hf_cachegen.artifact.artifact import Artifact, write
from hf_cachegen.artifact.encoded import EncodedContext, encode_no_kv
from hf_cachegen.artifact.tensors import NamedTensor
from hf_cachegen.codec.context import Encoder
from hf_cachegen.codec.geometry import Geometry
from hf_cachegen.codec.rows import empty_kv
from hf_cachegen.codec.spread import Destination
from hf_cachegen.config import CacheGenConfig
from hf_cachegen.errors import ArtifactNotFoundError, ConfigError, CorruptError, ManifestError
from hf_cachegen.models.fingerprint import Fingerprint, hash_tokens
from hf_cachegen.models.recurrent import Checkpoints
from hf_cachegen.prefix_cache.block import Block
from hf_cachegen.prefix_cache.checkpoint import decode_checkpoint, encode_checkpoint
from hf_cachegen.prefix_cache.coding import Coding
from hf_cachegen.prefix_cache.index import Row
from hf_cachegen.prefix_cache.keys import chain, checkpoint_key, family_of
from hf_cachegen.stores import Access, open_store

if TYPE_CHECKING:
    from hf_cachegen.prefix_cache.cache import PrefixCache


def import_artifact(prefix_cache: PrefixCache, location: str | os.PathLike[str], **access: Any) -> int:
    """Store the whole blocks of a lossless artifact, so that prompts find them.

    Of a model with recurrent states its checkpoints at ends of blocks are stored too (`state_every=`).

    Args:
        prefix_cache: its config must be lossless too.
        location: the artifact: a folder, a repository or a URL.
        access: fields of hf_cachegen.stores.Access.

    Returns:
        Tokens that are stored.

    Raises:
        ConfigError: the artifact or the prefix cache is lossy: answers would change without anybody's asking.
        ManifestError: the artifact has no fingerprint, no checksums or no tokens.
        ArtifactError, StoreError: it cannot be read.
    """
    artifact = Artifact(open_store(location, Access.from_keywords(access)))
    if not (artifact.config.lossless and prefix_cache.rules.config.lossless):
        raise ConfigError(f"{location} is imported only if it is lossless, into a lossless prefix cache")
    ids = artifact.input_ids
    if artifact.fingerprint is None or ids is None or artifact.geometry.batch != 1:
        raise ManifestError(f"{location} has no fingerprint, no tokens or several rows: nothing says whose it is")
    fingerprint = Fingerprint.from_dict(artifact.fingerprint)
    if hash_tokens(ids) != fingerprint.tokens:
        raise CorruptError(f"{location}: the stored tokens are not those of the fingerprint")
    if fingerprint.checksum is None:
        raise ManifestError(f"{location} was made by an earlier release, which recorded no checksums: make it again")
    rules = prefix_cache.rules
    width = rules.block_tokens
    family = family_of(fingerprint.to_dict(), rules.config.to_dict(), rules.level, None, width)
    coding = Coding(rules.config, rules.level, None)
    keys, values = artifact.decode()
    chained = chain(family.salt, ids, width)
    for depth in range(len(chained)):
        first = depth * width
        k, v = ([x[:, :, first : first + width].contiguous() for x in tensors] for tensors in (keys, values))
        parent = chained[depth - 1] if depth else family.salt
        block = coding.encode(family, parent, depth, ids[first : first + width], k, v, artifact.geometry.layers)
        prefix_cache.store(chained[depth], partial(_same, block), 0, chained[:depth])
    for checkpoint in Checkpoints.from_named(artifact.tensors(), len(ids)).all:
        if checkpoint.tokens % width == 0:
            before = chained[: checkpoint.tokens // width]
            block = encode_checkpoint(family, before[-1], len(before), checkpoint)
            prefix_cache.store(block.key, partial(_same, block), 0, before)
    prefix_cache.flush()
    return prefix_cache.local.stored(chained) * width


def export_artifact(prefix_cache: PrefixCache, key: str, directory: str | os.PathLike[str]) -> int:
    """Write a stored prefix as an artifact, with its checkpoint of recurrent states if its end has one.

    Args:
        prefix_cache: where it is stored.
        key: of its last block or checkpoint, in hexadecimal; the beginning is enough if it is unique.
        directory: the folder of the artifact.

    Returns:
        Tokens of the artifact.

    Raises:
        ArtifactNotFoundError: there is no such block, or one before it has gone.
        ConfigError: the key is not unique, or the prefix is lossy.
        ArtifactError: a block is damaged, or the folder holds an artifact.
    """
    rows = ancestry(prefix_cache, find_one(prefix_cache, key))
    blocks = [_block(prefix_cache, row) for row in rows]
    tensors_of_states = _states(prefix_cache, blocks, rows[-1])
    blocks = [block for block in blocks if block.tokens]
    fields = blocks[-1].family.fields
    config = CacheGenConfig.from_dict(fields["codec"])
    if not config.lossless:
        raise ConfigError(f"prefix {key} is stored with losses; only a lossless one is exported")
    coding, geometry = Coding(config, fields["level"], None), Geometry.from_dict(blocks[0].geometry)
    whole = Geometry(geometry.layers, geometry.tokens * len(blocks), 1, geometry.dtype)
    tensors = empty_kv(whole, [None] * len(whole.layers))
    destination = Destination(tensors) if tensors else None
    for number, block in enumerate(blocks):
        if coding.geometry(block) != geometry:
            raise CorruptError(f"block {block.key.hex()[:16]} has another geometry than the first of its chain")
        coding.launch(block, geometry, destination, number * geometry.tokens)()
    ids = [token for block in blocks for token in block.tokens]
    fingerprint = Fingerprint.from_dict({
        **fields["fingerprint"], "model_id": fields["model_id"], "commit": None, "tokenizer": None,
        "tokens": hash_tokens(ids), "transformers": fields["transformers"],
    })  # fmt: skip
    source: Encoder | EncodedContext
    if whole.layers:
        source = Encoder(tensors[::2], tensors[1::2], CacheGenConfig(lossless=True), layers=list(whole.layers))
    else:
        source = encode_no_kv(whole)
    write(source, directory, input_ids=ids, fingerprint=fingerprint.to_dict(), tensors=tensors_of_states)
    return len(ids)


def find_one(prefix_cache: PrefixCache, key: str) -> Row:
    """Return the block whose key begins with these hexadecimal digits.

    Raises:
        ConfigError: they are no such digits, or several keys begin with them.
        ArtifactNotFoundError: no key does.
    """
    digits = key.lower()
    if not digits or len(digits) > 64 or set(digits) - set("0123456789abcdef"):
        raise ConfigError(f"a key is up to 64 hexadecimal digits, got {key!r:.80}; 'prefix-cache ls' shows them")
    rows = prefix_cache.local.index.find(digits)
    if not rows:
        raise ArtifactNotFoundError(f"no stored block has a key that begins with {key}")
    if len(rows) > 1:
        raise ConfigError(f"{len(rows)} keys begin with {key}: give more digits")
    return rows[0]


def ancestry(prefix_cache: PrefixCache, row: Row) -> list[Row]:
    """Return a block and all before it, the first one first. Raises ArtifactNotFoundError where one has gone."""
    rows = [row]
    while rows[-1].depth:
        before = prefix_cache.local.index.find(rows[-1].parent.hex())
        if not before:
            raise ArtifactNotFoundError(f"the block before {rows[-1].key.hex()[:16]} is no longer stored")
        rows.append(before[0])
    return rows[::-1]


def _states(prefix_cache: PrefixCache, blocks: Sequence[Block], end: Row) -> list[NamedTensor]:
    """Return the tensors of the checkpoint at the end of a chain; none where it has none."""
    last = blocks[-1]
    if not end.is_checkpoint:
        rows = prefix_cache.local.index.find(checkpoint_key(end.key).hex())
        if not rows:
            return []
        last = _block(prefix_cache, rows[0])
    return Checkpoints((decode_checkpoint(last, None, str(last.family.fields["model_id"])),)).named()


def _same(block: Block) -> Block:
    return block


def _block(prefix_cache: PrefixCache, row: Row) -> Block:
    data = prefix_cache.local.get(row.key)
    if data is None:
        raise ArtifactNotFoundError(f"block {row.key.hex()[:16]} is no longer stored")
    return prefix_cache.protection.parse(data, row.key)
