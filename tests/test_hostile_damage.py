"""Damaged artifacts: `verify` and every reader find every flipped bit and every missing byte."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from hf_cachegen.artifact import Reader
from hf_cachegen.artifact.manifest import loads
from hf_cachegen.errors import ArtifactNotFoundError, CorruptError, ManifestError, TruncatedError
from hf_cachegen.stores import LocalStore
from tests.small_artifact import FILES, SEGMENTS, MemoryStore, contents, read_all, write


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    directory = tmp_path_factory.mktemp("artifact")
    write(directory)
    return contents(directory)


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_every_flipped_bit_of_the_manifest_is_found(artifact: dict[str, bytes]) -> None:
    data = artifact["cachegen.json"]
    for bit in range(8 * len(data)):
        with pytest.raises(ManifestError):
            loads(flipped(data, bit))


@pytest.mark.parametrize("file", sorted(FILES - {"cachegen.json"}))
def test_verify_and_readers_find_every_flipped_bit_of_a_file(
    artifact: dict[str, bytes], file: str
) -> None:
    for bit in range(8 * len(artifact[file])):
        store = MemoryStore({**artifact, file: flipped(artifact[file], bit)})
        with pytest.raises(CorruptError, match=file):
            Reader(store).verify()
        with pytest.raises(CorruptError, match=file):
            read_whole(Reader(store), file)


def read_whole(reader: Reader, file: str) -> None:
    for segment in reader.manifest.files[file].segments:
        reader.read(segment)


def test_every_truncation_of_the_manifest_is_found(artifact: dict[str, bytes]) -> None:
    data = artifact["cachegen.json"]
    for length in range(len(data)):
        with pytest.raises(ManifestError):
            Reader(MemoryStore({**artifact, "cachegen.json": data[:length]}))


@pytest.mark.parametrize("file", sorted(FILES - {"cachegen.json"}))
def test_every_truncation_of_a_file_is_found(artifact: dict[str, bytes], tmp_path: Path, file: str) -> None:
    for name, data in artifact.items():
        (tmp_path / name).write_bytes(data)
    reader = Reader(LocalStore(tmp_path))
    for length in range(len(artifact[file]) - 1, -1, -1):
        (tmp_path / file).write_bytes(artifact[file][:length])
        with pytest.raises(TruncatedError, match=file):
            reader.verify()
        with pytest.raises(TruncatedError, match=file):
            read_whole(Reader(LocalStore(tmp_path)), file)


@pytest.mark.parametrize("file", sorted(FILES))
def test_an_additional_byte_is_found(artifact: dict[str, bytes], file: str) -> None:
    with pytest.raises(ManifestError if file == "cachegen.json" else CorruptError):
        Reader(MemoryStore({**artifact, file: artifact[file] + b"\0"})).verify()


@pytest.mark.slow
def test_ten_thousand_random_bits_of_the_segments_are_found(artifact: dict[str, bytes]) -> None:
    choose = random.Random(20240804)
    segments = [s for s in Reader(MemoryStore(artifact)).manifest.segments if s.length]
    for _ in range(10_000):
        segment = choose.choice(segments)
        bit = 8 * segment.offset + choose.randrange(8 * segment.length)
        reader = Reader(MemoryStore({**artifact, segment.file: flipped(artifact[segment.file], bit)}))
        with pytest.raises(CorruptError, match=segment.name):
            reader.read(segment)


def test_segments_of_another_artifact_are_found(artifact: dict[str, bytes]) -> None:
    """Equal sizes and headers, other content: one file is from a second artifact of the same shape."""
    other = artifact["base.safetensors"][:-1] + b"?"
    with pytest.raises(CorruptError, match="chunk-00001"):
        Reader(MemoryStore({**artifact, "base.safetensors": other})).verify()


@pytest.mark.parametrize("file", sorted(FILES - {"cachegen.json"}))
def test_a_missing_file_is_found(artifact: dict[str, bytes], file: str) -> None:
    reader = Reader(MemoryStore({name: data for name, data in artifact.items() if name != file}))
    with pytest.raises(ManifestError, match=rf"{file} is listed .* missing"):
        reader.verify()


def test_a_missing_manifest_is_a_missing_artifact(artifact: dict[str, bytes]) -> None:
    with pytest.raises(ArtifactNotFoundError):
        Reader(MemoryStore({name: data for name, data in artifact.items() if name != "cachegen.json"}))


def test_a_file_that_shrinks_after_the_check_is_found(tmp_path: Path) -> None:
    write(tmp_path)
    reader = Reader(LocalStore(tmp_path))
    side, *_, last = reader.manifest.files["base.safetensors"].segments
    reader.read(side)
    with (tmp_path / "base.safetensors").open("r+b") as file:
        file.truncate(last.offset + 1)
    with pytest.raises(TruncatedError):
        reader.read(last)


def test_an_overwritten_artifact_is_not_mixed_with_the_old_one(tmp_path: Path) -> None:
    write(tmp_path)
    reader = Reader(LocalStore(tmp_path))
    changed = tmp_path / "changed"
    write(changed)
    (changed / "base.safetensors").replace(tmp_path / "base.safetensors")
    assert reader.verify()  # the same bytes are the same artifact
    data = bytearray((tmp_path / "base.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "base.safetensors").write_bytes(data)
    with pytest.raises(CorruptError):
        reader.read(reader.manifest.segments[2])


class WrongServer(MemoryStore):
    """A server that ignores the range and sends the whole file, or sends nothing."""

    def __init__(self, files: dict[str, bytes], whole: bool) -> None:
        super().__init__(files)
        self.whole = whole

    def read(self, name: str, offset: int, length: int, xxh3: str | None = None) -> bytes:
        return self.files[name] if self.whole else b""


def test_a_server_that_ignores_ranges(artifact: dict[str, bytes]) -> None:
    with pytest.raises(CorruptError, match="the header"):
        Reader(WrongServer(artifact, whole=True)).verify()


def test_a_server_that_sends_nothing(artifact: dict[str, bytes]) -> None:
    reader = Reader(MemoryStore(artifact))
    reader.store = WrongServer(artifact, whole=False)
    with pytest.raises(TruncatedError, match="the header has 0"):
        reader.verify()


def test_the_small_artifact_is_valid(tmp_path: Path) -> None:
    """The artifact that the tests above damage is valid."""
    write(tmp_path)
    assert sorted(read_all(tmp_path)) == sorted(SEGMENTS)
