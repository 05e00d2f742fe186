"""List the artifacts and profiles at a location, copy an artifact whole, and check whether a server can serve one."""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from hf_cachegen.artifact import (
    BASE_FILE,
    MANIFEST_FILE,
    PROFILE_FILE,
    SIGNATURE_FILE,
    ArtifactWriter,
    Limits,
    Reader,
    Segment,
    Store,
    innermost,
)
from hf_cachegen.artifact.manifest import is_own_file
from hf_cachegen.artifact.pin import Pin
from hf_cachegen.artifact.store import local_path, location_name
from hf_cachegen.errors import ArtifactNotFoundError, CacheGenError, ConfigError, OfflineError, ProfileError
from hf_cachegen.stores.http import shown
from hf_cachegen.stores.locations import Access, hub_location, open_store
from hf_cachegen.stores.naming import is_repository, named_both_ways, require_folder
from hf_cachegen.stores.profiles import fetch_beside, is_kept_profile
from hf_cachegen.stores.remote import is_url, open_files
from hf_cachegen.stores.sealed import SUFFIX
from hf_cachegen.stores.signed import read_signature

CHECK_BYTES = 64 << 20
"""Most bytes that are fetched to measure the speed of a location."""


@dataclass(frozen=True)
class Found:
    """An artifact, or a profile, at a location.

    Attributes:
        folder: path relative to the location, "" for the location itself; its URL in a namespace of the Hub.
        nbytes: size in bytes of all files of the artifact, or of the profile in use.
        profile: True for a profile.
        kept: number of older profiles in the folder.
    """

    folder: str
    nbytes: int
    profile: bool = False
    kept: int = 0


@dataclass(frozen=True)
class Check:
    """The result of one check of a server.

    Attributes:
        name: name of the check.
        passed: None where the result is advice.
        detail: the measured value, or the reason.
    """

    name: str
    passed: bool | None
    detail: str


def find(location: str, access: Access | None = None) -> list[Found]:
    """List the artifacts, plain and sealed, and the profiles at or below a location, each in alphabetical order.

    Args:
        location: a folder, a repository, an fsspec URL, or a namespace of the Hub (hf://name) for all its repositories.
        access: the options for reaching it.

    Raises:
        ConfigError: the location is an http(s) URL, which cannot be listed.
        ArtifactNotFoundError: there is no such folder or repository.
        StoreError: the location cannot be reached.
    """
    access, location = access or Access(), location_name(location)
    if location.startswith("hf://"):
        from hf_cachegen.stores import hub

        if (name := hub.namespace(location)) is not None:
            if access.revision or access.subfolder:
                raise ConfigError(f"revision and subfolder are for one repository; {location} is a namespace")
            repositories = hub.find_repositories(name, _is_listed, access.token)
            files = {where.origin: hub.find_files(where, access.token) for where in repositories}
            return [
                replace(found, folder=f"{origin}/{found.folder}".rstrip("/"))
                for origin, listed in files.items()
                for found in _found(listed)
            ]
    if is_repository(location):
        from hf_cachegen.stores import hub

        with named_both_ways(location):
            return _found(hub.find_files(hub_location(location, access), access.token))
    if is_url(location):
        listed = open_files(location, storage_options=access.storage_options, patience=access.patience).find()
        if listed is None:
            raise ConfigError(f"a web server lists no files; name the artifact's own URL instead of {shown(location)}")
        return _found(listed)
    root = local_path(location) / (access.subfolder or "")
    require_folder(root, location, access.repo_type)
    return _found({
        os.path.relpath(path, root): os.path.getsize(path)
        for folder, _, names in os.walk(root)
        for name in names
        if is_own_file(name.removesuffix(SUFFIX)) or _is_listed(name) or is_kept_profile(name)
        if os.path.isfile(path := os.path.join(folder, name))  # a link may lead nowhere
    })  # fmt: skip


def _found(files: Mapping[str, int]) -> list[Found]:
    """Return the artifacts and profiles among these files, given as path and size."""
    sizes: dict[str, int] = {}
    profiles: dict[str, int] = {}
    kept: Counter[str] = Counter()
    for path, size in files.items():
        folder, name = str(PurePosixPath(path).parent), PurePosixPath(path).name
        if is_own_file(name.removesuffix(SUFFIX)):
            sizes[folder] = sizes.get(folder, 0) + size
        elif name.removesuffix(SUFFIX) == PROFILE_FILE:
            profiles[folder] = size
        elif is_kept_profile(name):
            kept[folder] += 1
    manifests = (MANIFEST_FILE, MANIFEST_FILE + SUFFIX)
    whole = [folder for folder in sizes if any(str(PurePosixPath(folder, name)) in files for name in manifests)]
    found = [Found(folder, sizes[folder]) for folder in sorted(whole)]
    # The profile in use is also kept under its digest.
    found += [Found(folder, profiles[folder], True, max(0, kept[folder] - 1)) for folder in sorted(profiles)]
    return [replace(one, folder="") if one.folder == "." else one for one in found]


def _is_listed(path: str) -> bool:
    """Report whether the folder of this file holds an artifact or a profile."""
    return PurePosixPath(path).name.removesuffix(SUFFIX) in (MANIFEST_FILE, PROFILE_FILE)


