"""Decide whether a location that the user named is a local path or a repository on the Hub. (URLs: `remote.is_url`.)

One rule for every command and function that takes a location:

- A path object is a path, and so is a string that cannot name a repository. They cause no request. Such strings begin
  with "/", "." or "~", have no slash or more than one, end in a slash or in a suffix of this package's files, or break
  the Hub's own rules for names.
- "a/b" is a path if the folder "a" exists here, whether or not "a/b" does. Else it is a repository.
- "hf://..." is always a repository.

If "a/b" names a repository that cannot be read, the error names the folder first: the path may be misspelt, or the
process may run in another folder than its user believes.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_cachegen.artifact.store import resembles_url
from hf_cachegen.errors import ArtifactNotFoundError, ProfileError, StoreError

HUB = "hf://"
SUFFIXES = (".cachegen", ".sealed", ".safetensors", ".json", ".pt")
"""Suffixes of the files and folders of this package; a name with one of them is never taken for a repository."""
_PART = r"(?!.*(?:--|\.\.|\.git$))[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_REPO_ID = re.compile(rf"(?P<namespace>{_PART})/(?P<name>{_PART})")
_HUB_ID = re.compile(rf"(?:(?P<namespace>{_PART})/)?(?P<name>{_PART})")


def is_repository(location: str | os.PathLike[str]) -> bool:
    """Report whether `location` names a repository on the Hub, by the rule at the top of this file."""
    return isinstance(location, str) and (location.startswith(HUB) or _matches(_REPO_ID, location))


def is_hub_id(location: str) -> bool:
    """Report whether `location` may name a model or a data set on the Hub, with a namespace or without (gpt2)."""
    return _matches(_HUB_ID, location)


def _matches(pattern: re.Pattern[str], location: str) -> bool:
    found = pattern.fullmatch(location)
    if found is None or location.endswith(SUFFIXES):
        return False
    namespace = found["namespace"]
    return namespace is None or not os.path.isdir(namespace)


def is_guess(location: str | os.PathLike[str]) -> bool:
    """Report whether `location` is taken for a repository although it could be a path."""
    return is_repository(location) and not str(location).startswith(HUB)


@contextmanager
def named_both_ways(location: str | os.PathLike[str]) -> Iterator[None]:
    """Add to the errors of a repository the folder that its name could also mean."""
    try:
        yield
    except (ArtifactNotFoundError, ProfileError, StoreError) as error:
        if not is_guess(location):
            raise
        text = f"there is no folder {os.path.abspath(location)}, and as a repository on the Hub: {error}"
        raise type(error)(text) from (error.__cause__ or error)


def require_folder(path: Path, location: str | os.PathLike[str], repo_type: str = "dataset") -> None:
    """Raise ArtifactNotFoundError, with an alternative, unless `path`, which `location` named, is a folder."""
    try:
        if stat.S_ISDIR(os.stat(path).st_mode):
            return
    except PermissionError:
        return  # reading it raises
    except OSError:
        raise ArtifactNotFoundError(
            f"there is no folder {os.path.abspath(path)}{alternative(location, repo_type)}"
        ) from None
    raise ArtifactNotFoundError(f"{os.path.abspath(path)} is a file; name the folder that holds the artifact")


def alternative(location: str | os.PathLike[str], repo_type: str = "dataset") -> str:
    """Return a hint for the message where a path may be meant as a repository or a URL; "" where it cannot be."""
    name = os.fspath(location)
    if isinstance(location, str) and _REPO_ID.fullmatch(name):
        return f"; if the repository on the Hub is meant, write {HUB}{repo_type}s/{name}"
    if resembles_url(location):
        return "; if a URL is meant, pass it as a string, with :// and without a chain of schemes (::)"
    return ""
