"""Publish a saved artifact, or a profile, with its card, into a repository on the Hub."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from hf_cachegen.artifact import Reader
from hf_cachegen.artifact.pin import Pin
from hf_cachegen.artifact.store import local_path
from hf_cachegen.stores.card import card, profile_card, sealed_card
from hf_cachegen.stores.hub import DEFAULT_REVISION, HubLocation, Token
from hf_cachegen.stores.local import open_folder
from hf_cachegen.stores.profiles import REPO_TYPE
from hf_cachegen.stores.pushing import Pushed, own_repository, push, push_profile
from hf_cachegen.stores.sealed import SUFFIX, Secret, sealed_names


def publish_artifact(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    profile: bytes | None = None,
    key: Secret | None = None,
    description: str = "",
    private: bool = True,
    token: Token = None,
    revision: str | None = None,
    subfolder: str | None = None,
    repo_type: str = "dataset",
    commit_message: str = "Upload a KV cache",
    create_pr: bool = False,
    progress: bool = True,
) -> Pushed:
    """Push the artifact in `folder`, with a card, to a repository in one commit; create the repository if needed.

    Args:
        folder: an artifact, plain or sealed; its bytes are verified first.
        repo_id: "user/name".
        profile: the file of the profile to push with it (`profiles.finding.profile_to_push`); None for none.
        key: secret key of a sealed artifact, to verify its plain bytes too.
        description: what the context is, for the card.
        private: refuse a public repository.
        token: token for the Hub (default: the one logged in with).
        revision: branch (default: main); created if needed.
        subfolder: folder within the repository.
        repo_type: "dataset", "model" or "space".
        commit_message: message of the commit.
        create_pr: open a pull request instead of committing.
        progress: show the progress bars of the Hub's client on stderr.

    Returns:
        The URL of the commit, its id, and the pushed artifact's location.

    Raises:
        ConfigError: `private` and the repository is public; a key, and the artifact is not sealed.
        ConflictError: this artifact was changed in the repository at the same time.
        ArtifactError: the artifact is damaged.
        StoreError: the Hub could not be reached, or refused.
    """
    directory = local_path(folder)
    if os.path.isdir(directory) and sealed_names(directory):
        nbytes = sum(path.stat().st_size for path in directory.glob(f"*{SUFFIX}"))
        text = sealed_card(nbytes, repo_id, subfolder=subfolder, description=description)
    else:
        text = card(Reader(open_folder(directory)), repo_id, subfolder=subfolder, description=description)
    return push(
        directory, HubLocation(repo_id, repo_type, subfolder, revision or DEFAULT_REVISION), text, profile=profile,
        key=key, token=token, private=private, commit_message=commit_message, create_pr=create_pr, progress=progress,
    )  # fmt: skip


def publish_profile(
    data: bytes,
    pin: Pin,
    about: Mapping[str, Any],
    repo_id: str | None = None,
    *,
    private: bool = True,
    token: Token = None,
    revision: str | None = None,
    commit_message: str = "Upload a profile",
    create_pr: bool = False,
    progress: bool = True,
) -> Pushed:
    """Push a profile's file, with a card, to a repository in one commit; create the repository if needed.

    Args:
        data: the bytes of the file.
        pin: its hashes, and the model's name.
        about: the description in the profile's file, for the card.
        repo_id: "user/name" (default: <you>/<model>-cachegen-profile).
        private: refuse a public repository.
        token: token for the Hub (default: the one logged in with).
        revision: branch (default: main); created if needed.
        commit_message: message of the commit.
        create_pr: open a pull request instead of committing.
        progress: show the progress bars of the Hub's client on stderr.

    Returns:
        The URL of the commit, its id, and the pushed profile's location.

    Raises:
        ConfigError: `private` and the repository is public; no repository can be named after the model.
        ConflictError: the profile was changed in the repository at the same time.
        StoreError: the Hub could not be reached, or refused.
    """
    location = HubLocation(repo_id or own_repository(pin.model, token), REPO_TYPE, None, revision or DEFAULT_REVISION)
    return push_profile(
        data, location, profile_card(about, pin, location.repo_id), token=token, private=private,
        commit_message=commit_message, create_pr=create_pr, progress=progress,
    )  # fmt: skip
