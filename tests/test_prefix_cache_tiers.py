"""Locations behind the folder: read, published, damaged, hostile, slow, away; seals and signatures; artifacts."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from hf_cachegen import CacheGenCache, CacheGenConfig, PrefixCache
from hf_cachegen.errors import ArtifactNotFoundError, ConfigError, PrefixCacheError, StoreError
from hf_cachegen.generation import attach, generate
from hf_cachegen.prefix_cache import PrefixCacheCollector, levels
from hf_cachegen.prefix_cache.block import dump, load
from hf_cachegen.prefix_cache.keys import Family
from hf_cachegen.prefix_cache.remote import RemoteTier, name_of
from hf_cachegen.prefix_cache.transfer import export_artifact, import_artifact
from hf_cachegen.stores.objects import Objects
from tests.generation_support import fed, seeded
from tests.hub_server import Repo, running_hub
from tests.prefix_cache_support import WIDTH, same_as_stock, small
from tests.tiny_models import make, shared, tokens

pytestmark = pytest.mark.usefixtures("own_cache")
IDS = tokens(40)


@pytest.fixture(name="team")
def _team() -> Any:
    """A location that fsspec reads and writes."""
    fsspec.filesystem("memory").store.clear()
    return "memory://team/prefixes"


def fill(cache: PrefixCache, ids: torch.Tensor = IDS) -> None:
    same_as_stock(shared("llama"), cache, ids, do_sample=False)
    cache.flush()


def test_one_nodes_prefill_serves_all(tmp_path: Path, team: str) -> None:
    first = small(tmp_path / "first", remote=team)
    fill(first)
    assert first.stats().bytes_published == first.stats().nbytes
    second = small(tmp_path / "second", remote=team)
    with fed(shared("llama")) as lengths:
        seeded(generate, shared("llama"), IDS, prefix_cache=second, do_sample=False)
    assert lengths[0] == 1
    second.flush()
    assert second.stats().bytes_fetched > 0
    assert second.stats().blocks == first.stats().blocks, "what was fetched is kept"
    assert second.stats().bytes_published == 0
    fetched = second.stats().bytes_fetched
    fill(second)
    assert second.stats().bytes_fetched == fetched, "and not fetched again"


def test_a_location_may_be_all_that_is_given(team: str) -> None:
    fill(PrefixCache(team, block_tokens=WIDTH, min_tokens=WIDTH))
    assert fsspec.filesystem("memory").find("team/prefixes")


@pytest.mark.parametrize("kind", ["folder", "server", "memory"])
def test_shared_locations_are_only_read(kind: str, tmp_path: Path, team: str, server: Any) -> None:
    fill(small(tmp_path / "source", remote=str(tmp_path / "team") if kind != "memory" else team))
    where = team if kind == "memory" else tmp_path / "team"
    if kind == "server":
        for path in (tmp_path / "team").rglob("*"):
            if path.is_file():
                server.files[f"team/{path.parent.name}/{path.name}"] = path.read_bytes()
        where = f"{server.url}/team"
    reader = small(tmp_path / "reader", shared=[where])
    fill(reader, torch.cat([IDS, tokens(20, 7)], 1))
    assert reader.stats().tokens_reused == 40
    assert reader.stats().bytes_published == 0


def test_the_end_of_a_run_is_found_by_bisection(team: str) -> None:
    keys = [bytes([number]) * 32 for number in range(100)]
    objects = Objects(team)
    tier = RemoteTier(objects, True)
    for stored in (0, 1, 37, 100):
        for key in keys[:stored]:
            tier.publish(key, b"x")
        asked: list[str] = []
        real = objects.exists
        objects.exists = lambda name, asked=asked, real=real: asked.append(name) or real(name)  # type: ignore[method-assign,func-returns-value]
        assert tier.stored(keys) == stored
        assert len(asked) <= 8
        objects.exists = real  # type: ignore[method-assign]


def test_a_damaged_or_hostile_block_of_a_location_is_computed(tmp_path: Path, team: str) -> None:
    fill(small(tmp_path / "first", remote=team))
    memory = fsspec.filesystem("memory")
    for number, name in enumerate(sorted(memory.find("team/prefixes"))):
        data = bytearray(memory.cat_file(name))
        data[-1 - number] ^= 1
        memory.pipe_file(name, bytes(data))
    reader = small(tmp_path / "reader", shared=[team])
    fill(reader)
    assert reader.stats().hits == 0
    assert reader.stats().blocks_damaged == 1
    fill(reader)
    assert reader.stats().hits == 1, "computed and stored again"


@pytest.mark.parametrize("lie", [{"depth": 7}, {"family": Family({"block_tokens": WIDTH, "model_id": "x"})}], ids=str)
def test_a_block_that_lies_about_its_chain_is_computed(lie: dict[str, Any], tmp_path: Path, team: str) -> None:
    fill(small(tmp_path / "first", remote=team))
    memory = fsspec.filesystem("memory")
    for name in memory.find("team/prefixes"):
        block = load(memory.cat_file(name))
        if block.depth == 1:
            memory.pipe_file(name, dump(replace(block, **lie)))
    reader = small(tmp_path / "reader", shared=[team])
    fill(reader)
    assert reader.stats().tokens_reused == WIDTH
    assert reader.stats().blocks_damaged == 1


def test_a_location_that_fails_costs_one_try(tmp_path: Path, team: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, calls = small(tmp_path / "prefixes", remote=team), [0]

    def fail(*_: Any) -> bool:
        calls[0] += 1
        raise StoreError("away")

    monkeypatch.setattr(Objects, "exists", fail)
    fill(cache)
    asked = calls[0]
    fill(cache, tokens(40, 5))
    assert cache.stats().hits == 0
    assert cache.stats().blocks > 0, "the folder goes on"
    fill(cache)
    assert cache.stats().hits == 1
    assert cache.stats().errors >= asked >= 1


def test_blocks_that_do_not_come_before_the_slo_are_computed(
    tmp_path: Path, team: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(small(tmp_path / "first", remote=team))
    real, reader = Objects.get, small(tmp_path / "reader", shared=[team])
    monkeypatch.setattr(Objects, "get", lambda self, name, limit: (time.sleep(5), real(self, name, limit))[1])
    model = attach(make("llama"), prefix_cache=reader)
    begun = time.monotonic()
    with fed(model) as lengths:
        model.generate(IDS, slo=0.3, max_new_tokens=1, do_sample=False)
    assert lengths[0] == 40
    assert time.monotonic() - begun < 5
    with pytest.raises(ConfigError, match="location"):
        model.generate(IDS, slo=0.3, refine="off", max_new_tokens=1)


IDENTITY = CacheGenConfig(transform="identity")


def test_a_slow_location_gives_the_base_in_time_and_the_rest_afterwards(
    tmp_path: Path, team: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refinements never come before the SLO: the bases are decoded, and the whole blocks are kept afterwards."""
    seeded(generate, shared("llama"), IDS, prefix_cache=(first := small(tmp_path / "1", remote=team, config=IDENTITY)))
    first.flush()
    reader = small(tmp_path / "reader", shared=[team], config=IDENTITY)
    released = threading.Event()
    monkeypatch.setattr(levels.Parts, "fetch", lambda *_: released.wait(60))
    monkeypatch.setattr("hf_cachegen.prefix_cache.storage.Storage.complete", lambda self, *asked: later.append(asked))
    later: list[Any] = []
    model = attach(make("llama"), prefix_cache=reader)
    with fed(model) as lengths:
        model.generate(IDS, slo=2.0, max_new_tokens=9, do_sample=False)
    released.set()
    assert lengths[0] == 1
    assert reader.stats().blocks_coarse == len(later) == 5
    assert reader.stats().errors == reader.stats().blocks_damaged == 0
    monkeypatch.undo()
    reader.flush()
    assert reader.stats().blocks == 0, "nothing that follows a coarser level is stored"
    for key, before in later:
        reader.complete(key, before)
    reader.flush()
    rows = sorted(first.local.index.rows(), key=lambda row: row.depth)
    assert reader.stats().nbytes == sum(row.nbytes for row in rows[:5]), "whole blocks"
    with fed(model) as lengths:
        model.generate(IDS, slo=2.0, max_new_tokens=1, do_sample=False)
    assert lengths[0] == 1
    assert reader.stats().blocks_coarse == 5, "and found whole"


