"""How to reach what is stored somewhere: the options that `open_store` takes, and that its stores carry."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_cachegen.stores.retry import Patience
    from hf_cachegen.stores.sealed import Secret
    from hf_cachegen.stores.signed import KeyLike


@dataclass(frozen=True)
class Access:
    """How to reach an artifact; the first seven have the names and meanings of Transformers.

    revision: branch, tag or commit of a repository (default: main). token: for the Hub; default the one logged in with.
    cache_dir: where verified segments are kept. local_files_only: only from there, without network.
    force_download: fetch everything again. subfolder: where in the repository or below the URL. repo_type: of the Hub.
    headers: for http(s) URLs. storage_options: for other URLs, passed to fsspec. patience: time limits and attempts.
    public_key: accept only what is signed with its private half (hf_cachegen.stores.signed).
    key: opens what is sealed (hf_cachegen.stores.sealed), which the local cache keeps as it is, sealed.
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