def pull(
    location: str,
    directory: str | os.PathLike[str],
    access: Access | None = None,
    *,
    overwrite: bool = False,
    limits: Limits | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Copy a whole artifact into a folder, with its signature and its profile where they are beside it.

    Every segment is verified. After an error the folder holds nothing of the artifact.

    Args:
        location: a folder, a URL or a repository.
        directory: the folder to write; created if needed.
        access: the options for reaching the location.
        overwrite: replace an artifact in `directory`.
        limits: limits for the artifact.
        progress: called with (bytes copied, bytes in all).

    Returns:
        The size of the artifact in bytes.

    Raises:
        ArtifactError: the artifact is missing, damaged or above the limits, or `directory` holds one.
        StoreError: the location cannot be read.
    """
    directory = local_path(directory)
    reader = Reader(open_store(location, access, limits), limits or Limits())
    manifest = reader.manifest
    segments = manifest.segments
    reader.prefetch(segments)
    signature = None
    with suppress(ArtifactNotFoundError, OfflineError):
        signature = read_signature(reader.store)  # first: the writer removes the one in `directory`
    done, total = 0, sum(segment.length for segment in segments)
    with ArtifactWriter(directory, overwrite=overwrite, limits=limits or Limits()) as writer:
        for segment in segments:
            writer.add(segment.file, segment.name, reader.read(segment))
            done += segment.length
            if progress:
                progress(done, total)
        writer.commit(replace(manifest, files={}))
    if signature is not None:
        _replace(Path(directory, SIGNATURE_FILE), signature)
    if "profile" in manifest.codec:
        with suppress(ArtifactNotFoundError, OfflineError, ProfileError):
            data = fetch_beside(Pin.from_codec(manifest.codec), reader.store, reader.limits)
            if overwrite or not os.path.lexists(Path(directory, PROFILE_FILE)):  # another one may be needed there
                _replace(Path(directory, PROFILE_FILE), data)
    return reader.nbytes_at()


def _replace(path: Path, data: bytes) -> None:
    with tempfile.TemporaryDirectory(prefix=".", suffix=".partial", dir=path.parent) as folder:
        partial = Path(folder, path.name)
        partial.write_bytes(data)
        os.replace(partial, path)


def serve_check(location: str, access: Access | None = None) -> list[Check]:
    """Check whether a location can serve its artifact for loading; stop at the first check that raises.

    Args:
        location: a URL or a repository.
        access: the options for reaching it; the local cache is not used.

    Returns:
        The results of the checks that were made.
    """
    checks: list[Check] = []
    with tempfile.TemporaryDirectory(prefix="hf_cachegen-") as folder:
        access = replace(access or Access(), cache_dir=folder, local_files_only=False, force_download=True)
        try:
            for step in _steps(location, access):
                checks.append(step())
        except CacheGenError as error:
            checks.append(Check(_STEPS[len(checks)], False, f"{type(error).__name__}: {error}"))
    return checks


_STEPS = ("manifest", "ranges", "changes are noticed", "level 1", "speed")


def _steps(location: str, access: Access) -> list[Callable[[], Check]]:
    state: dict[str, Reader] = {}

    def manifest() -> Check:
        start = time.perf_counter()
        reader = state["reader"] = Reader(open_store(location, access))
        seconds = time.perf_counter() - start
        return Check("manifest", True, f"{reader.manifest.tokens:,} tokens, {seconds * 1000:.0f} ms to open")

    def ranges() -> Check:
        store, longest = _served(state["reader"], location), _longest(state["reader"])
        store.size(longest.file)
        if not store.serves_ranges():
            return Check("ranges", None, "ignored: every file is fetched whole, once for each load")
        first, last = longest.offset + longest.length // 3, longest.offset + longest.length
        for offset, length in ((first, last - first), (last - 1, 1)):
            data = store.read(longest.file, offset, length)
            if len(data) != length:
                return Check("ranges", False, f"expected a range of {length} bytes, got {len(data)}")
        return Check("ranges", True, f"exact, within {longest.file}")

    def changes() -> Check:
        mark = _served(state["reader"], location).mark(_longest(state["reader"]).file)
        detail = f"marked {mark[:60]}" if mark else "no ETag or date: only checksums find mixed states"
        return Check("changes are noticed", True if mark else None, detail)

    def level() -> Check:
        start = time.perf_counter()
        count = state["reader"].verify(level=1)
        return Check("level 1", True, f"sound, {count:,} bytes in {time.perf_counter() - start:.2f} s")

    def speed() -> Check:
        wanted: list[Segment] = []
        for segment in state["reader"].manifest.segments:
            if sum(s.length for s in wanted) + segment.length <= CHECK_BYTES:
                wanted.append(segment)
        start = time.perf_counter()
        state["reader"].prefetch(wanted)
        count = sum(len(state["reader"].read(segment)) for segment in wanted)
        seconds = max(time.perf_counter() - start, 1e-9)
        return Check("speed", None, f"{count / seconds / 1e6:.1f} MB/s over {count:,} bytes")

    return [manifest, ranges, changes, level, speed]


def _longest(reader: Reader) -> Segment:
    """Return the longest segment of the base, as a range of the file that is served."""
    found = max(reader.manifest.files[BASE_FILE].segments, key=lambda segment: segment.length)
    return reader.store.locate(found)


def _served(reader: Reader, location: str) -> Store:
    """Return the store of the files at the location, without the local cache."""
    store = innermost(reader.store)
    if store.folder() is not None:
        raise ConfigError(f"expected a URL or a repository; {location} is a local folder, which no server serves")
    return store
