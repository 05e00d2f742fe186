"""Artifacts on the Hugging Face Hub: their locations, and ranges of their files.

A revision is resolved to a commit before anything is read, so that all files of one load are of one state. Ranges are
read from the Hub's URLs, because its client fetches whole files and does not check them. Everything else is done by the
Hub's client, with the user's token, endpoint and offline mode. The client may exchange its network library, so any
error that is not the client's own counts as a failed connection.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import quote, unquote

import huggingface_hub
from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers

from hf_cachegen._version import __version__
from hf_cachegen.errors import (
    ArtifactNotFoundError,
    CacheGenError,
    ConfigError,
    OfflineError,
    StoreAccessError,
    StoreError,
)
from hf_cachegen.stores.http import HttpFiles
from hf_cachegen.stores.retry import Patience

REPO_TYPES = ("dataset", "model", "space")
DEFAULT_REVISION = "main"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_URL = re.compile(
    r"hf://(?:(?P<kind>datasets|spaces|models)/)?(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?(?:/(?P<folder>.*))?"
)
_NAMESPACE = re.compile(r"hf://(?P<name>[\w][\w.-]*)/?")
_FOLDER = re.compile(r"(?!\.{1,2}(?:/|$))[^/\\\0]+(?:/(?!\.{1,2}(?:/|$))[^/\\\0]+)*")
Token = str | bool | None


@dataclass(frozen=True)
class HubLocation:
    """A folder of a repository at a revision.

    Attributes:
        repo_id: "user/name".
        repo_type: "dataset", "model" or "space".
        subfolder: path of the folder within the repository; None for the repository itself.
        revision: branch, tag or commit.

    Raises:
        ConfigError: one of them is not valid.
    """

    repo_id: str
    repo_type: str = "dataset"
    subfolder: str | None = None
    revision: str = DEFAULT_REVISION

    def __post_init__(self) -> None:
        try:
            huggingface_hub.utils.validate_repo_id(self.repo_id)
        except HFValidationError as error:
            raise ConfigError(f"{self.repo_id!r:.200} is not the name of a repository: {error}") from error
        if self.repo_type not in REPO_TYPES:
            raise ConfigError(f"repo_type must be one of {REPO_TYPES}, got {self.repo_type!r}")
        if self.subfolder is not None and not _FOLDER.fullmatch(self.subfolder):
            raise ConfigError(f"subfolder must be a path within the repository, such as 'a/b', got {self.subfolder!r}")
        if not self.revision or "\0" in self.revision:
            raise ConfigError(f"revision must name a branch, tag or commit, got {self.revision!r}")

    @classmethod
    def from_url(cls, url: str, repo_type: str = "dataset") -> HubLocation:
        """Parse hf://[datasets/|models/|spaces/]user/name[@revision][/folder].

        Args:
            url: the URL.
            repo_type: type of the repository where the URL names none.

        Raises:
            ConfigError: the URL has another form.
        """
        match = _URL.fullmatch(url)
        if match is None:
            raise ConfigError(f"expected hf://datasets/user/name[@revision][/folder], got {url!r:.200}")
        kind = match["kind"].removesuffix("s") if match["kind"] else repo_type
        folder = (match["folder"] or "").strip("/") or None
        return cls(match["repo"], kind, folder, unquote(match["revision"] or DEFAULT_REVISION))

    @property
    def origin(self) -> str:
        """Return the repository and folder without the revision, as a URL: the key in the local cache."""
        return f"hf://{self.repo_type}s/{self.repo_id}" + (f"/{self.subfolder}" if self.subfolder else "")

    @property
    def url(self) -> str:
        """Return the URL, revision included, that `from_url` parses."""
        folder = f"/{self.subfolder}" if self.subfolder else ""
        return f"hf://{self.repo_type}s/{self.repo_id}@{quote(self.revision, safe='')}{folder}"

    def __str__(self) -> str:
        return f"{self.origin} at {self.revision}"

    def path(self, name: str) -> str:
        """Return a file's path in the repository."""
        return f"{self.subfolder}/{name}" if self.subfolder else name


def is_offline() -> bool:
    """Report whether the user's environment forbids the Hub (HF_HUB_OFFLINE)."""
    return bool(constants.HF_HUB_OFFLINE)


def is_commit(revision: str) -> bool:
    """Report whether this is a full commit id, whose content never changes."""
    return _COMMIT.fullmatch(revision) is not None


