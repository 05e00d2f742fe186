"""Artifacts on the Hugging Face Hub: where they are, and ranges of their files.

A revision is resolved to a commit before anything is read, so that all files of one load are of one state. Reading goes
by ranges from the Hub's own addresses (its client would take whole files, and does not check what it takes); everything
else is the Hub's client, with the user's token, endpoint and offline mode. The client's network errors are of a library
that it may exchange, so whatever is not its own is taken for a failed connection.
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
class HubPlace:
    """A folder of a repository at a revision (branch, tag or commit). Raises ConfigError for what cannot be one."""

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
    def from_url(cls, url: str, repo_type: str = "dataset") -> HubPlace:
        """From hf://[datasets/|models/|spaces/]user/name[@revision][/folder]; repo_type: where it says no kind."""
        match = _URL.fullmatch(url)
        if match is None:
            raise ConfigError(f"expected hf://datasets/user/name[@revision][/folder], got {url!r:.200}")
        kind = match["kind"].removesuffix("s") if match["kind"] else repo_type
        folder = (match["folder"] or "").strip("/") or None
        return cls(match["repo"], kind, folder, unquote(match["revision"] or DEFAULT_REVISION))

    @property
    def origin(self) -> str:
        """The repository and folder, without the revision: what a cache files it under."""
        return f"hf://{self.repo_type}s/{self.repo_id}" + (f"/{self.subfolder}" if self.subfolder else "")

    @property
    def url(self) -> str:
        """What `from_url` reads."""
        folder = f"/{self.subfolder}" if self.subfolder else ""
        return f"hf://{self.repo_type}s/{self.repo_id}@{quote(self.revision, safe='')}{folder}"

    def __str__(self) -> str:
        return f"{self.origin} at {self.revision}"

    def path(self, name: str) -> str:
        """A file's path in the repository."""
        return f"{self.subfolder}/{name}" if self.subfolder else name


def is_offline() -> bool:
    """Whether the user's environment forbids the Hub (HF_HUB_OFFLINE)."""
    return bool(constants.HF_HUB_OFFLINE)


def is_commit(revision: str) -> bool:
    """Whether this is a whole commit id, which never comes to mean something else."""
    return _COMMIT.fullmatch(revision) is not None


def resolve(place: HubPlace, token: Token = None, patience: Patience | None = None) -> str:
    """The commit that the place's revision means now. Raises ArtifactNotFoundError, StoreError."""
    if is_commit(place.revision):
        return place.revision
    with named(f"{place}"):
        timeout = (patience or Patience()).timeout
        info = client(token).repo_info(
            place.repo_id, revision=place.revision, repo_type=place.repo_type, timeout=timeout
        )
    if not is_commit(str(info.sha)):
        raise StoreError(f"{place}: the Hub named no commit")
    return str(info.sha)


def open_hub(
    place: HubPlace,
    commit: str,
    token: Token = None,
    patience: Patience | None = None,
    progress: Callable[[int], None] | None = None,
) -> HttpFiles:
    """The files of the place at that commit. progress: as for `HttpFiles`."""
    if is_offline():
        raise OfflineError(f"{place}: offline mode is on (HF_HUB_OFFLINE)")
    with named(f"{place}"):
        headers = build_hf_headers(token=token, library_name="hf_cachegen", library_version=__version__)

    def url_of(name: str) -> str:
        return hf_hub_url(
            place.repo_id, name, subfolder=place.subfolder, repo_type=place.repo_type, revision=commit,
            endpoint=constants.ENDPOINT,
        )  # fmt: skip

    return HttpFiles(url_of, headers, patience, progress)


def find_files(place: HubPlace, token: Token = None) -> dict[str, int]:
    """All files at or below the place: path relative to it, and size."""
    with named(f"{place}"):
        entries = client(token).list_repo_tree(
            place.repo_id, place.subfolder, recursive=True, revision=place.revision, repo_type=place.repo_type
        )
        sizes = {str(entry.path): int(entry.size) for entry in entries if hasattr(entry, "blob_id")}
    prefix = f"{place.subfolder}/" if place.subfolder else ""
    return {path.removeprefix(prefix): size for path, size in sizes.items()}


def namespace(url: str) -> str | None:
    """The user or organisation that hf://name means; None for what names a repository."""
    match = _NAMESPACE.fullmatch(url)
    return match and match["name"]


def find_repositories(name: str, holds: Callable[[str], bool], token: Token = None) -> list[HubPlace]:
    """The repositories of a user or an organisation with a file that `holds` is true of: those of data sets, where
    artifacts are by default, then those of models, where profiles are. Raises StoreError.
    """
    places = []
    with named(f"namespace {name}"):
        api = client(token)
        for kind, listed in (("dataset", api.list_datasets), ("model", api.list_models)):
            for one in listed(author=name, expand=["siblings"]):
                if any(holds(str(file.rfilename)) for file in one.siblings or []):
                    places.append(HubPlace(str(one.id), kind))
    return places


def client(token: Token) -> HfApi:
    """The Hub's client, with this token. Raises OfflineError."""
    if is_offline():
        raise OfflineError("offline mode is on (HF_HUB_OFFLINE), and this needs the Hub")
    return HfApi(
        endpoint=constants.ENDPOINT, token=token, library_name="hf_cachegen", library_version=__version__
    )


def status_of(error: HfHubHTTPError) -> int:
    """The HTTP status; 0 where there was none."""
    return int(getattr(error.response, "status_code", 0))


@contextmanager
def named(where: str) -> Iterator[None]:
    """Gives what the Hub's client raises its name here."""
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
    """The first line that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
