"""Find and fetch the files of profiles. An artifact pins its profile by a hash, and a file must have that hash.

    <location>/cachegen_profile.safetensors   the profile in use, beside an artifact or in a repository
    <repository>/<digest>.safetensors         every profile that was pushed there, so that older artifacts find theirs
    <namespace>/<model>-cachegen-profile      the repository (of type model) with the profiles of namespace/model

A file with the pinned hash is right wherever it comes from. So the local cache keeps it under its SHA-256 for every
artifact that pins it. (XXH3, the older digest, does not authenticate: a profile pinned by it alone is fetched each
time.)
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice

import xxhash

from hf_cachegen.artifact import PROFILE_FILE, Limits, Segment, Store, without_signature
from hf_cachegen.artifact.pin import Pin
from hf_cachegen.artifact.store import local_path
from hf_cachegen.errors import (
    ArtifactNotFoundError,
    CacheGenError,
    ConfigError,
    LimitError,
    OfflineError,
    ProfileError,
    StoreAccessError,
    StoreError,
)
from hf_cachegen.stores.local import LocalStore
from hf_cachegen.stores.locations import Access, hub_location, is_kept, open_store
from hf_cachegen.stores.naming import alternative, is_repository, named_both_ways
from hf_cachegen.stores.remote import RemoteStore, is_url
from hf_cachegen.stores.retry import Patience
from hf_cachegen.stores.segment_cache import SegmentCache

NAMESPACES_VARIABLE = "HF_CACHEGEN_PROFILES"
"""Variable with the namespaces on the Hub, separated by commas, that are searched for profiles instead of the model's
own; empty for none.
"""
REPO_TYPE = "model"
QUICK = Patience(attempts=2, timeout=10)
"""Patience for a repository that may not exist."""
_REPO_SUFFIX = "-cachegen-profile"
_ORIGIN = "profiles, by their SHA-256"
_PIECE_BYTES = 8 << 20
_MODEL_ID = re.compile(r"(?P<namespace>[\w][\w.-]*)/(?P<name>[\w.-]+)")
_ON_HUB = re.compile(r"hf://(?:datasets|models|spaces)/(?P<namespace>[^/@]+)/")
_DIGEST = re.compile(r"[0-9a-f]{32}")


def is_kept_profile(name: str) -> bool:
    """Report whether a file of this name is a profile under its digest."""
    return name.endswith(".safetensors") and _DIGEST.fullmatch(name.removesuffix(".safetensors")) is not None


def repository(model_id: str, namespace: str | None = None) -> str | None:
    """Return the repository for profiles of a model.

    Args:
        model_id: name of the model on the Hub, "namespace/name".
        namespace: namespace of the repository (default: the model's own).

    Returns:
        "namespace/name-cachegen-profile"; None where `model_id` is not the name of a model on the Hub.
    """
    match = _MODEL_ID.fullmatch(model_id)
    name = f"{match['name']}{_REPO_SUFFIX}" if match else ""
    return f"{namespace or match['namespace']}/{name}" if match and len(name) <= 96 and ".." not in name else None


def repositories(model_id: str, *namespaces: str) -> list[str]:
    """List the repositories that are searched for profiles of a model: in the model's namespace, or in those that
    HF_CACHEGEN_PROFILES names instead, and in `namespaces`.
    """
    named = os.environ.get(NAMESPACES_VARIABLE)
    own = [None] if named is None else [part.strip() for part in named.split(",") if part.strip()]
    found = [repository(model_id, namespace) for namespace in [*own, *namespaces]]
    return list(dict.fromkeys(one for one in found if one))


def fetch_pinned(
    pin: Pin, store: Store, access: Access, limits: Limits, *, beside_alone: bool = False
) -> bytes:
    """Fetch the file of the profile that an artifact needs.

    The local cache is searched first, then the artifact's own location, the repository that the artifact names, and
    those of `repositories`. Local folders are not searched here.

    Args:
        pin: the hashes of the profile.
        store: the store of the artifact.
        access: the options that the artifact was opened with.
        limits: bounds the size of the profile.
        beside_alone: search the artifact's own location alone.

    Returns:
        The bytes of the file.

    Raises:
        ProfileError: it is in none of these locations.
        StoreError: one of them could not be reached, and no other has it.
        OfflineError: it is not in the cache, and no other location may be read.
    """
    cache = SegmentCache(access.cache_dir)
    kept = None if access.force_download or beside_alone else _kept(cache, pin.sha256)
    if kept is not None and pin.fits(kept):
        return kept
    failures: list[tuple[str, CacheGenError]] = []
    for location, fetch in islice(_sources(pin, store, access, limits), 1 if beside_alone else None):
        try:
            data = fetch()
            if not pin.fits(data):
                raise ProfileError("the file there is another profile")
        except CacheGenError as error:
            failures.append((location, error))
            continue
        if access.key is None:  # the cache must not hold the plain bytes of a sealed file
            _keep(cache, data)
        return data
    raise _not_found(pin, failures)


def fetch_beside(pin: Pin, store: Store, limits: Limits) -> bytes:
    """Fetch the file of the profile that an artifact needs, from the artifact's own location.

    Args:
        pin: the hashes of the profile.
        store: the store of the artifact.
        limits: bounds the size of the profile.

    Returns:
        The bytes of the file.

    Raises:
        ProfileError: the file there is another profile.
        ArtifactNotFoundError: there is no such file.
        LimitError: the file exceeds the limits.
        StoreError: the location cannot be read.
    """
    # The manifest is signed, and holds the hash of the profile: a signature of its own is not needed.
    data = download(without_signature(store), PROFILE_FILE, limits, pin.nbytes)
    if not pin.fits(data):
        raise ProfileError("the file there is another profile")
    return data


def fetch(
    location: str | os.PathLike[str], access: Access, limits: Limits, digest: str | None = None
) -> tuple[bytes, str | None]:
    """Fetch a profile's file from a location that the user named.

    Args:
        location: a repository ("user/name" or hf://...), a URL of a folder or a file, a folder, or a file.
        access: the options for reaching it.
        limits: bounds the size of the profile.
        digest: fetch the profile with this digest; a repository keeps every profile that was pushed to it.

    Returns:
        The bytes of the file, and its location on the Hub at a commit (hf://...; None elsewhere).

    Raises:
        ProfileError: there is no profile, or it has another digest.
        LimitError: the file exceeds the limits.
        StoreError: the location cannot be read.
    """
    cache = SegmentCache(access.cache_dir)
    if is_repository(location):
        with named_both_ways(location):
            data, where = _from_hub(str(location), access, limits, digest, cache)
    elif isinstance(location, str) and is_url(location):
        data, where = _from_url(location, access, limits, cache), None
    else:
        path = local_path(location) / (access.subfolder or "")
        path = path / PROFILE_FILE if os.path.isdir(path) else path
        if access.revision is not None:
            raise ConfigError(
                f"a revision is for repositories on the Hub; {path} has none{alternative(location, access.repo_type)}"
            )
        if not os.path.isfile(path):
            raise ProfileError(
                f"there is no profile at {os.path.abspath(path)}; learn one with hf_cachegen.learn_profile"
                f"{alternative(location, access.repo_type)}"
            )
        data, where = download(LocalStore(path.parent), path.name, limits), None
    if digest is not None and xxhash.xxh3_128_hexdigest(data) != digest:
        raise ProfileError(f"{location}: expected the profile {digest}, got {xxhash.xxh3_128_hexdigest(data)}")
    return data, where


def download(store: Store, name: str, limits: Limits, nbytes: int | None = None) -> bytes:
    """Fetch a whole file of a store, as ranges that are fetched in parallel.

    Args:
        store: the store.
        name: name of the file.
        limits: bounds the size of the file.
        nbytes: the expected size in bytes; None for any.

    Raises:
        LimitError: the file exceeds the limits.
        ProfileError: the file has another size.
        ArtifactNotFoundError, StoreError: the file cannot be read.
    """
    size = store.size(name)
    if size > limits.max_profile_bytes:
        raise LimitError(f"{store}: {name} has {size} bytes, the limit for a profile is {limits.max_profile_bytes}")
    if nbytes not in (None, size):
        raise ProfileError(f"expected a profile of {nbytes} bytes, the file there has {size} bytes")
    pieces = [
        Segment(name, str(offset), offset, min(_PIECE_BYTES, size - offset), "")
        for offset in range(0, size, _PIECE_BYTES)
    ]
    store.prefetch(pieces)
    return b"".join(store.read(name, piece.offset, piece.length) for piece in pieces)


def _sources(
    pin: Pin, store: Store, access: Access, limits: Limits
) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Yield the locations to search, in order, each with a function that fetches the file."""
    yield f"beside the artifact, {store}", partial(_beside, pin, store, limits)
    match = _ON_HUB.match(str(store))
    namespaces = [match["namespace"]] if match else []
    guesses = [f"hf://{REPO_TYPE}s/{name}" for name in repositories(pin.model, *namespaces)]
    if pin.place:
        yield pin.place, partial(_pinned_on_hub, pin, pin.place, access, limits)
    for url in guesses:
        yield url, partial(_pinned_on_hub, pin, url, replace(access, patience=access.patience or QUICK), limits)


def _beside(pin: Pin, store: Store, limits: Limits) -> bytes:
    if store.folder() is not None:
        raise ArtifactNotFoundError("its folder was searched before")
    return fetch_beside(pin, store, limits)


def _pinned_on_hub(pin: Pin, url: str, access: Access, limits: Limits) -> bytes:
    """Fetch by the hash, without resolving the revision to a commit first."""
    from hf_cachegen.stores import hub

    if access.local_files_only:
        raise OfflineError(f"{url} may not be read (local_files_only)")
    location = hub.HubLocation.from_url(url)
    store = RemoteStore(hub.open_hub(location, location.revision, access.token, access.patience), url)
    try:
        return download(store, f"{pin.digest}.safetensors", limits, pin.nbytes)
    except ArtifactNotFoundError:
        return download(store, PROFILE_FILE, limits, pin.nbytes)


def _not_found(pin: Pin, failures: list[tuple[str, CacheGenError]]) -> CacheGenError:
    """Return the error that lists the locations that were searched."""
    searched = "; ".join(f"{location[:200]}: {_reason(error)}" for location, error in failures)
    searched = "".join(c if c.isprintable() else "?" for c in searched)  # parts of it are untrusted text
    text = f"this artifact needs {pin}: pass it as profile=, or put it in the model's or the artifact's folder"
    text = f"{text} (searched: {searched})" if searched else text
    # A location that could not be reached may have it: the same call may succeed later.
    unreached = [e for _, e in failures if isinstance(e, StoreError) and not isinstance(e, StoreAccessError)]
    found: CacheGenError = type(unreached[0])(text) if unreached else ProfileError(text)
    found.__cause__ = unreached[0] if unreached else (failures[-1][1] if failures else None)
    return found


def _reason(error: CacheGenError) -> str:
    return "not there" if isinstance(error, ArtifactNotFoundError) else f"{type(error).__name__}: {error}"[:300]


def _from_hub(
    name: str, access: Access, limits: Limits, digest: str | None, cache: SegmentCache
) -> tuple[bytes, str]:
    from hf_cachegen.stores import hub

    location = hub_location(name, access)
    offline = access.local_files_only or hub.is_offline()
    commit = location.revision if hub.is_commit(location.revision) else None
    head = f"commit of {location.revision}"
    if commit is None and offline:
        commit = (cache.noted(location.origin, head) or b"").decode("ascii", "replace")
    elif commit is None:
        try:
            commit = hub.resolve(location, access.token, access.patience)
        except ArtifactNotFoundError as error:
            raise ProfileError(str(error)) from error
        cache.note(location.origin, head, commit.encode())
    where = hub.HubLocation(location.repo_id, location.repo_type, location.subfolder, commit or location.revision).url
    note = f"SHA-256 of profile {digest or ''} at {commit}"
    kept = _kept(cache, (cache.noted(location.origin, note) or b"").decode("ascii", "replace"))
    if kept is not None and not access.force_download:
        return kept, where
    if offline:
        raise OfflineError(
            f"the profile at {location} is not in the cache at {cache.directory}; load it once without "
            "local_files_only (and not in offline mode)"
        )
    store = RemoteStore(hub.open_hub(location, commit or "", access.token, access.patience), f"{location}")
    try:
        data = download(store, f"{digest}.safetensors" if digest else PROFILE_FILE, limits)
    except ArtifactNotFoundError as error:
        raise ProfileError(f"there is no profile {digest or ''} in {location}") from error
    cache.note(location.origin, note, _keep(cache, data).encode())
    return data, where


def _from_url(url: str, access: Access, limits: Limits, cache: SegmentCache) -> bytes:
    path, mark, query = url.partition("?")
    folder, _, name = path.rpartition("/")
    if not name.endswith(".safetensors"):
        folder, name = path, PROFILE_FILE
    store = open_store(f"{folder}{mark}{query}", access, limits)
    note = f"SHA-256 of {name}"
    if access.local_files_only and access.key is None and access.public_key is None and is_kept(url):
        kept = _kept(cache, (cache.noted(str(store), note) or b"").decode("ascii", "replace"))
        if kept is None:
            raise OfflineError(f"the profile {name} at {store} is not in the cache at {cache.directory}")
        return kept
    try:
        data = download(store, name, limits)
    except ArtifactNotFoundError as error:
        raise ProfileError(f"there is no profile {name} at {store}") from error
    cache.note(str(store), note, _keep(cache, data).encode())
    return data


def _kept(cache: SegmentCache, sha256: str | None) -> bytes | None:
    """Return the file with that SHA-256, checked, from the cache; None where the cache lacks it."""
    data = cache.noted(_ORIGIN, sha256) if sha256 else None
    return data if data is not None and hashlib.sha256(data).hexdigest() == sha256 else None


def _keep(cache: SegmentCache, data: bytes) -> str:
    sha256 = hashlib.sha256(data).hexdigest()
    cache.note(_ORIGIN, sha256, data)
    return sha256