@pytest.mark.parametrize("slo", [None, 60.0])
def test_a_fast_location_gives_the_stored_level(slo: float | None, tmp_path: Path, team: str) -> None:
    seeded(generate, shared("llama"), IDS, prefix_cache=(first := small(tmp_path / "1", remote=team, config=IDENTITY)))
    first.flush()
    reader = small(tmp_path / "reader", shared=[team], config=IDENTITY)
    again = seeded(generate, shared("llama"), IDS, prefix_cache=small(tmp_path / "1", config=IDENTITY))
    assert torch.equal(seeded(generate, shared("llama"), IDS, prefix_cache=reader, slo=slo), again)
    reader.flush()
    assert reader.stats().hits == 1
    assert reader.stats().blocks_coarse == 0
    assert reader.stats().blocks >= 5, "what was fetched is kept"


def test_damage_and_loss_at_a_location_end_the_levels_there(tmp_path: Path, team: str) -> None:
    seeded(generate, shared("llama"), IDS, prefix_cache=(first := small(tmp_path / "1", remote=team, config=IDENTITY)))
    first.flush()
    memory, rows = fsspec.filesystem("memory"), sorted(first.local.index.rows(), key=lambda row: row.depth)
    name = "team/prefixes/" + name_of(rows[2].key)
    whole = memory.cat_file(name)
    damaged = (b"", b"x" * 10, whole[:3000], whole[:9] + b"\xff" * 3 + whole[12:], whole[:-1] + b"!")
    for number, data in enumerate(damaged):
        memory.pipe_file(name, data)
        reader = small(tmp_path / f"reader{number}", shared=[team], config=IDENTITY)
        with fed(shared("llama")) as lengths:
            seeded(generate, shared("llama"), IDS, prefix_cache=reader, slo=60.0)
        assert lengths[0] == 40 - 16, number
        assert reader.stats().blocks_damaged == 1
    assert small(tmp_path / "last", shared=[team], config=IDENTITY).tiers.whole(rows[0].key) is not None


