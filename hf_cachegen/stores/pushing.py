"""Pushing to the Hub: artifacts, sealed ones too, and profiles, each in one commit on top of the head that was seen.

Whoever commits in between is not overwritten: the push is made again on the new head, unless the files that it is about
were changed there.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import xxhash
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from hf_cachegen.artifact import PROFILE_FILE, SIGNATURE_FILE, Reader
from hf_cachegen.artifact.manifest import is_own_file
from hf_cachegen.errors import ArtifactNotFoundError, ConfigError, ConflictError
from hf_cachegen.stores.hub import (
    DEFAULT_REVISION,
    HubPlace,
    Token,
    client,
    is_commit,
    named,
    open_hub,
    status_of,
)
from hf_cachegen.stores.local import LocalStore, published_root
from hf_cachegen.stores.profiles import repository
from hf_cachegen.stores.sealed import SUFFIX, SealedStore, Secret, read_header, sealed_names
from hf_cachegen.stores.signed import require_current

CARD = "README.md"
CARD_MARK = "<!-- written by hf_cachegen; remove this line to keep your own text -->"
"""Only a card with this line is ever replaced."""
ATTEMPTS = 8
BACKOFF_SECONDS = 0.25
"""Wait after the first attempt that met another commit, at most; it doubles, and chance shortens it, since many who
push to one repository would meet again.
"""


@dataclass(frozen=True)
class Pushed:
    """url: of the commit, or of the pull request; commit: its id; place: what was pushed, at that commit (hf://...)."""

    url: str
    commit: str
    place: str


def push(
    directory: Path,
    place: HubPlace,
    card: str,
    *,
    profile: bytes | None = None,
    key: Secret | None = None,
    token: Token = None,
    private: bool = True,
    commit_message: str = "Upload a KV cache",
    create_pr: bool = False,
    progress: bool = True,
) -> Pushed:
    """Puts the artifact in `directory` into a repository, which is made if need be, in one commit, with its signature,
    and with the file of the profile that it needs where one is given. A sealed artifact goes as it is; with `key` it is
    opened first, and every byte checked.

    What an earlier artifact had and this one has not is removed in the same commit; a card of somebody else's making
    stays, and so does a profile. progress: let the Hub's client draw its bars on stderr.
    Raises ConfigError where `private` is asked for and the repository is public; ConflictError where somebody else
    changed this very artifact meanwhile; SignatureError for a signature of another artifact; ArtifactError, StoreError.
    """
    files: dict[str, Path | bytes] = {name: directory / name for name in _checked_names(directory, key)}
    if profile is not None:
        files[PROFILE_FILE] = profile
    return _publish(
        files, place, card, _is_artifacts, token=token, private=private, commit_message=commit_message,
        create_pr=create_pr, progress=progress,
    )  # fmt: skip


def push_profile(
    data: bytes,
    place: HubPlace,
    card: str,
    *,
    token: Token = None,
    private: bool = True,
    commit_message: str = "Upload a profile",
    create_pr: bool = False,
    progress: bool = True,
) -> Pushed:
    """Puts a profile's file into a repository as the one in use, and under its digest, where it stays; otherwise as
    `push`.
    """
    files: dict[str, Path | bytes] = {PROFILE_FILE: data, f"{xxhash.xxh3_128_hexdigest(data)}.safetensors": data}
    return _publish(
        files, place, card, lambda name: name == PROFILE_FILE, token=token, private=private,
        commit_message=commit_message, create_pr=create_pr, progress=progress,
    )  # fmt: skip


def own_repository(model: str, token: Token = None) -> str:
    """Where the user who has this token keeps profiles of that model: <user>/<model>-cachegen-profile."""
    model = PurePosixPath(model.rstrip("/")).name if repository(model) is None else model
    with named("the user's own namespace"):
        user = str(client(token).whoami()["name"])
    found = repository(model if "/" in model else f"{user}/{model}", user)
    if found is None:
        raise ConfigError(f"no repository can be named after model {model!r:.200}: pass repo_id=")
    return found


def _publish(
    files: Mapping[str, Path | bytes],
    place: HubPlace,
    card: str,
    is_ours: Callable[[str], bool],
    *,
    token: Token,
    private: bool,
    commit_message: str,
    create_pr: bool,
    progress: bool,
) -> Pushed:
    """One commit with `files` and the card. is_ours: which of the files there this is about: removed if they are not
    among `files`, except a profile's; what has changed them meanwhile is a conflict.
    """
    api = client(token)
    with named(f"{place}"), _bars(progress):
        api.create_repo(place.repo_id, private=private, repo_type=place.repo_type, exist_ok=True)
        if private and not api.repo_info(place.repo_id, repo_type=place.repo_type).private:
            raise ConfigError(
                f"{place.repo_id} is public, and a cache reveals its text; if you mean it, pass private=False"
            )
        if place.revision != DEFAULT_REVISION and not create_pr and not is_commit(place.revision):
            api.create_branch(place.repo_id, branch=place.revision, repo_type=place.repo_type, exist_ok=True)
        before: dict[str, str] | None = None
        for attempt in range(1, ATTEMPTS + 1):
            head = api.repo_info(place.repo_id, revision=place.revision, repo_type=place.repo_type).sha
            there = _files_there(api, place, head, is_ours)
            if before is not None and there != before:
                raise ConflictError(f"{place}: somebody else changed these files meanwhile; look, then push again")
            before = there
            operations: list[CommitOperationAdd | CommitOperationDelete] = [
                CommitOperationAdd(place.path(name), data if isinstance(data, bytes) else str(data))
                for name, data in files.items()
            ]
            gone = sorted(set(there) - set(files) - {PROFILE_FILE})
            operations += [CommitOperationDelete(place.path(name)) for name in gone]
            if _may_write_card(place, head, token):
                operations.append(CommitOperationAdd(place.path(CARD), f"{card}\n{CARD_MARK}\n".encode()))
            try:
                info = api.create_commit(
                    place.repo_id, operations, commit_message=commit_message, repo_type=place.repo_type,
                    revision=place.revision, create_pr=create_pr, parent_commit=head,
                )  # fmt: skip
                url, commit = str(info.pr_url or info.commit_url), str(info.oid)
                return Pushed(url, commit, replace(place, revision=commit).url)
            except HfHubHTTPError as error:
                if status_of(error) not in (409, 412):
                    raise
                if attempt == ATTEMPTS:
                    raise ConflictError(f"{place}: others committed during each of {attempt} attempts") from error
                time.sleep(random.uniform(0, BACKOFF_SECONDS * 2 ** (attempt - 1)))
    raise RuntimeError("unreachable: the last attempt returns or raises")


def _checked_names(directory: Path, key: Secret | None) -> list[str]:
    """The files of a sound artifact, plain or sealed, and its signature."""
    store = LocalStore(directory, within=published_root(directory))
    if names := sealed_names(directory):
        for name in names:
            read_header(store, name)
        if key is not None:
            Reader(SealedStore(store, key)).verify()
        return [name + SUFFIX for name in names]
    if key is not None:
        raise ConfigError(f"the artifact in {directory} is not sealed, and would be pushed for all to read who can")
    reader = Reader(store)
    reader.verify()
    signed = (directory / SIGNATURE_FILE).is_file()
    if signed:
        store.size(SIGNATURE_FILE)  # raises for a link that leads out
        require_current(directory)
    return sorted(reader.sizes) + [SIGNATURE_FILE] * signed


def _is_artifacts(name: str) -> bool:
    plain = name.removesuffix(SUFFIX)
    return is_own_file(plain) or plain in (SIGNATURE_FILE, PROFILE_FILE)


def _files_there(api: HfApi, place: HubPlace, commit: str, is_ours: Callable[[str], bool]) -> dict[str, str]:
    """Name and content hash of those files of the place that this is about."""
    try:
        entries = list(
            api.list_repo_tree(place.repo_id, place.subfolder, revision=commit, repo_type=place.repo_type)
        )
    except EntryNotFoundError:
        return {}
    files = {PurePosixPath(entry.path).name: str(entry.blob_id) for entry in entries if hasattr(entry, "blob_id")}
    return {name: blob for name, blob in files.items() if is_ours(name)}


def _may_write_card(place: HubPlace, commit: str, token: Token) -> bool:
    try:
        _, text = open_hub(place, commit, token).open(CARD)
    except ArtifactNotFoundError:
        return True
    return CARD_MARK.encode() in text


@contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """Keeps the Hub's client from drawing progress bars, unless they shall be shown."""
    hide = not shown and not are_progress_bars_disabled()
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            enable_progress_bars()
