"""PrefixCache: attached to a model once, it finds, loads and stores prefixes by itself."""

from __future__ import annotations

import hashlib
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hf_cachegen.config import CacheGenConfig
from hf_cachegen.errors import CacheGenError, ConfigError, PrefixCacheError, StoreError
from hf_cachegen.prefix_cache.block import Block, dump
from hf_cachegen.prefix_cache.keys import chain
from hf_cachegen.prefix_cache.local import LocalTier, Verified
from hf_cachegen.prefix_cache.protect import Protection
from hf_cachegen.prefix_cache.remote import RemoteTier
from hf_cachegen.prefix_cache.sizes import parse_size
from hf_cachegen.prefix_cache.stats import Counters, PrefixCacheStats
from hf_cachegen.prefix_cache.tiers import Tiers
from hf_cachegen.prefix_cache.worker import WhenFull, Worker
from hf_cachegen.stores.naming import is_repository
from hf_cachegen.stores.objects import Objects
from hf_cachegen.stores.remote import is_url
from hf_cachegen.stores.retry import Patience
from hf_cachegen.stores.sealed import Secret
from hf_cachegen.stores.segment_cache import default_directory
from hf_cachegen.stores.signed import KeyLike

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_cachegen.profiles.finding import ProfileLike

LOG = logging.getLogger("hf_cachegen.prefix_cache")
BLOCK_TOKENS = 256
"""Tokens of a block: at 23 to 128 KiB of keys and values per token a file of a few megabytes."""
IMPATIENT = Patience(attempts=2, timeout=5.0, backoff=0.1, max_wait=1.0)
"""A location is asked while somebody waits for a first token."""
Location = str | os.PathLike[str]


