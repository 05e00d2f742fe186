"""What is stored and how: the tiers, the background thread, the counters and the rules of one prefix cache.

`cache.py` gives it to users; calls (`session.py`) and models (`binding.py`) work with this part alone.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from hf_cachegen.errors import CacheGenError, PrefixCacheError, StoreError
from hf_cachegen.prefix_cache.block import Block, dump
from hf_cachegen.prefix_cache.local import LocalTier, Verified
from hf_cachegen.prefix_cache.protect import Protection
from hf_cachegen.prefix_cache.remote import RemoteTier
from hf_cachegen.prefix_cache.rules import Rules
from hf_cachegen.prefix_cache.sizes import parse_size
from hf_cachegen.prefix_cache.stats import Counters, PrefixCacheStats
from hf_cachegen.prefix_cache.tiers import Tiers
from hf_cachegen.prefix_cache.worker import Worker

LOG = logging.getLogger("hf_cachegen.prefix_cache")


class Storage:
    """The stored blocks of one prefix cache, and what stores new ones.

    Args:
        rules: what is stored, and how.
        local: the local tier.
        remotes: the locations behind it.
        protection: seals and signatures.
        worker: the background thread.
    """

    def __init__(
        self, rules: Rules, local: LocalTier, remotes: Sequence[RemoteTier], protection: Protection, worker: Worker
    ) -> None:
        self.rules, self.local, self.protection, self.worker = rules, local, protection, worker
        self.counters = Counters()
        self.tiers = Tiers(local, remotes, protection, self.counters)
        self._bindings: dict[str, Any] = {}
        self._queued: set[bytes] = set()

    def binding(self, family: str, make: Callable[[], Any]) -> Any:
        """Return what `make` returned for this family first."""
        if family not in self._bindings:
            self._bindings[family] = make()
        return self._bindings[family]

    def store(self, key: bytes, encode: Callable[[], Block], nbytes: int, before: Sequence[bytes]) -> None:
        """Encode a block in the background, and write it to all tiers.

        Args:
            key: its key.
            encode: makes the block.
            nbytes: bytes of its tensors, which count until it is stored.
            before: the keys before it.
        """

        def run() -> None:
            if self._stored(key, before):
                return
            try:
                block = encode()
                data = self.protection.wrap(dump(block), key)
            except CacheGenError as error:
                self.counters.add(errors=1)
                LOG.warning("block %s was not encoded: %s", key.hex()[:16], error)
            else:
                self._write(block, data, before, publish=True)

        self._submit(key, nbytes, run)

    def keep(self, block: Block, data: bytes, before: Sequence[bytes]) -> None:
        """Write a block that came from another location into the folder, in the background."""
        self._submit(block.key, len(data), partial(self._write, block, data, before, publish=False))

    def complete(self, key: bytes, before: Sequence[bytes]) -> None:
        """Fetch a block whole that was loaded at a coarser level, and keep it in the folder, in the background."""

        def run() -> None:
            try:
                if not self._stored(key, before) and (found := self.tiers.whole(key)) is not None:
                    self._write(*found, before, publish=False)
            except CacheGenError as error:
                self.counters.add(errors=1)
                LOG.warning("block %s was not fetched whole: %s", key.hex()[:16], error)

        self._submit(key, 0, run)

    def _submit(self, key: bytes, nbytes: int, function: Callable[[], None]) -> None:
        if key in self._queued:
            return
        self._queued.add(key)

        def run() -> None:
            try:
                function()
            finally:
                self._queued.discard(key)

        if not self.worker.submit(nbytes, run):
            self._queued.discard(key)
            self.counters.add(blocks_dropped=1)

    def _stored(self, key: bytes, before: Sequence[bytes]) -> bool:
        """Report whether the folder holds a block already, from another process perhaps; note that it was used."""
        try:
            if not self.local.index.stored([key]):
                return False
            self.local.index.touch([*before, key], time.time())
        except sqlite3.Error:  # `put` will say what is wrong
            return False
        return True

    def note_use(self, keys: Sequence[bytes]) -> None:
        """Note, in the background, that a chain was used; and carry the counters to the index."""

        def run() -> None:
            try:
                self.local.index.touch(keys, time.time())
                self.local.index.count_up(self.counters.take())
            except sqlite3.Error as error:
                LOG.warning("the use of %d blocks was not noted: %s", len(keys), error)

        self.worker.submit(0, run)

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until everything is stored, at most `timeout` seconds; report whether it is."""
        done = self.worker.flush(timeout)
        if done and (new := self.counters.take()):
            try:
                self.local.index.count_up(new)
            except sqlite3.Error as error:
                LOG.warning("the counters were not kept: %s", error)
        return done

    def stats(self) -> PrefixCacheStats:
        """Return what this object has done, and what its folder holds."""
        index = self.local.index
        try:
            held = {"blocks": index.count(), "nbytes": index.nbytes()}
        except sqlite3.Error as error:
            raise PrefixCacheError(f"the index in {self.local.directory} cannot be read: {error}") from error
        return self.counters.snapshot(**held, queued_bytes=self.worker.nbytes)

    def prune(self, max_bytes: int | str | None = None) -> tuple[int, int]:
        """Remove expired blocks, then the least recently used ones, until the folder has at most `max_bytes`.

        Args:
            max_bytes: default the budget.

        Returns:
            Blocks and bytes removed.
        """
        return self.local.prune(None if max_bytes is None else parse_size(max_bytes))

    def verify(self) -> Verified:
        """Check every byte of every block in the folder; remove damaged ones."""
        return self.local.verify()

    def _write(self, block: Block, data: bytes, before: Sequence[bytes], *, publish: bool) -> None:
        try:
            if self.local.put(block, data, before):
                stored = {"blocks_stored": 1, "tokens_stored": len(block.tokens)} if block.tokens else {}
                self.counters.add(bytes_written=len(data), **(stored or {"checkpoints_stored": 1}))
            else:
                self.counters.add(blocks_refused=1)
        except PrefixCacheError as error:
            self.counters.add(errors=1)
            LOG.warning("%s", error)
        for remote in self.tiers.remotes if publish else ():
            if not remote.writable:
                continue
            try:
                if remote.publish(block.key, data):
                    self.counters.add(bytes_published=len(data))
            except StoreError as error:
                self.counters.add(errors=1)
                LOG.warning("block %s was not published: %s", block.key.hex()[:16], error)

