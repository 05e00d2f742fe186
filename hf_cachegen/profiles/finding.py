"""Find a profile: the one to encode a model's caches with, and the one that an artifact is decoded with.

Names are not trusted. A profile found for encoding must be of the model's configuration and, unless the user named it,
of the model's weights. One found for decoding must have the hashes in the artifact, at any location.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakValueDictionary, ref

import torch

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
from hf_cachegen.models.fingerprint import Fingerprint
from hf_cachegen.models.layers import dtype_name
from hf_cachegen.models.sampled_weights import coarse_weights
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
"""Profiles in use, by SHA-256. Artifacts of one model share one."""
_used: WeakKeyDictionary[PreTrainedModel, Profile] = WeakKeyDictionary()
"""The last profile that decoded for each model, which keeps it in use: to read and check it again, and to make its
matrices, takes longer than a short load.
"""


def for_encoding(profile: ProfileLike, model: PreTrainedModel) -> Profile | None:
    """Return the profile to encode `model`'s caches with.

    Args:
        profile: A profile, its location (a file, a folder, a repository or a URL), None, or "auto". "auto" looks in the
            model's folder, or for a model on the Hub in <model>-cachegen-profile beside it (once per process;
            HF_CACHEGEN_PROFILES names other namespaces, or none).
        model: The model.

    Raises:
        ProfileError: There is no profile at this location, or it is damaged.
        WrongModelError: It is of another model.
        WrongWeightsError: "auto" found one that was learnt from other weights.
    """
    found = find(profile, model_folder(model))
    if found is None:
        return None
    try:
        Fingerprint.from_dict(found.about.get("fingerprint")).check_config(model)
    except ManifestError as error:
        raise ProfileError(f"this profile has no valid fingerprint of its model: {error}") from error
    if profile == AUTO and (why := _other_weights(found, model)):
        raise WrongWeightsError(
            f"the profile found for this model ({found.place or 'in its folder'}) {why}: pass it as profile= to use "
            "it, or None to use none"
        )
    return found


def _other_weights(profile: Profile, model: PreTrainedModel) -> str:
    """Return why a profile is not known to be of the weights of `model`; "" where it is."""
    weights, halves = (profile.about.get(name) for name in ("weights", "weights_float16"))
    # Older profiles in a model's folder have no checksum of the weights.
    if (weights is None and not profile.place) or weights == coarse_weights(model):
        return ""
    if dtype_name(model.dtype) == "float16" and weights is not None:
        if halves is None:
            return "was learnt by an earlier release and cannot be compared with weights in float16 (learn it again)"
        if halves == coarse_weights(model, torch.float16):
            return ""
    return "was learnt from other weights of the same configuration"


def model_folder(model: PreTrainedModel | None) -> str:
    """Return the folder or the Hub id that a model was loaded from; "" if there is none."""
    return "" if model is None else str(getattr(model.config, "_name_or_path", ""))


def find(profile: ProfileLike, model: str) -> Profile | None:
    """Return the profile for a model of this name, without comparing the model.

    Args:
        profile: A profile, its location, None, or "auto".
        model: A folder, or an id on the Hub.

    Raises:
        ProfileError: There is no profile at this location, or it is damaged.
    """
    if profile is None or isinstance(profile, Profile):
        return profile
    if profile != AUTO:
        return _named(profile, Access())
    model = os.path.expanduser(model)
    if model and os.path.isfile(os.path.join(model, PROFILE_FILE)):
        return Profile.load(model)
    # The path of a folder that was moved since the model was loaded is not an id on the Hub.
    return _on_hub(tuple(repositories(model))) if is_repository(model) else None


def for_decoding(profile: ProfileLike, pin: Pin, store: Store, model_folder: str, limits: Limits) -> Profile:
    """Return the profile that the artifact in `store` needs.

    Args:
        profile: A profile, its location, "auto" or None. "auto" looks beside the artifact and in `model_folder`, then
            at the locations of `fetch_pinned`. None looks beside the artifact only.
        pin: The artifact's description of the profile.
        store: Holds the artifact.
        model_folder: Of the model, "" if unknown.
        limits: The largest file to accept.

    Raises:
        ProfileError: The profile is missing, or another one.
        StoreError: A location cannot be reached.
        SignatureError: A signed artifact does not fix the profile's SHA-256.
    """
    if profile is not None and profile != AUTO:
        access = access_of(store)
        # Options of the artifact's location (a password for its server, a folder) do not apply to another location.
        own = Access(token=access.token, cache_dir=access.cache_dir, local_files_only=access.local_files_only,
                     patience=access.patience)  # fmt: skip
        given = profile if isinstance(profile, Profile) else _named(profile, own, pin.digest, limits)
        if given.digest != pin.digest or (pin.sha256 and given.pin.sha256 != pin.sha256):
            raise ProfileError(f"this artifact needs {pin}, got profile {given.digest}")
        return given
    if pin.sha256 is None and any(one.signed for one in chain(store)):
        raise SignatureError(f"the signature of {store} does not cover the SHA-256 of {pin}: pass it as profile=")
    if profile == AUTO and (known := _known.get(pin.sha256 or "")) is not None:
        return known
    data = _in_folders(pin, store, model_folder if profile == AUTO else "", limits)
    if data is None:
        data = fetch_pinned(pin, store, access_of(store), limits, beside_alone=profile is None)
    found = Profile.from_bytes(data, pin.place)
    return _known.setdefault(found.pin.sha256 or "", found)


def profile_of(artifact: Artifact, profile: ProfileLike = AUTO, model_folder: str = "") -> Profile | None:
    """Return the profile that decoding `artifact` needs; None if it needs none. Raises the errors of `for_decoding`."""
    pin = artifact.pin
    return None if pin is None else for_decoding(profile, pin, artifact.store, model_folder, artifact.reader.limits)


def finder(profile: ProfileLike, model: PreTrainedModel | None) -> Callable[[Artifact], Profile | None]:
    """Return what finds the profile that decoding an artifact for a model needs, as `profile_of` does.

    The profile is kept as long as the model exists. The result does not keep the model.
    """
    folder, of = model_folder(model), None if model is None else ref(model)

    def find(artifact: Artifact) -> Profile | None:
        found, user = profile_of(artifact, profile, folder), None if of is None else of()
        if user is not None and found is not None:
            _used[user] = found
        return found

    return find


def open_with_profile(
    store: Store, profile: ProfileLike = AUTO, model_folder: str = "", limits: Limits | None = None
) -> Artifact:
    """Open the artifact in `store`, ready to be decoded. Raises the errors of `Artifact` and `for_decoding`."""
    artifact = Artifact(store, limits=limits)
    return artifact.with_profile(profile_of(artifact, profile, model_folder))


def profile_to_push(profile: Profile | None, codec: Mapping[str, Any], with_profile: bool | None) -> bytes | None:
    """Return the file of the profile to upload together with an artifact of this `codec`.

    Args:
        profile: The profile at hand.
        codec: Of the artifact's manifest.
        with_profile: Whether to upload it. None: only if the artifact does not name a repository that has it.

    Returns:
        The file; None if it is not uploaded.

    Raises:
        ProfileError: The profile is missing, or another one.
    """
    if "profile" not in codec or with_profile is False:
        return None
    pin = Pin.from_codec(codec)
    if with_profile is None and pin.place is not None:
        return None
    if profile is None or profile.digest != pin.digest:
        raise ProfileError(f"the artifact needs {pin}, which would be uploaded with it: pass it as profile=")
    return profile.checked_bytes()


def _in_folders(pin: Pin, store: Store, model_folder: str, limits: Limits) -> bytes | None:
    """Return the file, if it is in one of the local folders. A file with other hashes is not parsed."""
    folders = [folder for folder in (store.folder(), model_folder) if folder]
    files = (pin.in_file(Path(folder, PROFILE_FILE), limits) for folder in folders)
    return next((data for data in files if data is not None), None)


def _named(
    location: str | os.PathLike[str], access: Access, digest: str | None = None, limits: Limits | None = None
) -> Profile:
    options = {name: getattr(access, name) for name in ("token", "cache_dir", "local_files_only", "patience")}
    # A repository keeps its older profiles, so the digest selects one. A file holds only one.
    kept = digest if isinstance(location, str) and is_repository(location) else None
    return Profile.from_pretrained(location, digest=kept, limits=limits, **options)


@lru_cache(maxsize=16)
def _on_hub(repositories: tuple[str, ...]) -> Profile | None:
    found = (_in_repository(repo_id) for repo_id in repositories)
    return next((profile for profile in found if profile is not None), None)


def _in_repository(repo_id: str) -> Profile | None:
    """Return the profile of a repository; None if there is none, or this cannot be determined."""
    try:
        return Profile.from_pretrained(f"{HUB}{REPO_TYPE}s/{repo_id}", patience=QUICK)
    except (OfflineError, StoreAccessError):
        return None
    except ProfileError as error:
        if isinstance(error.__cause__, ArtifactNotFoundError):
            return None
        raise
    except StoreError as error:
        warnings.warn(f"cannot determine whether {repo_id} has a profile: {error}", stacklevel=2)
        return None
