"""Fixtures of more than one file of tests. Tests that stream, or load from places, take `own_cache`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_cachegen.stores.segment_cache import DIRECTORY_VARIABLE
from tests.http_server import Server, running


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The local cache of segments and speeds is the test's own."""
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path / "cache"))


@pytest.fixture
def server() -> Iterator[Server]:
    """A web server of no files."""
    with running(Server()) as found:
        yield found


@pytest.fixture
def spare() -> Iterator[Server]:
    """Another one."""
    with running(Server()) as found:
        yield found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The artifact of the context of streaming_support, of the model "llama"."""
    from tests.streaming_support import write  # torch, which most tests do without

    return write("llama", tmp_path / "artifact")


@pytest.fixture
def url(server: Server, folder: Path) -> str:
    """`folder` on `server`."""
    from tests.streaming_support import serve

    return serve(server, folder)
