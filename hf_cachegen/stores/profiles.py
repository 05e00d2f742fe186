"""Profiles in places: one file each, found by what an artifact says of it and believed for its hash alone.

    <place>/cachegen_profile.safetensors   the profile that is in use there; beside an artifact, or in a repository
    <repository>/<digest>.safetensors      each one that was ever pushed there, so that old artifacts find theirs
    <namespace>/<model>-cachegen-profile   the repository (of type model) where those of namespace/model are looked for

What is found by its hash may come from anywhere, so it is kept in the local cache under its SHA-256 and serves every
artifact that pins it. (XXH3, the older digest, authenticates nothing: what is pinned by it alone is fetched each time.)
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
from hf_cachegen.stores.naming import alternative, is_repository, local_path, named_both_ways
from hf_cachegen.stores.places import Access, hub_place, is_kept, open_store
from hf_cachegen.stores.remote import RemoteStore, is_url
from hf_cachegen.stores.retry import Patience
from hf_cachegen.stores.segment_cache import SegmentCache

NAMESPACES_VARIABLE = "HF_CACHEGEN_PROFILES"
"""Namespaces on the Hub (commas between them) to look for profiles in, instead of each model's own; empty: in none."""
REPO_TYPE = "model"
QUICK = Patience(attempts=2, timeout=10)
"""For asking whether there is a profile where nobody said that there is one."""
_REPO_SUFFIX = "-cachegen-profile"
_ORIGIN = "profiles, by their SHA-256"
_PIECE_BYTES = 8 << 20
_MODEL_ID = re.compile(r"(?P<namespace>[\w][\w.-]*)/(?P<name>[\w.-]+)")
_ON_HUB = re.compile(r"hf://(?:datasets|models|spaces)/(?P<namespace>[^/@]+)/")
_DIGEST = re.compile(r"[0-9a-f]{32}")


def is_kept_profile(name: str) -> bool:
    """Whether a file of this name in a repository is a profile under its digest."""
    return name.endswith(".safetensors") and _DIGEST.fullmatch(name.removesuffix(".safetensors")) is not None


def repository(model_id: str, namespace: str | None = None) -> str | None:
    """Where profiles of this model on the Hub are looked for (in the model's namespace or in another one); None for
    what is no name of a model on the Hub.
    """
    match = _MODEL_ID.fullmatch(model_id)
    name = f"{match['name']}{_REPO_SUFFIX}" if match else ""
    return f"{namespace or match['namespace']}/{name}" if match and len(name) <= 96 and ".." not in name else None


def repositories(model_id: str, *namespaces: str) -> list[str]:
    """All repositories to look into: in the model's namespace, or in those that HF_CACHEGEN_PROFILES names instead,
    and in `namespaces`.
    """
    named = os.environ.get(NAMESPACES_VARIABLE)
    own = [None] if named is None else [part.strip() for part in named.split(",") if part.strip()]
    found = [repository(model_id, namespace) for namespace in [*own, *namespaces]]
    return list(dict.fromkeys(one for one in found if one))


def fetch_pinned(
    pin: Pin, store: Store, access: Access, limits: Limits, *, beside_alone: bool = False
) -> bytes:
    """The file of the profile that the artifact in `store` needs: from the local cache, from beside the artifact, from
    the repository that the artifact names, or from those of `repositories`. (Local folders are not looked into here.)

    Raises ProfileError where it is in none of them, saying what is where; StoreError where one of them could not be
    asked; OfflineError where none may be.
    """
    cache = SegmentCache(access.cache_dir)
    kept = None if access.force_download or beside_alone else _kept(cache, pin.sha256)
    if kept is not None and pin.fits(kept):
        return kept
    failures: list[tuple[str, CacheGenError]] = []
    for place, fetch in islice(_sources(pin, store, access, limits), 1 if beside_alone else None):
        try:
            data = fetch()
            if not pin.fits(data):
                raise ProfileError("what is there is another profile")
        except CacheGenError as error:
            failures.append((place, error))
            continue
        if access.key is None:  # what was sealed stays sealed on the disk, too: its store sees to that
            _keep(cache, data)
        return data
    raise _not_found(pin, failures)


def fetch_beside(pin: Pin, store: Store, limits: Limits) -> bytes:
    """The file of the profile that the artifact in `store` needs, from beside it. Raises ProfileError for another one,
    ArtifactNotFoundError, LimitError, StoreError.
    """
    # Its hash is in the manifest, which is signed.
    data = download(without_signature(store), PROFILE_FILE, limits, pin.nbytes)
    if not pin.fits(data):
        raise ProfileError("what is there is another profile")
    return data


def fetch(
    place: str | os.PathLike[str], access: Access, limits: Limits, digest: str | None = None
) -> tuple[bytes, str | None]:
    """A profile's file from a place that the user named, and its place on the Hub at a commit.

    place: a repository ("user/name" or hf://...), a URL of a folder or a file, a folder, or a file. digest: take the
    one of this digest, of which a repository keeps every one that was pushed there.
    Raises ProfileError where there is none, or another one; StoreError, LimitError.
    """
    cache = SegmentCache(access.cache_dir)
    if is_repository(place):
        with named_both_ways(place):
            data, where = _from_hub(str(place), access, limits, digest, cache)
    elif isinstance(place, str) and is_url(place):
        data, where = _from_url(place, access, limits, cache), None
    else:
        path = local_path(place) / (access.subfolder or "")
        path = path / PROFILE_FILE if os.path.isdir(path) else path
        if access.revision is not None:
            raise ConfigError(
                f"a revision is for repositories on the Hub; {path} has none{alternative(place, access.repo_type)}"
            )
        if not os.path.isfile(path):
            raise ProfileError(
                f"there is no profile at {os.path.abspath(path)}; learn one with hf_cachegen.learn_profile"
                f"{alternative(place, access.repo_type)}"
            )
        data, where = download(LocalStore(path.parent), path.name, limits), None
    if digest is not None and xxhash.xxh3_128_hexdigest(data) != digest:
        raise ProfileError(f"the profile at {place} is not {digest} but {xxhash.xxh3_128_hexdigest(data)}")
    return data, where


