"""The format is frozen: artifacts of version 1 are read, and written to the same bytes. docs/format.md matches the
code.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_cachegen.artifact import FORMAT_VERSION, PROFILE_FILE, Limits
from hf_cachegen.artifact.artifact import write
from hf_cachegen.artifact.manifest import loads
from hf_cachegen.codec import anchors, basis, codebook, quantize, rans, tables
from hf_cachegen.codec.context import Encoder
from hf_cachegen.codec.rows import gather, spans_of
from hf_cachegen.codec.transforms.klt import Klt
from hf_cachegen.config import CacheGenConfig
from hf_cachegen.errors import UnsupportedFormatError
from hf_cachegen.profiles.files import Profile
from hf_cachegen.profiles.finding import open_with_profile
from hf_cachegen.stores import LocalStore
from tests.golden_cache import (
    digests,
    golden_kv,
    golden_layers,
    golden_profile,
    golden_tensors,
    record,
    recorded,
    require_same_files,
)

GOLDEN = Path(__file__).with_name("golden") / "version-1"
PAGE = (Path(__file__).parents[1] / "docs" / "format.md").read_text()
CASES = {
    "delta": CacheGenConfig(transform="delta", chunk_tokens=32, protect_last=8),
    "identity": CacheGenConfig(transform="identity", chunk_tokens=32, protect_last=8, levels=2),
    "identity-sinks": CacheGenConfig(transform="identity", chunk_tokens=32, protect_last=8),
    "indexed": CacheGenConfig(transform="identity", chunk_tokens=32, protect_last=8, levels=2),
    "klt": CacheGenConfig(transform="klt", chunk_tokens=32, protect_last=8),
    "klt-sinks": CacheGenConfig(transform="klt", chunk_tokens=32, protect_last=8),
    "klt-step": CacheGenConfig(transform="klt", chunk_tokens=32, protect_last=8, step_offset=-5),
    "klt-tables": CacheGenConfig(transform="klt", chunk_tokens=32, protect_last=8),
    "lossless": CacheGenConfig(transform="identity", lossless=True, chunk_tokens=32),
    "states": CacheGenConfig(transform="identity", lossless=True, chunk_tokens=32),
}


def write_golden(directory: Path, config: CacheGenConfig) -> None:
    profile = golden_profile() if config.transform == "klt" else None
    write(
        Encoder(*golden_kv(directory.name), config, profile, layers=golden_layers(directory.name)),
        directory,
        input_ids=list(range(50)),
        fingerprint={"model": "golden"},
        tensors=golden_tensors() if directory.name == "states" else (),
    )


@pytest.mark.parametrize("name", CASES)
def test_old_artifacts_are_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digest of each level was stored beside the artifact when it was made, and so was klt's profile."""
    monkeypatch.setattr(basis, "multiplies_bfloat16", lambda: False)
    artifact = open_with_profile(LocalStore(GOLDEN / name))
    expected = recorded(GOLDEN / name)
    assert artifact.reader.verify() == artifact.nbytes_at()
    assert digests(artifact) == expected
    assert len(expected) == artifact.levels
    assert artifact.input_ids == list(range(50))


@pytest.mark.parametrize("name", [name for name in CASES if name != "klt"])
def test_this_encoder_writes_the_same_bytes(name: str, tmp_path: Path) -> None:
    write_golden(tmp_path / name, CASES[name])
    require_same_files(tmp_path / name, GOLDEN / name)


def test_klt_with_the_profiles_own_tables_is_written_to_the_same_bytes() -> None:
    """Contexts that gain nothing by own tables are encoded with the profile's, like all contexts of older releases."""
    old = open_with_profile(LocalStore(GOLDEN / "klt")).read()
    codec = Klt(old.geometry, old.config, golden_profile())
    for index, span in enumerate(spans_of(50, 32)):
        assert codec.encode(gather(*golden_kv(), span), span) == [part[index] for part in old.parts]
    assert codec.side_bytes() == old.side