class PrefixCache:
    """A store of prefixes that `model.generate` uses by itself once it is attached (`hf_cachegen.attach`).

    Args:
        location: a folder. Or a URL or repository, which becomes `remote` (`shared`, where it is read-only), behind a
            folder of the user's cache.
        max_bytes: budget of the folder, bytes or a text such as "20GB"; None for no limit. Never exceeded: what was
            not used for longest is removed first, from the end of its chain.
        remote: a location, any that fsspec can write, behind the folder: read where the folder ends, and new blocks are
            published there.
        shared: locations that are only read, after `remote`: http(s) URLs, repositories on the Hub, buckets.
        storage_options: for fsspec, of `remote` and `shared`. headers: of http(s) locations.
        config: how blocks are encoded; default lossless, so that answers do not change.
        level: how many levels of a lossy config are stored and loaded; None for all.
        profile: as for `CacheGenCache.from_context`, for a lossy config.
        block_tokens: tokens of a block; only whole blocks are stored.
        min_tokens: shorter contexts are neither stored nor looked for.
        reuse: "auto" computes a prefix where that is measured to be faster than loading it; "always" loads it.
        ttl: seconds after its last use at which a block is removed; None for never.
        queue_bytes: most bytes of keys and values that wait to be encoded.
        when_full: what a call does when they are more: "wait" for room, or "drop" its blocks.
        key: 32 bytes, or the path of a file with them: seals all files (AES-256-GCM).
        private_key: signs new blocks (Ed25519). public_key: required of blocks from other locations than the folder.
        patience: time limits and attempts at other locations.

    Raises:
        ConfigError: an option is out of its range.
        PrefixCacheError: the folder cannot be made or opened.
        StoreError: a repository cannot be found.
    """

    def __init__(
        self,
        location: Location,
        max_bytes: int | str | None = "20GB",
        *,
        remote: Location | None = None,
        shared: Sequence[Location] = (),
        storage_options: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        config: CacheGenConfig | None = None,
        level: int | None = None,
        profile: ProfileLike = "auto",
        block_tokens: int = BLOCK_TOKENS,
        min_tokens: int = BLOCK_TOKENS,
        reuse: Literal["auto", "always"] = "auto",
        ttl: float | None = None,
        queue_bytes: int | str = "2GB",
        when_full: WhenFull = "wait",
        key: Secret | None = None,
        private_key: KeyLike | None = None,
        public_key: KeyLike | None = None,
        patience: Patience = IMPATIENT,
    ) -> None:
        self._options: dict[str, Any] = {
            "location": location, "max_bytes": max_bytes, "remote": remote, "shared": shared,
            "storage_options": storage_options, "headers": headers, "config": config, "level": level,
            "profile": profile, "block_tokens": block_tokens, "min_tokens": min_tokens, "reuse": reuse, "ttl": ttl,
            "queue_bytes": queue_bytes, "when_full": when_full, "key": key, "private_key": private_key,
            "public_key": public_key, "patience": patience,
        }  # fmt: skip
        for name, value in (("block_tokens", block_tokens), ("min_tokens", min_tokens)):
            if type(value) is not int or not 1 <= value <= 1 << 15:
                raise ConfigError(f"{name} must be a whole number from 1 to {1 << 15}, got {value!r}")
        if reuse not in ("auto", "always"):
            raise ConfigError(f"reuse must be 'auto' or 'always', got {reuse!r}")
        if when_full not in ("wait", "drop"):
            raise ConfigError(f"when_full must be 'wait' or 'drop', got {when_full!r}")
        # A block is decoded without its model's first layers, so nothing is predicted.
        self.config = (CacheGenConfig(lossless=True) if config is None else config).predicting(None)
        if self.config.target_kl is not None:
            raise ConfigError("the blocks of a prefix cache serve many contexts: pass steps or a profile, no target_kl")
        self.level, self.profile = level, profile
        self.block_tokens, self.min_tokens, self.reuse = block_tokens, min_tokens, reuse
        folder, remotes = _located(location, remote, shared, storage_options or {}, headers or {}, patience)
        self.protection = Protection(key, private_key, public_key)
        self.local = LocalTier(
            folder, None if max_bytes is None else parse_size(max_bytes), ttl, self.protection.parse
        )
        self.counters = Counters()
        self.tiers = Tiers(self.local, remotes, self.protection, self.counters)
        self.worker = Worker(parse_size(queue_bytes, "queue_bytes"), when_full)
        self._bindings: dict[str, Any] = {}
        self._queued: set[bytes] = set()

    def __repr__(self) -> str:
        behind = "".join(f", {remote}" for remote in self.tiers.remotes)
        return f"PrefixCache({self.local.directory}{behind})"

    def __deepcopy__(self, memo: dict[int, Any]) -> PrefixCache:
        """Return this object: copies of a model share their prefix cache."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(PrefixCache, **self._options), ()

    def generate(
        self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: Mapping[str, Any], stock: Callable[..., Any],
        start: Callable[..., Any], slo: float | None = None,
    ) -> Any:  # fmt: skip
        """Call the stock generate so that it starts from the longest stored prefix, and store what is new.

        `hf_cachegen.generate` calls this; users call `model.generate` of an attached model.

        Args:
            model: the model.
            args: the positional arguments of the stock generate.
            kwargs: its keyword arguments.
            stock: the stock generate of the model.
            start: called with the model, the call, a filled stock cache and logits processors to add.
            slo: seconds from this call to the first token: how long other locations are waited for.
        """
        from hf_cachegen.prefix_cache.session import Session  # torch, which the commands do without

        return Session(self, model, stock, start, slo).generate(args, kwargs)

    def check(self, model: PreTrainedModel) -> None:
        """Raise UnsupportedModelError, ProfileError or LevelError unless prefixes of this model can be stored."""
        from hf_cachegen.prefix_cache.binding import bind

        bind(self, model)

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

    def pin(self, model: PreTrainedModel, input_ids: Any, *, pinned: bool = True) -> int:
        """Protect the stored prefix of a text from eviction and expiry, or end that.

        Args:
            model: the model that it was stored of.
            input_ids: the text, int64 [tokens] or [1, tokens].
            pinned: False ends the protection.

        Returns:
            Tokens of the prefix that is stored, and protected.
        """
        from hf_cachegen.models.inputs import one_row
        from hf_cachegen.prefix_cache.binding import bind

        self.flush()
        salt = bind(self, model).family.salt
        keys = chain(salt, one_row(input_ids)[0].tolist(), self.block_tokens)
        count = self.local.stored(keys)
        if count:
            self.local.index.pin(keys[count - 1], pinned)
        return count * self.block_tokens

    def _write(self, block: Block, data: bytes, before: Sequence[bytes], *, publish: bool) -> None:
        try:
            if self.local.put(block, data, before):
                self.counters.add(blocks_stored=1, tokens_stored=len(block.tokens), bytes_written=len(data))
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


def _located(
    location: Location, remote: Location | None, shared: Sequence[Location], storage_options: Mapping[str, Any],
    headers: Mapping[str, str], patience: Patience,
) -> tuple[Path, list[RemoteTier]]:  # fmt: skip
    """Return the folder of the local tier, and the tiers behind it."""
    if isinstance(shared, str | os.PathLike):
        raise ConfigError(f"shared must be a sequence of locations, got {shared!r:.100}: pass [{str(shared)!r:.100}]")

    def tier(where: Location) -> RemoteTier:
        hub, web = is_repository(where), str(where).startswith(("http://", "https://"))
        options = None if hub or web else storage_options
        objects = Objects(where, headers=headers if web else None, storage_options=options, patience=patience)
        return RemoteTier(objects, objects.writable)

    behind = [tier(where) for where in ([] if remote is None else [remote])]
    if behind and not behind[0].writable:
        raise ConfigError(f"remote={remote!s:.200} is read-only: pass it in shared=")
    if is_repository(location) or (isinstance(location, str) and is_url(location)):
        if remote is not None:
            raise ConfigError("a location on the network is the remote itself: pass a folder first, or remote= alone")
        behind = [tier(location)]
        name = hashlib.sha256(str(location).encode()).hexdigest()[:32]
        location = Path(default_directory(), "prefixes", name)
    for where in shared:
        found = tier(where)
        found.writable = False
        behind.append(found)
    return Path(location), behind