def download(store: Store, name: str, limits: Limits, nbytes: int | None = None) -> bytes:
    """A whole file of a store, in ranges side by side. nbytes: what it should have. Raises LimitError, ProfileError."""
    size = store.size(name)
    if size > limits.max_profile_bytes:
        raise LimitError(f"{store}: {name} has {size} bytes, the limit for a profile is {limits.max_profile_bytes}")
    if nbytes not in (None, size):
        raise ProfileError(f"what is there has {size} bytes, the profile that is needed {nbytes}")
    pieces = [
        Segment(name, str(offset), offset, min(_PIECE_BYTES, size - offset), "")
        for offset in range(0, size, _PIECE_BYTES)
    ]
    store.prefetch(pieces)
    return b"".join(store.read(name, piece.offset, piece.length) for piece in pieces)


def _sources(
    pin: Pin, store: Store, access: Access, limits: Limits
) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Where it may be, in the order of looking, and how to get it from there."""
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
        raise ArtifactNotFoundError("its folder was looked into before")
    return fetch_beside(pin, store, limits)


def _pinned_on_hub(pin: Pin, url: str, access: Access, limits: Limits) -> bytes:
    """By its hash, so that no commit needs to be asked for first."""
    from hf_cachegen.stores import hub

    if access.local_files_only:
        raise OfflineError(f"{url} may not be asked (local_files_only)")
    place = hub.HubPlace.from_url(url)
    store = RemoteStore(hub.open_hub(place, place.revision, access.token, access.patience), url)
    try:
        return download(store, f"{pin.digest}.safetensors", limits, pin.nbytes)
    except ArtifactNotFoundError:
        return download(store, PROFILE_FILE, limits, pin.nbytes)


def _not_found(pin: Pin, failures: list[tuple[str, CacheGenError]]) -> CacheGenError:
    looked = "; ".join(f"{place[:200]}: {_reason(error)}" for place, error in failures)
    looked = "".join(c if c.isprintable() else "?" for c in looked)  # a stranger's words among them
    text = f"this artifact needs {pin}: pass it as profile=, or put it in the model's or the artifact's folder"
    text = f"{text} (looked: {looked})" if looked else text
    grave = [e for _, e in failures if isinstance(e, StoreError) and not isinstance(e, StoreAccessError)]
    # What could not be asked may have it: another time the same call may do.
    found: CacheGenError = type(grave[0])(text) if grave else ProfileError(text)
    found.__cause__ = grave[0] if grave else (failures[-1][1] if failures else None)
    return found


def _reason(error: CacheGenError) -> str:
    return "not there" if isinstance(error, ArtifactNotFoundError) else f"{type(error).__name__}: {error}"[:300]


def _from_hub(
    name: str, access: Access, limits: Limits, digest: str | None, cache: SegmentCache
) -> tuple[bytes, str]:
    from hf_cachegen.stores import hub

    place = hub_place(name, access)
    offline = access.local_files_only or hub.is_offline()
    commit = place.revision if hub.is_commit(place.revision) else None
    head = f"commit of {place.revision}"
    if commit is None and offline:
        commit = (cache.noted(place.origin, head) or b"").decode("ascii", "replace")
    elif commit is None:
        try:
            commit = hub.resolve(place, access.token, access.patience)
        except ArtifactNotFoundError as error:
            raise ProfileError(str(error)) from error
        cache.note(place.origin, head, commit.encode())
    where = hub.HubPlace(place.repo_id, place.repo_type, place.subfolder, commit or place.revision).url
    note = f"SHA-256 of profile {digest or ''} at {commit}"
    kept = _kept(cache, (cache.noted(place.origin, note) or b"").decode("ascii", "replace"))
    if kept is not None and not access.force_download:
        return kept, where
    if offline:
        raise OfflineError(
            f"the profile at {place} is not in the cache at {cache.directory}; load it once without local_files_only "
            "(and not in offline mode)"
        )
    store = RemoteStore(hub.open_hub(place, commit or "", access.token, access.patience), f"{place}")
    try:
        data = download(store, f"{digest}.safetensors" if digest else PROFILE_FILE, limits)
    except ArtifactNotFoundError as error:
        raise ProfileError(f"there is no profile {digest or ''} in {place}") from error
    cache.note(place.origin, note, _keep(cache, data).encode())
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
    """The file of that SHA-256, proved, if it is in the cache."""
    data = cache.noted(_ORIGIN, sha256) if sha256 else None
    return data if data is not None and hashlib.sha256(data).hexdigest() == sha256 else None


def _keep(cache: SegmentCache, data: bytes) -> str:
    sha256 = hashlib.sha256(data).hexdigest()
    cache.note(_ORIGIN, sha256, data)
    return sha256