def resolve(location: HubLocation, token: Token = None, patience: Patience | None = None) -> str:
    """Return the commit that the location's revision names now. Raises ArtifactNotFoundError, StoreError."""
    if is_commit(location.revision):
        return location.revision
    with named(f"{location}"):
        timeout = (patience or Patience()).timeout
        info = client(token).repo_info(
            location.repo_id, revision=location.revision, repo_type=location.repo_type, timeout=timeout
        )
    if not is_commit(str(info.sha)):
        raise StoreError(f"{location}: the Hub named no commit")
    return str(info.sha)


def open_hub(
    location: HubLocation,
    commit: str,
    token: Token = None,
    patience: Patience | None = None,
    progress: Callable[[int], None] | None = None,
) -> HttpFiles:
    """Open the files of a location at a commit.

    Args:
        location: the repository and folder; its revision is not used.
        commit: the commit to read.
        token: token for the Hub (default: the one logged in with).
        patience: time limits and number of attempts.
        progress: called with the length in bytes of each piece that arrives.

    Raises:
        OfflineError: offline mode is on.
        StoreAccessError: no token is at hand, and one is required.
    """
    if is_offline():
        raise OfflineError(f"{location}: offline mode is on (HF_HUB_OFFLINE)")
    with named(f"{location}"):
        headers = build_hf_headers(token=token, library_name="hf_cachegen", library_version=__version__)

    def url_of(name: str) -> str:
        return hf_hub_url(
            location.repo_id, name, subfolder=location.subfolder, repo_type=location.repo_type, revision=commit,
            endpoint=constants.ENDPOINT,
        )  # fmt: skip

    return HttpFiles(url_of, headers, patience, progress)


def find_files(location: HubLocation, token: Token = None) -> dict[str, int]:
    """Return the sizes in bytes of all files at or below the location, by path relative to it."""
    with named(f"{location}"):
        entries = client(token).list_repo_tree(
            location.repo_id,
            location.subfolder,
            recursive=True,
            revision=location.revision,
            repo_type=location.repo_type,
        )
        sizes = {str(entry.path): int(entry.size) for entry in entries if hasattr(entry, "blob_id")}
    prefix = f"{location.subfolder}/" if location.subfolder else ""
    return {path.removeprefix(prefix): size for path, size in sizes.items()}


def namespace(url: str) -> str | None:
    """Return the user or organisation that hf://name names; None for a URL of another form."""
    match = _NAMESPACE.fullmatch(url)
    return match and match["name"]


def find_repositories(name: str, holds: Callable[[str], bool], token: Token = None) -> list[HubLocation]:
    """List the repositories of a user or an organisation that hold a certain file.

    Args:
        name: the user or organisation.
        holds: returns True for the path of such a file.
        token: token for the Hub (default: the one logged in with).

    Returns:
        The repositories of data sets, where artifacts are by default, then those of models, where profiles are.

    Raises:
        StoreError: the Hub cannot be reached, or refuses.
    """
    locations = []
    with named(f"namespace {name}"):
        api = client(token)
        for kind, listed in (("dataset", api.list_datasets), ("model", api.list_models)):
            for one in listed(author=name, expand=["siblings"]):
                if any(holds(str(file.rfilename)) for file in one.siblings or []):
                    locations.append(HubLocation(str(one.id), kind))
    return locations


def client(token: Token) -> HfApi:
    """Return the Hub's client, with this token. Raises OfflineError."""
    if is_offline():
        raise OfflineError("this needs the Hub, and offline mode is on: unset HF_HUB_OFFLINE")
    return HfApi(
        endpoint=constants.ENDPOINT, token=token, library_name="hf_cachegen", library_version=__version__
    )


def status_of(error: HfHubHTTPError) -> int:
    """Return the HTTP status of an error; 0 where it has none."""
    return int(getattr(error.response, "status_code", 0))


@contextmanager
def named(where: str) -> Iterator[None]:
    """Raise errors of the Hub's client as errors of this package, which name the location `where`."""
    try:
        yield
    except CacheGenError:
        raise
    except HFValidationError as error:
        raise ConfigError(f"{where}: {error}") from error
    except OfflineModeIsEnabled as error:
        raise OfflineError(f"{where}: offline mode is on (HF_HUB_OFFLINE)") from error
    except (GatedRepoError, LocalTokenNotFoundError) as error:
        raise StoreAccessError(f"{where}: {_text(error)}") from error
    except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError) as error:
        raise ArtifactNotFoundError(
            f"there is no {where} (a private one needs a token with the right to read it): {_text(error)}"
        ) from error
    except HfHubHTTPError as error:
        refused = status_of(error) in (401, 403)
        raise (StoreAccessError if refused else StoreError)(f"{where}: {_text(error)}") from error
    except Exception as error:
        raise StoreError(f"{where}: {type(error).__name__}: {_text(error)}") from error


def _text(error: Exception) -> str:
    """Return the first line of an error's text that is not empty."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
