"""Fixtures of more than one file of tests. Tests that stream, or load from locations, use `own_cache`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_cachegen.stores.segment_cache import DIRECTORY_VARIABLE
from tests.http_server import Server, running


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the test a local cache of segments and speeds of its own."""
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path / "cache"))


@pytest.fixture
def server() -> Iterator[Server]:
    """Run a web server without files."""
    with running(Server()) as found:
        yield found


@pytest.fixture
def spare() -> Iterator[Server]:
    """Run a second web server without files."""
    with running(Server()) as found:
        yield found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the artifact of the context of streaming_support, for the model "llama"."""
    from tests.streaming_support import write  # torch, which most tests do without

    return write("llama", tmp_path / "artifact")


@pytest.fixture
def url(server: Server, folder: Path) -> str:
    """Serve `folder` on `server`, and return its URL."""
    from tests.streaming_support import serve

    return serve(server, folder)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The library's functions that are called meanwhile."""
    from hf_cachegen.codec import native  # torch, which most tests do without

    found: list[str] = []
    real = native.call
    monkeypatch.setattr(native, "call", lambda name, *a, **k: (found.append(name), real(name, *a, **k))[1])
    return found
