"""Which profile: the one to encode a model's caches with, and the one that an artifact cannot be decoded without.

Names are not believed. A profile found for encoding must be of the model's configuration and, where nobody named it, of
its very weights; one found for decoding must have the hashes that the artifact says, wherever it lies.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from hf_cachegen.artifact import PROFILE_FILE, Limits, Store, chain
from hf_cachegen.artifact.artifact import Artifact
from hf_cachegen.artifact.pin import Pin
from hf_cachegen.errors import (
    ArtifactNotFoundError,
    ManifestError,
    OfflineError,
    ProfileError,
    SignatureError,
    StoreAccessError,
    StoreError,
    WrongWeightsError,
)
from hf_cachegen.models.fingerprint import Fingerprint, coarse_weights
from hf_cachegen.profiles.files import Profile
from hf_cachegen.stores import Access
from hf_cachegen.stores.locations import access_of
from hf_cachegen.stores.naming import HUB, is_repository
from hf_cachegen.stores.profiles import QUICK, REPO_TYPE, fetch_pinned, repositories

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ProfileLike = Profile | str | os.PathLike | None
AUTO = "auto"
_known: WeakValueDictionary[str, Profile] = WeakValueDictionary()
"""Profiles in use, by SHA-256: artifacts of one model share one."""


def for_encoding(profile: ProfileLike, model: PreTrainedModel) -> Profile | None:
    """The profile to encode `model`'s caches with.

    profile: one, its place (a file, a folder, a repository or a URL), None, or "auto": that in the model's folder, or,
    for a model on the Hub, in <model>-cachegen-profile beside it (looked for once in a process; HF_CACHEGEN_PROFILES
    names other namespaces, or none). Raises ProfileError, WrongModelError for another model's, WrongWeightsError for
    one that nobody named and that was learnt from other weights.
    """
    found = find(profile, model_folder(model))
    if found is None:
        return None
    try:
        Fingerprint.from_dict(found.about.get("fingerprint")).check_config(model)
    except ManifestError as error:
        raise ProfileError(f"this profile does not say whose it is: {error}") from error
    weights = found.about.get("weights")
    # One from a model's own folder that does not say its weights is an older one.
    if profile == AUTO and (weights is not None or found.place) and weights != coarse_weights(model):
        raise WrongWeightsError(
            f"the profile found for this model ({found.place or 'in its folder'}) was learnt from other weights of the "
            "same configuration: pass it as profile= if it shall be used all the same, else None"
        )
    return found


def model_folder(model: PreTrainedModel | None) -> str:
    """The folder or the Hub id that a model was loaded from, "" where there is none."""
    return "" if model is None else str(getattr(model.config, "_name_or_path", ""))


def find(profile: ProfileLike, model: str) -> Profile | None:
    """As `for_encoding`, for a model of that name (a folder, or an id on the Hub), whose weights are not at hand."""
    if profile is None or isinstance(profile, Profile):
        return profile
    if profile != AUTO:
        return _named(profile, Access())
    model = os.path.expanduser(model)
    if model and Path(model, PROFILE_FILE).is_file():
        return Profile.load(model)
    # A model whose folder has been moved since it was loaded is none of the Hub's.
    return _on_hub(tuple(repositories(model))) if is_repository(model) else None


def for_decoding(profile: ProfileLike, pin: Pin, store: Store, model_folder: str, limits: Limits) -> Profile:
    """The profile that the artifact in `store` needs.

    profile: one, its place, "auto": the right one beside the artifact or in `model_folder`, else from the places of
    `fetch_pinned`; None: the one beside the artifact alone.
    Raises ProfileError where it is missing or another one, StoreError and SignatureError as `fetch_pinned` does.
    """
    if profile is not None and profile != AUTO:
        access = access_of(store)
        # What reaches the artifact (a password for its server, a folder within it) is not for another place.
        own = Access(token=access.token, cache_dir=access.cache_dir, local_files_only=access.local_files_only,
                     patience=access.patience)  # fmt: skip
        given = profile if isinstance(profile, Profile) else _named(profile, own, pin.digest, limits)
        if given.digest != pin.digest or (pin.sha256 and given.pin.sha256 != pin.sha256):
            raise ProfileError(f"this artifact needs {pin}, the one given is {given.digest}")
        return given
    if pin.sha256 is None and any(one.signed for one in chain(store)):
        raise SignatureError(f"the signature of {store} does not cover {pin}: pass it as profile=")
    if profile == AUTO and (known := _known.get(pin.sha256 or "")) is not None:
        return known
    data = _in_folders(pin, store, model_folder if profile == AUTO else "", limits)
    if data is None:
        data = fetch_pinned(pin, store, access_of(store), limits, beside_alone=profile is None)
    found = Profile.from_bytes(data, pin.place)
    return _known.setdefault(found.pin.sha256 or "", found)


def profile_of(artifact: Artifact, profile: ProfileLike = AUTO, model_folder: str = "") -> Profile | None:
    """The profile that decoding `artifact` takes, None where it takes none; otherwise as `for_decoding`."""
    pin = artifact.pin
    return None if pin is None else for_decoding(profile, pin, artifact.store, model_folder, artifact.reader.limits)


def open_with_profile(
    store: Store, profile: ProfileLike = AUTO, model_folder: str = "", limits: Limits | None = None
) -> Artifact:
    """Open the artifact in `store`, ready to be decoded. Raises what `Artifact` and `for_decoding` raise."""
    artifact = Artifact(store, limits=limits)
    return artifact.with_profile(profile_of(artifact, profile, model_folder))


def profile_to_push(profile: Profile | None, codec: Mapping[str, Any], with_profile: bool | None) -> bytes | None:
    """The file of the profile that goes along with an artifact of that `codec`; None: none does, since it needs none,
    shall not, or (with_profile None) says itself where it is on the Hub. Raises ProfileError.
    """
    if "profile" not in codec or with_profile is False:
        return None
    pin = Pin.from_codec(codec)
    if with_profile is None and pin.place is not None:
        return None
    if profile is None or profile.digest != pin.digest:
        raise ProfileError(f"the artifact needs {pin}, which is not at hand to go along: pass it as profile=")
    return profile.checked_bytes()


def _in_folders(pin: Pin, store: Store, model_folder: str, limits: Limits) -> bytes | None:
    """The file, where it is in one of the local folders; nothing is made of a file that is another one."""
    folders = [folder for folder in (store.folder(), model_folder) if folder]
    files = (pin.in_file(Path(folder, PROFILE_FILE), limits) for folder in folders)
    return next((data for data in files if data is not None), None)


def _named(
    place: str | os.PathLike[str], access: Access, digest: str | None = None, limits: Limits | None = None
) -> Profile:
    options = {name: getattr(access, name) for name in ("token", "cache_dir", "local_files_only", "patience")}
    # Of a repository, which keeps its older profiles, the one that is needed; a file is what it is.
    kept = digest if isinstance(place, str) and is_repository(place) else None
    return Profile.from_pretrained(place, digest=kept, limits=limits, **options)


@lru_cache(maxsize=16)
def _on_hub(repositories: tuple[str, ...]) -> Profile | None:
    found = (_in_repository(repo_id) for repo_id in repositories)
    return next((profile for profile in found if profile is not None), None)


def _in_repository(repo_id: str) -> Profile | None:
    """The profile in use there, None where there is none or nobody can tell."""
    try:
        return Profile.from_pretrained(f"{HUB}{REPO_TYPE}s/{repo_id}", patience=QUICK)
    except (OfflineError, StoreAccessError):
        return None
    except ProfileError as error:
        if isinstance(error.__cause__, ArtifactNotFoundError):
            return None
        raise
    except StoreError as error:
        warnings.warn(f"whether there is a profile in {repo_id} is not known: {error}", stacklevel=2)
        return None
