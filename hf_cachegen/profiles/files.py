"""The public Profile: the arrays of `codec.profile`, with methods to read and write files, repositories and URLs."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hf_cachegen.artifact import PROFILE_FILE, Limits
from hf_cachegen.artifact.pin import Pin
from hf_cachegen.artifact.store import local_path, output_path
from hf_cachegen.codec import profile as codec_profile
from hf_cachegen.errors import ArtifactExistsError, ConfigError, ProfileError
from hf_cachegen.stores import Access
from hf_cachegen.stores.profiles import REPO_TYPE, fetch


@dataclass(eq=False)
class Profile(codec_profile.Profile):
    """Everything that the klt transform needs of one model. Make one with `learn_profile`, or `load` it.

    The fields are those of `hf_cachegen.codec.profile.Profile`.
    """

    @property
    def named(self) -> Pin:
        """The description of this profile in the artifacts that need it."""
        return Pin.of(self)

    @property
    def pin(self) -> Pin:
        """Hashes and length of the file, without the location."""
        return replace(self.named, place=None)

    def checked_bytes(self) -> bytes:
        """Return the file, which must have the digest that artifacts refer to.

        Raises:
            ProfileError: This release would write other bytes.
        """
        data = self.to_bytes()
        if not self.pin.fits(data):
            raise ProfileError(f"this release would write other bytes for profile {self.digest}: copy its file instead")
        return data

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the file into a folder (such as the model's), or to a path that ends in .safetensors.

        Args:
            path: The folder or the file.
            overwrite: Replace another profile, which existing artifacts may need.

        Returns:
            The path of the file.

        Raises:
            ArtifactExistsError: Another profile exists at this path.
            ProfileError: This release would write other bytes.
        """
        return write_file(path, self.checked_bytes(), overwrite=overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Load a file, or the one in a folder. Raises ConfigError, ProfileError, LimitError."""
        return cls._from_file(path, fetch(local_path(path), Access(), Limits())[0])

    @classmethod
    def _from_file(cls, location: str | os.PathLike[str], data: bytes, place: str | None = None) -> Profile:
        try:
            return cls.from_bytes(data, place)
        except ProfileError as error:
            raise ProfileError(f"{os.fspath(location)}: {error}") from error

    @classmethod
    def from_pretrained(
        cls,
        place: str | os.PathLike[str],
        *,
        digest: str | None = None,
        limits: Limits | None = None,
        repo_type: str = REPO_TYPE,
        **access: Any,
    ) -> Profile:
        """Load from a repository on the Hub ("user/name"), a URL, a folder or a file. Downloads are kept in the local
        cache.

        Args:
            place: The location.
            digest: XXH3-128 of the profile to load. A repository keeps every profile that was pushed to it.
            limits: The largest file to accept.
            repo_type: Of the repository.
            access: revision, token, cache_dir, local_files_only, force_download and subfolder as in Transformers, and
                the other fields of hf_cachegen.stores.Access.

        Raises:
            ProfileError: There is no profile, or another one.
            ConfigError: The options name a key.
            StoreError: The location cannot be reached.
            LimitError: The file is larger than the limits.
        """
        options = Access.from_keywords({**access, "repo_type": repo_type})
        if options.key is not None or options.public_key is not None:
            raise ConfigError("profiles are neither sealed nor signed: pass digest= instead of a key")
        data, where = fetch(place, options, limits or Limits(), digest)
        return cls._from_file(place, data, where)

    def push_to_hub(
        self,
        repo_id: str | None = None,
        *,
        private: bool = True,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload a profile",
        create_pr: bool = False,
    ) -> str:
        """Upload the profile, with a card, to a repository on the Hub, in one commit.

        Artifacts that are made with this object afterwards name the repository and the commit. A profile that the
        repository had before is replaced, and kept under its digest.

        Args:
            repo_id: Created if it does not exist. Default: <you>/<model>-cachegen-profile, where readers of your
                artifacts look for it.
            private: Make a new repository private.
            token: Of your account on the Hub. None: the stored one.
            revision: The branch to push to.
            commit_message: Of the commit.
            create_pr: Open a pull request instead.

        Returns:
            The URL of the commit.

        Raises:
            ConfigError: The repository has no valid name.
            StoreError: The Hub cannot be reached, or denies access.
        """
        from hf_cachegen.stores.publishing import publish_profile

        pushed = publish_profile(
            self.checked_bytes(), self.pin, self.about, repo_id, private=private, token=token, revision=revision,
            commit_message=commit_message, create_pr=create_pr,
        )  # fmt: skip
        self.place = pushed.location
        return pushed.url


def write_file(path: str | os.PathLike[str], data: bytes, *, overwrite: bool = False) -> Path:
    """Write a profile's file unchanged, into a folder or to a path that ends in .safetensors.

    Args:
        path: The folder or the file.
        data: The file.
        overwrite: Replace another profile.

    Returns:
        The path of the file.

    Raises:
        ArtifactExistsError: Another profile exists at this path, or the folder is a file.
        ConfigError: The path is none.
    """
    target = output_path(path)
    target = target if target.suffix == ".safetensors" else target / PROFILE_FILE
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ArtifactExistsError(f"{target.parent} must be a folder, in which {target.name} is written") from error
    if target.exists() and not overwrite:
        if target.is_file() and target.stat().st_size == len(data) and target.read_bytes() == data:
            return target
        raise ArtifactExistsError(f"there is another profile at {target}: pass overwrite=True to replace it")
    with tempfile.TemporaryDirectory(prefix=".", suffix=".partial", dir=target.parent) as folder:
        partial = Path(folder) / target.name  # a file in a new folder has the usual permissions
        partial.write_bytes(data)
        os.replace(partial, target)
    return target
