"""Push artifacts, plain or sealed, and profiles to the Hub, each in one commit on top of a known head.

A commit by somebody else in between is never overwritten: the push is made again on the new head, or refused if the
same files were changed there.
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
    HubLocation,
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
"""Mark of a card of this package; only such a card is replaced."""
ATTEMPTS = 8
BACKOFF_SECONDS = 0.25
"""Longest wait in seconds after the first attempt that met another commit. It doubles with each attempt, and each wait
is shortened at random, so that processes that push to one repository do not meet again.
"""


@dataclass(frozen=True)
class Pushed:
    """A commit that was pushed.

    Attributes:
        url: URL of the commit or the pull request.
        commit: id of the commit.
        location: location of the pushed files at that commit (hf://...).
    """

    url: str
    commit: str
    location: str


def push(
    directory: Path,
    location: HubLocation,
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
    """Push an artifact, with its signature, to a repository in one commit; create the repository if needed.

    Files of an earlier artifact that this one lacks are removed in the same commit. A card that was written by hand
    stays, and so does a profile.

    Args:
        directory: the artifact, plain or sealed; its bytes are verified first.
        location: the repository, folder and branch.
        card: text of the card.
        profile: the file of the profile to push with it; None for none.
        key: secret key of a sealed artifact, to verify its plain bytes too.
        token: token for the Hub (default: the one logged in with).
        private: refuse a public repository.
        commit_message: message of the commit.
        create_pr: open a pull request instead of committing.
        progress: show the progress bars of the Hub's client on stderr.

    Raises:
        ConfigError: `private` and the repository is public; a key, and the artifact is not sealed.
        ConflictError: somebody else changed this artifact at the same time.
        SignatureError: the signature is of another artifact.
        ArtifactError: the artifact is damaged.
        StoreError: the Hub could not be reached, or refused.
    """
    files: dict[str, Path | bytes] = {name: directory / name for name in _checked_names(directory, key)}
    if profile is not None:
        files[PROFILE_FILE] = profile
    return _publish(
        files, location, card, _is_artifacts, token=token, private=private, commit_message=commit_message,
        create_pr=create_pr, progress=progress,
    )  # fmt: skip


def push_profile(
    data: bytes,
    location: HubLocation,
    card: str,
    *,
    token: Token = None,
    private: bool = True,
    commit_message: str = "Upload a profile",
    create_pr: bool = False,
    progress: bool = True,
) -> Pushed:
    """Push a profile's file to a repository, as the profile in use and under its digest, where it stays.

    Args:
        data: the bytes of the file.
        location: the repository and branch.
        card: text of the card.
        token: token for the Hub (default: the one logged in with).
        private: refuse a public repository.
        commit_message: message of the commit.
        create_pr: open a pull request instead of committing.
        progress: show the progress bars of the Hub's client on stderr.

    Raises:
        ConfigError: `private` and the repository is public.
        ConflictError: somebody else changed the profile at the same time.
        StoreError: the Hub could not be reached, or refused.
    """
    files: dict[str, Path | bytes] = {PROFILE_FILE: data, f"{xxhash.xxh3_128_hexdigest(data)}.safetensors": data}
    return _publish(
        files, location, card, lambda name: name == PROFILE_FILE, token=token, private=private,
        commit_message=commit_message, create_pr=create_pr, progress=progress,
    )  # fmt: skip


def own_repository(model: str, token: Token = None) -> str:
    """Return the token's owner's repository for profiles of a model: <user>/<model>-cachegen-profile.

    Raises:
        ConfigError: no repository can be named after the model.
        StoreError: the Hub could not be reached, or does not accept the token.
    """
    model = PurePosixPath(model.rstrip("/")).name if repository(model) is None else model
    with named("the user's own namespace"):
        user = str(client(token).whoami()["name"])
    found = repository(model if "/" in model else f"{user}/{model}", user)
    if found is None:
        raise ConfigError(f"no repository can be named after model {model!r:.200}: pass repo_id=")
    return found


def _publish(
    files: Mapping[str, Path | bytes],
    location: HubLocation,
    card: str,
    is_ours: Callable[[str], bool],
    *,
    token: Token,
    private: bool,
    commit_message: str,
    create_pr: bool,
    progress: bool,
) -> Pushed:
    """Commit `files` and the card.

    Args:
        is_ours: returns True for the name of a file that belongs to this push. Such a file in the repository is removed
            if it is not among `files`, except a profile; a change of one by somebody else is a conflict.
    """
    api = client(token)
    with named(f"{location}"), _bars(progress):
        api.create_repo(location.repo_id, private=private, repo_type=location.repo_type, exist_ok=True)
        if private and not api.repo_info(location.repo_id, repo_type=location.repo_type).private:
            raise ConfigError(
                f"{location.repo_id} is public, and a cache reveals its text: pass private=False to publish it anyway"
            )
        if location.revision != DEFAULT_REVISION and not create_pr and not is_commit(location.revision):
            api.create_branch(location.repo_id, branch=location.revision, repo_type=location.repo_type, exist_ok=True)
        before: dict[str, str] | None = None
        for attempt in range(1, ATTEMPTS + 1):
            head = api.repo_info(location.repo_id, revision=location.revision, repo_type=location.repo_type).sha
            there = _files_there(api, location, head, is_ours)
            if before is not None and there != before:
                raise ConflictError(
                    f"{location}: somebody else changed these files at the same time; look at them, then push again"
                )
            before = there
            operations: list[CommitOperationAdd | CommitOperationDelete] = [
                CommitOperationAdd(location.path(name), data if isinstance(data, bytes) else str(data))
                for name, data in files.items()
            ]
            gone = sorted(set(there) - set(files) - {PROFILE_FILE})
            operations += [CommitOperationDelete(location.path(name)) for name in gone]
            if _may_write_card(location, head, token):
                operations.append(CommitOperationAdd(location.path(CARD), f"{card}\n{CARD_MARK}\n".encode()))
            try:
                info = api.create_commit(
                    location.repo_id, operations, commit_message=commit_message, repo_type=location.repo_type,
                    revision=location.revision, create_pr=create_pr, parent_commit=head,
                )  # fmt: skip
                url, commit = str(info.pr_url or info.commit_url), str(info.oid)
                return Pushed(url, commit, replace(location, revision=commit).url)
            except HfHubHTTPError as error:
                if status_of(error) not in (409, 412):
                    raise
                if attempt == ATTEMPTS:
                    raise ConflictError(
                        f"{location}: others committed during each of {attempt} attempts; push again later"
                    ) from error
                time.sleep(random.uniform(0, BACKOFF_SECONDS * 2 ** (attempt - 1)))
    raise RuntimeError("unreachable: the last attempt returns or raises")


def _checked_names(directory: Path, key: Secret | None) -> list[str]:
    """Verify an artifact, plain or sealed, and return the names of its files and its signature."""
    store = LocalStore(directory, within=published_root(directory))
    if names := sealed_names(directory):
        for name in names:
            read_header(store, name)
        if key is not None:
            Reader(SealedStore(store, key)).verify()
        return [name + SUFFIX for name in names]
    if key is not None:
        raise ConfigError(f"a key is given, and the artifact in {directory} is not sealed: seal it, or pass no key")
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


def _files_there(api: HfApi, location: HubLocation, commit: str, is_ours: Callable[[str], bool]) -> dict[str, str]:
    """Return the content hashes of those files at the location that belong to this push, by name."""
    try:
        entries = list(
            api.list_repo_tree(location.repo_id, location.subfolder, revision=commit, repo_type=location.repo_type)
        )
    except EntryNotFoundError:
        return {}
    files = {PurePosixPath(entry.path).name: str(entry.blob_id) for entry in entries if hasattr(entry, "blob_id")}
    return {name: blob for name, blob in files.items() if is_ours(name)}


def _may_write_card(location: HubLocation, commit: str, token: Token) -> bool:
    try:
        _, text = open_hub(location, commit, token).open(CARD)
    except ArtifactNotFoundError:
        return True
    return CARD_MARK.encode() in text


@contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """Hide the progress bars of the Hub's client in the block unless `shown`."""
    hide = not shown and not are_progress_bars_disabled()
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            enable_progress_bars()
