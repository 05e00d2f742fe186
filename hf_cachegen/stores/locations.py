"""Open the store of a location: a folder, a URL, or a repository on the Hub."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from hf_cachegen.artifact import MANIFEST_FILE, Limits, Store
from hf_cachegen.artifact.store import local_path
from hf_cachegen.errors import ArtifactNotFoundError, ConfigError, OfflineError
from hf_cachegen.stores.access import Access
from hf_cachegen.stores.cached import CachedStore
from hf_cachegen.stores.http import shown
from hf_cachegen.stores.local import open_folder
from hf_cachegen.stores.metered import Meter, MeteredStore
from hf_cachegen.stores.naming import (
    alternative,
    is_guess,
    is_repository,
    named_both_ways,
    require_folder,
)
from hf_cachegen.stores.remote import RemoteStore, is_url, open_files
from hf_cachegen.stores.sealed import Kept, SealedStore, sealed_names
from hf_cachegen.stores.segment_cache import SegmentCache
from hf_cachegen.stores.signed import SignedStore

_UNCACHED = ("file", "memory")
"""Schemes of URLs that are as near as the local cache, which does not keep their files."""


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
    """A location that the local cache keeps: its store (None in offline mode), and its part of the cache."""

    store: Store | None
    kept: Kept


def open_store(
    location: str | os.PathLike[str],
    access: Access | None = None,
    limits: Limits | None = None,
    meter: Meter | None = None,
) -> Store:
    """Open the store of an artifact.

    Args:
        location: a folder, a URL (hf:// too), or a repository ("user/name"). `hf_cachegen.stores.naming` has the rule
            by which a string is taken for a path or a repository; a path object is always a folder.
        access: the options for reaching it.
        limits: limits for the manifest.
        meter: observer of the requests that leave this process.

    Raises:
        ConfigError: the options contradict each other, or do not apply to this kind of location.
        ArtifactNotFoundError: there is no artifact.
        SignatureError: `access` has a public key, and the artifact is not signed with its private half.
        StoreError: the location cannot be reached.
    """
    access = access or Access()
    if access.local_files_only and access.force_download:
        raise ConfigError("local_files_only and force_download contradict each other")
    with named_both_ways(location):
        store = _plain(_open(location, access, meter), access, limits)
        if access.public_key is not None:
            store = SignedStore(store, access.public_key)
        if is_guess(location):
            store.size(MANIFEST_FILE)  # within the block, so that its error names the folder; readers need it next
    return ReachedStore(store, access)


def access_of(store: Store) -> Access:
    """Return the options that `open_store` opened a store with, to fetch a profile likewise; else the defaults."""
    found = store.access()
    return found if isinstance(found, Access) else Access()


def _plain(found: Store | _Cached, access: Access, limits: Limits | None) -> Store:
    """Return the store of the plain files, behind the local cache where it applies. Sealed files stay sealed there."""
    if not isinstance(found, _Cached):
        return found if access.key is None else SealedStore(found, access.key)
    store, kept = found
    if access.key is not None:
        return SealedStore(store, access.key, kept)
    return CachedStore(store, kept.cache, kept.origin, kept.version, refresh=kept.refresh, limits=limits)


def _open(location: str | os.PathLike[str], access: Access, meter: Meter | None) -> Store | _Cached:
    if is_repository(location):
        return _hub(str(location), access, meter)
    if isinstance(location, str) and is_url(location):
        return _url(location, access, meter)
    for name in ("revision", "headers", "storage_options"):
        if getattr(access, name):
            raise ConfigError(
                f"{name} is for locations on the network; {os.fspath(location)!r} is a local folder"
                f"{alternative(location, access.repo_type)}"
            )
    path = local_path(location)
    if access.subfolder:
        path = local_path(os.path.join(path, access.subfolder))
    require_folder(path, location, access.repo_type)
    store = open_folder(path)
    _require_key_for_sealed(store.directory, access.key is not None)
    return store


def _require_key_for_sealed(folder: Path, given: bool) -> None:
    """Raise ArtifactNotFoundError where a folder holds a sealed artifact and no key is given, or the reverse."""
    with suppress(PermissionError):  # reading raises
        sealed, plain = bool(sealed_names(folder)), os.path.lexists(folder / MANIFEST_FILE)
        if sealed and not plain and not given:
            raise ArtifactNotFoundError(f"the artifact in {folder} is sealed: pass its key as key=")
        if plain and not sealed and given:
            raise ArtifactNotFoundError(f"the artifact in {folder} is not sealed: pass no key")


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
    kept = Kept(SegmentCache(access.cache_dir), origin, refresh=access.force_download)
    return _Cached(None if access.local_files_only else store, kept)


def is_kept(url: str) -> bool:
    """Report whether the local cache keeps the files of a URL."""
    return not url.startswith(tuple(f"{scheme}:" for scheme in _UNCACHED))


def _remote(files: Store, name: str, meter: Meter | None) -> RemoteStore:
    return RemoteStore(files if meter is None else MeteredStore(files, meter), name)


def _hub(name: str, access: Access, meter: Meter | None) -> _Cached:
    from hf_cachegen.stores import hub  # the Hub's client is slow to import, and local artifacts do not need it

    if access.headers or access.storage_options:
        raise ConfigError(f"headers and storage_options are for URLs; {name} on the Hub takes a token")
    location = hub_location(name, access)
    cache = SegmentCache(access.cache_dir)
    key = f"commit of {location.revision}"
    if access.local_files_only or hub.is_offline():
        commit = location.revision
        if not hub.is_commit(commit):
            noted = cache.noted(location.origin, key)
            commit = noted.decode("ascii", "replace") if noted else ""
        if not hub.is_commit(commit):
            raise OfflineError(
                f"{location} is not in the cache at {cache.directory}; load it once without local_files_only (and not "
                "in offline mode)"
            )
        return _Cached(None, Kept(cache, location.origin, commit))
    commit = hub.resolve(location, access.token, access.patience)
    cache.note(location.origin, key, commit.encode())
    progress = None if meter is None else meter.arrived
    files = hub.open_hub(location, commit, access.token, access.patience, progress)
    return _Cached(_remote(files, f"{location}", meter), Kept(cache, location.origin, commit, access.force_download))


def hub_location(name: str, access: Access) -> Any:
    """Return the HubLocation of a repository's name or an hf:// URL together with the options.

    Raises:
        ConfigError: the name is not valid, or the URL and the options name two revisions or two folders.
    """
    from hf_cachegen.stores.hub import DEFAULT_REVISION, HubLocation

    if not name.startswith("hf://"):
        return HubLocation(name, access.repo_type, access.subfolder, access.revision or DEFAULT_REVISION)
    location = HubLocation.from_url(name, access.repo_type)
    if access.revision is not None and location.revision not in (DEFAULT_REVISION, access.revision):
        raise ConfigError(f"two revisions: {location.revision} in the URL, {access.revision} as revision=")
    if access.subfolder is not None and location.subfolder is not None:
        raise ConfigError(f"two folders: {location.subfolder} in the URL, {access.subfolder} as subfolder=")
    return replace(
        location,
        subfolder=location.subfolder or access.subfolder,
        revision=access.revision or location.revision,
    )
