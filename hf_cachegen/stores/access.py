"""The options for reaching a location: `open_store` takes them, and its stores keep them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from hf_cachegen.errors import ConfigError

if TYPE_CHECKING:
    from hf_cachegen.stores.retry import Patience
    from hf_cachegen.stores.sealed import Secret
    from hf_cachegen.stores.signed import KeyLike


@dataclass(frozen=True)
class Access:
    """Options for reaching an artifact; the first seven have the names and meanings of Transformers.

    Attributes:
        revision: branch, tag or commit of a repository (default: main).
        token: token for the Hub (default: the one logged in with).
        cache_dir: folder in which verified segments are kept.
        local_files_only: read from `cache_dir` alone, without network.
        force_download: fetch everything again.
        subfolder: folder within the repository or below the URL.
        repo_type: type of a repository on the Hub: "dataset", "model" or "space".
        headers: HTTP headers, for http(s) URLs.
        storage_options: options for fsspec, for URLs of other schemes.
        patience: time limits and number of attempts.
        public_key: accept only files that are signed with its private half (`hf_cachegen.stores.signed`).
        key: secret key of a sealed artifact (`hf_cachegen.stores.sealed`). The local cache keeps it sealed.

    Raises:
        ConfigError: revision or subfolder is no text.
    """

    revision: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False
    force_download: bool = False
    subfolder: str | None = None
    repo_type: str = "dataset"
    headers: Mapping[str, str] | None = field(default=None, repr=False)
    storage_options: Mapping[str, Any] | None = field(default=None, repr=False)
    patience: Patience | None = None
    public_key: KeyLike | None = None
    key: Secret | None = field(default=None, repr=False)

    @classmethod
    def from_keywords(cls, keywords: Mapping[str, Any]) -> Access:
        """Make options from the further keywords of a call. Raise TypeError for one that is no option."""
        names = [found.name for found in fields(cls)]
        for name in keywords:
            if name not in names:
                raise TypeError(
                    f"unexpected keyword argument {name!r}; the options of a location are {', '.join(names)}"
                )
        return cls(**keywords)

    def __post_init__(self) -> None:
        for name in ("revision", "subfolder"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and _is_text(value)):
                raise ConfigError(f"{name} must be a text without control characters, got {value!a:.200}")


def _is_text(value: str) -> bool:
    return re.search(r"[\0-\x1f\x7f\ud800-\udfff]", value) is None
