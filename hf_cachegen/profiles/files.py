"""Profile as users hold it: the arrays of `codec.profile` with the ways in and out: files, repositories, URLs."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hf_cachegen.artifact import PROFILE_FILE, Limits
from hf_cachegen.artifact.pin import Pin
from hf_cachegen.codec import profile as codec_profile
from hf_cachegen.errors import ArtifactExistsError, ConfigError, ProfileError
from hf_cachegen.stores import Access
from hf_cachegen.stores.profiles import REPO_TYPE, fetch


@dataclass(eq=False)
class Profile(codec_profile.Profile):
    """Everything that the klt transform needs of one model. Make one by `learn_profile`, or `load` it.

    The fields are those of `hf_cachegen.codec.profile.Profile`.
    """

    @property
    def named(self) -> Pin:
        """What an artifact that needs this profile says of it."""
        return Pin.of(self)

    @property
    def pin(self) -> Pin:
        """Hashes and length of the file, without the location."""
        return replace(self.named, place=None)

    def checked_bytes(self) -> bytes:
        """The file, which must have the digest that artifacts know this profile by. Raises ProfileError."""
        data = self.to_bytes()
        if not self.pin.fits(data):
            raise ProfileError(f"profile {self.digest} was written by another release: copy its file instead")
        return data

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the file into a folder (such as the model's), or to a path that ends in .safetensors; return its path.

        Raises ArtifactExistsError where another one is there, which artifacts may need, unless overwrite.
        """
        return write_file(path, self.checked_bytes(), overwrite=overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Load a file, or the one in a folder. Raises ProfileError, LimitError."""
        return cls.from_bytes(fetch(Path(path), Access(), Limits())[0])

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
        """Load from a repository on the Hub ("user/name"), a URL, a folder or a file; kept in the local cache.

        digest: take the profile of this digest, and no other; a repository has all that were ever pushed there.
        access: revision, token, cache_dir, local_files_only, force_download and subfolder as in Transformers, and the
        other fields of hf_cachegen.stores.Access.
        Raises ProfileError where there is none, or another one; StoreError, LimitError.
        """
        options = Access(**access, repo_type=repo_type)
        if options.key is not None or options.public_key is not None:
            raise ConfigError("a profile is neither sealed nor signed: pass digest= to have one and no other")
        data, where = fetch(place, options, limits or Limits(), digest)
        return cls.from_bytes(data, where)

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
        """Put it, with a card, into a repository on the Hub, in one commit; the repository is made if need be. Returns
        the URL of the commit. Artifacts that are made with this object afterwards name the repository and the commit.

        repo_id: default <you>/<model>-cachegen-profile, which readers of your artifacts look into by themselves. The
        one that is in use there before is replaced, and kept under its digest. Raises ConfigError, StoreError.
        """
        from hf_cachegen.stores.publishing import publish_profile

        pushed = publish_profile(
            self.checked_bytes(), self.pin, self.about, repo_id, private=private, token=token, revision=revision,
            commit_message=commit_message, create_pr=create_pr,
        )  # fmt: skip
        self.place = pushed.location
        return pushed.url


def write_file(path: str | os.PathLike[str], data: bytes, *, overwrite: bool = False) -> Path:
    """Write a profile's file as it is; the arguments, the result and the errors are those of `Profile.save`."""
    place = Path(os.path.expanduser(path))
    place = place if place.suffix == ".safetensors" else place / PROFILE_FILE
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.exists() and not overwrite:
        if place.is_file() and place.stat().st_size == len(data) and place.read_bytes() == data:
            return place
        raise ArtifactExistsError(f"there is another profile at {place}: pass overwrite=True to replace it")
    with tempfile.TemporaryDirectory(prefix=".", suffix=".partial", dir=place.parent) as folder:
        partial = Path(folder) / place.name  # in a folder of its own, so that it has the usual permissions
        partial.write_bytes(data)
        os.replace(partial, place)
    return place
