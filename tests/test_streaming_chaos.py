"""Streams from servers that fail at random end with the reported chunks or with a typed error."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_cachegen.cache import CacheGenCache
from hf_cachegen.errors import ArtifactError, StoreError
from hf_cachegen.stores.segment_cache import DIRECTORY_VARIABLE
from hf_cachegen.streaming import StreamReport
from tests.http_server import Server, running
from tests.streaming_support import at_level, fail_at_random, same_kv, serve, threads_end, write
from tests.tiny_models import shared

WAYS: tuple[dict[str, Any], ...] = (
    {},
    {"level": 2},
    {"slo": 5.0},
    {"slo": 0.3},
    {"slo": 1.0, "policy": "paper"},
    {"slo": 2.0, "refine": "off"},
    {"refine": "while_generating"},
    {"slo": 0.5, "refine": "while_generating"},
)
LIMIT_SECONDS = 60.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write("llama", tmp_path_factory.mktemp("artifacts") / "artifact")


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_a_stream_equals_its_report_or_is_an_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: dict[str, Any], seed: int
) -> None:
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path / "cache"))
    levels = {level: at_level(folder, level) for level in (1, 2, 3)}
    start = time.monotonic()
    with running(Server()) as one, running(Server()) as other:
        fail_at_random(one, seed)
        fail_at_random(other, seed + 100)
        fallback = [serve(other, folder)] if seed % 2 else []
        try:
            cache = CacheGenCache.stream(
                serve(one, folder), shared("llama"), fallback=fallback, stall_seconds=0.3, **way
            )  # fmt: skip
        except (StoreError, ArtifactError):
            cache = None
        else:
            assert cache.refinement is not None
            assert cache.refinement.wait(LIMIT_SECONDS)
        assert threads_end()
    assert time.monotonic() - start < LIMIT_SECONDS
    if cache is not None:
        assert isinstance(cache.report, StreamReport)
        for chunk in cache.report.chunks:
            where = slice(chunk.first, chunk.first + chunk.tokens)
            assert chunk.level is None or same_kv(cache, levels[chunk.level], where)
        assert all(bool(torch.isfinite(keys).all()) for keys in cache.kv.keys)