@pytest.mark.parametrize("location", ["hf://datasets/team/prefixes/blocks", "hf://datasets/team/prefixes@main/blocks"])
def test_a_repository_on_the_hub_is_a_shared_tier(
    location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(small(tmp_path / "first"))
    files = {
        f"blocks/{path.parent.name}/{path.name}": path.read_bytes()
        for path in (tmp_path / "first" / "blocks").rglob("*") if path.is_file()
    }  # fmt: skip
    with running_hub(monkeypatch) as hub:
        hub.repos["datasets/team/prefixes"] = Repo(False)
        hub.repos["datasets/team/prefixes"].commit({".gitattributes": b"", **files}, "prefixes")
        reader = small(tmp_path / "reader", shared=[location])
        fill(reader, torch.cat([IDS, tokens(20, 7)], 1))
        assert reader.stats().tokens_reused == 40
        assert reader.stats().errors == reader.stats().blocks_damaged == reader.stats().bytes_published == 0
        with pytest.raises(ConfigError, match="read-only"):
            small(tmp_path / "other", remote=location)
        assert small(tmp_path / "third", shared=[location]).tiers.remotes[0].writable is False
        with pytest.raises(ArtifactNotFoundError):
            small(tmp_path / "none", shared=["hf://datasets/team/nothing"])


def test_sealed_blocks_open_with_their_key_alone(tmp_path: Path, team: str) -> None:
    pytest.importorskip("cryptography")
    key = os.urandom(32)
    fill(small(tmp_path / "first", remote=team, key=key))
    for name in fsspec.filesystem("memory").find("team/prefixes"):
        assert b"fingerprint" not in fsspec.filesystem("memory").cat_file(name)
    again = small(tmp_path / "first", key=key)
    fill(again)
    assert again.stats().hits == 1
    assert again.verify().damaged == ()
    wrong = small(tmp_path / "wrong", shared=[team], key=os.urandom(32))
    fill(wrong)
    assert wrong.stats().hits == 0
    assert wrong.stats().blocks_damaged == 1


def test_blocks_from_elsewhere_can_be_required_to_be_signed(tmp_path: Path, team: str) -> None:
    ed25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")
    private = ed25519.Ed25519PrivateKey.generate()
    public = private.public_key().public_bytes_raw()
    fill(small(tmp_path / "signed", remote=team, private_key=private.private_bytes_raw()))
    reader = small(tmp_path / "reader", shared=[team], public_key=public)
    fill(reader)
    assert reader.stats().hits == 1
    other = ed25519.Ed25519PrivateKey.generate().public_key().public_bytes_raw()
    stranger = small(tmp_path / "stranger", shared=[team], public_key=other)
    fill(stranger)
    assert stranger.stats().hits == 0
    fill(small(tmp_path / "unsigned", remote="memory://unsigned"))
    strict = small(tmp_path / "strict", shared=["memory://unsigned"], public_key=public)
    fill(strict)
    assert strict.stats().hits == 0


def test_artifacts_are_imported_and_exported(tmp_path: Path) -> None:
    model, source = shared("llama"), small(tmp_path / "source")
    CacheGenCache.from_context(make("llama"), IDS, CacheGenConfig(lossless=True)).save_pretrained(tmp_path / "artifact")
    assert import_artifact(source, tmp_path / "artifact") == 40
    with fed(model) as lengths:
        seeded(generate, model, IDS, prefix_cache=source, do_sample=False)
    assert lengths[0] == 1
    last = max(source.local.index.rows(), key=lambda row: row.depth)
    assert export_artifact(source, last.key.hex()[:12], tmp_path / "exported") == 40
    cache = CacheGenCache.from_pretrained(tmp_path / "exported", model=make("llama"))
    assert torch.equal(cache.input_ids, IDS)
    exact = CacheGenCache.from_pretrained(tmp_path / "artifact")
    assert all(torch.equal(a, b) for a, b in zip(cache.kv.keys, exact.kv.keys, strict=True))
    with pytest.raises(ArtifactNotFoundError):
        export_artifact(source, "00" * 32, tmp_path / "none")
    with pytest.raises(ConfigError, match="hexadecimal"):
        export_artifact(source, "xyz", tmp_path / "none")
    CacheGenCache.from_context(make("llama"), IDS, CacheGenConfig(transform="identity")).save_pretrained(
        tmp_path / "lossy"
    )
    with pytest.raises(ConfigError, match="lossless"):
        import_artifact(source, tmp_path / "lossy")


def test_pins_by_text(tmp_path: Path) -> None:
    cache = small(tmp_path / "prefixes")
    fill(cache)
    assert cache.pin(shared("llama"), IDS[0, :20]) == 16
    cache.prune(0)
    assert cache.stats().blocks == 2
    assert cache.pin(shared("llama"), IDS, pinned=False) == 16
    assert cache.prune(0)[0] == 2


def test_prometheus(tmp_path: Path) -> None:
    prometheus = pytest.importorskip("prometheus_client")
    cache, registry = small(tmp_path / "prefixes"), prometheus.CollectorRegistry()
    PrefixCacheCollector(cache, registry)
    fill(cache)
    fill(cache)
    text = prometheus.generate_latest(registry).decode()
    assert "hf_cachegen_prefix_cache_hits_total 1.0" in text
    assert "hf_cachegen_prefix_cache_tokens_reused_total 39.0" in text


def test_a_full_queue(tmp_path: Path) -> None:
    for when_full, dropped in (("wait", 0), ("drop", 1)):
        cache = small(tmp_path / when_full, queue_bytes=1, when_full=when_full)
        fill(cache)
        assert (cache.stats().blocks_dropped > 0) == bool(dropped)
        assert cache.stats().errors == 0
        fill(cache)


def test_an_index_that_cannot_be_read_costs_the_reuse_alone(tmp_path: Path) -> None:
    cache = small(tmp_path / "prefixes")
    fill(cache)
    cache.local.index.close()
    for name in ("index.sqlite-wal", "index.sqlite-shm"):
        (tmp_path / "prefixes" / name).unlink(missing_ok=True)
    (tmp_path / "prefixes" / "index.sqlite").write_bytes(b"no database" * 1000)
    fill(cache)
    assert cache.stats().errors >= 1
    fill(cache)
    assert cache.stats().hits == 1, "it was made again"
    with pytest.raises(PrefixCacheError):
        small(tmp_path / "prefixes" / "index.sqlite")