@pytest.mark.parametrize(("name", "features"), [
    ("identity", ()), ("identity-sinks", ("sinks",)), ("klt", ("klt",)), ("klt-tables", ("klt", "klt-tables")),
    ("klt-step", ("klt", "klt-step", "klt-tables")), ("klt-sinks", ("klt", "klt-tables", "sinks")),
    ("states", ("states",)),
], ids=str)  # fmt: skip
def test_additions_are_required_features(name: str, features: tuple[str, ...]) -> None:
    data = (GOLDEN / name / "cachegen.json").read_bytes()
    assert loads(data).required == features
    for left_out in features:
        with pytest.raises(UnsupportedFormatError, match=left_out):
            loads(data, features=set(features) - {left_out})


def test_named_tensors_are_read_exactly() -> None:
    stored = open_with_profile(LocalStore(GOLDEN / "states"))
    assert {entry.coding for entry in stored.manifest.states} == {"raw", "planes"}
    assert any(entry.base for entry in stored.manifest.states)
    for expected, found in zip(golden_tensors(), stored.tensors(), strict=True):
        assert (found.name, found.tokens, found.tensor.dtype) == (expected.name, expected.tokens, expected.tensor.dtype)
        assert found.tensor.shape == expected.tensor.shape
        assert torch.equal(found.tensor, expected.tensor)


def test_a_profile_is_written_to_the_same_bytes() -> None:
    assert golden_profile().to_bytes() == (GOLDEN / "klt" / PROFILE_FILE).read_bytes()
    assert Profile.load(GOLDEN / "klt").digest == golden_profile().digest


def test_the_codebook_file_matches_its_program() -> None:
    stored = load_file(Path(tables.__file__).with_name("codebook.safetensors"))
    made = codebook.codebooks()
    assert stored.keys() == made.keys()
    for name, frequencies in stored.items():
        assert int((frequencies - made[name]).abs().max()) <= 1  # the last bit of exp() depends on the machine


@pytest.mark.parametrize(
    ("pattern", "value"),
    [
        (r"s = 2\^\(\(code - (\d+)\) / 4\)", quantize.UNIT_CODE),
        (r"code - 160\) / (\d+)\)", quantize.STEPS_PER_OCTAVE),
        (r"x s x 3\^\(n - 1\) / (\d+)\.", quantize.MEANS_PER_STEP),
        (r"at a step (\d) times|coarse = floor\(\(f \+ 1\) / (\d)\)", quantize.RATIO),
        (r"tiles of (\d+) (?:channels|columns)", rans.TILE_COLUMNS),
        (r"value \+ (\d+) for symbols", tables.ZERO_INDEX),
        (r"digit \+ (\d+)\. *\n|digit \+ (\d+)\b", tables.DIGIT_ZERO),
        (r"symbols -(\d+)\.\.\d+, scales bfloat16", anchors.ANCHOR_PEAK),
        (r"value tables over (\d+) indices", tables.VALUE_SYMBOLS),
        (r"digit tables over (\d+),", tables.DIGIT_SYMBOLS),
        (r"\| `format_version` \| (\d+) \|", FORMAT_VERSION),
        (r"at most (\d+) MiB", Limits().max_header_bytes >> 20),
        (r"`codebook` \(`([\w-]+)`\)", tables.SHIPPED_CODEBOOK),
        (r"With 3\s+levels that is (\d) bytes a (?:channel|column)", 6),
    ],
)
def test_the_page_matches_the_code(pattern: str, value: int | str) -> None:
    found = re.search(pattern, PAGE)
    assert found is not None, pattern
    assert str(value) in found.groups()


if __name__ == "__main__":  # python tests/test_format.py: once for each format version
    for case, config in CASES.items():
        if (GOLDEN / case).exists():
            continue
        write_golden(GOLDEN / case, config)
        if config.transform == "klt":
            golden_profile().save(GOLDEN / case)
        record(GOLDEN / case, open_with_profile(LocalStore(GOLDEN / case)))
