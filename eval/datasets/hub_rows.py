"""Read the rows of a data set on the Hub, or of a folder of the same form, through `datasets`.

`datasets` 4 and later runs no loading scripts, so the revision must hold Parquet files: a repository published as such,
or the branch refs/convert/parquet that the Hub makes of one with a script.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from hf_cachegen.errors import ConfigError, MissingExtraError


def rows(
    repo: str, name: str, split: str, revision: str, *, files: str = "", streaming: bool = False,
    limit: int | None = None,
) -> tuple[Iterator[dict[str, Any]], dict[str, Any]]:  # fmt: skip
    """Read one split.

    Args:
        repo: repository on the Hub, or a folder.
        name: configuration.
        split: split.
        revision: branch, tag or commit; ignored for a folder.
        files: pattern of file names, for a branch whose layout does not name configurations and splits.
        streaming: read row by row, for a data set of which little is needed.
        limit: most rows; None for all.

    Returns:
        (rows, source); the source names repository, revision and commit.

    Raises:
        ConfigError: the data set cannot be loaded.
        MissingExtraError: `datasets` is not installed.
    """
    try:
        from datasets import disable_progress_bars, load_dataset
    except ImportError as error:
        raise MissingExtraError("install the extra 'eval' (datasets) for data sets of the Hub") from error
    disable_progress_bars()
    local = Path(repo).is_dir()
    try:
        found = load_dataset(
            repo, None if files else name, split=split, revision=None if local else revision or None,
            data_files={split: files} if files else None, streaming=streaming,
        )  # fmt: skip
    except Exception as error:  # the readers and clients of `datasets` raise errors of many kinds
        raise ConfigError(
            f"cannot load {repo!r} ({files or name}, split {split!r}, revision {revision or 'default'!r}): "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"
        ) from error
    source = {
        "repo": repo,
        "name": name,
        "split": split,
        "revision": revision,
        "commit": _commit(repo, revision, local),
    }
    return islice(iter(found), limit), source


def _commit(repo: str, revision: str, local: bool) -> str | None:
    """Return the commit that a revision names, None where it is unknown (a folder, or no network)."""
    if local:
        return None
    from huggingface_hub import dataset_info
    from huggingface_hub.errors import HfHubHTTPError

    try:
        sha: str | None = dataset_info(repo, revision=revision or None).sha
    except (HfHubHTTPError, OSError):
        return None
    return sha
