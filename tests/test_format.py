"""The format is frozen: artifacts of version 1, written once, are read for ever, and written to the same bytes; the
page that describes it says what the code does.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from safetensors.torch import load_file
from torch import Tensor

from hf_cachegen.artifact import FORMAT_VERSION, PROFILE_FILE, Limits
from hf_cachegen.artifact.artifact import write
from hf_cachegen.artifact.manifest import loads
from hf_cachegen.codec import anchors, basis, codebook, quantize, rans, tables
from hf_cachegen.codec.context import Encoder
from hf_cachegen.codec.geometry import LayerGeometry
from hf_cachegen.codec.profile import Group, Rotary
from hf_cachegen.codec.rows import gather, spans_of
from hf_cachegen.codec.transforms.klt import Klt
from hf_cachegen.config import CacheGenConfig
from hf_cachegen.errors import UnsupportedFormatError
from hf_cachegen.profiles.files import Profile
from hf_cachegen.profiles.finding import open_with_profile
from hf_cachegen.stores import LocalStore

GOLDEN = Path(__file__).with_name("golden") / "version-1"
PAGE = (Path(__file__).parents[1] / "docs" / "format.md").read_text()
CASES = {
    "delta": CacheGenConfig(transform="delta", chunk_tokens=32, protect_last=8),
    "identity": CacheGenConfig(transform="identity", chunk_tokens=32, protect_last=8, levels=2),
    "identity-sinks": CacheGenConfig(transform="identity", chunk_tokens=32, protect_last=8),
    "klt": CacheGenConfig(transform="klt", chunk_tokens=32, protect_last=8),
    "klt-sinks": CacheGenConfig(transform="klt", chunk_tokens=32, protect_last=8),
    "klt-tables": CacheGenConfig(transform="klt", chunk_tokens=32, protect_last=8),
    "lossless": CacheGenConfig(transform="identity", lossless=True, chunk_tokens=32),
}


def golden_kv(name: str = "") -> tuple[list[Tensor], list[Tensor]]:
    """Two layers, 50 tokens, from integers alone: the same on every machine and in every release of torch. Tokens 0 and
    40 are sinks where the name says so.
    """
    numbers = np.arange(2 * 2 * 2 * 50 * 12, dtype=np.uint64)
    for _ in range(3):
        numbers = numbers * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)
        numbers ^= numbers >> np.uint64(29)
    noise = (numbers >> np.uint64(48)).astype(np.int64) - 32768
    x = torch.from_numpy(noise).reshape(2, 2, 1, 2, 50, 12).float() / 32768
    x = x.cumsum(4) * torch.tensor([2.0 ** (c % 5 - 2) for c in range(12)]) + torch.arange(12) / 2 - 3
    x = x.bfloat16()
    if name.endswith("-sinks"):
        x[0, :, :, :, [0, 40]] /= 256
    return list(x[0]), list(x[1])


def golden_profile() -> Profile:
    """A profile of the golden cache's two layers whose products have no rounding: no rotation, a basis of ones and
    quarters.
    """
    layer = LayerGeometry("full", 2, 12, 2, 12)
    mixing = torch.eye(48) + torch.eye(48).flip(0) / 4
    group = [Group(kind, 0, 2, torch.eye(12).expand(4, 12, 12) * (1 + kind), mixing[:40]) for kind in (0, 1)]
    components = torch.arange(80)
    return Profile(
        layers=(layer, layer),
        rotary=Rotary("none", torch.empty(0, dtype=torch.float64)),
        means=torch.arange(96).float() / 16 - 3,
        groups=tuple(group),
        step_code=148,
        base_entries=(components % 30 + 30).to(torch.uint8),
        refine_entries=torch.stack([components % 20 + 5, components % 15 + 10]).to(torch.uint8),
        about={"model": "golden"},
    )


def digest(tensors: list[Tensor]) -> str:
    return xxhash.xxh3_128_hexdigest(b"".join(t.contiguous().view(torch.int16).numpy().tobytes() for t in tensors))


def write_golden(directory: Path, config: CacheGenConfig) -> None:
    profile = golden_profile() if config.transform == "klt" else None
    write(
        Encoder(*golden_kv(directory.name), config, profile),
        directory,
        input_ids=list(range(50)),
        fingerprint={"model": "golden"},
    )


@pytest.mark.parametrize("name", CASES)
def test_old_artifacts_are_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each level's digest was written beside the artifact when it was made; klt's profile lies beside it too, and its
    product is that of every machine.
    """
    monkeypatch.setattr(basis, "multiplies_bfloat16", lambda: False)
    artifact = open_with_profile(LocalStore(GOLDEN / name))
    expected = (GOLDEN / f"{name}.digests").read_text().split()
    assert artifact.reader.verify() == artifact.nbytes_at()
    for level, line in enumerate(expected, 1):
        keys, values = artifact.decode(level)
        assert digest([*keys, *values]) == line
    assert len(expected) == artifact.levels
    assert artifact.input_ids == list(range(50))


@pytest.mark.parametrize("name", [name for name in CASES if name != "klt"])
def test_todays_encoder_writes_the_same_bytes(name: str, tmp_path: Path) -> None:
    write_golden(tmp_path / name, CASES[name])
    for file in sorted((GOLDEN / name).iterdir()):
        if file.name not in ("cachegen.json", PROFILE_FILE):  # the manifest names its writer, whose version moves on
            assert (tmp_path / name / file.name).read_bytes() == file.read_bytes(), file.name


def test_klt_with_the_profiles_own_tables_is_written_to_the_same_bytes() -> None:
    """As every context was before an encoder could name tables of its own, and as those are that gain nothing by it."""
    old = open_with_profile(LocalStore(GOLDEN / "klt")).read()
    codec = Klt(old.geometry, old.config, golden_profile())
    for index, span in enumerate(spans_of(50, 32)):
        assert codec.encode(gather(*golden_kv(), span), span) == [part[index] for part in old.parts]
    assert codec.side_bytes() == old.side


@pytest.mark.parametrize(("name", "features"), [
    ("identity", ()), ("identity-sinks", ("sinks",)), ("klt", ("klt",)), ("klt-tables", ("klt", "klt-tables")),
    ("klt-sinks", ("klt", "klt-tables", "sinks")),
], ids=str)  # fmt: skip
def test_what_older_readers_do_not_know_is_a_required_feature(name: str, features: tuple[str, ...]) -> None:
    data = (GOLDEN / name / "cachegen.json").read_bytes()
    assert loads(data).required == features
    for left_out in features:
        with pytest.raises(UnsupportedFormatError, match=left_out):
            loads(data, features=set(features) - {left_out})


def test_a_profile_is_written_to_the_same_bytes() -> None:
    assert golden_profile().to_bytes() == (GOLDEN / "klt" / PROFILE_FILE).read_bytes()
    assert Profile.load(GOLDEN / "klt").digest == golden_profile().digest


def test_the_codebook_file_is_what_its_program_makes() -> None:
    stored = load_file(Path(tables.__file__).with_name("codebook.safetensors"))
    made = codebook.codebooks()
    assert stored.keys() == made.keys()
    for name, frequencies in stored.items():
        assert int((frequencies - made[name]).abs().max()) <= 1  # the last bit of exp() is the machine's own


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
def test_the_page_says_what_the_code_does(pattern: str, value: int | str) -> None:
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
        artifact = open_with_profile(LocalStore(GOLDEN / case))
        lines = [
            digest([x for side in artifact.decode(level) for x in side]) for level in range(1, artifact.levels + 1)
        ]
        (GOLDEN / f"{case}.digests").write_text("\n".join(lines) + "\n")
