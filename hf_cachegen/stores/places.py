"""From the name of a place to a store: a folder, a URL, or a repository on the Hub."""

from __future__ import annotations

import hashlib
import os
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from hf_cachegen.artifact import MANIFEST_FILE, Limits, Store
from hf_cachegen.errors import ConfigError, OfflineError
from hf_cachegen.stores.access import Access
from hf_cachegen.stores.cached import CachedStore
from hf_cachegen.stores.http import shown
from hf_cachegen.stores.local import LocalStore
from hf_cachegen.stores.metered import Meter, MeteredStore
from hf_cachegen.stores.naming import (
    alternative,
    is_guess,
    is_repository,
    local_path,
    named_both_ways,
    require_folder,
)
from hf_cachegen.stores.remote import RemoteStore, is_url, open_files
from hf_cachegen.stores.sealed import Kept, SealedStore
from hf_cachegen.stores.segment_cache import SegmentCache
from hf_cachegen.stores.signed import SignedStore

_UNCACHED = ("file", "memory")
"""Schemes that are no farther than the cache."""


class ReachedStore(Store):
    """A store together with the options that its location was opened with."""

    def __init__(self, store: Store, access: Access) -> None:
        self._store, self._access = store, access

    def __str__(self) -> str:
        return str(self._store)

    def unwrap(self) -> Store:
        """Return the store alone."""
        return self._store

    def size(self, name: str) -> int:
        """Return the length of a file in bytes."""
        return self._store.size(name)

    def read(self, name: str, offset: int, length: int, xxh3: str | None = None) -> bytes:
        """Read exactly that range of a file."""
        return self._store.read(name, offset, length, xxh3)

    def access(self) -> Access:
        """Return the options."""
        return self._access


class _Cached(NamedTuple):
    """store: reads the location; None: nothing may be read there. kept: its part of the local cache."""

    store: Store | None
    kept: Kept


def open_store(
    place: str | os.PathLike[str],
    access: Access | None = None,
    limits: Limits | None = None,
    meter: Meter | None = None,
) -> Store:
    """The store of the artifact at `place`: a folder, a URL (hf:// too), or a repository ("user/name").

    `naming` says which strings are paths. A path object is always a folder. meter: counts the requests that leave this
    process. Raises SignatureError, ConfigError, ArtifactNotFoundError, StoreError.
    """
    access = access or Access()
    if access.local_files_only and access.force_download:
        raise ConfigError("local_files_only and force_download contradict each other")
    with named_both_ways(place):
        store = _plain(_open(place, access, meter), access, limits)
        if access.public_key is not None:
            store = SignedStore(store, access.public_key)
        if is_guess(place):
            store.size(MANIFEST_FILE)  # now, so that its error names the folder too; readers ask for it next anyway
    return ReachedStore(store, access)


def access_of(store: Store) -> Access:
    """How `open_store` reached it, so that what goes with it can be fetched likewise; the defaults for other stores."""
    found = store.access()
    return found if isinstance(found, Access) else Access()


def _plain(found: Store | _Cached, access: Access, limits: Limits | None) -> Store:
    """The plain files, from the local cache if it has them. It keeps sealed ones sealed."""
    if not isinstance(found, _Cached):
        return found if access.key is None else SealedStore(found, access.key)
    store, kept = found
    if access.key is not None:
        return SealedStore(store, access.key, kept)
    return CachedStore(store, kept.cache, kept.origin, kept.version, anew=kept.anew, limits=limits)


def _open(place: str | os.PathLike[str], access: Access, meter: Meter | None) -> Store | _Cached:
    if is_repository(place):
        return _hub(str(place), access, meter)
    if isinstance(place, str) and is_url(place):
        return _url(place, access, meter)
    for name in ("revision", "headers", "storage_options"):
        if getattr(access, name):
            raise ConfigError(
                f"{name} is for places on the network; {os.fspath(place)!r} is taken for a folder"
                f"{alternative(place, access.repo_type)}"
            )
    path = local_path(place) / (access.subfolder or "")
    require_folder(path, place, access.repo_type)
    return LocalStore(path)


def _url(url: str, access: Access, meter: Meter | None) -> Store | _Cached:
    if access.revision is not None:
        raise ConfigError(f"a revision is for repositories on the Hub; {shown(url)} has none")
    if access.subfolder:
        before, mark, query = url.partition("?")
        url = f"{before.rstrip('/')}/{access.subfolder}{mark}{query}"
    name = shown(url)
    files = open_files(
        url, headers=access.headers, storage_options=access.storage_options, patience=access.patience,
        progress=None if meter is None else meter.arrived,
    )  # fmt: skip
    store = _remote(files, name, meter)
    if not is_kept(url):
        return store
    query = urlsplit(url).query
    origin = f"{name}?{hashlib.sha256(query.encode()).hexdigest()[:16]}" if query else name
    kept = Kept(SegmentCache(access.cache_dir), origin, anew=access.force_download)
    return _Cached(None if access.local_files_only else store, kept)


def is_kept(url: str) -> bool:
    """Whether the local cache keeps what is read at a URL."""
    return not url.startswith(tuple(f"{scheme}:" for scheme in _UNCACHED))


def _remote(files: Store, name: str, meter: Meter | None) -> RemoteStore:
    return RemoteStore(files if meter is None else MeteredStore(files, meter), name)


def _hub(name: str, access: Access, meter: Meter | None) -> _Cached:
    from hf_cachegen.stores import hub  # the Hub's client is slow to import, and local artifacts do not need it

    if access.headers or access.storage_options:
        raise ConfigError(f"headers and storage_options are for URLs; {name} on the Hub takes a token")
    place = hub_place(name, access)
    cache = SegmentCache(access.cache_dir)
    key = f"commit of {place.revision}"
    if access.local_files_only or hub.is_offline():
        commit = place.revision
        if not hub.is_commit(commit):
            noted = cache.noted(place.origin, key)
            commit = noted.decode("ascii", "replace") if noted else ""
        if not hub.is_commit(commit):
            raise OfflineError(
                f"{place} is not in the cache at {cache.directory}; load it once without local_files_only (and not in "
                "offline mode)"
            )
        return _Cached(None, Kept(cache, place.origin, commit))
    commit = hub.resolve(place, access.token, access.patience)
    cache.note(place.origin, key, commit.encode())
    progress = None if meter is None else meter.arrived
    files = hub.open_hub(place, commit, access.token, access.patience, progress)
    return _Cached(_remote(files, f"{place}", meter), Kept(cache, place.origin, commit, access.force_download))


def hub_place(name: str, access: Access) -> Any:
    """The HubPlace that a repository's name or an hf:// URL means, together with the options."""
    from hf_cachegen.stores.hub import DEFAULT_REVISION, HubPlace

    if not name.startswith("hf://"):
        return HubPlace(name, access.repo_type, access.subfolder, access.revision or DEFAULT_REVISION)
    place = HubPlace.from_url(name, access.repo_type)
    if access.revision is not None and place.revision not in (DEFAULT_REVISION, access.revision):
        raise ConfigError(f"two revisions: {place.revision} in the URL, {access.revision} as revision=")
    if access.subfolder is not None and place.subfolder is not None:
        raise ConfigError(f"two folders: {place.subfolder} in the URL, {access.subfolder} as subfolder=")
    return HubPlace(
        place.repo_id, place.repo_type, place.subfolder or access.subfolder, access.revision or place.revision
    )
