"""A small artifact of every kind of file, for the tests of the container and the stores."""

from __future__ import annotations

from pathlib import Path

from hf_cachegen.artifact import Manifest, Reader, Store, pack_input_ids, write_artifact
from hf_cachegen.errors import ArtifactNotFoundError
from hf_cachegen.stores import LocalStore

MANIFEST = Manifest(geometry={"layers": 2}, codec={"step": 0.5}, chunks=((0, 3), (3, 2)), writer="test")
INPUT_IDS = [5, 0, 7, 2**40, 1]
SEGMENTS = [
    ("base.safetensors", "side", b"side information"),
    ("base.safetensors", "chunk-00000", bytes(range(100))),
    ("refine-1.safetensors", "chunk-00000", b"first refinement"),
    ("refine-2.safetensors", "chunk-00000", b""),
    ("base.safetensors", "chunk-00001", bytes(range(100, 160))),
    ("refine-1.safetensors", "chunk-00001", b"more of it"),
    ("refine-2.safetensors", "chunk-00001", b"the second"),
    ("tokens.safetensors", "input_ids", pack_input_ids(INPUT_IDS)),
]
FILES = {"cachegen.json", *(file for file, _, _ in SEGMENTS)}


class MemoryStore(Store):
    """A store over a dict. It returns the given bytes, valid or not."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files

    def size(self, name: str) -> int:
        if name not in self.files:
            raise ArtifactNotFoundError(name)
        return len(self.files[name])

    def read(self, name: str, offset: int, length: int, xxh3: str | None = None) -> bytes:
        return self.files[name][offset : offset + length]


def write(directory: Path, **options: bool) -> Manifest:
    """Write the artifact."""
    return write_artifact(directory, MANIFEST, SEGMENTS, **options)


def killed_between_renames(folder: Path) -> None:
    """Leave of an artifact what a writer leaves that is killed before it renames a file."""
    for path in list(folder.iterdir()):
        path.rename(folder / f".{path.name}.partial")


def contents(directory: Path) -> dict[str, bytes]:
    """Return every file of the directory, hidden ones included."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def read_all(directory: Path) -> list[tuple[str, str, bytes]]:
    """Return all segments as (file, name, bytes), in the manifest's order."""
    reader = Reader(LocalStore(directory))
    return [(segment.file, segment.name, reader.read(segment)) for segment in reader.manifest.segments]
