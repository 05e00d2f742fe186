"""The local tier and the locations behind it, as one: where a prompt's blocks are, and their proved contents."""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from hf_cachegen.errors import ArtifactError, CacheGenError, PrefixCacheError, StoreError
from hf_cachegen.prefix_cache.block import Block
from hf_cachegen.prefix_cache.keys import checkpoint_key
from hf_cachegen.prefix_cache.levels import Time
from hf_cachegen.prefix_cache.local import LocalTier
from hf_cachegen.prefix_cache.protect import Protection
from hf_cachegen.prefix_cache.remote import RemoteTier
from hf_cachegen.prefix_cache.stats import Counters

LOG = logging.getLogger("hf_cachegen.prefix_cache")
PENALTY_SECONDS = 60.0
"""How long a location that failed is left alone."""
ANY_TIME = Time()
NEAR = 16
"""Blocks at the end of a chain of which a location is asked for every checkpoint."""
Result = TypeVar("Result")


@dataclass(frozen=True)
class Found:
    """Where the blocks of a prompt are: consecutive runs of its keys, each in one tier (None: the local one)."""

    runs: tuple[tuple[RemoteTier | None, int], ...]

    @property
    def count(self) -> int:
        """Number of blocks."""
        return sum(count for _, count in self.runs)

    def cut(self, blocks: int) -> Found:
        """Return where the first so many blocks are."""
        runs = []
        for tier, count in self.runs:
            taken = min(blocks, count)
            blocks -= taken
            if taken:
                runs.append((tier, taken))
        return Found(tuple(runs))


class Tiers:
    """All tiers of a prefix cache.

    Args:
        local: the local tier.
        remotes: the locations behind it, in the order in which they are asked.
        protection: seals and signatures.
        counters: where failures and bytes are counted.
    """

    def __init__(
        self, local: LocalTier, remotes: Sequence[RemoteTier], protection: Protection, counters: Counters
    ) -> None:
        self.local, self.remotes, self.protection, self.counters = local, tuple(remotes), protection, counters
        self._failed: dict[int, float] = {}

    def find(self, keys: Sequence[bytes]) -> Found:
        """Return where the longest stored run at the beginning of `keys` is; a tier that fails is empty."""
        runs: list[tuple[RemoteTier | None, int]] = [(None, self._guarded(lambda: self.local.stored(keys), 0))]
        position = runs[0][1]
        for number, remote in enumerate(self.remotes):
            if position == len(keys) or self._failed.get(number, 0.0) > time.monotonic():
                continue
            count = self._tried(number, remote, partial(remote.stored, keys[position:]), 0)
            runs.append((remote, count))
            position += count
        return Found(tuple(run for run in runs if run[1]))

    def checkpoints(self, keys: Sequence[bytes], every: int) -> list[tuple[int, RemoteTier | None]]:
        """Return the stored checkpoints of a chain, latest first: the number of blocks before each, and its tier.

        Locations behind the folder are asked for those alone that are later than the folder's latest: the last NEAR
        blocks and every `every`-th one.
        """
        named = [checkpoint_key(key) for key in keys]
        nothing: set[bytes] = set()
        held = self._guarded(lambda: self.local.index.present(named), nothing)
        found: dict[int, RemoteTier | None] = {number + 1: None for number, key in enumerate(named) if key in held}
        for number, remote in enumerate(self.remotes):
            latest = max(found, default=0)
            asked = [n for n in range(latest + 1, len(keys) + 1) if n > len(keys) - NEAR or n % every == 0]
            if not asked or self._failed.get(number, 0.0) > time.monotonic():
                continue
            there = self._tried(number, remote, partial(remote.present, [named[n - 1] for n in asked]), nothing)
            found.update({n: remote for n in asked if named[n - 1] in there})
        return sorted(found.items(), key=lambda item: -item[0])

    def read(
        self, keys: Sequence[bytes], found: Found, left: Time = ANY_TIME
    ) -> Iterator[tuple[Block, bytes, bool]]:
        """Yield blocks in order: the block, the bytes of its file, and whether they came from elsewhere.

        Ends early where a block is missing or damaged; the damaged block is removed and reported.

        Args:
            keys: the keys of a prompt.
            found: where they are.
            left: how long to wait for locations.
        """
        position = 0
        for tier, count in found.runs:
            run = keys[position : position + count]
            later = left.after(position)
            by_level = later.refinements is not None and self.protection.partial
            if tier is None:
                files: Iterator[bytes | None] = map(self.local.get, run)
            elif by_level:
                files = tier.fetch_levels(run, later)
            else:
                files = tier.fetch(run, later.base)
            for key in run:
                block = self._proved(tier, key, files, by_level)
                if block is None:
                    return
                yield block[0], block[1], tier is not None
            position += count

    def whole(self, key: bytes) -> tuple[Block, bytes] | None:
        """Return a block, and the bytes of its file, from the first location that has it; None where none has.

        Raises:
            StoreError: a location cannot be read.
            ArtifactError: the block is damaged.
        """
        for remote in self.remotes:
            if (data := remote.get(key)) is not None:
                self.counters.add(bytes_fetched=len(data))
                return self.protection.parse_foreign(data, key), data
        return None

    def _proved(
        self, tier: RemoteTier | None, key: bytes, files: Iterator[bytes | None], by_level: bool
    ) -> tuple[Block, bytes] | None:
        where = self.local.directory if tier is None else tier
        try:
            data = next(files, None)
            if data is None:
                return None
            if tier is None:
                self.counters.add(bytes_read=len(data))
                return self.protection.parse(data, key), data
            self.counters.add(bytes_read=len(data), bytes_fetched=len(data))
            parse = self.protection.parse_beginning if by_level else self.protection.parse_foreign
            return parse(data, key), data
        except ArtifactError as error:
            self.damaged(key, f"{where}: {error}", local=tier is None)
        except (StoreError, PrefixCacheError, OSError) as error:
            self.counters.add(errors=1)
            LOG.warning("block %s of %s is computed: %s", key.hex()[:16], where, error)
        return None

    def damaged(self, key: bytes, why: str, *, local: bool) -> None:
        """Report a damaged block; remove it, with all that are chained with it, from the local tier."""
        self.counters.add(blocks_damaged=1)
        LOG.warning("block %s is damaged and is computed again: %s", key.hex()[:16], why)
        if local:
            self._guarded(lambda: self.local.drop(key), 0)

    def _tried(
        self, number: int, remote: RemoteTier, function: Callable[[], Result], otherwise: Result
    ) -> Result:
        try:
            return function()
        except CacheGenError as error:
            self.counters.add(errors=1)
            self._failed[number] = time.monotonic() + PENALTY_SECONDS
            LOG.warning("%s is left alone for %d seconds: %s", remote, PENALTY_SECONDS, error)
            return otherwise

    def _guarded(self, function: Callable[[], Result], otherwise: Result) -> Result:
        try:
            return function()
        except (PrefixCacheError, sqlite3.Error, OSError) as error:
            self.counters.add(errors=1)
            LOG.warning("the prefix cache in %s failed: %s", self.local.directory, error)
            return otherwise
