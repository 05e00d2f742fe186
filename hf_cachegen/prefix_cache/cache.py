"""PrefixCache: attached to a model once, it finds, loads and stores prefixes by itself."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hf_cachegen.artifact.store import output_path
from hf_cachegen.config import CacheGenConfig
from hf_cachegen.errors import ConfigError
from hf_cachegen.prefix_cache.keys import chain, checkpoint_key
from hf_cachegen.prefix_cache.local import LocalTier
from hf_cachegen.prefix_cache.protect import Protection
from hf_cachegen.prefix_cache.remote import RemoteTier
from hf_cachegen.prefix_cache.rules import Rules
from hf_cachegen.prefix_cache.sizes import parse_size
from hf_cachegen.prefix_cache.storage import Storage
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

BLOCK_TOKENS = 256
"""Tokens of a block: at 23 to 128 KiB of keys and values per token a file of a few megabytes."""
STATE_TOKENS = 2048
"""Tokens between checkpoints: what a prompt that leaves a stored one computes again at most."""
IMPATIENT = Patience(attempts=2, timeout=5.0, backoff=0.1, max_wait=1.0)
"""A location is asked while somebody waits for a first token."""
Location = str | os.PathLike[str]


class PrefixCache(Storage):
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
        state_every: of a model with recurrent states: tokens between two checkpoints of a long prompt, besides those at
            the end of the prompt and of the answer; whole blocks.
        state_budget: most bytes of checkpoints that one call keeps; above it fewer, evenly chosen ones, but one of the
            prompt and one of the answer.
        ttl: seconds after its last use at which a block is removed; None for never.
        queue_bytes: most bytes of keys and values that wait to be encoded.
        when_full: what a call does when they are more: "wait" for room, or "drop" its blocks.
        key: 32 bytes, or the path of a file with them: seals all files (AES-256-GCM).
        private_key: signs new blocks (Ed25519). public_key: required of blocks from other locations than the folder.
        patience: time limits and attempts at other locations.

    Raises:
        ConfigError: an option is out of its range.
        PrefixCacheError: the folder cannot be made or opened.
        ArtifactNotFoundError: a repository cannot be found.
        StoreError: it cannot be asked.
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
        state_every: int = STATE_TOKENS,
        state_budget: int | str = "512MiB",
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
            "public_key": public_key, "patience": patience, "state_every": state_every, "state_budget": state_budget,
        }  # fmt: skip
        if when_full not in ("wait", "drop"):
            raise ConfigError(f"when_full must be 'wait' or 'drop', got {when_full!r}")
        rules = Rules.of(
            config=config, level=level, profile=profile, block_tokens=block_tokens, min_tokens=min_tokens, reuse=reuse,
            state_every=state_every, state_budget=state_budget,
        )  # fmt: skip
        folder, remotes = _located(location, remote, shared, storage_options or {}, headers or {}, patience)
        protection = Protection(key, private_key, public_key)
        local = LocalTier(folder, None if max_bytes is None else parse_size(max_bytes), ttl, protection.parse)
        worker = Worker(parse_size(queue_bytes, "queue_bytes"), when_full)
        super().__init__(rules, local, remotes, protection, worker)

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
        binding, index = bind(self, model), self.local.index
        keys = chain(binding.family.salt, one_row(input_ids)[0].tolist(), self.rules.block_tokens)
        ends = list(keys[: self.local.stored(keys)])
        if binding.continuation is not None:  # a prefix of such a model ends with a checkpoint
            ends = [checkpoint_key(key) for key in ends]
            held = index.present(ends)
            ends = ends[: max((number for number, key in enumerate(ends, 1) if key in held), default=0)]
        if ends:
            index.pin(ends[-1], pinned)
        return len(ends) * self.rules.block_tokens


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
    return output_path(location), behind
