"""The container: artifacts are read back as written; equal content gives equal bytes; a write is complete or absent."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from hf_cachegen.artifact import (
    Limits,
    Manifest,
    Reader,
    artifact_sizes,
    chunk_name,
    nbytes_at,
    pack_input_ids,
    write_artifact,
)
from hf_cachegen.artifact.manifest import dumps, loads
from hf_cachegen.errors import (
    LevelError,
    LimitError,
    ManifestError,
    TensorError,
)
from hf_cachegen.stores import LocalStore
from tests.small_artifact import FILES, INPUT_IDS, MANIFEST, SEGMENTS, contents, read_all, write

LENGTHS = [(file, name, len(data)) for file, name, data in SEGMENTS]


# Round trips.


def test_segments_and_manifest_round_trip(tmp_path: Path) -> None:
    written = write(tmp_path / "new" / "directory")
    reader = Reader(LocalStore(tmp_path / "new" / "directory"))
    assert reader.manifest == written
    assert sorted(read_all(tmp_path / "new" / "directory")) == sorted(SEGMENTS)
    assert reader.input_ids() == INPUT_IDS
    assert (reader.manifest.tokens, reader.manifest.levels) == (5, 3)
    assert set(contents(tmp_path / "new" / "directory")) == FILES


def test_an_artifact_may_have_no_tokens_and_no_refinements(tmp_path: Path) -> None:
    write_artifact(tmp_path, replace(MANIFEST, chunks=((0, 9),)), [("base.safetensors", "chunk-00000", b"")])
    reader = Reader(LocalStore(tmp_path))
    assert (reader.input_ids(), reader.manifest.levels) == (None, 1)
    assert reader.verify() == reader.nbytes_at()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63) + 1, 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abcé\"\\/", max_size=4), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
json_objects = st.dictionaries(st.text("xyz\n\x7f", max_size=4), json_values, max_size=3)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_artifact_round_trips_and_has_the_computed_sizes(data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(1, 1000), min_size=1, max_size=4))
    manifest = Manifest(
        geometry=data.draw(json_objects),
        codec=data.draw(json_objects),
        chunks=tuple((sum(counts[:i]), count) for i, count in enumerate(counts)),
        fingerprint=data.draw(st.none() | json_objects),
        report=data.draw(json_objects),
        extra=data.draw(json_objects),
        writer=data.draw(st.text("abc 0.1", max_size=9)),
    )
    parts = ["base.safetensors", "refine-1.safetensors", "refine-2.safetensors"][: data.draw(st.integers(1, 3))]
    segments = [(p, chunk_name(i), data.draw(st.binary(max_size=99))) for i in range(len(counts)) for p in parts]
    segments.append(("tokens.safetensors", "input_ids", pack_input_ids(data.draw(st.lists(st.integers(0, 2**63 - 1))))))
    with tempfile.TemporaryDirectory() as directory:
        written = write_artifact(directory, manifest, segments)
        reader = Reader(LocalStore(directory))
        assert reader.manifest == written == replace(manifest, files=written.files)
        assert sorted(read_all(Path(directory))) == sorted(segments)
        sizes = {name: len(content) for name, content in contents(Path(directory)).items()}
        assert artifact_sizes(manifest, [(f, n, len(b)) for f, n, b in segments]) == sizes == reader.sizes
        assert reader.verify() == sum(sizes.values())
        assert dumps(loads(dumps(written))) == dumps(written)


def test_the_same_content_gives_the_same_bytes_however_it_is_streamed(tmp_path: Path) -> None:
    write(tmp_path / "a")
    shuffled = replace(MANIFEST, codec=dict(reversed({**MANIFEST.codec, "a": 1}.items())))
    write_artifact(tmp_path / "b", shuffled, sorted(SEGMENTS, key=lambda s: s[0], reverse=True))
    first, second = contents(tmp_path / "a"), contents(tmp_path / "b")
    for name in FILES - {"cachegen.json"}:
        assert first[name] == second[name]
    write(tmp_path / "c")
    assert contents(tmp_path / "c") == first


def test_the_bytes_of_version_1_do_not_change(tmp_path: Path) -> None:
    write_artifact(
        tmp_path,
        Manifest(geometry={}, codec={"é": [1, 2.5]}, chunks=((0, 2),)),
        [("base.safetensors", "chunk-00000", b"abc"), ("tokens.safetensors", "input_ids", pack_input_ids([1, 258]))],
    )
    header = b'{"chunk-00000":{"data_offsets":[0,3],"dtype":"U8","shape":[3]}}'
    assert (tmp_path / "base.safetensors").read_bytes() == b"\x40\0\0\0\0\0\0\0" + header + b" " + b"abc"
    header = b'{"input_ids":{"data_offsets":[0,16],"dtype":"I64","shape":[1,2]}}'
    ids = b"\1\0\0\0\0\0\0\0\2\1\0\0\0\0\0\0"
    assert (tmp_path / "tokens.safetensors").read_bytes() == b"\x48\0\0\0\0\0\0\0" + header + b" " * 7 + ids
    assert (tmp_path / "cachegen.json").read_text(encoding="utf-8") == (
        '{\n"chunks":[[0,2]],\n"codec":{"é":[1,2.5]},\n"extra":{},\n'
        '"files":{"base.safetensors":{"header_xxh3":"8243d07b0a04e074c2e4cc14cccf092b","segments":'
        '[["chunk-00000",72,3,"06b05ab6733a618578af5f94892f3950"]],"size":75},'
        '"tokens.safetensors":{"header_xxh3":"f4dea3b5b64671936f75adc61a2fdff7","segments":'
        '[["input_ids",80,16,"43738ce55964d4d22992c0497267f901"]],"size":96}},\n'
        '"fingerprint":null,\n"format_version":1,\n"geometry":{},\n"report":{},\n"required":[],\n"writer":"",\n'
        '"xxh3":"87c078d7e5992355d391c6cfb74565a9"\n}\n'
    )


def test_the_safetensors_library_reads_every_file(tmp_path: Path) -> None:
    write(tmp_path)
    wanted = {(file, name): data for file, name, data in SEGMENTS}
    for file in FILES - {"cachegen.json"}:
        with safe_open(tmp_path / file, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no mapping)
                tensor = tensors.get_tensor(name)
                tokens = file == "tokens.safetensors"
                assert tensor.shape == ((1, len(INPUT_IDS)) if tokens else (len(wanted[file, name]),))
                assert str(tensor.dtype) == ("int64" if tokens else "uint8")
                assert tensor.tobytes() == wanted.pop((file, name))
    assert not wanted


# Sizes and levels.


def test_a_level_counts_the_files_that_its_loader_fetches(tmp_path: Path) -> None:
    write(tmp_path)
    sizes, reader = artifact_sizes(MANIFEST, LENGTHS), Reader(LocalStore(tmp_path))
    on_disk = {name: len(content) for name, content in contents(tmp_path).items()}
    assert sizes == on_disk
    coarsest = sum(on_disk[name] for name in ("cachegen.json", "base.safetensors", "tokens.safetensors"))
    assert nbytes_at(sizes, 1) == reader.nbytes_at(1) == coarsest
    assert nbytes_at(sizes, 2) == reader.nbytes_at(2) == coarsest + on_disk["refine-1.safetensors"]
    assert nbytes_at(sizes, 3) == nbytes_at(sizes) == reader.nbytes_at() == sum(on_disk.values())


@pytest.mark.parametrize("level", [0, 4, -1])
def test_a_missing_level_is_an_error(tmp_path: Path, level: int) -> None:
    write(tmp_path)
    with pytest.raises(LevelError, match="from 1 to 3"):
        Reader(LocalStore(tmp_path)).verify(level)


def test_a_coarse_level_needs_no_refinement_files(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "refine-1.safetensors").unlink()
    (tmp_path / "refine-2.safetensors").unlink()
    reader = Reader(LocalStore(tmp_path))
    assert reader.verify(level=1) == reader.nbytes_at(1)
    with pytest.raises(ManifestError, match=r"refine-1.safetensors is listed"):
        reader.verify(level=2)


def test_verify_reports_its_progress(tmp_path: Path) -> None:
    write(tmp_path)
    steps: list[tuple[int, int]] = []
    reader = Reader(LocalStore(tmp_path))
    total = reader.verify(progress=lambda done, all_bytes: steps.append((done, all_bytes)))
    assert steps == sorted(steps)
    assert steps[-1] == (total, total) == (reader.nbytes_at(), reader.nbytes_at())


def test_many_threads_read_one_reader(tmp_path: Path) -> None:
    write(tmp_path)
    reader = Reader(LocalStore(tmp_path))
    wanted = {(file, name): data for file, name, data in SEGMENTS}
    jobs = list(reader.manifest.segments) * 50
    with ThreadPoolExecutor(8) as pool:
        for segment, data in zip(jobs, pool.map(reader.read, jobs), strict=True):
            assert data == wanted[segment.file, segment.name]


def test_memory_holds_one_segment_at_a_time(tmp_path: Path) -> None:
    length, count = 1 << 20, 24
    manifest = replace(MANIFEST, chunks=tuple((i, 1) for i in range(count)))
    tracemalloc.start()
    try:
        write_artifact(tmp_path, manifest, (("base.safetensors", chunk_name(i), bytes(length)) for i in range(count)))
        Reader(LocalStore(tmp_path)).verify()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * length  # of 24


def test_the_container_imports_neither_torch_nor_numpy() -> None:
    unwanted = "{'torch', 'numpy', 'transformers', 'pickle'}"
    code = f"import sys, hf_cachegen.artifact; print(sorted({unwanted} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# Input that the writer refuses.


def write_base(directory: Path, manifest: Manifest, **options: Limits) -> None:
    write_artifact(directory, manifest, [row for row in SEGMENTS if row[0] == "base.safetensors"], **options)


@pytest.mark.parametrize(
    "manifest",
    [
        replace(MANIFEST, report={"error": float("nan")}),
        replace(MANIFEST, extra={"object": object()}),
        replace(MANIFEST, extra={"text": "\ud800"}),
        replace(MANIFEST, extra={"big": 10**19}),
        replace(MANIFEST, extra={1: "a", "1": "b"}),
        replace(MANIFEST, geometry=[]),
        replace(MANIFEST, chunks=((0, 3),)),
        replace(MANIFEST, chunks=((0, 3), (4, 1))),
        replace(MANIFEST, chunks=()),
    ],
    ids=["nan", "object", "surrogate", "big-integer", "key-types", "geometry", "chunk-count", "chunk-gap", "no-chunks"],
)
def test_an_unreadable_manifest_is_not_written(tmp_path: Path, manifest: Manifest) -> None:
    with pytest.raises(ManifestError):
        write_base(tmp_path / "new", manifest)
    assert not list(tmp_path.iterdir())


def test_artifacts_above_the_limits_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(LimitError):
        write_base(tmp_path / "new", replace(MANIFEST, extra={"text": "x" * (1 << 20)}))
    with pytest.raises(LimitError):
        write_base(tmp_path / "new", MANIFEST, limits=Limits(max_tokens=4))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("file", ["../base.safetensors", "cachegen.json", "Base.safetensors", "", "a/b.safetensors"])
def test_an_invalid_file_name_is_refused(tmp_path: Path, file: str) -> None:
    with pytest.raises(ManifestError):
        write_artifact(tmp_path / "new", MANIFEST, [*SEGMENTS, (file, "x", b"")])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "ids", [[-1], [2**63], [1.5], ["1"], [None]], ids=["negative", "2^63", "float", "string", "none"]
)
def test_invalid_token_ids_are_refused(ids: list[int]) -> None:
    with pytest.raises(TensorError):
        pack_input_ids(ids)
