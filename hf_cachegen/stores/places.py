"""From the name of a place to a store: a folder, a URL, or a repository on the Hub."""

from __future__ import annotations

import hashlib
import os
from typing import Any
from urllib.parse import urlsplit

from hf_cachegen.artifact import MANIFEST_FILE, Limits, Store
from hf_cachegen.errors import ConfigError, OfflineError
from hf_cachegen.stores.access import Access
from hf_cachegen.stores.cached import CachedStore
from hf_cachegen.stores.http import shown
from hf_cachegen.stores.local import LocalStore
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


def open_store(
    place: str | os.PathLike[str], access: Access | None = None, limits: Limits | None = None
) -> Store:
    """The store of the artifact at `place`: a folder, a URL (hf:// too), or a repository ("user/name").

    `naming` says which strings are paths. A path object is always a folder. Raises SignatureError, ConfigError,
    ArtifactNotFoundError, StoreError.
    """
    access = access or Access()
    if access.local_files_only and access.force_download:
        raise ConfigError("local_files_only and force_download contradict each other")
    with named_both_ways(place):
        store = _layered(_open(place, access, limits), access)
        if is_guess(place):
            store.size(MANIFEST_FILE)  # now, so that its error names the folder too; readers ask for it next anyway
    return store


def access_of(store: Store) -> Access:
    """How `open_store` reached it, so that what goes with it can be fetched likewise; the defaults for other stores."""
    found = getattr(store, "access", None)
    return found if isinstance(found, Access) else Access()


def _layered(store: Store, access: Access) -> Store:
    """What opens seals and checks signatures in front of `store`."""
    if access.key is not None:
        if isinstance(store, CachedStore):
            kept = Kept(store.cache, store.origin, store.version, store.anew)
            store = SealedStore(store.store, access.key, kept, access=access)
        else:
            store = SealedStore(store, access.key, access=access)
    return store if access.public_key is None else SignedStore(store, access.public_key, access=access)


def _open(place: str | os.PathLike[str], access: Access, limits: Limits | None) -> Store:
    if is_repository(place):
        return _hub(str(place), access, limits)
    if isinstance(place, str) and is_url(place):
        return _url(place, access, limits)
    for name in ("revision", "headers", "storage_options"):
        if getattr(access, name):
            raise ConfigError(
                f"{name} is for places on the network; {os.fspath(place)!r} is taken for a folder"
                f"{alternative(place, access.repo_type)}"
            )
    path = local_path(place) / (access.subfolder or "")
    require_folder(path, place, access.repo_type)
    return LocalStore(path, access=access)


def _url(url: str, access: Access, limits: Limits | None) -> Store:
    if access.revision is not None:
        raise ConfigError(f"a revision is for repositories on the Hub; {shown(url)} has none")
    if access.subfolder:
        before, mark, query = url.partition("?")
        url = f"{before.rstrip('/')}/{access.subfolder}{mark}{query}"
    name = shown(url)
    files = open_files(
        url, headers=access.headers, storage_options=access.storage_options, patience=access.patience
    )
    if url.startswith(tuple(f"{scheme}:" for scheme in _UNCACHED)):
        return RemoteStore(files, name, access=access)
    query = urlsplit(url).query
    origin = f"{name}?{hashlib.sha256(query.encode()).hexdigest()[:16]}" if query else name
    store = None if access.local_files_only else RemoteStore(files, name)
    cache = SegmentCache(access.cache_dir)
    return CachedStore(store, cache, origin, anew=access.force_download, limits=limits, access=access)


def _hub(name: str, access: Access, limits: Limits | None) -> Store:
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
        return CachedStore(None, cache, place.origin, commit, limits=limits, access=access)
    commit = hub.resolve(place, access.token, access.patience)
    cache.note(place.origin, key, commit.encode())
    store = RemoteStore(hub.open_hub(place, commit, access.token, access.patience), f"{place}")
    return CachedStore(
        store, cache, place.origin, commit, anew=access.force_download, limits=limits, access=access
    )  # fmt: skip


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
