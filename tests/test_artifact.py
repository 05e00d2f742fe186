"""Tensors to files and back. Damaged or contradictory artifacts are never decoded."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from kv_samples import same, sample_kv

from hf_cachegen.artifact import Limits, manifest
from hf_cachegen.artifact.artifact import Artifact, write
from hf_cachegen.artifact.encoded import decode_kv, encode_kv
from hf_cachegen.codec import context
from hf_cachegen.codec.chunk import Channels
from hf_cachegen.codec.context import Encoder
from hf_cachegen.codec.geometry import Geometry, LayerGeometry
from hf_cachegen.codec.transforms import transform_of
from hf_cachegen.config import CacheGenConfig
from hf_cachegen.errors import (
    ArtifactError,
    ArtifactExistsError,
    ArtifactNotFoundError,
    CorruptError,
    LevelError,
    LimitError,
    ManifestError,
    TensorError,
    TruncatedError,
)
from hf_cachegen.stores import LocalStore

CONFIG = CacheGenConfig(transform="delta", chunk_tokens=32)
CONFIGS = [CONFIG, replace(CONFIG, transform="identity"), replace(CONFIG, transform="identity", lossless=True)]
IDS = ["delta", "identity", "lossless"]


def make(directory: Path, config: CacheGenConfig = CONFIG, **shape: Any) -> Path:
    keys, values = sample_kv(**{"layers": 2, "tokens": 70, "dim": 8, **shape})
    write(Encoder(keys, values, config), directory, input_ids=list(range(keys[0].shape[2])))
    return directory


def decode(path: Path) -> None:
    """Read and decode all segments at the finest level."""
    artifact = Artifact(LocalStore(path))
    artifact.decode()
    _ = artifact.input_ids


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_files_hold_the_encoded_context(config: CacheGenConfig, tmp_path: Path) -> None:
    keys, values = sample_kv(tokens=70)
    encoded = encode_kv(keys, values, config)
    write(encoded, tmp_path / "whole")
    write(Encoder(keys, values, config), tmp_path / "streamed")
    for path in sorted((tmp_path / "whole").iterdir()):
        assert path.read_bytes() == (tmp_path / "streamed" / path.name).read_bytes()
    artifact = Artifact(LocalStore(tmp_path / "whole"))
    assert artifact.read() == encoded
    for level in range(1, artifact.levels + 1):
        found, expected = artifact.decode(level), decode_kv(encoded, level)
        assert same(found[0], expected[0])
        assert same(found[1], expected[1])
        assert artifact.nbytes_at(level) == encoded.nbytes_at(level)
    on_disk = sum(path.stat().st_size for path in (tmp_path / "whole").iterdir())
    assert on_disk == encoded.nbytes == artifact.nbytes_at()


def test_a_level_needs_only_its_own_files(tmp_path: Path) -> None:
    path = make(tmp_path / "a")
    (path / "refine-2.safetensors").unlink()
    Artifact(LocalStore(path)).decode(2)
    (path / "refine-1.safetensors").unlink()
    Artifact(LocalStore(path)).decode(1)
    with pytest.raises(ManifestError):
        Artifact(LocalStore(path)).decode(2)


def test_geometry_round_trips(tmp_path: Path) -> None:
    keys, values = sample_kv(layers=2, tokens=40, dim=8, v_dim=24)
    layers = [LayerGeometry("sliding", 2, 8, 2, 24, window=16), LayerGeometry("mla", 2, 8, 2, 24)]
    write(Encoder(keys, values, CONFIG, layers=layers), tmp_path / "a", fingerprint={"model": "x"})
    artifact = Artifact(LocalStore(tmp_path / "a"))
    assert list(artifact.geometry.layers) == layers
    assert artifact.fingerprint == {"model": "x"}
    assert artifact.input_ids is None


def test_wrong_geometry_is_refused() -> None:
    keys, values = sample_kv(layers=1, tokens=40, dim=8)
    with pytest.raises(TensorError):
        Encoder(keys, values, CONFIG, layers=[LayerGeometry("full", 2, 16, 2, 8)])
    with pytest.raises(TensorError):
        Encoder(keys, values, CONFIG, layers=[])


def test_wrong_number_of_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TensorError):
        write(encode_kv(*sample_kv(tokens=40)), tmp_path / "a", input_ids=[1, 2, 3])
    assert not (tmp_path / "a").exists()


def test_existing_artifacts_are_kept(tmp_path: Path) -> None:
    path = make(tmp_path / "a")
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    with pytest.raises(ArtifactExistsError):
        make(path, CONFIGS[1])
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before
    write(encode_kv(*sample_kv(tokens=40), CONFIGS[2]), path, overwrite=True)
    assert Artifact(LocalStore(path)).config.lossless


def test_tensors_that_cannot_be_encoded_leave_the_old_artifact(tmp_path: Path) -> None:
    path = make(tmp_path / "a")
    keys, values = sample_kv(tokens=40)
    values[-1][..., -1, -1] = float("nan")
    with pytest.raises(TensorError):
        write(Encoder(keys, values, CONFIG), path, overwrite=True)
    decode(path)


EXTREMES = {
    "one key of 3e38": (0, 40, 3e38),
    "a protected key of 3e38": (0, 0, 3e38),
    "large values": (1, slice(None), 1e30),
    "small keys": (0, slice(None), 1e-30),
}


@pytest.mark.parametrize("config", CONFIGS[:2], ids=IDS[:2])
@pytest.mark.parametrize(("side", "token", "factor"), EXTREMES.values(), ids=EXTREMES.keys())
def test_values_beyond_every_step_are_refused(side: int, token: Any, factor: float, config: CacheGenConfig) -> None:
    kv = sample_kv(layers=2, tokens=70, dim=8)
    if isinstance(token, int):
        kv[side][1][0, 0, token, 3] = factor
    else:
        kv[side][1].mul_(factor)
    with pytest.raises(TensorError, match=f"{('keys', 'values')[side]} of layer 1"):
        Encoder(*kv, config)
    decoded = decode_kv(encode_kv(*kv, CONFIGS[2]))
    assert same(decoded[0], kv[0])
    assert same(decoded[1], kv[1])


@pytest.mark.parametrize("config", CONFIGS[:2], ids=IDS[:2])
def test_zeros_and_very_small_channels_are_encoded(config: CacheGenConfig) -> None:
    keys, values = sample_kv(layers=2, tokens=70, dim=8)
    keys[0].zero_()
    values[1][..., 2] *= 1e-30
    decoded = decode_kv(encode_kv(keys, values, config))
    assert not bool(decoded[0][0].any())
    assert float(decoded[1][1][..., 2].abs().max()) < 1e-2 * float(values[1].abs().max())


def test_a_missing_artifact_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactNotFoundError):
        Artifact(LocalStore(tmp_path / "missing"))


@pytest.mark.parametrize("level", [0, 4, True])
def test_wrong_levels_are_refused(level: int, tmp_path: Path) -> None:
    with pytest.raises(LevelError):
        Artifact(LocalStore(make(tmp_path / "a"))).decode(level)


def test_limits_are_checked_before_allocation(tmp_path: Path) -> None:
    path = make(tmp_path / "a")
    with pytest.raises(LimitError):
        Artifact(LocalStore(path), limits=Limits(max_decoded_bytes=1000))
    with pytest.raises(LimitError):
        Artifact(LocalStore(path), limits=Limits(max_tokens=50))


HOSTILE: dict[str, dict[str, Any]] = {
    "another codebook": {"codec": {"codebook": "other"}},
    "no options": {"codec": {"config": None}},
    "unresolved transform": {"codec": {"config": {"transform": "auto"}}},
    "unknown option": {"codec": {"config": {"surprise": 1}}},
    "option out of range": {"codec": {"config": {"chunk_tokens": 0}}},
    "steps of another type": {"codec": {"config": {"steps": 3}}},
    "steps that are strings": {"codec": {"config": {"steps": ["a", "b", "c"]}}},
    "more levels than files": {"codec": {"config": {"levels": 2}}},
    "other chunks than the table": {"codec": {"config": {"chunk_tokens": 33}}},
    "fewer tokens than chunks": {"geometry": {"tokens": 69}},
    "unknown dtype": {"geometry": {"dtype": "load"}},
    "another batch": {"geometry": {"batch": 2}},
    "another transform": {"codec": {"config": {"transform": "identity"}}},
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
def test_contradictions_with_a_valid_checksum_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    path = make(tmp_path / "a")
    file = path / "cachegen.json"
    found = manifest.loads(file.read_bytes())
    codec, geometry = dict(found.codec), {**found.geometry, **change.get("geometry", {})}
    for name, value in change.get("codec", {}).items():
        codec[name] = {**codec[name], **value} if isinstance(value, dict) else value
    file.write_bytes(manifest.dumps(replace(found, codec=codec, geometry=geometry)))
    with pytest.raises(ArtifactError):
        decode(path)


@pytest.mark.parametrize("chunk_tokens", [1, 32])
def test_tokens_that_only_a_geometry_states_take_no_memory(chunk_tokens: int, tmp_path: Path) -> None:
    """A list of their chunks would take gigabytes, and half a minute."""
    file = make(tmp_path / "a") / "cachegen.json"
    found = manifest.loads(file.read_bytes())
    codec = {**found.codec, "config": {**found.codec["config"], "chunk_tokens": chunk_tokens}}
    file.write_bytes(manifest.dumps(replace(found, geometry={**found.geometry, "tokens": 1 << 24}, codec=codec)))
    tracemalloc.start()
    try:
        with pytest.raises(ManifestError, match="chunk table"):
            Artifact(LocalStore(tmp_path / "a"))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


WIDE_LAYER = {"kind": "full", "heads": 1 << 14, "k_dim": 1 << 16, "v_heads": 1, "v_dim": 1, "window": None}


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_nothing_is_built_for_channels_that_the_side_information_lacks(
    config: CacheGenConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(tmp_path / "a", config)
    encoded = Artifact(LocalStore(path)).read()
    assert len(encoded.side) in transform_of(encoded.config).side_lengths(encoded.geometry, encoded.config)
    monkeypatch.setattr(Channels, "of", lambda geometry: pytest.fail("channels were built"))
    geometry = {**encoded.geometry.to_dict(), "layers": [WIDE_LAYER]}
    for side in (b"", encoded.side, encoded.side + bytes(1)):
        with pytest.raises((CorruptError, TruncatedError)):
            context.codec_of(Geometry.from_dict(geometry), encoded.config, side, None)
    file = path / "cachegen.json"
    found = manifest.loads(file.read_bytes())
    file.write_bytes(manifest.dumps(replace(found, geometry=geometry)))
    with pytest.raises(ManifestError, match="side information"):
        Artifact(LocalStore(path), limits=Limits(max_decoded_bytes=1 << 50))


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_truncation_at_every_offset_is_found(config: CacheGenConfig, tmp_path: Path) -> None:
    path = make(tmp_path / "a", config, layers=1, tokens=40, heads=1, dim=4)
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        for length in range(len(whole)):
            file.write_bytes(whole[:length])
            with pytest.raises(ArtifactError):
                decode(path)
        file.write_bytes(whole)
    decode(path)


@pytest.mark.slow
def test_every_flipped_bit_of_the_manifest_is_found(tmp_path: Path) -> None:
    path = make(tmp_path / "a", layers=1, tokens=40, heads=1, dim=4)
    file = path / "cachegen.json"
    whole = file.read_bytes()
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        with pytest.raises(ArtifactError):
            Artifact(LocalStore(path))


@pytest.mark.slow
def test_ten_thousand_flipped_bits_of_the_segments_are_found(tmp_path: Path) -> None:
    path = make(tmp_path / "a")
    rng = random.Random(0)
    files = sorted(path.glob("*.safetensors"))
    for _ in range(10_000):
        file = rng.choice(files)
        at, bit = rng.randrange(file.stat().st_size), rng.randrange(8)
        with file.open("r+b") as out:
            out.seek(at)
            byte = out.read(1)[0]
            out.seek(at)
            out.write(bytes([byte ^ 1 << bit]))
        with pytest.raises(ArtifactError):
            decode(path)
        with file.open("r+b") as out:
            out.seek(at)
            out.write(bytes([byte]))
    decode(path)


def test_files_of_another_artifact_are_found(tmp_path: Path) -> None:
    one, other = make(tmp_path / "a"), make(tmp_path / "b", seed=1)
    for name in ("base.safetensors", "refine-1.safetensors"):
        mixed = tmp_path / f"mixed-{name}"
        shutil.copytree(one, mixed)
        shutil.copy(other / name, mixed / name)
        with pytest.raises(ArtifactError):
            decode(mixed)


MEMORY_PROBE = """
import resource, sys, torch
from hf_cachegen.artifact.artifact import Artifact, write
from hf_cachegen.codec.chunk import Channels
from hf_cachegen.codec.context import Encoder
from hf_cachegen.codec.transforms import transform_of
from hf_cachegen.stores import LocalStore
from hf_cachegen.config import CacheGenConfig
torch.set_num_threads(1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
config = CacheGenConfig(transform="identity", chunk_tokens=64)
def run(tokens, path):
    x = torch.randn(2, 1, 4, tokens, 64).bfloat16()
    write(Encoder(list(x), list(x), config), path)
    return Artifact(LocalStore(path)).decode()
run(256, sys.argv[1] + "/warm")
keys = torch.randn(2, 1, 4, 32768, 64).bfloat16()
before = peak()
write(Encoder(list(keys), list(keys), config), sys.argv[1] + "/a")
encoding = peak() - before
del keys
Artifact(LocalStore(sys.argv[1] + "/a")).decode()
print(before, encoding, peak() - before)
"""


def test_memory_is_the_tensors_and_one_chunk(tmp_path: Path) -> None:
    """A cache of 64 MiB (its tensors 32 MiB, shared by K and V): encoding adds far less, decoding only its own tensors.
    """
    command = [sys.executable, "-c", MEMORY_PROBE, str(tmp_path)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    _, encoding, both = map(int, done.stdout.split())
    assert encoding < 24
    assert both < 64 + 24
